"""Original LLaVA folders, made here in their layout, against the conversion. The numbers of real ones: test_parity."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionModel, LlamaForCausalLM

from medllava.errors import CheckpointError
from medllava.model import checkpoint, tiny
from medllava.model.__main__ import main
from medllava.model.convert import convert
from medllava.model.pixels import pixel_values

VISION = tiny.VisionSizes(image_size=48, hidden_size=32, intermediate_size=64, layers=2, heads=2)
TEXT = tiny.TextSizes(hidden_size=48, intermediate_size=64, layers=2)


class Original:
    """A folder each of an image encoder, a language model, and the three kinds of LLaVA checkpoint made of them."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.tokenizer = tiny.build_tokenizer(["a gland in the upper left"], tiny.TokenizerSizes(vocab_size=300))
        self.tower = CLIPVisionModel(tiny.vision_config(VISION))
        self.tower.save_pretrained(folder / "tower")
        CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}).save_pretrained(
            folder / "tower"
        )
        self.language = LlamaForCausalLM(tiny.llama_config(TEXT, self.tokenizer))
        self.projector = {
            "0.weight": torch.randn(48, 32), "0.bias": torch.randn(48), "2.weight": torch.randn(48, 48),
            "2.bias": torch.randn(48),
        }
        self.write("base", self.language.state_dict(), model_type="llama")
        self.tokenizer.save_pretrained(folder / "base")

    def write(self, name: str, tensors: dict[str, torch.Tensor], file: str = "pytorch_model.bin", **more: Any) -> Path:
        path = self.folder / name
        path.mkdir(exist_ok=True)
        torch.save(tensors, path / file)
        config = json.loads(self.language.config.to_json_string(use_diff=False)) | more
        (path / "config.json").write_text(json.dumps(config))
        return path

    def multimodal(self, aspect: str = "pad", **more: Any) -> dict[str, Any]:
        return {
            "model_type": "llava_llama", "mm_vision_tower": "tower", "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "image_aspect_ratio": aspect,
            "_name_or_path": "base",
        } | more

    def full(self, **more: Any) -> Path:
        tensors = dict(self.language.state_dict())
        tensors |= {f"model.mm_projector.{name}": value for name, value in self.projector.items()}
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        path = self.write("full", tensors, **self.multimodal(**more))
        self.tokenizer.save_pretrained(path)
        return path

    def lora(self) -> tuple[Path, Any]:
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        adapted = get_peft_model(self.language, config)
        path = self.write("lora", dict(get_peft_model_state_dict(adapted)), "adapter_model.bin", **self.multimodal())
        torch.save(
            {f"base_model.model.model.mm_projector.{name}": value for name, value in self.projector.items()},
            path / "non_lora_trainables.bin",
        )
        (path / "adapter_config.json").write_text(
            json.dumps({"r": 4, "lora_alpha": 8, "bias": "none", "base_model_name_or_path": "base"})
        )
        return path, adapted.merge_and_unload()


@pytest.fixture
def original(tmp_path: Path) -> Original:
    return Original(tmp_path)


def _logits(folder: Path) -> torch.Tensor:
    loaded = checkpoint.load(folder, device="cpu")
    picture = pixel_values(loaded.image_processor, [Image.new("RGB", (70, 40), (200, 90, 150))])
    ids = torch.tensor([[3, *[loaded.model.config.image_token_id] * 4, 9, 10, 11]])
    with torch.no_grad():
        found: torch.Tensor = loaded.model(input_ids=ids, pixel_values=picture).logits
    return found


