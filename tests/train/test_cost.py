from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from medllava.errors import ConfigError, MissingExtraError
from medllava.jsonl import read_rows
from medllava.model import checkpoint
from medllava.train import cost, loop
from medllava.train.__main__ import main
from medllava.train.config import TuneRecipe, load_training_recipe
from medllava.train.plots import plot_loss
from medllava.train.stages import select

RECIPES = Path(__file__).parents[2] / "train" / "recipes"
QUICK = ["log_every=1", "lora.r=2", "optim.batch_size=4", "kinds=[grounding]", "optim.steps=3"]


def train(data: Any, out: Path, start: Path, *rest: str) -> int:
    paths = [*data.arguments, "--init-from", str(start), "--out", str(out)]
    return main(["--config", str(RECIPES / "demo_stage2.yaml"), *paths, *QUICK, *rest])


def recipe(stage: str, **changes: Any) -> TuneRecipe:
    loaded = load_training_recipe(RECIPES / "stage2_lora.yaml", [f"stage={stage}"])
    assert isinstance(loaded, TuneRecipe)
    return loaded.model_copy(update=changes)


@pytest.fixture
def seven(seven_billion: Callable[[], Any]) -> Callable[[str], Any]:
    """The shapes of LLaVA-1.5 7B, without weights, set up for a stage."""

    def make(stage: str) -> Any:
        model = seven_billion()
        select(model, recipe(stage))
        return model

    return make


def test_operations_follow_from_what_trains(seven: Callable[[str], Any]) -> None:
    frozen, full = (
        cost.work(seven(stage), lengths=[700] * 3, image_tokens=576, cached=stage == "full")
        for stage in ("projector", "full")
    )
    body = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    attention = 6 * 32 * 4096 * 700
    assert frozen.per_token == 4 * body + attention
    assert full.per_token == 6 * body + attention
    assert (frozen.per_target, full.per_target) == (4 * 32064 * 4096, 6 * 32064 * 4096)
    projector = 4 * 576 * (1024 * 4096 + 4096 * 4096)
    assert full.per_picture == projector  # the encoder's output is read from a cache
    layers = 23 * 2 * 576 * (4 * 1024**2 + 2 * 1024 * 4096 + 2 * 576 * 1024)  # the last of 24 is not used
    assert frozen.per_picture == projector + layers + 2 * 576 * 3 * 14 * 14 * 1024
    # Long samples attend further: each token of them counts with its own sample's length.
    mixed = cost.work(seven("projector"), lengths=[100, 300], image_tokens=576, cached=True)
    assert mixed.per_token - 4 * body == 6 * 32 * 4096 * (100 * 100 + 300 * 300) / 400


def test_operations_agree_with_a_count_of_the_real_ones(stage0: Path) -> None:
    """PyTorch counts what it multiplies in one forward and backward pass of a tiny model."""
    from torch.utils.flop_counter import FlopCounterMode

    loaded = checkpoint.load(stage0, device="cpu")
    model = loaded.model.train()
    select(model, recipe("full"))
    model.model.multi_modal_projector.requires_grad_(False)
    ids = torch.arange(1, 33)[None]
    with FlopCounterMode(display=False) as counted:
        logits = model(input_ids=ids, use_cache=False).logits
        logits.sum().backward()
    told = cost.work(model, lengths=[32], image_tokens=16, cached=True).operations(32, 32, 0)
    # Attention as computed is not halved by the mask; there is little of it here. The embeddings take no gradient in.
    assert told == pytest.approx(counted.get_total_flops(), rel=0.1)


def test_memory_of_the_known_sizes(seven: Callable[[str], Any]) -> None:
    model = seven("lora")
    loose = recipe("lora", gradient_checkpointing=False)
    plain = cost.memory(model, loose, tokens=2800, targets=500, half=True)
    assert 14e9 < plain.weights < 17e9
    assert plain.optimizer == 2 * plain.gradients
    saved = cost.memory(model, recipe("lora", gradient_checkpointing=True), tokens=2800, targets=500, half=True)
    assert saved.activations < plain.activations / 8
    four = cost.memory(model, recipe("lora", quantize="nf4"), tokens=2800, targets=500, half=True)
    assert 5e9 < four.weights < 7e9
    full = seven("full")
    alone, spread = (
        cost.memory(full, recipe("full"), tokens=2800, targets=500, half=True, devices=8, zero=zero) for zero in (0, 3)
    )
    assert alone.weights + alone.gradients + alone.optimizer == pytest.approx(6.76e9 * 18, rel=0.05)
    assert spread.optimizer == alone.optimizer / 8
    assert spread.weights == alone.weights / 8


