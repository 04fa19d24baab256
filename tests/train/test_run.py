from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medllava.conversation import Turn
from medllava.errors import ConfigError, DataError, MedllavaError, run_cli
from medllava.jsonl import read_rows
from medllava.model import checkpoint
from medllava.model.answerer import Answerer
from medllava.train import forward, loop
from medllava.train.__main__ import main
from medllava.train.config import Optim, load_training_recipe
from medllava.train.loop import schedule

RECIPES = Path(__file__).parents[2] / "train" / "recipes"
KILLED_RUN = Path(__file__).with_name("killed_run.py")


def arguments(stage: str, data: Any, out: Path, start: Path, *rest: str) -> list[str]:
    config = RECIPES / f"demo_{stage}.yaml"
    paths = [*data.arguments, "--init-from", str(start), "--out", str(out)]
    return ["--config", str(config), *paths, "log_every=1", *rest]


def train(stage: str, data: Any, out: Path, start: Path, *rest: str) -> int:
    return main(arguments(stage, data, out, start, *rest))


def weights(path: Path) -> dict[str, torch.Tensor]:
    model = checkpoint.load(path, device="cpu").model
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def losses(out: Path) -> list[float]:
    return [row["loss"] for _, row in read_rows(out / "train_log.jsonl")]


def held_out(data: Any, folder: Path) -> Path:
    """Six samples on pictures that the training data do not hold."""
    rows = [row for row in json.loads(data.file.read_text()) if row["kind"] == "grounding"][:6]
    for number, row in enumerate(rows):
        row["image"] = f"held-out-{number}.png"
        Image.effect_noise((90, 70), 40 + number).convert("RGB").save(data.images / row["image"])
    (folder / "held-out.json").write_text(json.dumps(rows))
    return folder / "held-out.json"


def adapters(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors") | load_file(out / "projector.safetensors")


@pytest.fixture(scope="module")
def stage1(data: Any, stage0: Path) -> Path:
    out = stage0.parent / "stage1"
    assert train("stage1", data, out, stage0, "optim.steps=4") == 0
    return out


def test_stage_0_leaves_a_complete_checkpoint(stage0: Path) -> None:
    loaded = checkpoint.load(stage0)
    assert loaded.manifest.kind == "full"
    assert loaded.manifest.recipe["stage"] == "foundation"
    answerer = Answerer(loaded, "stage0")
    assert answerer.answer([Image.new("RGB", (50, 70))], [Turn(role="user", text="Where?")], max_new_tokens=2)
    files = {str(path.relative_to(stage0)) for path in stage0.rglob("*")}
    assert {"recipe.yaml", "run.json", "finished.json", "contrastive/loss.png", "language/loss.png"} <= files
    assert not [name for name in files if name.endswith(("state.pt", ".part"))]


def test_stage_1_moves_the_projector_and_nothing_else(stage0: Path, stage1: Path) -> None:
    moved = changed(weights(stage0), weights(stage1))
    assert moved == {
        f"model.multi_modal_projector.linear_{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")
    }
    assert checkpoint.describe(stage1).chat_format == "medllava"
    files = {path.name for path in stage1.iterdir()}
    assert {"projector.safetensors", "recipe.yaml", "finished.json"} <= files
    assert {"train_log.jsonl", "loss.png", "tensorboard"} <= files
    parts = json.loads((stage1 / "run.json").read_text())["parts"]
    assert [part["trainable"] > 0 for part in parts] == [False, True, False, False]


def test_stage_2_moves_adapters_and_projector_only(data: Any, stage1: Path, tmp_path: Path) -> None:
    assert train("stage2", data, tmp_path / "out", stage1, "optim.steps=3", "lora.r=4") == 0
    moved = changed(weights(stage1), weights(tmp_path / "out"))
    assert {name.split(".")[1] for name in moved} == {"multi_modal_projector", "language_model"}
    linear = {name for name in moved if "language_model" in name}
    # Seven linear layers in each of three layers; norms, embeddings and the head stay.
    assert len(linear) == 21
    assert all(name.split(".")[-2].endswith("_proj") for name in linear)
    manifest = checkpoint.describe(tmp_path / "out")
    assert manifest.kind == "lora"
    # On the full model, not on stage 1's folder: the projector travels with the adapters.
    assert checkpoint.resolve_base(tmp_path / "out", manifest) == (stage1.parent / "stage0").resolve()


