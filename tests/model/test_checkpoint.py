from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from medllava.conversation import Turn
from medllava.errors import CheckpointError
from medllava.model import checkpoint
from medllava.model.__main__ import main
from medllava.model.answerer import Answerer
from medllava.model.manifest import Manifest, read_manifest
from medllava.model.tiny import tiny_checkpoint

IMAGES = [Image.effect_noise((60 + 30 * number, 96), 80).convert("RGB") for number in range(5)]
PROMPTS = ["Where is the gland?", "How many findings?", "What is here?", "Is there necrosis?", "Box."]


def answers(path: Path) -> list[str]:
    answerer = Answerer.load(path, device="cpu")
    questions = [([image], [Turn(role="user", text=text)]) for image, text in zip(IMAGES, PROMPTS, strict=True)]
    return [completion.text for completion in answerer.answer_batch(questions, max_new_tokens=24)]


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def test_stock_classes_open_a_full_folder_and_agree(tiny: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(tiny)
    processor = AutoProcessor.from_pretrained(tiny)
    content = [{"type": "image"}, {"type": "text", "text": PROMPTS[0]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=IMAGES[0], text=text, return_tensors="pt", add_special_tokens=False)
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(ids, skip_special_tokens=True).strip() == answers(tiny)[0]


def test_a_plain_hugging_face_folder_is_accepted(tiny: Path, tmp_path: Path) -> None:
    plain = copy(tiny, tmp_path / "01")
    (plain / "medllava.json").unlink()
    manifest = checkpoint.describe(plain)
    assert (manifest.kind, manifest.chat_format) == ("full", "template")
    assert (manifest.image_size, manifest.padding) == (96, "square")
    assert answers(plain) == answers(tiny)


def test_adapter_merged_and_exported_give_the_same_tokens(lora: Path, tiny: Path, tmp_path: Path) -> None:
    expected = answers(lora)
    assert expected != answers(tiny)
    loaded = checkpoint.load(lora, device="cpu", merge=False)
    unmerged = Answerer(loaded, "unmerged")
    questions = [([image], [Turn(role="user", text=text)]) for image, text in zip(IMAGES, PROMPTS, strict=True)]
    assert [completion.text for completion in unmerged.answer_batch(questions, max_new_tokens=24)] == expected
    assert main(["merge", str(lora), str(tmp_path / "merged")]) == 0
    assert main(["export", str(tmp_path / "merged"), str(tmp_path / "exported")]) == 0
    assert answers(tmp_path / "merged") == expected
    assert answers(tmp_path / "exported") == expected
    assert checkpoint.describe(tmp_path / "merged").kind == "full"


def test_kind_and_base_come_from_files_not_names(lora: Path, projector: Path, tiny: Path, tmp_path: Path) -> None:
    expected = answers(lora), answers(projector)
    assert answers(projector) != answers(tiny)
    moved = tmp_path / "elsewhere"
    copy(tiny, moved / tiny.name)
    # Adapters and base moved together: the manifest's relative path still holds, whatever the folder is called.
    assert answers(copy(lora, moved / "00")) == expected[0]
    assert answers(copy(projector, moved / "full-model")) == expected[1]


def test_a_missing_base_is_told(lora: Path, tmp_path: Path) -> None:
    alone = copy(lora, tmp_path / "alone")
    with pytest.raises(CheckpointError, match="its base model is not at"):
        checkpoint.load(alone)


@pytest.mark.parametrize("name", ["projector.safetensors", "adapter_model.safetensors", "adapter_config.json"])
def test_a_lora_folder_without_one_of_its_files(
    lora: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = copy(lora, tmp_path / "broken")
    (broken / name).unlink()
    monkeypatch.setattr(checkpoint, "_load_full", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        checkpoint.load(broken)


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["stray"] = tensors.pop(sorted(tensors)[0])


def widen(tensors: dict[str, torch.Tensor]) -> None:
    name = sorted(tensors)[0]
    tensors[name] = torch.zeros(7, *tensors[name].shape[1:])


@pytest.mark.parametrize("file", ["model", "projector", "adapter_model"])
def test_tensors_that_do_not_match_stop_the_load_and_are_named(
    tiny: Path, lora: Path, tmp_path: Path, file: str
) -> None:
    copy(tiny, tmp_path / tiny.name)
    broken = tmp_path / tiny.name if file == "model" else copy(lora, tmp_path / lora.name)
    path = broken / f"{file}.safetensors"
    whole = path.read_bytes()
    first = sorted(load_file(path))[0]

    edit(path, lambda tensors: tensors.pop(first))
    with pytest.raises(CheckpointError, match="missing "):
        checkpoint.load(broken)
    path.write_bytes(whole)
    edit(path, rename)
    with pytest.raises(CheckpointError, match="unexpected .*stray"):
        checkpoint.load(broken)
    path.write_bytes(whole)
    edit(path, widen)
    with pytest.raises(CheckpointError, match=r"mis-shaped .*\(7"):
        checkpoint.load(broken)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged or cut off"):
        checkpoint.load(broken)


def test_a_projector_of_another_width_is_told_before_the_base_is_loaded(
    projector: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(tiny, tmp_path / tiny.name)
    other = copy(projector, tmp_path / "other")
    edit(other / "projector.safetensors", lambda tensors: tensors.update({"linear_1.weight": torch.zeros(128, 64)}))
    monkeypatch.setattr(checkpoint, "_load_full", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(CheckpointError, match="64 -> 128 features, but its base .* needs 96 -> 96"):
        checkpoint.load(other)


def test_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"looked for medllava.json .* and config.json"):
        checkpoint.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="model_type is 'llama', expected 'llava'"):
        checkpoint.load(tmp_path)
    (tmp_path / "medllava.json").write_text('{"kind": "whole"}')
    with pytest.raises(CheckpointError, match="not a medllava manifest: kind"):
        checkpoint.load(tmp_path)


def test_a_generation_config_that_cannot_be_saved_is_mended(tiny: Path, tmp_path: Path) -> None:
    vicuna = copy(tiny, tmp_path / "vicuna")
    config = json.loads((vicuna / "generation_config.json").read_text())
    (vicuna / "generation_config.json").write_text(json.dumps(config | {"temperature": 0.9, "top_p": 0.6}))
    loaded = checkpoint.load(vicuna)
    checkpoint.save_full(tmp_path / "again", loaded.model, loaded.processor, chat_format="medllava")
    assert answers(tmp_path / "again") == answers(tiny)


def test_saving_into_a_folder_with_other_files_keeps_them(tiny: Path, tmp_path: Path) -> None:
    loaded = checkpoint.load(tiny)
    run = tmp_path / "run"
    run.mkdir()
    (run / "train_log.jsonl").write_text("{}\n")
    checkpoint.save_full(run, loaded.model, loaded.processor, chat_format="medllava", training_mpp=0.5)
    assert (run / "train_log.jsonl").is_file()
    assert read_manifest(run) == checkpoint.describe(run)
    assert checkpoint.describe(run).training_mpp == 0.5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_save_that_fails_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = checkpoint.load(tiny)

    def full(*_: object) -> None:
        raise OSError(28, "full")

    monkeypatch.setattr(type(loaded.processor), "save_pretrained", full)
    with pytest.raises(OSError, match="full"):
        checkpoint.save_full(tmp_path / "out", loaded.model, loaded.processor, chat_format="medllava")
    assert list(tmp_path.iterdir()) == []


def test_manifest_keeps_what_it_is_told(tiny: Path) -> None:
    manifest = read_manifest(tiny)
    assert manifest is not None
    assert Manifest.model_validate(manifest.model_dump(mode="json")) == manifest
    assert manifest.versions["torch"] == torch.__version__


def test_commands(tiny: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(lora)]) == 0
    shown = capsys.readouterr().out
    assert "kind lora" in shown
    assert "18,624 parameters" in shown
    assert "projector.safetensors" in shown
    with pytest.raises(CheckpointError, match="already exists"):
        main(["merge", str(lora), str(tiny)])
    with pytest.raises(CheckpointError, match="expected an original LLaVA folder"):
        main(["convert", str(tmp_path), str(tmp_path / "out")])


def test_another_tower_of_the_same_shape_is_refused(tiny: Path, lora: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path / "other", seed=7)
    with pytest.raises(CheckpointError, match="was trained on another vision tower than that of .*other"):
        checkpoint.load(lora, device="cpu", base=other)
    half = checkpoint.load(tiny, device="cpu", dtype="float16")
    checkpoint.save_full(tmp_path / "half", half.model, half.processor, chat_format="medllava")
    assert checkpoint.load(lora, device="cpu", base=tmp_path / "half").manifest.kind == "lora"
