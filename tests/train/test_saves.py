from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from medllava.conversation import Turn
from medllava.errors import CheckpointError, ConfigError, DataError, MedllavaError
from medllava.jsonl import read_rows, write_json
from medllava.model import checkpoint
from medllava.model.answerer import Answerer
from medllava.serve.cli import main as chat
from medllava.train import forward, loop, saves, validation
from medllava.train.__main__ import main
from medllava.train.saves import Saves

RECIPES = Path(__file__).parents[2] / "train" / "recipes"
QUICK = ["log_every=1", "lora.r=2", "lora.alpha=4", "optim.batch_size=4", "kinds=[grounding]"]


def train(data: Any, out: Path, start: Path, *rest: str) -> int:
    paths = [*data.arguments, "--init-from", str(start), "--out", str(out)]
    return main(["--config", str(RECIPES / "demo_stage2.yaml"), *paths, *QUICK, *rest])


def held_out(data: Any, folder: Path, count: int = 6) -> Path:
    rows = [row for row in json.loads(data.file.read_text()) if row["kind"] == "grounding"][:count]
    for number, row in enumerate(rows):
        row["image"] = f"unseen-{number}.png"
        Image.effect_noise((90, 70), 40 + number).convert("RGB").save(data.images / row["image"])
    (folder / "held-out.json").write_text(json.dumps(rows))
    return folder / "held-out.json"


def answer(path: Path) -> str:
    picture = Image.linear_gradient("L").convert("RGB")
    return Answerer.load(path, device="cpu").answer([picture], [Turn(role="user", text="Where?")]).text


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoint.load(path, device="cpu").model.state_dict())


def same(one: Path, two: Path) -> bool:
    first, second = tensors(one), tensors(two)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("stage", ["projector", "lora", "full"])