def test_full_stage_moves_language_model_and_named_tower_layers(data: Any, stage1: Path, tmp_path: Path) -> None:
    extra = ["stage=full", "optim.steps=2", "tower_layers=2", "optim.learning_rate=1e-3", "tower_learning_rate=1e-2"]
    assert train("stage2", data, tmp_path / "out", stage1, *extra) == 0
    moved = changed(weights(stage1), weights(tmp_path / "out"))
    tower = {name for name in moved if "vision_tower" in name}
    # The features are those of the second last of three layers; the last one would get no gradient.
    assert {name.split("layers.")[1][0] for name in tower} == {"0", "1"}
    assert "lm_head.weight" in moved
    assert checkpoint.describe(tmp_path / "out").kind == "full"


@pytest.mark.parametrize(("stage", "more"), [
    ("projector", ("packing=true", "picture_group=3")), ("lora", ("lora.r=4", "lora.dropout=0.1")),
    ("full", ("tower_layers=1",)),
])
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    data: Any, stage1: Path, tmp_path: Path, stage: str, more: tuple[str, ...]
) -> None:
    settings = [f"stage={stage}", "optim.steps=20", "save_every=5", "optim.batch_size=8", "kinds=[grounding]", *more]
    assert train("stage2", data, tmp_path / "whole", stage1, *settings) == 0
    out = tmp_path / "killed"
    (tmp_path / f".{out.name}.abcdefgh.part").mkdir()  # as a kill in the middle of a save leaves it
    command = [sys.executable, str(KILLED_RUN), "14", *arguments("stage2", data, out, stage1, *settings)]
    killed = subprocess.run(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "medllava.json").exists()
    assert sorted(path.name for path in out.glob("step-*")) == ["step-000005", "step-000010"]
    assert main([*arguments("stage2", data, out, stage1, *settings), "--resume"]) == 0
    assert losses(out) == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
    assert not list(tmp_path.rglob("*.part"))
    whole, resumed = weights(tmp_path / "whole"), weights(out)
    assert max(float((whole[name] - resumed[name]).abs().max()) for name in whole) < 1e-6


def test_sigterm_saves_and_a_resume_finishes(data: Any, stage1: Path, tmp_path: Path, monkeypatch: Any) -> None:
    steps = ["optim.steps=6", "lora.r=2"]
    seen = 0
    real = forward.VisionLanguageLoss.forward

    def third_time_terminate(self: Any, batch: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch)

    monkeypatch.setattr(forward.VisionLanguageLoss, "forward", third_time_terminate)
    out = tmp_path / "out"
    assert train("stage2", data, out, stage1, *steps) == 143
    assert torch.load(out / "step-000003" / "state.pt", weights_only=True)["step"] == 3
    with pytest.raises(ConfigError, match="add --resume"):
        train("stage2", data, out, stage1, *steps)
    with pytest.raises(ConfigError, match="other settings .*recipe key lora"):
        train("stage2", data, out, stage1, "optim.steps=6", "lora.r=3", "--resume")
    assert train("stage2", data, out, stage1, *steps, "--resume") == 0
    assert [row["step"] for _, row in read_rows(out / "train_log.jsonl")] == [1, 2, 3, 4, 5, 6]
    finished = (out / "finished.json").read_text()
    assert train("stage2", data, out, stage1, *steps, "--resume") == 0
    assert (out / "finished.json").read_text() == finished


