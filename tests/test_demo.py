"""The whole street at its smallest: once undisturbed, once more, and killed at several moments of its way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medllava import demo

Run = Callable[..., subprocess.CompletedProcess[str]]

STEPS = 11
METRICS = {"where", "yes_no", "what", "count", "box_iou"}
CONDITIONS = {"no_image", "blank", "noise", "mismatched"}
SAME = (
    "narrated/narratives.jsonl", "narrated/captions.jsonl", "data/samples.jsonl", "data/llava.json", "data/train.json",
    "data/val.json", "data/case_facts.jsonl", "held-out/questions.jsonl", "report/answers.jsonl",
    "stage2/adapter_model.safetensors", "stage2/projector.safetensors",
)
"""Files that are the same to the byte however often a run was killed."""


def arguments(out: Path) -> list[str]:
    return ["demo", "--quick", "--no-web", "--seed", "3", "--out", str(out)]


@pytest.fixture(scope="module")
def finished(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("demo") / "undisturbed"
    done = run(*arguments(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("medllava ") >= STEPS  # each step shows the command that a person would type
    assert f"report: {out / 'report' / 'report.html'}" in done.stdout
    return out


def test_one_command_ends_in_a_report(finished: Path) -> None:
    report = json.loads((finished / "report" / "report.json").read_text())
    assert report["metrics"].keys() >= METRICS
    assert report["ablations"].keys() == CONDITIONS
    for name in METRICS:
        metric = report["metrics"][name]
        assert metric.keys() >= {"value", "low", "high", "n", "unscored"}
        assert metric["n"] > 0
        assert metric["unscored"] == 0
        assert 0 <= metric["low"] <= metric["value"] <= metric["high"] <= 1
        assert all(0 <= report["ablations"][condition][name]["value"] <= 1 for condition in CONDITIONS)
    for name in ("report.md", "report.html"):
        text = (finished / "report" / name).read_text()
        assert all(metric in text for metric in METRICS)
    assert "data:image/" in (finished / "report" / "report.html").read_text()


def test_every_stage_leaves_its_loss_curve_and_checkpoint(finished: Path) -> None:
    for name in ("stage0/contrastive", "stage0/language", "stage1", "stage2"):
        with Image.open(finished / name / "loss.png") as picture:
            picture.load()
            assert min(picture.size) > 300
        assert list((finished / name / "tensorboard").glob("events.out.tfevents.*"))
    kinds = {name: json.loads((finished / name / "medllava.json").read_text())["kind"] for name in
             ("stage0", "stage1", "stage2")}
    assert kinds == {"stage0": "full", "stage1": "projector", "stage2": "lora"}


def test_a_dry_run_tells_what_the_teacher_will_take(
    finished: Path, run: Run, repository: Path, tmp_path: Path
) -> None:
    """Calls, prompt and reply tokens told before the first call, within 5 % of those then used. Replies about a whole
    video's case grow with its length, which here is a third of the demo's."""
    done = run(
        "instruct_gen", "generate", "--captions", finished / "narrated" / "captions.jsonl", "--out", tmp_path,
        "--config", repository / "instruct_gen" / "recipes" / "demo.yaml", "--dry-run",
        "--base-url", "http://127.0.0.1:9/v1",
    )
    assert done.returncode == 0, done.stderr
    told = {
        line[:22].strip(): [int(number.replace(",", "")) for number in line[22:].split()[1:4]]
        for line in done.stdout.splitlines() if line.startswith(("total", "case facts"))
    }
    calls, prompt_tokens, reply_tokens = told["total"]
    used = json.loads((finished / "data" / "summary.json").read_text())
    replies = [json.loads(line)["reply"] for line in (finished / "data" / "replies.jsonl").read_text().splitlines()]
    about_samples = sum(reply["completion_tokens"] for reply in replies if "single_case" not in reply["text"])
    assert calls == used["replies"]
    assert prompt_tokens == pytest.approx(used["prompt_tokens"], rel=0.05)
    assert reply_tokens - told["case facts"][2] == pytest.approx(about_samples, rel=0.05)


def test_a_stage_of_other_settings_is_started_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = demo.Step("stage1", "", ["train"], 1.0, folder="stage1")
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "run.json").write_text("{}")
    demo._start_anew_if_changed(step, tmp_path, "a")  # of an earlier version, without a record: train itself decides
    demo._start_anew_if_changed(step, tmp_path, "a")  # killed and run again
    assert (tmp_path / "stage1" / "run.json").is_file()
    (tmp_path / ".done" / "stage1.json").write_text('{"key": "a"}')
    demo._start_anew_if_changed(step, tmp_path, "b")
    assert "starting it anew" in capsys.readouterr().out
    assert not (tmp_path / "stage1").exists()
    # Else the step would pass for done if somebody went back to the first settings.
    assert not (tmp_path / ".done" / "stage1.json").exists()


def test_held_out_videos_are_not_those_of_training(finished: Path) -> None:
    rows = json.loads((finished / "data" / "llava.json").read_text())
    trained = {Path(row["image"]).name for row in rows if "image" in row}
    lines = (finished / "held-out" / "questions.jsonl").read_text().splitlines()
    asked = {Path(json.loads(line)["image"]).name for line in lines}
    assert trained and asked
    assert trained.isdisjoint(asked)


def test_a_second_run_does_nothing_again_even_in_another_place(
    finished: Path, run: Run, tmp_path: Path, seconds_of_children: Callable[[], float]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    before = {path: path.stat().st_mtime_ns for path in moved.rglob("*") if path.name != ".lock"}
    began = seconds_of_children()
    done = run(*arguments(moved))
    assert done.returncode == 0, done.stderr
    assert seconds_of_children() - began < 10
    assert done.stdout.count("done before") == STEPS
    assert {path: path.stat().st_mtime_ns for path in moved.rglob("*") if path.name != ".lock"} == before


# -- kill -9


class Killable:
    """A run of the demo, and every process that came out of it, known by a mark in its environment."""

    def __init__(self, out: Path, repository: Path, log: Path) -> None:
        self._mark = f"MEDLLAVA_TEST_RUN={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "medllava", *arguments(out)], cwd=repository, env={**os.environ, name: value},
                stdout=file, stderr=file, start_new_session=True,
            )

    def alive(self) -> list[str]:
        """The command lines of the processes that are still there."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                marked = self._mark.encode() in (folder / "environ").read_bytes().split(b"\0")
                state = (folder / "stat").read_text().rpartition(") ")[2][0]
                if marked and state != "Z":
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:  # it ended meanwhile, or is not ours
                continue
        return found

    def kill(self, *, parent_only: bool) -> None:
        if parent_only:
            self.process.kill()
        else:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(repository: Path, tmp_path: Path) -> Iterator[Callable[[Path], Killable]]:
    started: list[Killable] = []

    def begin(out: Path) -> Killable:
        started.append(Killable(out, repository, tmp_path / "log"))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            one.kill(parent_only=False)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


