"""Which weights a stage moves, and how fast: everything else is the start's, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medllava.model import checkpoint
from medllava.train.__main__ import main

RECIPE = Path(__file__).parents[2] / "train" / "recipes" / "demo_stage2.yaml"
RATES = {"projector": 1e-3, "tower": 4e-3, "rest": 2e-3}
LAST_USED = "model.vision_tower.encoder.layers.1."  # of three layers the second one makes the features


def moved(stage0: Path, out: Path) -> dict[str, float]:
    """Largest change of each tensor that is not bit-identical."""
    before, after = (checkpoint.load(path, device="cpu").model.state_dict() for path in (stage0, out))
    assert before.keys() == after.keys()
    return {
        name: float((before[name] - after[name]).abs().max()) for name in before
        if not torch.equal(before[name], after[name])
    }


@pytest.mark.parametrize("tower", [0, 1])
@pytest.mark.parametrize("stage", ["projector", "lora", "full"])
def test_a_step_moves_what_the_stage_names_at_its_own_rate(
    data: Any, stage0: Path, tmp_path: Path, stage: str, tower: int
) -> None:
    settings = [
        f"stage={stage}", f"tower_layers={tower}", "optim.steps=1", "optim.schedule=constant", "optim.warmup=0",
        f"optim.learning_rate={RATES['rest']}", f"projector_learning_rate={RATES['projector']}",
        f"tower_learning_rate={RATES['tower']}", "lora.r=2", "kinds=[grounding]", "optim.weight_decay=0",
    ]
    paths = [*data.arguments, "--init-from", str(stage0), "--out", str(tmp_path / "out")]
    assert main(["--config", str(RECIPE), *paths, *settings]) == 0
    found = moved(stage0, tmp_path / "out")
    parts = {
        "projector": {name for name in found if name.startswith("model.multi_modal_projector.")},
        "tower": {name for name in found if name.startswith(LAST_USED)},
    }
    rest = found.keys() - parts["projector"] - parts["tower"]
    assert len(parts["projector"]) == 4
    # A key's bias moves all scores of a query alike, which softmax forgets: its gradient is nothing but rounding.
    assert len(parts["tower"]) >= 15 * tower
    assert tower or not parts["tower"]
    for part, names in parts.items():
        for name in names:
            if not name.endswith("k_proj.bias"):
                # Adam's first step is the learning rate wherever there is a gradient.
                assert found[name] == pytest.approx(RATES[part], rel=0.02), name
    if stage == "projector":
        assert not rest
    elif stage == "lora":
        # Seven linear layers in each of three layers; norms, embeddings and the head stay.
        assert len(rest) == 21
        assert all("language_model" in name and name.split(".")[-2].endswith("_proj") for name in rest)
        adapters = load_file(tmp_path / "out" / "adapter_model.safetensors")
        changed = [tensor.abs().max() for name, tensor in adapters.items() if "lora_B" in name]
        assert [float(value) for value in changed] == pytest.approx([RATES["rest"]] * 21, rel=0.02)
    else:
        assert all(name.startswith(("model.language_model.", "lm_head.")) for name in rest)
        assert {"lm_head.weight", "model.language_model.embed_tokens.weight", "model.language_model.norm.weight"} < rest
