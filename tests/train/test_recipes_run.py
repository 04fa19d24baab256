"""Every recipe that ships loads, plans and trains two steps, on each kind of base that it can start from."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from medllava.model import checkpoint
from medllava.model.assemble import assemble
from medllava.model.embeddings import load_encoder
from medllava.train.__main__ import main
from medllava.train.config import TuneRecipe, load_training_recipe

RECIPES = Path(__file__).parents[2] / "train" / "recipes"
FOUND = sorted(RECIPES.glob("*.yaml"))
TINY = ["optim.epochs=null", "optim.steps=2", "optim.batch_size=4", "optim.accumulate=2", "workers=0"]
CHATML = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def siglip_qwen(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP and a Qwen3 of few random weights, assembled."""
    from transformers import (
        AutoTokenizer,
        Qwen3Config,
        Qwen3ForCausalLM,
        SiglipImageProcessor,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    root = tmp_path_factory.mktemp("parts")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2}
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**size, image_size=48, patch_size=12)).save_pretrained(root / "siglip")
    SiglipImageProcessor(size={"height": 48, "width": 48}).save_pretrained(root / "siglip")
    tokenizer = AutoTokenizer.from_pretrained(clip)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.bos_token, tokenizer.chat_template = "<|im_end|>", None, CHATML
    config = Qwen3Config(
        **size | {"num_hidden_layers": 2}, num_key_value_heads=1, head_dim=16, vocab_size=1000,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(root / "qwen")
    tokenizer.save_pretrained(root / "qwen")
    assemble(root / "siglip", root / "qwen", root / "start")
    return root / "start"


def test_recipes_were_found() -> None:
    stages = {load_training_recipe(path, []).stage for path in FOUND}
    assert stages == {"foundation", "contrastive", "projector", "lora", "full"}
    names = {path.stem for path in FOUND}
    assert {"stage0_contrastive", "stage1_projector", "stage2_lora", "stage2_qlora", "stage2_full"} <= names


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.stem)
def test_it_opens_with_its_command_and_its_cost(path: Path) -> None:
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert f"--config train/recipes/{path.name} " in comments[0]
    assert "-m medllava.train" in comments[0]
    assert ("--deepspeed" in comments[0]) == ("ZeRO-3" in " ".join(comments) or path.stem.endswith("full"))
    if not path.stem.startswith("demo"):
        assert "cost:" in " ".join(comments).lower()


@pytest.mark.parametrize("base", ["clip_llama", "siglip_qwen"])
@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.stem)
def test_it_plans_and_trains_two_steps(
    path: Path, base: str, data: Any, stage0: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    recipe = load_training_recipe(path, [])
    if recipe.stage == "foundation":
        return  # run by the fixture, with fewer steps and at a smaller size
    extra = [*TINY, "precision=float32"]
    if recipe.stage == "contrastive":
        if base != "clip_llama":
            return  # tests/train/test_contrastive_tune.py trains a SigLIP
        start = request.getfixturevalue("clip")
    else:
        assert isinstance(recipe, TuneRecipe)
        fits = {"template": base == "siglip_qwen", "vicuna_v1": base == "clip_llama"}
        if not fits.get(recipe.chat_format or "", True):
            return  # the base's tokenizer is of another family than the recipe's
        if recipe.quantize and importlib.util.find_spec("bitsandbytes") is None:
            pytest.skip("bitsandbytes is not installed (extra: gpu)")
        start = stage0 if base == "clip_llama" else request.getfixturevalue("siglip_qwen")
        extra += ["lora.r=4", "kinds=[caption]", f"tower_layers={min(recipe.tower_layers, 2)}"]
    command = ["--config", str(path), *data.arguments, "--init-from", str(start), "--out", str(tmp_path / "out")]
    assert main([*command, *extra, "--plan"]) == 0
    assert not (tmp_path / "out").exists()
    assert main([*command, *extra]) == 0
    assert json.loads((tmp_path / "out" / "finished.json").read_text())["steps"] == 2
    if recipe.stage == "contrastive":
        assert load_encoder(tmp_path / "out").kind == "clip"
    else:
        assert checkpoint.load(tmp_path / "out").manifest.recipe["stage"] == recipe.stage
