"""The whole street once, on tissue this project draws itself: videos -> data -> training -> scores -> web chat.

Every step is the ordinary command a person would run on real data, started as a process of its own and shown as it
starts. A finished step leaves a marker that names its command; a second run of the same demo goes on from there.

example: medllava demo --out demo-out --seed 0 --no-web
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from medllava import __version__
from medllava.errors import ConfigError, MedllavaError, ServiceError, run_cli
from medllava.jsonl import read_json, write_json
from medllava.processes import end_with_parent

ROOT = Path(__file__).resolve().parent.parent
SUMMARY = ("where", "yes_no", "what", "count", "box_iou")


@dataclass(frozen=True)
class Step:
    """One command of the street. ``minutes`` is its usual time on two cores, for the estimate of what is left.

    ``folder``: of ``out``, if the command goes on there only with what it began with.
    """

    name: str
    title: str
    command: list[str]
    minutes: float
    needs_teacher: bool = False
    folder: str | None = None


@dataclass(frozen=True)
class Size:
    """How much of everything: the demo's own size, or one small enough for a test (its scores mean nothing)."""

    videos: int
    held_out: int
    fields: int
    per_kind: int
    overrides: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def of(self, stage: str) -> list[str]:
        return [value for name, values in self.overrides if name == stage for value in values]


FULL = Size(videos=160, held_out=30, fields=12, per_kind=300)
QUICK = Size(
    videos=6, held_out=2, fields=4, per_kind=10,
    overrides=(
        ("stage0", ("contrastive.optim.steps=8", "language.optim.steps=8")),
        ("stage1", ("optim.steps=6",)),
        ("stage2", ("optim.steps=12",)),
    ),
)


def plan(out: Path, seed: int, size: Size) -> list[Step]:
    """The steps in order, as the commands a person would type. TEACHER stands for the teacher's address."""
    train_videos, held_videos = out / "videos", out / "held-out" / "videos"
    data, held = out / "data", out / "held-out"
    recipes = ROOT / "train" / "recipes"

    def train(stage: str, *more: str) -> list[str]:
        return [
            "train", "--config", str(recipes / f"demo_{stage}.yaml"), "--data", str(data / "train.json"),
            "--images", str(out / "narrated"), "--out", str(out / stage), "--resume", *more, f"seed={seed}",
            *size.of(stage),
        ]

    return [
        Step("videos", "narrated videos for training", [
            "phantom", "--out", str(train_videos), "--videos", str(size.videos), "--seed", str(seed),
            "--fields", str(size.fields),
        ], 0.9),
        Step("held-out-videos", "narrated videos that training never sees", [
            "phantom", "--out", str(held_videos), "--videos", str(size.held_out), "--seed", str(seed + 500_000),
            "--fields", str(size.fields),
        ], 0.3),
        Step("narrate", "video + speech -> stable chunks, cursor traces, grounded captions", [
            "instruct_gen", "narrate", "--videos", str(train_videos), "--out", str(out / "narrated"),
        ], 1.0),
        Step("narrate-held-out", "the same for the held-out videos", [
            "instruct_gen", "narrate", "--videos", str(held_videos), "--out", str(held / "narrated"),
        ], 0.3),
        Step("generate", "grounded captions -> instruction samples, written by the teacher", [
            "instruct_gen", "generate", "--captions", str(out / "narrated" / "captions.jsonl"), "--out", str(data),
            "--config", str(ROOT / "instruct_gen" / "recipes" / "demo.yaml"), "--base-url", "TEACHER",
        ], 0.5, needs_teacher=True),
        Step("stage0", "foundation: image encoder and language model, from scratch", train(
            "stage0"
        ), 6.4, folder="stage0"),
        Step("stage1", "instruction tuning, stage 1: projector only", train(
            "stage1", "--init-from", str(out / "stage0")
        ), 0.3, folder="stage1"),
        Step("stage2", "instruction tuning, stage 2: projector and LoRA", train(
            "stage2", "--init-from", str(out / "stage1"), "--eval-data", str(data / "val.json")
        ), 2.3, folder="stage2"),
        Step("questions", "questions about the held-out videos, from their truth", [
            "phantom.questions", "--videos", str(held_videos), "--narratives",
            str(held / "narrated" / "narratives.jsonl"), "--out", str(held / "questions.jsonl"), "--seed", str(seed),
            "--per-kind", str(size.per_kind),
        ], 0.1),
        Step("answer", "answers, with the right picture and with none, blank, noise, another's", [
            "eval", "answer", "--benchmark", str(ROOT / "eval" / "benchmarks" / "phantom.yaml"), "--questions",
            str(held / "questions.jsonl"), "--images", str(held / "narrated"), "--model-path", str(out / "stage2"),
            "--out", str(out / "report"),
        ], 1.0, folder="report"),
        Step("report", "scores and report", [
            "eval", "report", "--benchmark", str(ROOT / "eval" / "benchmarks" / "phantom.yaml"), "--questions",
            str(held / "questions.jsonl"), "--images", str(held / "narrated"), "--out", str(out / "report"),
        ], 0.2),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="medllava demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for everything (default: demo-out)")
    parser.add_argument("--seed", type=int, default=0, help="another seed: other videos, other weights (default: 0)")
    parser.add_argument("--no-web", action="store_true", help="stop after the report")
    parser.add_argument("--port", type=int, default=7860, help="port of the web chat (default: 7860)")
    parser.add_argument(
        "--quick", action="store_true", help="a few videos and steps, to see that it runs; its scores mean nothing"
    )
    arguments = parser.parse_args(argv)
    if not (ROOT / "train" / "recipes").is_dir():
        raise ConfigError(f"the demo runs from a checkout: {ROOT} has no train/recipes; clone the repository first")
    out: Path = arguments.out
    size = QUICK if arguments.quick else FULL
    steps = plan(out, arguments.seed, size)
    started = time.monotonic()
    with _only_one(out):
        _same_demo(out, {"seed": arguments.seed, "quick": arguments.quick})
        _run_all(steps, out)
    _summary(out / "report" / "report.json", time.monotonic() - started)
    if arguments.no_web:
        return 0
    return _start([
        "serve.web", "--model-path", str(out / "stage2"), "--examples", str(out / "held-out" / "narrated" / "frames"),
        "--port", str(arguments.port),
    ]).wait()


