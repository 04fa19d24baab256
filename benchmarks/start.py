"""How long a person waits before anything happens, and what an installation weighs.

    python benchmarks/start.py [--quick] [--demo demo-out]

Times of commands are CPU seconds of whole processes (medians), so that other work on the machine does not count. The
worker opens a very small model; what it waits for is the import of torch and transformers, which is the limit. The
demo's times are read from a finished one. Weights are those of the packages as installed here, with all that they need.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
from packaging.requirements import Requirement
from record import arguments, finish, row

from medllava.serve.web import free_port

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = "import torch; from transformers import LlavaForConditionalGeneration"


def main() -> int:
    parser = arguments(__doc__, "start")
    parser.add_argument("--demo", type=Path, default=ROOT / "demo-out", help="a finished demo (default: demo-out)")
    given = parser.parse_args()
    rounds = 1 if given.quick else 5
    notes: list[str] = []
    rows = [*_commands(rounds, quick=given.quick), *_servers(given), *_demo(given.demo, notes), *_weights(notes)]
    return finish(given.out, rows, ". ".join(notes))


def _commands(rounds: int, *, quick: bool) -> list[dict[str, Any]]:
    """Importing, and ``--help`` of every command."""
    from medllava.__main__ import COMMANDS

    bare = _median(rounds, "-c", "pass")
    rows = [row(
        "start.import_medllava", _median(rounds, "-c", "import medllava"), "CPU s", baseline="Python alone",
        baseline_value=bare,
    )]
    shown = list(COMMANDS)[:2] if quick else list(COMMANDS)
    for name in shown:
        seconds = _median(rounds, "-m", "medllava", *name.split(), "--help")
        rows.append(row(
            f"start.help_{re.sub('[^a-z_]', '_', name)}", seconds, "CPU s", baseline="Python alone",
            baseline_value=bare, most=1.0,
        ))
    return rows


def _servers(given: argparse.Namespace) -> list[dict[str, Any]]:
    """From the command to a worker that answers, and from there to a page that can be used."""
    from medllava.model.tiny import tiny_checkpoint

    libraries = _median(1, "-c", LIBRARIES)
    with tempfile.TemporaryDirectory() as name:
        model = tiny_checkpoint(Path(name) / "tiny")
        began = time.perf_counter()
        worker = subprocess.Popen(
            [sys.executable, "-m", "medllava.serve.worker", "--model-path", str(model), "--port", "0"],
            stdout=subprocess.PIPE, text=True,
        )
        try:
            assert worker.stdout is not None
            url = worker.stdout.readline().removeprefix("listening on ").strip()
            listening, listening_cpu = time.perf_counter() - began, _cpu_of(worker.pid)
            if not worker.stdout.readline().startswith("ready"):
                raise SystemExit("the worker did not start; its own message is above")
            ready, ready_cpu = time.perf_counter() - began, _cpu_of(worker.pid)
            port = free_port("127.0.0.1", 0)
            began = time.perf_counter()
            web = subprocess.Popen(
                [sys.executable, "-m", "medllava.serve.web", "--worker", url, "--port", str(port)],
                stdout=subprocess.DEVNULL,
            )
            try:
                _until(lambda: httpx.get(f"http://127.0.0.1:{port}/", timeout=5).status_code == 200, web)
                usable, usable_cpu = time.perf_counter() - began, _cpu_of(web.pid)
            finally:
                web.terminate()
                web.wait()
        finally:
            worker.terminate()
            worker.wait()
    imports = {"baseline": "importing torch and transformers", "baseline_value": libraries}
    return [
        row("start.worker_listening", listening_cpu, "CPU s"),
        row("start.worker_listening_wall", listening, "s"),
        row("start.worker_ready", ready_cpu, "CPU s", limit=libraries, **imports),
        row("start.worker_ready_wall", ready, "s"),
        row("start.web_usable_after_worker", usable_cpu, "CPU s"),
        row("start.web_usable_after_worker_wall", usable, "s"),
    ]


def _demo(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Minutes of each step of a finished demo, as it wrote them down; of an older one, from when its steps ended."""
    from medllava.demo import FULL, plan
    from medllava.jsonl import read_json

    markers = [folder / ".done" / f"{step.name}.json" for step in plan(folder, 0, FULL)]
    if not all(marker.is_file() for marker in markers):
        notes.append("No finished demo was found, so its times are not among the rows")
        return []
    notes.append("The demo's times are those of the machine that it ran on, whatever else it did")
    rows, total, before = [], 0.0, (folder / ".lock").stat().st_ctime
    before = min(before, (folder / "demo.json").stat().st_mtime)
    for marker in markers:
        ended = marker.stat().st_mtime
        seconds = read_json(marker).get("seconds", ended - before)
        before = ended
        total += seconds
        rows.append(row(f"start.demo_{marker.stem.replace('-', '_')}", seconds, "s"))
    return [*rows, row("start.demo", total, "s", most=1200)]


def _weights(notes: list[str]) -> list[dict[str, Any]]:
    """MB that the packages of an installation take on disk; of an extra, those that the base does not have."""
    extras = sorted(metadata.metadata("medllava").get_all("Provides-Extra") or [])
    base = _closure("medllava", "")
    rows = [row("start.weight_base", _megabytes(base), "MB")]
    absent = {}
    for extra in extras:
        needed = _closure("medllava", extra) - base
        missing = sorted(name for name in needed if _installed(name) is None)
        if missing:
            absent[extra] = missing
        else:
            rows.append(row(f"start.weight_{extra.replace('-', '_')}", _megabytes(needed), "MB"))
    if absent:
        listed = "; ".join(f"{extra} (without {', '.join(missing)})" for extra, missing in absent.items())
        notes.append(f"Not weighed, because not installed here as a whole: {listed}")
    return rows


def _closure(package: str, extra: str) -> set[str]:
    """The packages that ``package`` with ``extra`` needs here, itself left out; also those that are not installed."""
    found: set[str] = set()
    waiting = [(package, extra)]
    seen = set()
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        installed = _installed(name)
        for text in (installed.requires or []) if installed else []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": wanted}):
                other = re.sub(r"[-_.]+", "-", needed.name).lower()
                found.add(other)
                waiting += [(other, each) for each in ("", *needed.extras)]
    return found - {package}


def _installed(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def _megabytes(packages: set[str]) -> float:
    total = 0
    for name in packages:
        installed = _installed(name)
        for file in (installed.files or []) if installed else []:
            path = Path(str(installed.locate_file(file))) if installed else Path()
            total += path.stat().st_size if path.is_file() else 0
    return total / 1e6


def _median(rounds: int, *command: str) -> float:
    """CPU seconds of a Python process."""
    seconds = []
    for _ in range(rounds):
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"python {' '.join(command)} ended with {process.returncode}")
        seconds.append(usage.ru_utime + usage.ru_stime)
    return statistics.median(seconds)


def _cpu_of(pid: int) -> float:
    """CPU seconds that a running process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _until(ready: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    for _ in range(1200):
        if process.poll() is not None:
            raise SystemExit("the web chat ended; its own message is above")
        try:
            if ready():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit("the web chat did not answer for two minutes")


if __name__ == "__main__":
    sys.exit(main())