def test_full_lora_and_projector_folders(original: Original, tmp_path: Path) -> None:
    convert(original.full(), tmp_path / "a")
    lora, merged = original.lora()
    convert(lora, tmp_path / "b")
    same = original.write("same", dict(merged.state_dict()) | {
        f"model.mm_projector.{name}": value for name, value in original.projector.items()
    }, **original.multimodal())
    original.tokenizer.save_pretrained(same)
    convert(same, tmp_path / "c")
    projector = original.write(
        "projector", {f"model.mm_projector.{name}": value for name, value in original.projector.items()},
        "mm_projector.bin", **original.multimodal(aspect="square"),
    )
    convert(projector, tmp_path / "d", base=original.folder / "base")
    assert torch.allclose(_logits(tmp_path / "b"), _logits(tmp_path / "c"), atol=1e-5)
    assert not torch.allclose(_logits(tmp_path / "a"), _logits(tmp_path / "b"), atol=1e-2)
    assert checkpoint.describe(tmp_path / "a").padding == "square"
    assert checkpoint.describe(tmp_path / "d").padding == "none"
    convert(projector, tmp_path / "e", base=original.folder / "base", padding="square")
    assert checkpoint.describe(tmp_path / "e").padding == "square"
    loaded = checkpoint.load(tmp_path / "d", device="cpu").model
    assert torch.equal(loaded.model.multi_modal_projector.linear_2.weight, original.projector["2.weight"])
    assert torch.equal(loaded.lm_head.weight, original.language.state_dict()["lm_head.weight"])


def test_the_tower_s_own_weights_count_only_if_it_was_trained(original: Original, tmp_path: Path) -> None:
    changed = {
        f"model.vision_tower.vision_tower.{name if name.startswith('vision_model.') else f'vision_model.{name}'}":
            value + 1 for name, value in original.tower.state_dict().items()
    }
    changed["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    source = original.full()
    weights = torch.load(source / "pytorch_model.bin") | changed
    for trained, wanted in ((False, 0.0), (True, 1.0)):
        torch.save(weights, source / "pytorch_model.bin")
        (source / "config.json").write_text(
            json.dumps(json.loads((source / "config.json").read_text()) | {"unfreeze_mm_vision_tower": trained})
        )
        convert(source, tmp_path / f"out-{trained}")
        tower = checkpoint.load(tmp_path / f"out-{trained}", device="cpu").model.model.vision_tower.state_dict()
        ours, theirs = next(iter(tower.values())), next(iter(original.tower.state_dict().values()))
        assert torch.allclose(ours - theirs, torch.full_like(ours, wanted), atol=1e-5)


class Trap:
    """Says that it was run, if it is unpickled by the ordinary way."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("trapped",)


@pytest.mark.parametrize("fault", [
    "missing", "unexpected", "mis-shaped", "pickle", "cut off", "no weights", "other projector", "no tower",
])
def test_what_does_not_fit_is_named_and_nothing_is_written(
    fault: str, original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = original.full(
        **{"other projector": {"mm_projector_type": "linear"}, "no tower": {"mm_vision_tower": "nowhere/at-all"}}.get(
            fault, {}
        )
    )
    file = source / "pytorch_model.bin"
    weights = torch.load(file)
    if fault == "missing":
        del weights["model.mm_projector.2.bias"]
    elif fault == "unexpected":
        weights["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
    elif fault == "mis-shaped":
        weights["model.mm_projector.0.weight"] = torch.zeros(48, 31)
    torch.save({"a": Trap()} if fault == "pickle" else weights, file)
    if fault == "cut off":
        file.write_bytes(file.read_bytes()[:5000])
    elif fault == "no weights":
        file.unlink()
    told = {
        "missing": r"missing model\.multi_modal_projector\.linear_2\.bias", "unexpected": "unexpected .*layers.7",
        "mis-shaped": r"mis-shaped .*linear_1\.weight \(file \(48, 31\), model \(48, 32\)\)", "pickle": "refused",
        "cut off": "damaged", "no weights": "no weights", "other projector": "projector type 'linear'",
        "no tower": "--vision-tower",
    }
    with pytest.raises(CheckpointError, match=told[fault]):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "trapped").exists()


def test_a_lora_folder_without_its_base_says_how_to_give_it(original: Original, tmp_path: Path) -> None:
    lora, _ = original.lora()
    (original.folder / "base").rename(original.folder / "moved")
    with pytest.raises(CheckpointError, match="--base DIR"):
        convert(lora, tmp_path / "out")
    assert main(["convert", str(lora), str(tmp_path / "out"), "--base", str(original.folder / "moved")]) == 0
    (lora / "non_lora_trainables.bin").unlink()
    with pytest.raises(CheckpointError, match="non_lora_trainables.bin is missing"):
        convert(lora, tmp_path / "again", base=original.folder / "moved")
