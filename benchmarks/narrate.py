"""Benchmark of ``narrate``: how right it is on videos with known truth, and what it costs, beside the papers' way.

    python benchmarks/narrate.py [--clips DIR] [--quick] [--videos 8] [--seed 900] [--out FILE]

The videos are phantoms and, with --clips, those of a folder of NAME.mp4, NAME.words.json and NAME.truth.json. The
papers' way is benchmarks/naive.py on the same files. CPU seconds and peak memory are those of whole processes with one
worker each; the cost as a multiple of PyAV decoding every frame is measured in one process, medians of three runs.
--quick takes a minute of small video and is for testing the benchmark itself.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import write_result
from truth import figures

NAIVE = "the papers' way"
MIB = 400
"""Most memory that narrate may take, whatever the length of a video."""


@dataclass(frozen=True)
class Cost:
    """CPU seconds and peak resident memory of a process."""

    cpu_s: float
    peak_mib: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, help="folder of clips with known truth, measured as well")
    parser.add_argument("--quick", action="store_true", help="two small phantoms only")
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--seed", type=int, default=900)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "narrate.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = _measure(Path(name), arguments)
    write_result(arguments.out, rows)
    return 0 if all(row["holds"] is not False for row in rows) else 1


def _measure(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    videos, large = folder / "phantoms", folder / "large"
    size = ["--videos", 2, "--fields", 4] if arguments.quick else ["--videos", arguments.videos]
    _phantoms(videos, arguments.seed, *size)
    # Whole processes come first: a child inherits its parent's peak memory, and the cost against PyAV is in this one.
    rows = _beside("phantoms", videos, folder / "a")
    if arguments.clips is not None:
        rows += _beside("clips", arguments.clips, folder / "b")
    if not arguments.quick:
        _phantoms(large, arguments.seed, "--videos", 1, "--fields", 4, "--width", 1280, "--height", 720, "--fps", 30)
        rows += _costs("1280x720 at 30 fps", *_both(large, folder / "c"))
    rows.append(_against_decoding("CPU, 320x240 at 8 fps", sorted(videos.glob("*.mp4"))[:3], folder / "d", limit=None))
    if not arguments.quick:
        rows.append(_against_decoding("CPU, 1280x720 at 30 fps", sorted(large.glob("*.mp4")), folder / "e", limit=1.3))
    if arguments.clips is not None:
        rows.append(_against_decoding("CPU, clips", sorted(arguments.clips.glob("*.mp4")), folder / "f", limit=1.3))
    return rows


def _beside(name: str, videos: Path, out: Path) -> list[dict[str, Any]]:
    """Figures of narrate on a folder of videos, and of the papers' way."""
    ours, naive = _both(videos, out)
    rows = [
        _row(f"{name}: {figure}", value, unit, NAIVE, other, limit, target)
        for (figure, value, unit, limit, target), (_, other, *_) in zip(
            figures(videos, out / "ours"), figures(videos, out / "naive"), strict=True
        )
    ]
    return rows + _costs(name, ours, naive)


def _both(videos: Path, out: Path) -> tuple[Cost, Cost]:
    narrate = ("-m", "medllava", "instruct_gen", "narrate", "--workers", 1)
    return (
        _cost_of(*narrate, "--videos", videos, "--out", out / "ours"),
        _cost_of(Path(__file__).with_name("naive.py"), "--videos", videos, "--out", out / "naive"),
    )


def _costs(name: str, ours: Cost, naive: Cost) -> list[dict[str, Any]]:
    return [
        _row(f"{name}: CPU", ours.cpu_s, "s", NAIVE, naive.cpu_s, "max", None),
        _row(f"{name}: peak memory", ours.peak_mib, "MiB", NAIVE, naive.peak_mib, "max", MIB),
    ]


def _cost_of(*command: object) -> Cost:
    process = subprocess.Popen([sys.executable, *map(str, command)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return Cost(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def _phantoms(out: Path, seed: int, *options: object) -> None:
    command = ["phantom", "--out", out, "--seed", seed, *options]
    subprocess.run([sys.executable, "-m", "medllava", *map(str, command)], check=True)


def _against_decoding(figure: str, files: list[Path], out: Path, limit: float | None) -> dict[str, Any]:
    """CPU time as a multiple of that of decoding every frame of the same files."""
    import av

    from medllava.instruct_gen.narrator import narrate

    def decode() -> None:
        for file in files:
            with av.open(str(file)) as container:
                container.streams.video[0].thread_type = "SLICE"
                for _ in container.decode(video=0):
                    pass

    def work() -> None:
        for file in files:
            narrate(file, file.with_suffix(".words.json"), out)

    (out / "frames").mkdir(parents=True)
    multiple = _median_cpu_s(work) / _median_cpu_s(decode)
    return _row(figure, multiple, "x decoding", "PyAV decodes every frame", 1.0, "max", limit)


def _median_cpu_s(work: Callable[[], None]) -> float:
    seconds = []
    for _ in range(3):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def _row(
    figure: str, value: float, unit: str, baseline: str, other: float, limit: str, target: float | None
) -> dict[str, Any]:
    """A row in which ``target`` is for ``value``. ``ratio`` is value over baseline."""
    met = None if target is None else value >= target if limit == "min" else value <= target
    return {
        "figure": figure, "value": round(value, 4), "unit": unit, "baseline": baseline,
        "baseline_value": round(other, 4), "ratio": round(value / other, 2) if other else None, "limit": limit,
        "target": target, "holds": met,
    }


if __name__ == "__main__":
    sys.exit(main())
