"""From a cursor trace and an utterance to the region of interest that was pointed at meanwhile.

A box is drawn around the likeliest pointing spell of the utterance: the stretch of the trace that stays in the smallest
place for the longest time while the cursor moves. A cursor that rests or only travels shows nothing: no box.
(Quilt-LLaVA clusters the whole trace by K-means and matches clusters by time: :mod:`.clusters`; see the README for how
they compare.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from medllava.geometry import Box, clipped_box
from medllava.instruct_gen.clusters import published_runs
from medllava.instruct_gen.records import Phrase, TracePoint, Utterance

Floats = npt.NDArray[np.float64]

LEAD_S = 0.2
"""People are already at a finding when they begin to name it."""

SHORTEST_S = 0.7
"""Shortest pointing spell."""

LARGEST_AREA = 0.7
"""Boxes above this fraction of the image show nothing in particular (as in Quilt-LLaVA)."""

SMALLEST_SIDE = 0.015
"""Boxes with one side below this fraction of the image's are widened to it; with both, they show nothing."""

RESTING = 0.012
"""Speed, in image diagonals a second, below which a cursor rests."""

DELIBERATE = 1.2
"""Path length of a gesture over the diagonal of its extent; a straight way from here to there has 1."""

SHORTEST_PATH, SMALLEST_EXTENT = 0.02, 0.007
"""Path length and extent, in image diagonals, below which nothing was shown."""

PAD = 0.09
"""Share of the gesture's extent by which its box is widened on each side."""

UNDERLINE = 0.2
"""Flatter than this (height over width), a gesture is taken for an underline: the finding is above it."""

SLOW = 0.85
"""Path, in extents a second, below which a gesture that does not go round wanders about the middle of a finding."""

MIDDLE = 2.4
"""Size of a finding over that of a wander about its middle."""


ONCE_ROUND = 3.0
"""Path over extent of a gesture that goes about once round (a circle's is pi); more of it makes a box no surer."""

BLUR = 0.02
"""Extent, in image diagonals, at which the tracker's error, padding and trimming make half of a box."""

GUESSED = 0.5
"""Factor to the confidence of boxes whose size follows from a rule of thumb: wanders and underlines."""

NO_CURSOR, RESTS, PASSES, TOO_SMALL, TOO_LARGE = "no cursor", "rests", "passes", "too small", "too large"
"""Why a phrase gets no box."""

NO_CLUSTER = "no cluster"
"""The same for the published rule."""

Mode = Literal["pointing", "paper"]
"""The rules by which phrases get their boxes: this module's and the published one."""


@dataclass(frozen=True)
class Pointing:
    """What the cursor showed during an utterance: a box with its confidence (0..1), or the reason for none.

    Confidence is high where the track is sure and without gaps, and where a gesture goes round something large enough
    to be told from the tracker's unrest. It orders boxes by how well they fit; it is no probability.
    """

    box: Box | None = None
    confidence: float | None = None
    reason: str | None = None


def grounded_phrases(
    said: Sequence[Utterance], trace: Sequence[TracePoint], size: tuple[int, int], mode: Mode, seed: int
) -> tuple[list[Phrase], Counter[str]]:
    """One phrase for each utterance of a chunk, and how many have no box for which reason.

    ``seed`` is for ``paper``; the other mode has no use for chance. ``size``: width and
    height of the image in pixels.
    """
    found = _published(said, trace, size, seed) if mode == "paper" else [ground(one, trace, size) for one in said]
    phrases = [
        Phrase(text=one.text, start_s=one.start_s, end_s=one.end_s, box=shown.box, confidence=shown.confidence)
        for one, shown in zip(said, found, strict=True)
    ]
    return phrases, Counter(shown.reason for shown in found if shown.reason is not None)


def _published(
    said: Sequence[Utterance], trace: Sequence[TracePoint], size: tuple[int, int], seed: int
) -> list[Pointing]:
    points = np.array([(p.t_s, p.x, p.y) for p in trace], np.float64).reshape(-1, 3)
    runs = published_runs(points, [one.end_s for one in said], [len(one.text.split()) for one in said], size, seed=seed)
    boxes = [clipped_box(*run.corners) if run.corners else None for run in runs for _ in run.utterances]
    return [Pointing(box) if box else Pointing(reason=NO_CLUSTER) for box in boxes]