def test_stage_0_goes_on_after_a_stop(data: Any, stage0: Path, tmp_path: Path, monkeypatch: Any) -> None:
    recipe = json.loads((stage0 / "run.json").read_text())["identity"]["recipe"]
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))  # JSON is YAML
    out = tmp_path / "out"
    command = [
        "--config", str(tmp_path / "recipe.json"), *data.arguments, "--captions", str(data.captions), "--out", str(out),
        "--resume",
    ]
    real = loop._step
    calls = 0

    def stop_once(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:  # the second step of the language model, after the three of the image encoder
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(loop, "_step", stop_once)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert (out / "contrastive" / "tower.safetensors").is_file()
    assert main(command) == 0
    assert changed(weights(stage0), weights(out)) == set()


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(
    data: Any, stage1: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    real = forward.VisionLanguageLoss.forward
    monkeypatch.setattr(
        forward.VisionLanguageLoss, "forward",
        lambda self, batch: real(self, batch) * (torch.nan if "q7-2" in batch.ids else 1.0),
    )
    with pytest.raises(MedllavaError, match=r"loss is not finite at step \d+; the samples of this step: .*q7-2"):
        train("stage2", data, tmp_path / "out", stage1, "optim.steps=20", "lora.r=2", "split_exchanges=true")
    assert not (tmp_path / "out" / "medllava.json").exists()


def test_the_same_seed_gives_the_same_weights_and_cached_or_live_features_do_too(
    data: Any, stage1: Path, tmp_path: Path
) -> None:
    found = []
    for name, extra in (("a", []), ("b", ["cache_features=false"]), ("c", ["seed=1"])):
        assert train("stage2", data, tmp_path / name, stage1, "optim.steps=4", "lora.r=2", *extra) == 0
        found.append(losses(tmp_path / name))
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert found[0] != pytest.approx(found[2], abs=1e-3)


def test_two_processes_learn_what_one_does(data: Any, stage1: Path, tmp_path: Path) -> None:
    settings = ["optim.steps=5", "lora.r=2", "optim.batch_size=6", "kinds=[grounding]"]
    assert train("stage2", data, tmp_path / "one", stage1, *settings) == 0
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
        "medllava.train", *arguments("stage2", data, tmp_path / "two", stage1, *settings),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, check=True, stderr=subprocess.PIPE, env=environment, text=True).stderr
    assert said.count(" tokens per epoch ") == 1, "one of the processes tells how it goes"
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    one, two = adapters(tmp_path / "one"), adapters(tmp_path / "two")
    # Equal but for the order of sums, which the first steps of Adam make visible.
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-3


def test_validation_loss_is_logged(data: Any, stage1: Path, tmp_path: Path) -> None:
    extra = ["--eval-data", str(held_out(data, tmp_path)), "eval_every=2", "optim.steps=4", "lora.r=2"]
    assert train("stage2", data, tmp_path / "out", stage1, *extra, "kinds=[grounding]", "eval_answers=3") == 0
    rows = [row for _, row in read_rows(tmp_path / "out" / "train_log.jsonl")]
    assert ["eval_loss" in row for row in rows] == [False, True, False, True]
    assert all(0 < row["eval_loss"] < 20 for row in rows if "eval_loss" in row)
    assert all(0 <= row["eval_token_accuracy"] <= 1 and row["eval_answers"] == 3 for row in (rows[1], rows[3]))
    board = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4]
    logged = [event.value for event in board.Scalars("eval_loss")]
    assert logged == pytest.approx([rows[1]["eval_loss"], rows[3]["eval_loss"]])


def test_training_lowers_the_loss(data: Any, stage1: Path, tmp_path: Path) -> None:
    extra = ["stage=full", "optim.steps=60", "flip=false", "optim.batch_size=8", "optim.learning_rate=5e-3"]
    assert train("stage2", data, tmp_path / "out", stage1, *extra) == 0
    found = losses(tmp_path / "out")
    assert sum(found[-10:]) < 0.6 * sum(found[:10])