# When the kill comes: as soon as the step has begun to leave something behind.
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "videos": lambda out: any((out / "videos").glob(".*.part")) or any((out / "videos").glob("*.mp4")),
    "narrate": lambda out: any((out / "narrated" / "parts").glob("*.jsonl")),
    "generate": lambda out: lines(out / "data" / "replies.jsonl") > 3,
    "stage2": lambda out: (out / "stage2" / "run.json").is_file(),
    "answer": lambda out: lines(out / "report" / "answers.jsonl") > 3,
}


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("parent_only", "steps"),
    [(True, ["videos", "narrate", "generate", "stage2"]), (False, ["videos", "generate", "answer"])],
    ids=["only the demo itself", "with all it started"],
)
def test_kill_9_loses_nothing_repeats_nothing_and_leaves_no_process(
    parent_only: bool, steps: list[str], finished: Path, start: Any, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    replies = out / "data" / "replies.jsonl"
    kept = b""
    for step in steps:
        demo = start(out)
        deadline = time.monotonic() + 120
        while not MOMENTS[step](out):
            assert demo.process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.001)
        demo.kill(parent_only=parent_only)
        assert not (out / ".done" / f"{step}.json").exists()
        gone = time.monotonic() + 60
        while demo.alive() and time.monotonic() < gone:
            time.sleep(0.05)
        assert demo.alive() == []
        if replies.is_file():
            written = replies.read_bytes()
            assert written.startswith(kept)
            kept = written[: written.rfind(b"\n") + 1]
    assert 3 < kept.count(b"\n") <= lines(finished / "data" / "replies.jsonl")

    last = start(out)
    assert last.process.wait(300) == 0, (tmp_path / "log").read_text()
    # Replies that were there stay as they were, and no request is asked twice.
    whole = replies.read_bytes()
    assert whole.startswith(kept)
    keys = [json.loads(line)["key"] for line in whole.splitlines()]
    undisturbed = [json.loads(line)["key"] for line in (finished / "data" / "replies.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys))
    assert sorted(keys) == sorted(undisturbed)
    for name in SAME:
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name