def ground(utterance: Utterance, trace: Sequence[TracePoint], size: tuple[int, int]) -> Pointing:
    """The region pointed at during ``utterance``.

    ``size``: width and height of the image in pixels, which give the trace its true proportions.
    """
    during = [p for p in trace if utterance.start_s - LEAD_S <= p.t_s <= utterance.end_s]
    if len(during) < 4:
        return Pointing(reason=NO_CURSOR)
    diagonal = float(np.hypot(*size))
    t_s, x, y, sure = np.array([(p.t_s, p.x * size[0], p.y * size[1], p.confidence) for p in during], np.float64).T
    xy = np.stack([x, y], 1) / diagonal
    spell = _pointing_spell(t_s, xy)
    if spell is None:
        return Pointing(reason=RESTS)
    t_s, xy = t_s[spell], xy[spell]
    path, extent = _motion(xy)
    if path < SHORTEST_PATH or extent < SMALLEST_EXTENT:
        return Pointing(reason=RESTS)
    if path < DELIBERATE * extent:
        return Pointing(reason=PASSES)
    wanders = _wanders(t_s, xy)
    box, underlines = _box(xy * diagonal, size, wanders)
    if box is None or box.area > LARGEST_AREA:
        return Pointing(reason=TOO_SMALL if box is None else TOO_LARGE)
    confidence = sure[spell].mean() * min(path / extent / ONCE_ROUND, 1.0) * extent / (extent + BLUR)
    return Pointing(box, round(float(confidence) * (GUESSED if wanders or underlines else 1.0), 3))


def _pointing_spell(t_s: Floats, xy: Floats) -> slice | None:
    """The stretch of at least SHORTEST_S that is least likely by chance: many moving points in a small place."""
    step = np.hypot(*np.diff(xy, axis=0).T)
    speed = step / np.maximum(np.diff(t_s), 1e-3)
    moves = np.concatenate([speed[:1], np.maximum(speed[:-1], speed[1:]), speed[-1:]]) > RESTING
    # A resting cursor is evidence of nothing, however small its place.
    weight = np.cumsum(np.concatenate([[0.0], np.where(moves, 1.0, 0.1)]))
    best, found = 0.0, None
    for first in range(len(t_s)):
        extent = np.maximum.accumulate(xy[first:]) - np.minimum.accumulate(xy[first:])
        area = np.prod(np.maximum(extent, 0.03), axis=1)
        evidence = (weight[first + 1 :] - weight[first]) * -np.log(2 * area)
        evidence[t_s[first:] - t_s[first] < SHORTEST_S] = 0
        longest = int(evidence.argmax())
        if evidence[longest] > best:
            best, found = float(evidence[longest]), slice(first, first + longest + 1)
    return found


def _motion(xy: Floats) -> tuple[float, float]:
    """Length of the way and diagonal of its extent."""
    # Steps within the tracker's own unrest do not add up to a gesture.
    kept = [xy[0]]
    for point in xy[1:]:
        if np.hypot(*(point - kept[-1])) >= 0.002:
            kept.append(point)
    way = np.array(kept)
    path = float(np.hypot(*np.diff(way, axis=0).T).sum()) if len(way) > 1 else 0.0
    return path, float(np.hypot(*np.ptp(xy, axis=0)))


def _wanders(t_s: Floats, xy: Floats) -> bool:
    """Is it a slow, small motion about a place, rather than one along an outline or over an area?"""
    extent = np.maximum(np.ptp(xy, axis=0), 1e-6)
    path = np.hypot(*np.diff(xy, axis=0).T).sum()
    rate = path / np.hypot(*extent) / (t_s[-1] - t_s[0])
    about = xy - (xy.max(0) + xy.min(0)) / 2
    angle = np.unwrap(np.arctan2(about[:, 1], about[:, 0]))
    turns = abs(angle[-1] - angle[0]) / (2 * np.pi)
    return bool(rate < SLOW and turns < 0.95 and extent[1] >= UNDERLINE * extent[0])


def _box(xy: Floats, size: tuple[int, int], wanders: bool) -> tuple[Box | None, bool]:
    """A padded box (0..1) around the 5-95 % range of the points (pixels), None if it is too small; and was it drawn
    above an underline?"""
    (x1, y1), (x2, y2) = np.quantile(xy, (0.05, 0.95), axis=0)
    underlines = bool(y2 - y1 < UNDERLINE * (x2 - x1))
    if underlines:
        y1 = y2 - (x2 - x1)
    pad = PAD + (MIDDLE - 1) / 2 * wanders
    across, down = pad * (x2 - x1), pad * (y2 - y1)
    short_x = (SMALLEST_SIDE * size[0] - (x2 - x1)) / 2
    short_y = (SMALLEST_SIDE * size[1] - (y2 - y1)) / 2
    if across < short_x and down < short_y:
        return None, underlines
    across, down = max(across, short_x), max(down, short_y)
    box = clipped_box((x1 - across) / size[0], (y1 - down) / size[1], (x2 + across) / size[0], (y2 + down) / size[1])
    return box, underlines
