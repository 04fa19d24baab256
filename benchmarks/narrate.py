"""Benchmark of ``narrate`` on phantom videos: how right it is against their truth, and its CPU cost against decoding.

    python benchmarks/narrate.py [--videos 8] [--seed 900] [--out benchmarks/results/narrate.json]

The baseline of the cost is PyAV decoding every frame of the same files in the same process; of three runs of each, the
medians count. Figures of accuracy are 0..1; a cursor point is right within 2 % of the frame's diagonal.
"""

from __future__ import annotations

import argparse
import bisect
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import write_result

from medllava.geometry import Box, box_from_pixels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--seed", type=int, default=900)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "narrate.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        videos, narrated = Path(folder, "videos"), Path(folder, "narrated")
        _run("phantom", "--out", videos, "--videos", arguments.videos, "--seed", arguments.seed)
        _run("instruct_gen", "narrate", "--videos", videos, "--out", narrated)
        rows = [_row(name, value, "share", limit, target) for name, value, limit, target in accuracy(videos, narrated)]
        small = sorted(videos.glob("*.mp4"))[:3]
        large = Path(folder, "large")
        _run(
            "phantom", "--out", large, "--videos", 1, "--seed", arguments.seed, "--fields", 4, "--width", 1280,
            "--height", 720, "--fps", 30,
        )
        rows.append(_cost("CPU, 320x240 at 8 fps", small, Path(folder, "a"), limit=None))
        rows.append(_cost("CPU, 1280x720 at 30 fps", sorted(large.glob("*.mp4")), Path(folder, "b"), limit=1.3))
    write_result(arguments.out, rows)
    return 0 if all(row["holds"] is not False for row in rows) else 1


def accuracy(videos: Path, narrated: Path) -> list[tuple[str, float, str, float]]:
    """(figure, value, "min" or "max", target) over all videos of the folder."""
    narratives, captions = _lines(narrated / "narratives.jsonl"), _lines(narrated / "captions.jsonl")
    found = wanted = right_spans = shown = reported = near = asides = boxed_asides = 0
    overlaps: list[float] = []
    for path in sorted(videos.glob("*.truth.json")):
        truth = json.loads(path.read_text())
        name = path.name.replace(".truth.json", ".mp4")
        mine = [row for row in narratives if row["video"] == name]
        spans = [span[:2] for span in truth["static"] if span[2] == "tissue" and span[1] - span[0] >= 3]
        wanted, reported_spans = wanted + len(spans), len(mine)
        right = sum(any(_span_iou(span, (row["start_s"], row["end_s"])) >= 0.5 for row in mine) for span in spans)
        right_spans, found = right_spans + right, found + reported_spans
        width, height, fps = truth["width"], truth["height"], truth["fps"]
        limit = 0.02 * (width**2 + height**2) ** 0.5
        for row in mine:
            points = [_to_frame(row["crop_px"], point) for point in row["trace"]]
            times = [point[0] for point in points]
            for frame in range(int(row["start_s"] * fps) + 1, int(row["end_s"] * fps)):
                at = bisect.bisect(times, frame / fps)
                close = [p for p in points[max(0, at - 1) : at + 1] if abs(p[0] - frame / fps) <= 0.21]
                best = min(close, key=lambda p: abs(p[0] - frame / fps), default=None)
                true = truth["cursor_xy_px"][frame]
                shown, reported = shown + (true is not None), reported + (best is not None)
                if true and best:
                    near += ((best[1] - true[0]) ** 2 + (best[2] - true[1]) ** 2) ** 0.5 <= limit
        said = [(phrase, row["crop_px"]) for row in captions if row["video"] == name for phrase in row["phrases"]]
        for utterance in truth["utterances"]:
            phrase, crop = max(
                said, key=lambda pair: _overlap((utterance["start"], utterance["end"]), pair[0]), default=(None, None)
            )
            if phrase is None or _overlap((utterance["start"], utterance["end"]), phrase) <= 0:
                continue
            if not utterance["grounded"]:
                asides, boxed_asides = asides + 1, boxed_asides + (phrase["box"] is not None)
            elif utterance["box"]:
                box = _box_to_frame(crop, phrase["box"], width, height) if phrase["box"] else None
                overlaps.append(box.iou(Box.model_validate(utterance["box"])) if box else 0.0)
    return [
        ("static chunks, recall", right_spans / wanted, "min", 0.97),
        ("static chunks, precision", right_spans / found, "min", 0.97),
        ("cursor within 2 %, recall", near / shown, "min", 0.95),
        ("cursor within 2 %, precision", near / reported, "min", 0.93),
        ("phrase box, mean IoU", statistics.fmean(overlaps), "min", 0.5),
        ("asides given a box", boxed_asides / max(asides, 1), "max", 0.1),
    ]


def _cost(figure: str, files: list[Path], out: Path, limit: float | None) -> dict[str, Any]:
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
    baseline, value = _median_cpu_s(decode), _median_cpu_s(work)
    ratio = value / baseline
    return {
        "figure": figure, "value": round(value, 3), "unit": "CPU s", "baseline": "PyAV decodes every frame",
        "baseline_value": round(baseline, 3), "ratio": round(ratio, 2), "limit": "max", "target": limit,
        "holds": None if limit is None else ratio <= limit,
    }


def _median_cpu_s(work: Callable[[], None]) -> float:
    seconds = []
    for _ in range(3):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def _row(figure: str, value: float, unit: str, limit: str, target: float) -> dict[str, Any]:
    holds = value >= target if limit == "min" else value <= target
    return {
        "figure": figure, "value": round(value, 4), "unit": unit, "baseline": None, "baseline_value": None,
        "ratio": None, "limit": limit, "target": target, "holds": holds,
    }


def _run(*command: object) -> None:
    subprocess.run([sys.executable, "-m", "medllava", *map(str, command)], check=True)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _span_iou(a: Any, b: Any) -> float:
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return shared / (max(a[1], b[1]) - min(a[0], b[0]))


def _overlap(span: tuple[float, float], phrase: dict[str, Any]) -> float:
    return min(span[1], phrase["end_s"]) - max(span[0], phrase["start_s"])


def _to_frame(crop: list[int], point: list[float]) -> tuple[float, float, float]:
    x0, y0, x1, y1 = crop
    return point[0], x0 + point[1] * (x1 - x0), y0 + point[2] * (y1 - y0)


def _box_to_frame(crop: list[int], box: list[float], width: int, height: int) -> Box | None:
    _, left, top = _to_frame(crop, [0, box[0], box[1]])
    _, right, bottom = _to_frame(crop, [0, box[2], box[3]])
    return box_from_pixels(left, top, right, bottom, width, height)


if __name__ == "__main__":
    sys.exit(main())
