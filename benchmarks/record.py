"""How a benchmark writes its result: rows of figures with their baseline, and where and on what they were measured."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from medllava.jsonl import write_json

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("medllava", "torch", "transformers", "numpy", "av", "opencv-python-headless")


@dataclass(frozen=True)
class Cost:
    """Wall and CPU seconds of a process with its children, and the peak of the memory that they hold together, in
    MiB."""

    wall_s: float
    cpu_s: float
    peak_mib: float


def row(
    figure: str, value: float, unit: str, *, baseline: str | None = None, baseline_value: float | None = None,
    ratio: float | None = None, limit: float | None = None, least: float | None = None, most: float | None = None,
) -> dict[str, Any]:
    """One figure. ``baseline``: what a user would take instead, and its value on the same work in the same run.
    ``limit``: what the machine or the other side allows at best, in the same unit. ``least`` or ``most``: the target
    for ``value``, if there is one. ``ratio``: value over baseline unless given."""
    if ratio is None and baseline_value:
        ratio = value / baseline_value
    target = most if least is None else least
    return {
        "figure": figure, "value": value, "unit": unit, "baseline": baseline, "baseline_value": baseline_value,
        "ratio": ratio, "limit": limit, "target": target,
        "holds": None if target is None else value >= target if least is not None else value <= target,
        "better": None if target is None else "more" if least is not None else "less",
    }


def write_result(path: Path, rows: list[dict[str, Any]], note: str = "") -> None:
    """Write ``path`` and print the rows as one table. ``note``: what a reader must know of how they came about."""
    rows = [_uniform(each) for each in rows]
    print(f"{'figure':<48}{'ours':>10}{'baseline':>12}{'limit':>10}  {'unit':<16}{'target':<12}{'holds':<8}baseline is")
    for each in rows:
        target = "" if each["target"] is None else f"{'>=' if each['better'] == 'more' else '<='} {each['target']:g}"
        holds = {True: "yes", False: "NO", None: ""}[each["holds"]]
        other, limit = ("" if each[name] is None else f"{each[name]:.5g}" for name in ("baseline_value", "limit"))
        print(
            f"{each['figure']:<48}{each['value']:>10.5g}{other:>12}{limit:>10}  {each['unit']:<16}{target:<12}"
            f"{holds:<8}{each['baseline'] or ''}"
        )
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    write_json(path, {
        "rows": rows, "commit": commit.stdout.strip(),
        "versions": {name: metadata.version(name) for name in PACKAGES}, "machine": machine(),
    } | ({"note": note} if note else {}))


def finish(path: Path, rows: list[dict[str, Any]], note: str = "") -> int:
    """Write the result; the exit code says whether every target was met."""
    write_result(path, rows, note)
    return int(any(each["holds"] is False for each in rows))


def machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def arguments(description: str | None, name: str) -> argparse.ArgumentParser:
    """The flags that every benchmark has: --quick and --out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small, in seconds: that it runs, no figures of speed")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    return parser


def cost_of(command: Sequence[object], *, environment: dict[str, str] | None = None, quiet: bool = False) -> Cost:
    """What a Python command costs. Its memory is its own high-water mark, not that of the process that started it, or
    what it and its children were seen to hold, pages that they share counted once, if that is more."""
    told = subprocess.DEVNULL if quiet else None
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, __file__, *map(str, command)], env={**os.environ, **(environment or {})}, stdout=told,
        stderr=subprocess.PIPE, text=True,
    )
    assert process.stderr is not None
    with ThreadPoolExecutor(1) as thread:
        held = thread.submit(_most_held_mib, process.pid)
        said = process.stderr.read()
        together_mib = held.result()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{said[-2000:]}")
    peak = next(line for line in reversed(said.splitlines()) if line.startswith("VmHWM"))
    peak_mib = max(int(peak.split()[1]) / 1024, together_mib)
    return Cost(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, peak_mib)


def _most_held_mib(pid: int, every_s: float = 0.5) -> float:
    """The most memory that a process with its children held at any look; ends when the process does."""
    most, process = 0, psutil.Process(pid)
    with suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:
            held = 0
            for each in (process, *process.children(recursive=True)):
                with suppress(psutil.Error):
                    held += each.memory_full_info().pss
            most = max(most, held)
            time.sleep(every_s)
    return most / 2**20


def paired(one: Callable[[], float], other: Callable[[], float], rounds: int = 3) -> tuple[float, float]:
    """Medians of two measurements taken in turns, so that other work on the machine falls on both."""
    values = [(one(), other()) for _ in range(rounds)]
    first, second = zip(*values, strict=True)
    return statistics.median(first), statistics.median(second)


def cpu_s(work: Callable[[], object]) -> float:
    """CPU seconds that this process takes for ``work``."""
    began = time.process_time()
    work()
    return time.process_time() - began


def wall_s(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _uniform(given: dict[str, Any]) -> dict[str, Any]:
    """A row whose ``limit`` names the direction of its target, as some scripts write it, as all others are."""
    if "better" in given:
        return given
    directions = {"min": "more", ">=": "more", "max": "less", "<=": "less"}
    better = directions.get(given["limit"]) if given["target"] is not None else None
    limit = given["limit"] if isinstance(given["limit"], int | float) else None
    return {**given, "limit": limit, "better": better}


def _run_and_tell_memory() -> None:
    """Child of :func:`cost_of`: run ``-m MODULE ...`` or a script, then say on stderr what memory it took at most."""
    import runpy

    sys.argv = sys.argv[1:]
    try:
        if sys.argv[0] == "-m":
            name, sys.argv = sys.argv[1], sys.argv[1:]
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(sys.argv[0]).parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        status = Path("/proc/self/status").read_text()
        print(next(line for line in status.splitlines() if line.startswith("VmHWM")), file=sys.stderr)


if __name__ == "__main__":
    _run_and_tell_memory()