def _same_demo(out: Path, settings: dict[str, object]) -> None:
    """One folder holds one demo: videos of two seeds in it would be narrated together."""
    record = out / "demo.json"
    if not record.is_file():
        write_json(record, settings)
    elif (before := read_json(record)) != settings:
        raise ConfigError(f"{out}: holds the demo of {before}, not of {settings}; choose another --out")


def _run_all(steps: list[Step], out: Path) -> None:
    usual = sum(step.minutes for step in steps)
    begun, done_minutes = time.monotonic(), 0.0
    earlier = ""
    for number, step in enumerate(steps, start=1):
        marker = out / ".done" / f"{step.name}.json"
        # A step's key holds the keys before it: redo everything downstream of what changed, nothing upstream.
        told = json.dumps([earlier, __version__, _portable(step.command, out)])
        earlier = hashlib.sha256(told.encode()).hexdigest()
        head = f"[{number}/{len(steps)}] {step.title}"
        if _finished(marker, earlier):
            print(f"{head}: done before", flush=True)
            usual -= step.minutes
            continue
        spent = (time.monotonic() - begun) / 60
        pace = spent / done_minutes if done_minutes > 0.5 else 1.0
        print(f"\n{head}   (about {max(1, round((usual - done_minutes) * pace))} min left)", flush=True)
        _start_anew_if_changed(step, out, earlier)
        started = time.monotonic()
        if step.needs_teacher:
            with _teacher() as address:
                _run(step, [address if word == "TEACHER" else word for word in step.command])
        else:
            _run(step, step.command)
        done_minutes += step.minutes
        seconds = round(time.monotonic() - started, 1)
        write_json(marker, {"key": earlier, "command": step.command, "seconds": seconds})


def _start_anew_if_changed(step: Step, out: Path, key: str) -> None:
    """Training and answering go on only with what they began with; what the demo itself began otherwise is removed."""
    if step.folder is None:
        return
    folder, done, begun = out / step.folder, *(out / ".done" / f"{step.name}{end}" for end in (".json", ".begun.json"))
    record = next((file for file in (begun, done) if file.is_file()), None)
    if folder.exists() and record and read_json(record).get("key") != key:
        print(f"    {folder} was made with other settings or data (an edited recipe?): starting it anew", flush=True)
        done.unlink(missing_ok=True)
        shutil.rmtree(folder)
    write_json(begun, {"key": key})


def _portable(command: list[str], out: Path) -> list[str]:
    """The command without the places of this checkout and this output folder, so that both may be moved; the checkout's
    own files in it (recipes) by their content, so that an edited one counts as another command."""
    told = []
    for word in command:
        told.append(word.replace(str(out), "OUT").replace(str(ROOT), "ROOT"))
        if word.startswith(str(ROOT)) and Path(word).is_file() and not word.startswith(str(out)):
            told.append(hashlib.sha256(Path(word).read_bytes()).hexdigest())
    return told


def _finished(marker: Path, key: str) -> bool:
    if not marker.is_file():
        return False
    return bool(read_json(marker).get("key") == key)


def _run(step: Step, command: list[str]) -> None:
    print(f"    medllava {shlex.join(command)}", flush=True)
    code = _start(command).wait()
    if code:
        what = f"was ended by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise MedllavaError(f"step {step.name!r} {what} (see above); run the demo again to go on from this step")


def _start(command: list[str], stdout: int | None = None) -> subprocess.Popen[str]:
    module, *arguments = command
    # One thread in the numerics libraries: these models are so small that more threads only wait for each other, and
    # where a recipe asks for two, they must not spin while they wait.
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", f"medllava.{module}", *arguments], env=environment, stdout=stdout, text=True,
        preexec_fn=partial(end_with_parent, os.getpid()),  # when the demo is killed, nothing runs on unseen
    )


@contextmanager
def _teacher() -> Iterator[str]:
    """Start the phantom teacher on a free port; yields its base URL."""
    process = _start(["phantom.teacher", "--port", "0"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "http://" not in line:
            raise ServiceError("the phantom teacher did not start; its own message is above")
        yield line.split()[-1]
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Hold a lock on the output folder: two runs in one folder take turns, the second then finds finished steps."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        _wait_for(lock, out)
        yield


def _wait_for(lock: IO[str], out: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another run is at work in {out}; waiting for it to end", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _summary(report: Path, seconds: float) -> None:
    content = read_json(report)
    print(f"\nscores on videos never seen in training ({seconds / 60:.1f} minutes in this run)\n")
    print(f"{'':<10}{'score':>7}  {'95 % interval':<16}{'mismatched image':>18}")
    for name in SUMMARY:
        metric = content["metrics"].get(name)
        if metric is None or metric["value"] is None:
            continue
        other = content["ablations"].get("mismatched", {}).get(name, {}).get("value")
        wrong = f"{other:.3f}" if other is not None else "-"
        print(f"{name:<10}{metric['value']:>7.3f}  {metric['low']:.3f} - {metric['high']:.3f}   {wrong:>18}")
    print(f"\nreport: {report.with_suffix('.html')}", flush=True)


if __name__ == "__main__":
    sys.exit(run_cli(main))