@pytest.mark.parametrize(("name", "peak", "gigabytes"), [
    ("NVIDIA H200", 989e12, 141), ("NVIDIA H100 80GB HBM3", 989e12, 80), ("NVIDIA H100 PCIe", 756e12, 80),
    ("NVIDIA A100-SXM4-40GB", 312e12, 40), ("NVIDIA GeForce RTX 4090", 165e12, 24), ("H100 NVL", 835e12, 94),
    ("NVIDIA L40S", 362e12, 48),
])
def test_known_devices(name: str, peak: float, gigabytes: float) -> None:
    device = cost.known_device(name)
    assert device is not None
    assert (device.peak, device.memory) == (peak, gigabytes * 1e9)


def test_unknown_devices() -> None:
    assert cost.known_device("Abacus 2000") is None


def test_plan_reads_no_weights_and_writes_nothing(
    data: Any, stage0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoint, "_load_full", lambda *_: pytest.fail("weights were read"))
    out = tmp_path / "out"
    with caplog.at_level("INFO"):
        assert train(data, out, stage0, "--plan") == 0
    assert "hours: unknown on this machine" in caplog.text
    assert "% of the computed tokens (packing off; on: " in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        assert train(data, out, stage0, "--plan", "--gpu", "A100", "--devices", "4") == 0
    assert "memory per device (4), at most: about " in caplog.text
    assert "A100 has 80.0 GB: it fits" in caplog.text
    assert "hours on 4 x A100 at 40 % MFU" in caplog.text
    with pytest.raises(ConfigError, match="--gpu Abacus"):
        train(data, out, stage0, "--plan", "--gpu", "Abacus")
    assert not out.exists()


def test_plan_names_the_nearest_setting_that_fits(
    data: Any, stage0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for room, said in (
        (9e6, "Small has 9.0 MB: it fits\n"), (3e6, "it fits with optim.accumulate=2"),
        (1.2e6, " gradient_checkpointing=true\n"), (1e4, "it fits with no accumulate"),
    ):
        monkeypatch.setattr(cost, "_DEVICES", {"Small": (1e9, room / 1e9)})
        caplog.clear()
        with caplog.at_level("INFO"):
            assert train(data, tmp_path / "out", stage0, "--plan", "--gpu", "Small", "precision=float32") == 0
        assert said in caplog.text


def test_throughput_and_mfu_are_logged_and_drawn(
    data: Any, stage0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert train(data, out, stage0) == 0
    rows = [row for _, row in read_rows(out / "train_log.jsonl")]
    assert all(row["tokens_per_s"] > row["samples_per_s"] > 0 for row in rows)
    assert [row["mfu"] for row in rows] == [None] * 3  # no peak is known of a CPU
    assert "MFU n/a" in loop._short(rows[0])
    whole = (out / "loss.png").stat().st_size
    for row in rows:
        del row["tokens_per_s"], row["samples_per_s"]
    (out / "old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_loss(out / "old.jsonl", out / "old.png", "the log of an earlier version")
    assert 0 < (out / "old.png").stat().st_size != whole
    # With a known peak, the share of it.
    from medllava.train import run_tune

    monkeypatch.setattr(run_tune, "this_device", lambda: cost.Device("made up", 1e12, 1e9))
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate takes one precision per process
    assert train(data, tmp_path / "gpu", stage0, "precision=bfloat16") == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    last = [row for _, row in read_rows(tmp_path / "gpu" / "train_log.jsonl")][-1]
    assert 0 < last["mfu"] < 1
    assert f"MFU {100 * last['mfu']:.1f} %" in loop._short(last)


def test_wandb_only_on_request(data: Any, stage0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, float]]] = []
    ended: list[int] = []

    def init(**settings: Any) -> Any:
        begun.append(settings)
        return types.SimpleNamespace(
            log=lambda values, step: logged.append((step, values)), finish=lambda exit_code: ended.append(exit_code)
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    assert train(data, tmp_path / "quiet", stage0) == 0
    assert not begun
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(loop, "_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(data, out, stage0, "--wandb", "slides")
    assert train(data, out, stage0, "--wandb", "slides", "--resume") == 0
    assert [step for step, _ in logged] == [1, 2, 3]
    assert {"loss", "grad_norm", "tokens_per_s", "lr/LoRA"} <= logged[0][1].keys()
    assert ended == [1, 0]
    assert begun[0]["project"] == "slides"
    assert begun[0]["id"] == begun[1]["id"]
    assert begun[0]["config"]["recipe"]["lora"]["r"] == 2
    assert str(tmp_path) not in json.dumps(begun[0]["config"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"medllava\[wandb\]"):
        train(data, tmp_path / "none", stage0, "--wandb", "slides")
    assert not (tmp_path / "none").exists()


def test_the_folder_says_what_made_it(data: Any, stage0: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert train(data, out, stage0) == 0
    record = json.loads((out / "run.json").read_text())
    assert len(record["versions"]["commit"].removesuffix("-modified")) == 40
    assert len(record["identity"]["data_sha256"]) == 64
    card = (out / "README.md").read_text()
    assert record["identity"]["data_sha256"] in card
    assert "learning_rate: 0.001" in card
    assert checkpoint.describe(out).figures["step"] == 3
