"""What is wrong with a folder is told in one line before any weight is read; what was written is proved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from medllava.conversation import Turn
from medllava.errors import CheckpointError, run_cli
from medllava.jsonl import write_json
from medllava.model import __main__ as commands
from medllava.model import checkpoint, same
from medllava.model.answerer import Answerer

KINDS = ("tiny", "projector", "lora")
PICTURE = Image.linear_gradient("L").convert("RGB")


@pytest.fixture
def folder(tiny: Path, projector: Path, lora: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a checkpoint of that kind, beside a copy of its base."""
    sources = dict(zip(KINDS, (tiny, projector, lora), strict=True))

    def copied(kind: str) -> Path:
        shutil.copytree(tiny, tmp_path / tiny.name, dirs_exist_ok=True)
        return Path(shutil.copytree(sources[kind], tmp_path / sources[kind].name, dirs_exist_ok=True))

    return copied


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_load_full", lambda *_: pytest.fail("weights were read"))


def refused(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as told:
        checkpoint.load(path, device="cpu")
    assert "\n" not in str(told.value)


def sharded(path: Path) -> list[Path]:
    """Weights of a full folder in several files."""
    loaded = checkpoint.load(path, device="cpu")
    (path / "model.safetensors").unlink()
    loaded.model.save_pretrained(path, max_shard_size="200KB")
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 2
    return shards


def answer(path: Path) -> str:
    return Answerer.load(path, device="cpu").answer([PICTURE], [Turn(role="user", text="Where?")]).text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_missing_tokenizer_or_processor_file(kind: str, file: str, folder: Any, no_weights: None) -> None:
    path = folder(kind)
    (path / file).unlink()
    refused(path, "tokenizer.json" if file == "tokenizer.json" else f"{file} is missing")


@pytest.mark.parametrize(("kind", "file"), [
    ("tiny", "model.safetensors"), ("projector", "projector.safetensors"), ("lora", "projector.safetensors"),
    ("lora", "adapter_model.safetensors"),
])
@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.999])
def test_a_file_that_was_cut_off(kind: str, file: str, part: float, folder: Any, no_weights: None) -> None:
    path = folder(kind)
    whole = (path / file).read_bytes()
    (path / file).write_bytes(whole[: int(part * len(whole))])
    refused(path, f"{file}: damaged or cut off")


