"""How right a folder of narratives and captions is, against videos whose truth is known (``NAME.truth.json``).

Static parts count from 3 s on; title slides count neither for nor against. A narrative and a static part are the same
if their times overlap by half of their union. A cursor place is right within 2 % of the frame's diagonal; between two
points of a trace up to LINKED_S apart it is interpolated. A phrase stands for a true utterance if it covers half of its
time.
"""

from __future__ import annotations

import bisect
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medllava.geometry import Box, box_from_pixels

LINKED_S, NEAR_S = 0.45, 0.21
"""Longest gap in a trace that is interpolated; how far before or after a lone point it still stands."""

Span = tuple[float, float]
Place = tuple[float, float]


@dataclass
class Tally:
    """Counts over all videos."""

    right_parts: int = 0
    parts: int = 0
    wrong_narratives: int = 0
    visible: int = 0
    reported: int = 0
    right_places: int = 0
    errors_px: list[float] = field(default_factory=list)
    overlaps: list[float] = field(default_factory=list)
    centres: list[bool] = field(default_factory=list)
    asides: list[bool] = field(default_factory=list)


def figures(videos: Path, narrated: Path) -> list[tuple[str, float, str, str, float]]:
    """(figure, value, unit, "min" or "max", target) over all videos with a truth in the folder."""
    narratives, captions = _lines(narrated / "narratives.jsonl"), _lines(narrated / "captions.jsonl")
    tally = Tally()
    for path in sorted(videos.glob("*.truth.json")):
        truth, stem = json.loads(path.read_text()), path.name.removesuffix(".truth.json")
        mine = [row for row in narratives if Path(row["video"]).stem == stem]
        parts = _count_parts(tally, truth, mine)
        _count_cursor(tally, truth, mine, parts)
        _count_phrases(tally, truth, [row for row in captions if Path(row["video"]).stem == stem])
    share, pixels = "share", "px at 720 lines"
    return [
        ("static chunks, recall", _ratio(tally.right_parts, tally.parts), share, "min", 0.97),
        (
            "static chunks, precision", _ratio(tally.right_parts, tally.right_parts + tally.wrong_narratives), share,
            "min", 0.97,
        ),
        ("cursor within 2 %, recall", _ratio(tally.right_places, tally.visible), share, "min", 0.95),
        ("cursor within 2 %, precision", _ratio(tally.right_places, tally.reported), share, "min", 0.93),
        ("cursor, median error", statistics.median(tally.errors_px or [float("inf")]), pixels, "max", 2.5),
        ("phrase box, mean IoU", _ratio(sum(tally.overlaps), len(tally.overlaps)), share, "min", 0.5),
        ("phrase box, centre in the finding", _ratio(sum(tally.centres), len(tally.centres)), share, "min", 0.85),
        ("asides given a box", _ratio(sum(tally.asides), len(tally.asides)), share, "max", 0.1),
    ]


def _count_parts(tally: Tally, truth: dict[str, Any], mine: list[dict[str, Any]]) -> list[Span]:
    """Count static parts found; returns the true ones."""
    counted = [kind == "tissue" and end_s - start_s >= 3 for start_s, end_s, kind in truth["static"]]
    parts = [(part[0], part[1]) for part, counts in zip(truth["static"], counted, strict=True) if counts]
    exempt = [(part[0], part[1]) for part, counts in zip(truth["static"], counted, strict=True) if not counts]
    left = list(parts)
    for row in mine:
        span = (row["start_s"], row["end_s"])
        best = max(left, key=lambda part: _shared(span, part) / _joint(span, part), default=None)
        if best is not None and _shared(span, best) >= 0.5 * _joint(span, best):
            left.remove(best)
            tally.right_parts += 1
        elif not any(_shared(span, part) >= 0.5 * (span[1] - span[0]) for part in exempt):
            tally.wrong_narratives += 1
    tally.parts += len(parts)
    return parts


def _count_cursor(tally: Tally, truth: dict[str, Any], mine: list[dict[str, Any]], parts: list[Span]) -> None:
    fps, width, height = truth["fps"], truth["width"], truth["height"]
    near = 0.02 * (width**2 + height**2) ** 0.5
    webcam = truth["webcam_px"]
    for start_s, end_s in parts:
        points = sorted(
            (point[0], *_in_frame(row["crop_px"], point[1], point[2]))
            for row in mine for point in row["trace"] if start_s <= point[0] <= end_s
        )
        times = [point[0] for point in points]
        for frame in range(int(start_s * fps) + 1, int(end_s * fps)):
            true = truth["cursor_xy_px"][frame]
            if true and webcam and webcam[0] <= true[0] <= webcam[2] and webcam[1] <= true[1] <= webcam[3]:
                continue
            place = _place_at(frame / fps, points, times)
            tally.visible += true is not None
            tally.reported += place is not None
            if true and place:
                error = ((place[0] - true[0]) ** 2 + (place[1] - true[1]) ** 2) ** 0.5
                tally.errors_px.append(error * 720 / height)
                tally.right_places += error <= near


def _place_at(time_s: float, points: list[tuple[float, float, float]], times: list[float]) -> Place | None:
    at = bisect.bisect(times, time_s)
    if 0 < at < len(points) and times[at] - times[at - 1] <= LINKED_S:
        (before_s, x0, y0), (after_s, x1, y1) = points[at - 1], points[at]
        share = (time_s - before_s) / (after_s - before_s) if after_s > before_s else 0.0
        return x0 + share * (x1 - x0), y0 + share * (y1 - y0)
    close = [point for point in points[max(0, at - 1) : at + 1] if abs(point[0] - time_s) <= NEAR_S]
    nearest = min(close, key=lambda point: abs(point[0] - time_s), default=None)
    return nearest[1:] if nearest is not None else None


def _count_phrases(tally: Tally, truth: dict[str, Any], captions: list[dict[str, Any]]) -> None:
    phrases = [
        ((phrase["start_s"], phrase["end_s"]), phrase["box"], row["crop_px"])
        for row in captions for phrase in row["phrases"]
    ]
    for utterance in truth["utterances"]:
        span = (utterance["start"], utterance["end"])
        best = max(phrases, key=lambda phrase: _shared(span, phrase[0]), default=None)
        box = None
        if best is not None and best[1] and _shared(span, best[0]) >= 0.5 * (span[1] - span[0]):
            corners = *_in_frame(best[2], *best[1][:2]), *_in_frame(best[2], *best[1][2:])
            box = box_from_pixels(*corners, truth["width"], truth["height"])
        if utterance["grounded"] and utterance["box"]:
            true = Box.model_validate(utterance["box"])
            tally.overlaps.append(box.iou(true) if box else 0.0)
            tally.centres.append(box is not None and true.contains(box.centre))
        elif not utterance["grounded"]:
            tally.asides.append(box is not None)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _in_frame(crop_px: list[int], x: float, y: float) -> Place:
    x0, y0, x1, y1 = crop_px
    return x0 + x * (x1 - x0), y0 + y * (y1 - y0)


def _shared(a: Span, b: Span) -> float:
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0]))


def _joint(a: Span, b: Span) -> float:
    return max(a[1], b[1]) - min(a[0], b[0])


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