def test_every_save_is_a_checkpoint_that_answers(
    stage: str, data: Any, stage0: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    settings = [f"stage={stage}", "save_every=2"]
    assert train(data, out, stage0, *settings, "optim.steps=8", "optim.schedule=constant") == 0
    assert sorted(path.name for path in out.glob("step-*")) == ["step-000004", "step-000006"]
    assert not list(out.rglob("state.pt"))  # a finished run is not gone on with
    step = out / "step-000006"
    manifest = checkpoint.describe(step)
    assert manifest.kind == stage
    assert manifest.figures["step"] == 6
    # Frozen weights are not copied.
    weights = {path.name for path in step.glob("*.safetensors")}
    own = {"projector": {"projector.safetensors"}, "full": {"model.safetensors"}}
    assert weights == own.get(stage, {"projector.safetensors", "adapter_model.safetensors"})
    assert chat(["--model-path", str(step), "--prompt", "What is a gland?", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out
    # It holds what the run held then, not what it held later, and a rename changes nothing.
    assert train(data, tmp_path / "six", stage0, *settings, "optim.steps=6", "optim.schedule=constant") == 0
    assert same(step, tmp_path / "six")
    assert not same(step, out)
    expected = answer(step)
    step.rename(out / "checkpoint-llava-lora-projector-full")
    assert answer(out / "checkpoint-llava-lora-projector-full") == expected


def test_the_best_by_validation_loss_is_kept(
    data: Any, stage0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([3.0, 1.0, 2.0, 2.5, 2.0])
    monkeypatch.setattr(
        validation, "judge", lambda *_: {"eval_loss": next(values), "eval_token_accuracy": 0.5}
    )
    out = tmp_path / "out"
    extra = ["--eval-data", str(held_out(data, tmp_path)), "eval_every=2", "optim.steps=10", "save_every=3", "keep=1"]
    assert train(data, out, stage0, *extra) == 0
    assert json.loads((out / "best.json").read_text()) == {"step": 4, "eval_loss": 1.0, "folder": "step-000004"}
    assert sorted(path.name for path in out.glob("step-*")) == ["step-000004", "step-000009"]
    assert checkpoint.load(out / "step-000004").manifest.figures["eval_loss"] == 1.0
    moved = shutil.copytree(out, tmp_path / "copied")  # a file survives copying, where a link may not
    assert (moved / json.loads((moved / "best.json").read_text())["folder"] / "medllava.json").is_file()


def test_the_last_step_may_be_the_best(data: Any, stage0: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extra = ["--eval-data", str(held_out(data, tmp_path)), "eval_every=3", "optim.steps=6", "eval_answers=2"]
    assert train(data, out, stage0, *extra) == 0
    rows = [row for _, row in read_rows(out / "train_log.jsonl") if "eval_loss" in row]
    assert rows[1]["eval_loss"] < rows[0]["eval_loss"]
    assert json.loads((out / "best.json").read_text())["folder"] == "."
    assert not list(out.glob("step-*"))[2:]
    assert checkpoint.describe(out).figures["eval_exact_match"] == 0.0
    assert "| eval loss |" in (out / "README.md").read_text()


def test_a_damaged_newest_save_is_told_and_the_one_before_it_taken(
    data: Any, stage0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ["optim.steps=9", "save_every=2"]
    assert train(data, tmp_path / "whole", stage0, *settings) == 0
    out = tmp_path / "out"
    stop_at(monkeypatch, 8)
    with pytest.raises(KeyboardInterrupt):
        train(data, out, stage0, *settings)
    state = out / "step-000006" / "state.pt"
    state.write_bytes(state.read_bytes()[:3000])
    (out / ".step-000008.part").mkdir()
    assert train(data, out, stage0, *settings, "--resume") == 0
    assert "going on from the save before it" in caplog.text
    assert same(out, tmp_path / "whole")
    assert [row["step"] for _, row in read_rows(out / "train_log.jsonl")] == list(range(1, 10))
    assert not list(tmp_path.rglob("*.part"))


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    real, calls = loop._step, 0

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            raise KeyboardInterrupt
        return real(*given, **named)

    monkeypatch.setattr(loop, "_step", counted)


def test_a_disk_that_fills_up_leaves_the_save_before_it(
    data: Any, stage0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", torch.save

    def full(state: Any, path: Path) -> None:
        if state["step"] == 4:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(state, path)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            train(data, out, stage0, "optim.steps=6", "save_every=2")
    assert [path.name for path in out.glob("*step-*")] == ["step-000002"]
    assert checkpoint.load(out / "step-000002").manifest.kind == "lora"
    assert train(data, out, stage0, "optim.steps=6", "save_every=2", "--resume") == 0


def test_a_disk_without_room_is_told_before_the_first_step(
    data: Any, stage0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(saves.shutil, "disk_usage", lambda _: usage._replace(free=12_345))
    monkeypatch.setattr(loop, "_step", lambda *_: pytest.fail("a step was run"))
    with pytest.raises(MedllavaError, match=r"need [\d,]+ bytes .* but 12,345 are free"):
        train(data, tmp_path / "out", stage0)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_reads_back_otherwise_stops_before_the_first_step(
    data: Any, stage0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.projector_state
    monkeypatch.setattr(
        checkpoint, "projector_state", lambda model: {name: value + 1 for name, value in real(model).items()}
    )
    monkeypatch.setattr(loop, "_step", lambda *_: pytest.fail("a step was run"))
    with pytest.raises(CheckpointError, match="multi_modal_projector.* not the same when read back"):
        train(data, tmp_path / "out", stage0)
    assert list(tmp_path.iterdir()) == []


def test_a_base_whose_generation_settings_cannot_be_saved(data: Any, stage0: Path, tmp_path: Path) -> None:
    base = shutil.copytree(stage0, tmp_path / "base")
    config = json.loads((base / "generation_config.json").read_text()) | {"do_sample": False}
    write_json(base / "generation_config.json", config | {"temperature": 0.9, "top_p": 0.6, "length_penalty": 0.7})
    # Vicuna's mixture is mended; what no save would accept is refused before any weight is read.
    assert train(data, tmp_path / "out", base, "stage=full", "optim.steps=1") == 0
    write_json(base / "generation_config.json", config | {"num_return_sequences": 4})
    with pytest.raises(CheckpointError, match=r"generation_config.json: .* cannot be saved again .*[Gg]reedy"):
        train(data, tmp_path / "other", base, "stage=full", "optim.steps=1")
    assert not (tmp_path / "other").exists()


def test_tower_layers_of_a_lora_run_are_in_its_checkpoint(data: Any, stage0: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(data, first, stage0, "tower_layers=1", "tower_learning_rate=1e-2", "optim.steps=2") == 0
    before, after = tensors(stage0), tensors(first)
    moved = {name for name in before if "vision_tower" in name and not torch.equal(before[name], after[name])}
    assert moved
    assert {name.partition("vision_tower.")[2] for name in moved} <= set(load_file(first / "vision_tower.safetensors"))
    # A second round that leaves the tower alone carries these layers on.
    assert train(data, second, first, "optim.steps=2") == 0
    last = tensors(second)
    assert all(torch.equal(last[name], after[name]) for name in moved)
    (second / "vision_tower.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"vision_tower.safetensors is missing"):
        checkpoint.load(second)


def test_tune_tune_again_load(
    data: Any, stage0: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(data, first, stage0, "optim.steps=3") == 0
    assert train(data, second, first, "optim.steps=3", "seed=5", "optim.warmup=0") == 0
    assert "going on with its adapters" in caplog.text
    manifest = checkpoint.describe(second)
    assert checkpoint.resolve_base(second, manifest) == stage0.resolve()
    assert not same(first, second)
    assert answer(second) is not None
    # The second run began where the first one ended.
    rows = [row["loss"] for _, row in read_rows(second / "train_log.jsonl")]
    fresh = [row["loss"] for _, row in read_rows(first / "train_log.jsonl")]
    assert rows[0] < fresh[0]
    monkeypatch.setattr(checkpoint, "_load_full", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match=r"its adapters have lora.r=2 lora.alpha=4, .* or fold them into their base"):
        train(data, tmp_path / "third", first, "lora.r=3", "lora.alpha=8")
    with pytest.raises(ConfigError, match="is a LoRA checkpoint; fold it into its base first"):
        train(data, tmp_path / "third", first, "stage=projector")


def poison(value: float, when: int) -> Callable[[Any], None]:
    """Make the gradient, but not the loss, of the ``when``-th micro-batch not finite."""
    calls = 0

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, loss: torch.Tensor) -> torch.Tensor:
            return loss.clone()

        @staticmethod
        def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * value

    real = forward.VisionLanguageLoss.forward

    def spoiled(self: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        loss = real(self, batch)
        return Spoil.apply(loss) if calls == when else loss

    return lambda patch: patch.setattr(forward.VisionLanguageLoss, "forward", spoiled)


@pytest.mark.parametrize(("value", "accumulate"), [(float("nan"), 1), (float("inf"), 1), (float("nan"), 4)])
def test_a_gradient_that_is_not_finite_stops_and_names_the_samples(
    value: float, accumulate: int, data: Any, stage0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(value, 3 * accumulate - (accumulate > 1))(monkeypatch)  # with pieces: the last but one of step 3
    with pytest.raises(MedllavaError, match=r"gradient is not finite at step 3; the samples of this step: q\d+.*, q"):
        train(data, tmp_path / "out", stage0, "optim.steps=6", f"optim.accumulate={accumulate}")


def test_a_loss_of_zero_for_ten_steps_is_an_error(
    data: Any, stage0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = forward.VisionLanguageLoss.forward
    monkeypatch.setattr(forward.VisionLanguageLoss, "forward", lambda self, batch: real(self, batch) * 0.0)
    with pytest.raises(MedllavaError, match="exactly 0 for 10 steps, up to step 10"):
        train(data, tmp_path / "out", stage0, "optim.steps=20")


def test_validation_data_that_training_saw_is_refused(data: Any, stage0: Path, tmp_path: Path) -> None:
    def refused(file: Path, match: str) -> None:
        with pytest.raises(DataError, match=match):
            train(data, tmp_path / "out", stage0, "--eval-data", str(file), "optim.steps=1")
        assert not (tmp_path / "out").exists()

    refused(data.file, r"40 pictures are \(0.png, 1.png, 10.png and 37 more\) also in the training data")
    rows = json.loads(held_out(data, tmp_path).read_text())
    shutil.copy(data.images / "7.png", data.images / "unseen-2.png")
    refused(tmp_path / "held-out.json", r"1 picture is \(unseen-2.png \(= \d+.png\)\) also in")
    rows[1]["image"] = "nowhere.png"
    write_json(tmp_path / "held-out.json", rows)
    refused(tmp_path / "held-out.json", "nowhere.png: no such image file")


def test_a_video_on_both_sides_is_a_leak() -> None:
    from medllava.conversation import InstructionSample, Provenance

    def sample(video: str) -> InstructionSample:
        turns = (Turn(role="user", text="?"), Turn(role="assistant", text="!"))
        return InstructionSample(id=video, turns=turns, provenance=Provenance(video=video))

    validation.check_held_out([sample("a.mp4")], [sample("b.mp4")], Path())
    with pytest.raises(DataError, match=r"1 video is \(a.mp4\) also in the training data"):
        validation.check_held_out([sample("a.mp4"), sample("c.mp4")], [sample("b.mp4"), sample("a.mp4")], Path())


def test_what_may_change_when_a_run_goes_on(
    data: Any, stage0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_at(patched, 4)
        with pytest.raises(KeyboardInterrupt):
            train(data, out, stage0, "optim.steps=5", "save_every=2")
    with pytest.raises(ConfigError, match="other settings .recipe key optim.learning_rate, recipe key seed"):
        train(data, out, stage0, "optim.steps=5", "seed=3", "optim.learning_rate=1e-5", "--resume")
    # A run of an earlier version, whose recipe did not have a key yet, goes on; so does one that saves less often.
    record = json.loads((out / "run.json").read_text())
    del record["identity"]["recipe"]["gradient_checkpointing"]
    write_json(out / "run.json", record)
    assert train(data, out, stage0, "optim.steps=5", "save_every=100", "keep=1", "--resume") == 0


def test_saves_alone(tmp_path: Path) -> None:
    def write(folder: Path, _: Any) -> None:
        folder.mkdir()
        save_file({"weight": torch.ones(2)}, folder / "weights.safetensors")

    kept = Saves(tmp_path / "run", keep=2, write=write)
    assert kept.restore(lambda _: 1) == 0
    for step in (5, 10, 15, 20):
        kept.save(step, lambda path: path.write_text("state"), {})
        if step == 5:
            kept.mark_best(5, 0.5)
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["best.json", "step-000005", "step-000015", "step-000020"]
    assert not (tmp_path / "run" / "step-000005" / "state.pt").exists()
    again = Saves(tmp_path / "run", keep=2, write=write)
    read = []
    assert again.restore(lambda path: read.append(path) or 0) == 20
    assert read == [tmp_path / "run" / "step-000020" / "state.pt"]
    assert not again.is_best(0.6)
    assert again.is_best(0.4)
    again.clear()
    assert list((tmp_path / "run").iterdir()) == []