def test_one_shard_cut_off_or_gone_also_of_the_base(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters, base = folder("lora"), folder("tiny")
    expected = answer(adapters)
    shards = sharded(base)
    assert answer(adapters) == expected
    monkeypatch.setattr(checkpoint, "_load_full", lambda *_: pytest.fail("weights were read"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-7])
    refused(base, f"{shards[1].name}: damaged or cut off")
    refused(adapters, f"{shards[1].name}: damaged or cut off")
    shards[1].unlink()
    refused(adapters, f"weight file {shards[1].name} is missing")
    shards[1].write_bytes(whole)
    tensors = load_file(shards[1])
    gone = sorted(tensors)[0]
    del tensors[gone]
    save_file(tensors, shards[1], metadata={"format": "pt"})
    refused(base, f"index.json: .*missing {gone}")


def test_widths_that_do_not_fit_the_config(folder: Any, no_weights: None) -> None:
    path = folder("tiny")
    tensors = load_file(path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("multi_modal_projector.linear_1.weight"))
    tensors[name] = torch.zeros(96, 48)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    refused(path, r"mis-shaped .*linear_1.weight \(file \(96, 48\), config.json \(96, 96\)\)")


@pytest.mark.parametrize("kind", ["projector", "lora"])
def test_a_projector_or_adapter_of_another_shape(kind: str, folder: Any, no_weights: None) -> None:
    path = folder(kind)
    tensors = load_file(path / "projector.safetensors")
    narrow = {**tensors, "linear_2.weight": torch.zeros(48, 96)}
    save_file(narrow, path / "projector.safetensors")
    refused(path, r"mis-shaped linear_2.weight \(file \(48, 96\), model \(96, 96\)\)")
    save_file(tensors, path / "projector.safetensors")
    if kind == "lora":
        config = json.loads((path / "adapter_config.json").read_text())
        write_json(path / "adapter_config.json", config | {"r": 5})
        refused(path, r"adapter_model.safetensors: .*mis-shaped .*lora_A.weight \(file \(4, 96\), model \(5, 96\)\)")


def test_generation_settings_that_no_save_accepts(folder: Any, no_weights: None) -> None:
    adapters, base = folder("lora"), folder("tiny")
    config = json.loads((base / "generation_config.json").read_text())
    write_json(base / "generation_config.json", config | {"max_new_tokens": -1})
    refused(base, "generation_config.json: a model with these settings cannot be saved again .*max_new_tokens")
    refused(adapters, "generation_config.json: a model with these settings cannot be saved again")


@pytest.mark.parametrize("kind", KINDS)
def test_renaming_and_moving_change_nothing(kind: str, folder: Any, tmp_path: Path) -> None:
    path = folder(kind)
    expected = answer(path)
    for name in ("llava-lora-full", "v1.5-projector", "01 (copy)"):
        path = path.rename(path.with_name(name))
        assert answer(path) == expected, name
        assert checkpoint.describe(path).kind == ("full" if kind == "tiny" else kind)
    # Base and adapters moved together, deeper and elsewhere.
    if kind != "tiny":
        deeper = tmp_path.parent / f"elsewhere-{kind}" / "deeper"
        deeper.mkdir(parents=True)
        for each in tmp_path.iterdir():
            shutil.move(each, deeper)
        assert answer(deeper / path.name) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_export_prove_themselves(
    kind: str, folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(kind)
    wanted = same.trace(checkpoint.load(path, device="cpu", merge=False))
    assert len(wanted.tokens) == 32
    assert commands.main(["merge", str(path), str(tmp_path / "merged")]) == 0
    assert "the same greedy tokens" in capsys.readouterr().out
    assert commands.main(["export", str(tmp_path / "merged"), str(tmp_path / "exported")]) == 0
    for name in ("merged", "exported"):
        found = same.trace(checkpoint.load(tmp_path / name, device="cpu"))
        assert found.tokens == wanted.tokens
        assert torch.allclose(found.logits, wanted.logits, atol=1e-4)


def test_a_merge_that_is_not_the_same_is_removed(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder("lora")
    real = checkpoint.save_full

    def forgetful(target: Path, model: Any, *given: Any, **named: Any) -> None:
        with torch.no_grad():
            model.model.multi_modal_projector.linear_2.bias.add_(3.0)
        real(target, model, *given, **named)

    monkeypatch.setattr(checkpoint, "save_full", forgetful)
    assert run_cli(lambda: commands.main(["merge", str(path), str(tmp_path / "merged")])) == 1
    assert "does not compute what" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_what_differs_is_said(tiny: Path) -> None:
    found = same.trace(checkpoint.load(tiny, device="cpu"))
    assert same.check_same(found, found) == 0.0
    tokens = [*found.tokens[:4], found.tokens[4] + 1, *found.tokens[5:]]
    other = same.Trace(found.prompt, found.pixels, tokens, found.logits)
    with pytest.raises(CheckpointError, match="greedy token 5 of 32 differs"):
        same.check_same(found, other)
    with pytest.raises(CheckpointError, match="logits differ by up to"):
        same.check_same(found, same.Trace(found.prompt, found.pixels, found.tokens, found.logits * 1.1))
    with pytest.raises(CheckpointError, match="logits differ"):
        same.check_same(found, same.Trace(found.prompt, found.pixels, found.tokens, found.logits * torch.nan))
    with pytest.raises(CheckpointError, match="other token ids"):
        same.check_same(found, same.Trace(found.prompt[1:], found.pixels, found.tokens, found.logits))


@pytest.mark.parametrize("kind", KINDS)
def test_every_checkpoint_has_a_model_card(kind: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(kind)
    text = (path / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    told = yaml.safe_load(header)
    assert told["pipeline_tag"] == "image-text-to-text"
    assert told["library_name"] == ("peft" if kind == "lora" else "transformers")
    assert "base_model" not in told  # a folder's path means nothing on the hub
    assert "Not meant for" in body
    assert "diagnosis" in body


def test_the_card_tells_base_data_recipe_and_figures(tiny: Path, tmp_path: Path) -> None:
    loaded = checkpoint.load(tiny, device="cpu")
    checkpoint.save_projector(
        tmp_path / "out", loaded.model, loaded.processor, base="org/base-7b", chat_format="vicuna_v1",
        data_sha256="ab" * 32, recipe={"stage": "projector", "optim": {"learning_rate": 0.001}},
        figures={"step": 200, "loss": 1.25, "eval_loss": 1.5},
    )
    text = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "org/base-7b"
    for told in ("`org/base-7b`", "ab" * 32, "| eval loss | 1.5 |", "learning_rate: 0.001", "`vicuna_v1`", "torch 2"):
        assert told in text
