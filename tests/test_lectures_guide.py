"""docs/your-own-lectures.md: every command of the page is run, in order, in one shell, on small lectures.

Blocks marked ``bash`` are run as they stand (only the teacher's port is changed for a free one). Blocks marked ``sh``
are shown only, since they need a network, a key or a person; the flags in them must be flags that the commands know.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "your-own-lectures.md"
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PORT = "8100"


def blocks(language: str) -> list[str]:
    return [text for name, text in FENCED.findall(PAGE.read_text()) if name == language]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout, in which the page's commands leave their files."""
    folder = tmp_path_factory.mktemp("guide")
    for name in ("instruct_gen", "train", "eval"):
        (folder / name).symlink_to(REPOSITORY / name)
    shims = {"python": f'exec "{sys.executable}" "$@"', "medllava": f'exec "{sys.executable}" -m medllava "$@"'}
    (folder / "bin").mkdir()
    for name, line in shims.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / "bin" / name).chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def done(workplace: Path) -> subprocess.CompletedProcess[str]:
    """The page, run from its first command to its last."""
    script = "set -euo pipefail\n" + "\n".join(blocks("bash")).replace(PORT, free_port())
    environment = {
        **os.environ, "PATH": f"{workplace / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY),
        "XDG_CACHE_HOME": str(workplace / "cache"), "HF_HUB_OFFLINE": "1",
    }
    # Files, not pipes: nobody would read these before the end, and progress bars can fill them. The teacher, started in
    # the background, has to go too.
    out, err = workplace / "out.txt", workplace / "err.txt"
    with out.open("w") as told, err.open("w") as warned:
        process = subprocess.Popen(
            ["bash", "-c", script], cwd=workplace, env=environment, stdout=told, stderr=warned, start_new_session=True
        )
        try:
            code = process.wait(timeout=800)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(script, code, out.read_text(), err.read_text())


def test_every_command_succeeds(done: subprocess.CompletedProcess[str], workplace: Path) -> None:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    assert not list((workplace / "lectures").glob("*.json"))
    for name in (
        "narrated/captions.jsonl", "data/train.json", "data/datacard.html", "data/DATACARD.md", "data/train_clean.json",
        "stage1/finished.json", "adapter/adapter_model.safetensors", "merged/config.json", "report/report.html",
    ):
        assert (workplace / name).stat().st_size, name


def test_what_the_commands_made_fits_together(done: subprocess.CompletedProcess[str], workplace: Path) -> None:
    card = json.loads((workplace / "data" / "datacard.json").read_text())
    train = json.loads((workplace / "data" / "train.json").read_text())
    val = json.loads((workplace / "data" / "val.json").read_text())
    assert card["samples"] == len(train) + len(val)
    assert card["split"]["leaks"] == []
    assert len({row["provenance"]["video"] for row in val}) >= 2
    assert json.loads((workplace / "data" / "train_clean.json").read_text()) == train
    report = json.loads((workplace / "report" / "report.json").read_text())
    assert report["metrics"]["box_iou"]["n"] > 0
    assert set(report["ablations"]) == {"no_image", "blank", "noise", "mismatched"}
    reply = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    assert json.loads(reply)


def test_flags_of_the_commands_that_are_only_shown() -> None:
    shown = [line for text in blocks("sh") for line in text.splitlines() if line.startswith("medllava ")]
    assert shown
    for line in shown:
        words = shlex.split(line, comments=True)[1:]
        steps = [word for word in words[:2] if not word.startswith("-")]
        told = subprocess.run(
            [sys.executable, "-m", "medllava", *steps, "--help"], cwd=REPOSITORY, capture_output=True, text=True,
            check=True,
        ).stdout
        for flag in (word for word in words if word.startswith("--")):
            assert flag in told, f"{line}: {flag}"


def test_links_and_files_of_the_page_exist() -> None:
    page = PAGE.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]*)?\)", page):
        assert (PAGE.parent / target).exists(), target
    for path in re.findall(r"\b(?:instruct_gen|train|eval)/(?:recipes|prompts|benchmarks)/[\w.]*", page):
        assert (REPOSITORY / path).exists(), path
