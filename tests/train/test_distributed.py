"""Two processes learn what one does: text-only rows beside pictures, uneven batches, packing, DDP, ZeRO-2, ZeRO-3."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from medllava.errors import CheckpointError, ConfigError
from medllava.jsonl import read_rows
from medllava.model import checkpoint
from medllava.train.__main__ import main
from medllava.train.dataset import Order

TRAIN = Path(__file__).parents[2] / "train"
ZERO = {stage: ["--deepspeed", str(TRAIN / "deepspeed" / f"zero{stage}.json")] for stage in (2, 3)}
needs_deepspeed = pytest.mark.skipif(
    not (importlib.util.find_spec("deepspeed") and shutil.which("g++")),
    reason="deepspeed (extra gpu) is not installed, or g++ for its parts on the CPU",
)
COUNT = 11


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples without a picture, with one, and with two in two turns."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = []
    for number in range(COUNT):
        images = [f"{number}-{count}.png" for count in range((0, 1, 0, 2)[number % 4])]
        for name in images:
            Image.effect_noise((50 + number, 70), 90).convert("RGB").save(folder / name)
        tags = ["<image>\n" if count < len(images) else "" for count in range(2)]
        turns = []
        for tag in tags:
            turns += [{"from": "human", "value": tag + "Where is the gland?" + " Say it." * (number % 3)}]
            turns += [{"from": "gpt", "value": "In the upper left." + " A vessel." * (number % 5)}]
        rows.append({"id": f"m{number}", "kind": "vqa", "image": images, "conversations": turns})
        if not images:
            del rows[-1]["image"]
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def command(mixed: Path, start: Path, out: Path, *settings: str) -> list[str]:
    paths = ["--data", str(mixed / "data.json"), "--images", str(mixed), "--init-from", str(start), "--out", str(out)]
    shared = ["log_every=1", "chat_format=medllava", "optim.batch_size=2", "optim.steps=8", "lora.r=2", "flip=false"]
    shared += ["split_exchanges=false", "threads=1", "kinds=[vqa]", "kind_weights={}"]
    return ["--config", str(TRAIN / "recipes" / "demo_stage2.yaml"), *paths, *shared, *settings]


def two_processes(commands: list[dict[str, Any]], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "commands.json").write_text(json.dumps(commands))
    worker = str(Path(__file__).parent / "run_commands.py")
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TRAIN.parent)}
    done = subprocess.run(
        [*start, worker, str(folder / "commands.json")], env=environment, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr[-3000:]


def losses(out: Path) -> list[float]:
    return [row["loss"] for _, row in read_rows(out / "train_log.jsonl")]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoint.load(path, device="cpu").model.state_dict())


def same(one: Path, other: Path) -> None:
    assert losses(other) == pytest.approx(losses(one), abs=1e-5)
    before, after = weights(one), weights(other)
    assert before.keys() == after.keys()
    # Equal but for the order of sums.
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-4


def test_some_step_has_pictures_in_one_process_alone_and_some_has_none() -> None:
    pictured = [number % 4 in (1, 3) for number in range(COUNT)]
    steps = [[pictured[index] for index in batch] for epoch in (0, 1) for batch in Order(COUNT, 2, seed=0).epoch(epoch)]
    assert [True, False] in steps[:8]
    assert [False, True] in steps[:8]
    assert [False, False] in steps[:8] or [False] in steps[:8]
    assert any(len(batch) == 1 for batch in steps[:8])


STAGES = {
    "projector": ["stage=projector", "cache_features=false"],
    "lora": ["stage=lora", "packing=true", "max_length=300", "optim.batch_size=4", "optim.accumulate=2"],
    "full": ["stage=full", "tower_layers=1", "optim.accumulate=2", "optim.learning_rate=1e-3"],
}


@pytest.fixture(scope="module")
def alone(mixed: Path, stage0: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stages run by one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name, settings in STAGES.items():
        assert main(command(mixed, stage0, folder / name, *settings)) == 0
    return folder


def test_two_processes_learn_what_one_does_in_every_stage(
    mixed: Path, stage0: Path, alone: Path, tmp_path: Path
) -> None:
    two_processes(
        [{"arguments": command(mixed, stage0, tmp_path / name, *settings)} for name, settings in STAGES.items()],
        tmp_path,
    )
    for name in STAGES:
        same(alone / name, tmp_path / name)


def test_two_nodes_learn_what_one_process_does(mixed: Path, stage0: Path, alone: Path, tmp_path: Path) -> None:
    """Two launches of the file for several nodes meet on a port and are one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "HOST": "127.0.0.1", "PORT": str(port), "NODES": "2", "PER_NODE": "1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(TRAIN.parent), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    launch = ["bash", str(TRAIN / "launch" / "torchrun.sh")]
    arguments = command(mixed, stage0, tmp_path / "lora", *STAGES["lora"])
    nodes = [
        subprocess.Popen([*launch, *arguments], env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        said = [node.communicate(timeout=800)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "".join(said)[-3000:]
    same(alone / "lora", tmp_path / "lora")
    assert sum("memory per device (2)" in told for told in said) == 1, "one of the nodes tells how it goes"


def test_packing_learns_what_padding_does(mixed: Path, stage0: Path, alone: Path, tmp_path: Path) -> None:
    unpacked = [setting for setting in STAGES["lora"] if "packing" not in setting]
    assert main(command(mixed, stage0, tmp_path / "out", *unpacked, "length_grouping=false")) == 0
    same(tmp_path / "out", alone / "lora")


@needs_deepspeed
def test_zero_2_and_3_learn_what_one_process_does_and_go_on_after_a_kill(
    mixed: Path, stage0: Path, alone: Path, tmp_path: Path
) -> None:
    commands: list[dict[str, Any]] = []
    for stage in (2, 3):
        for name, settings in STAGES.items():
            arguments = command(mixed, stage0, tmp_path / f"{name}-{stage}", *settings, *ZERO[stage], "save_every=3")
            if name == "full":
                commands += [{"arguments": arguments, "stop_at": 6}, {"arguments": [*arguments, "--resume"]}]
            else:
                commands.append({"arguments": arguments})
    two_processes(commands, tmp_path)
    for stage in (2, 3):
        for name in STAGES:
            out = tmp_path / f"{name}-{stage}"
            same(alone / name, out)
            # Every save is a checkpoint that can be used: nothing in it is spread over processes.
            assert weights(out / "step-000006").keys() == weights(out).keys()
            assert not list(out.rglob("zero"))


@needs_deepspeed
def test_a_run_goes_on_only_with_the_engine_it_began_with(mixed: Path, stage0: Path, tmp_path: Path) -> None:
    arguments = command(mixed, stage0, tmp_path / "out", *ZERO[2], "save_every=2")
    two_processes([{"arguments": arguments, "stop_at": 4}], tmp_path)
    plain = [argument for argument in arguments if argument not in ZERO[2]]
    with pytest.raises(CheckpointError, match="saved with --deepspeed and 2 processes; go on in the same way"):
        main([*plain, "--resume"])


def test_deepspeed_without_processes_or_with_a_wrong_file_is_told(mixed: Path, stage0: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--deepspeed needs processes: torchrun"):
        main(command(mixed, stage0, tmp_path / "out", *ZERO[2]))
    for written, said in (
        ({"zero_optimization": {}}, "zero_optimization.stage 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2}, "train_batch_size": 8}, "train_batch_size come from the recipe"),
    ):
        (tmp_path / "zero.json").write_text(json.dumps(written))
        with pytest.raises(ConfigError, match=said):
            main(command(mixed, stage0, tmp_path / "out", "--deepspeed", str(tmp_path / "zero.json")))
    assert not (tmp_path / "out").exists()
