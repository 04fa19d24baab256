"""What the tests of whole commands share: a way to run them, a few videos, a checkpoint, a full disk."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Several processes of this suite share few cores: threads that wait for each other must not spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

REPOSITORY = Path(__file__).resolve().parents[1]

Run = Callable[..., subprocess.CompletedProcess[str]]


def command(*arguments: object) -> list[str]:
    """``medllava`` with ``arguments`` as a person types it: ("eval", "answer", "--out", ...)."""
    return [sys.executable, "-m", "medllava", *map(str, arguments)]


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a command to its end in a process of its own; text of stdout and stderr is kept."""

    def run_command(*arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments), cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run_command


@pytest.fixture(scope="session")
def phantoms(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two short narrated videos with transcripts and truth."""
    out = tmp_path_factory.mktemp("phantoms") / "videos"
    done = run("phantom", "--out", out, "--videos", 2, "--seed", 11, "--fields", 3)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def narrated(run: Run, phantoms: Path) -> Path:
    """What ``narrate`` makes of them."""
    out = phantoms.parent / "narrated"
    done = run("instruct_gen", "narrate", "--videos", phantoms, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def teacher() -> Iterator[str]:
    """The address of a running phantom teacher."""
    process = subprocess.Popen(
        command("phantom.teacher", "--port", 0), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    yield process.stdout.readline().split()[-1]
    process.terminate()
    process.wait()


@pytest.fixture(scope="session")
def checkpoint(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a very small model with random weights."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    done = run("model", "tiny", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount an empty disk of a given size (``"64k"``); skips where this needs rights that the tests do not have."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        disk = tmp_path / f"disk-{size}-{len(mounted)}"
        disk.mkdir()
        if os.geteuid() != 0:
            pytest.skip("a disk of a chosen size can be mounted by root only")
        options = ["-t", "tmpfs", "-o", f"size={size}"]
        made = subprocess.run(["mount", *options, "tmpfs", str(disk)], capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"no disk can be mounted here: {made.stderr.strip()}")
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