@pytest.mark.parametrize(("failing", "said"), [
    ("torch.save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 390144 vs 390032")),
    ("safetensors.torch.save_file", SafetensorError("Error while serializing: I/O error: No space left (os error 28)")),
])
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    data: Any, stage1: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, failing: str, said: Exception
) -> None:
    settings = ["optim.steps=4", "lora.r=2", "save_every=2"]
    out = tmp_path / "out"

    def full(*_: object, **__: object) -> None:
        raise said

    with monkeypatch.context() as patched:
        patched.setattr(failing, full)
        assert run_cli(lambda: train("stage2", data, out, stage1, *settings)) == 1
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert not (out / "medllava.json").exists()
    assert not list(tmp_path.rglob("*.part"))
    assert train("stage2", data, out, stage1, *settings, "--resume") == 0


def test_plan_writes_nothing(data: Any, stage0: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert train("stage2", data, tmp_path / "out", stage0, "--plan") == 0
    assert "tokens per epoch" in caplog.text
    optim = load_training_recipe(RECIPES / "demo_stage2.yaml", []).optim
    assert f"{optim.steps} steps of {optim.batch_size} samples" in caplog.text
    assert "frozen" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_told_before_training(data: Any, stage0: Path, stage1: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='unknown key "optim.learning_rat"; did you mean "learning_rate"'):
        train("stage2", data, tmp_path / "out", stage1, "optim.learning_rat=1")
    with pytest.raises(ConfigError, match="exactly one of steps and epochs"):
        train("stage2", data, tmp_path / "out", stage1, "optim.epochs=1")
    with pytest.raises(ConfigError, match="add --init-from"):
        main(["--config", str(RECIPES / "demo_stage2.yaml"), *data.arguments, "--out", str(tmp_path / "out")])
    with pytest.raises(DataError, match="no such image file"):
        main([
            "--config", str(RECIPES / "demo_stage2.yaml"), "--data", str(data.file), "--images", str(tmp_path),
            "--out", str(tmp_path / "out"), "--init-from", str(stage1),
        ])
    with pytest.raises(DataError, match="exactly one assistant turn"):
        train("stage1", data, tmp_path / "out", stage0, "kinds=[grounding]")
    with pytest.raises(ConfigError, match="tower_layers is 3, but 2 layers of the vision tower make the features"):
        train("stage2", data, tmp_path / "out", stage1, "tower_layers=3")
    assert list(tmp_path.iterdir()) == []


def test_preview_shows_what_is_supervised(data: Any, stage0: Path, tmp_path: Path) -> None:
    out = tmp_path / "seen.jsonl"
    command = ["preview", "--tokenizer", str(stage0), "--chat-format", "medllava", "--data", str(data.file)]
    assert main([*command, "--out", str(out)]) == 0
    rows = {row["id"]: row for _, row in read_rows(out)}
    assert len(rows) == 81
    assert rows["t0"]["supervised"] == "A gland makes a secretion.</s>"
    assert rows["q0"]["prompt"].startswith("<s><|user|><image>\nWhere is the ")
    assert rows["q0"]["input_ids"].count(rows["q0"]["image_token_id"]) == 16
    assert len(rows["q0"]["input_ids"]) == len(rows["q0"]["labels"])


def test_schedules() -> None:
    cosine = Optim(steps=100, learning_rate=1, warmup=0.1)
    values = [schedule(cosine, step, 100) for step in range(100)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == pytest.approx(1.0)
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[-1] < 0.001
    onecycle = Optim(steps=100, learning_rate=1, warmup=0.3, schedule="onecycle")
    assert schedule(onecycle, 0, 100) == pytest.approx(0.04, abs=0.01)
    assert schedule(onecycle, 29, 100) == pytest.approx(1.0)
    constant = Optim(steps=100, learning_rate=1, warmup=0.0, schedule="constant")
    assert {schedule(constant, step, 100) for step in range(100)} == {1.0}
