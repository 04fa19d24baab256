"""From a cursor trace and an utterance to the region of interest that was pointed at meanwhile.

A box is drawn around the likeliest pointing spell of the utterance: the stretch of the trace that stays in the smallest
place for the longest time while the cursor moves. A cursor that rests or only travels shows nothing: no box.
(Quilt-LLaVA clusters the whole trace by K-means and matches clusters by time; see the README for how they compare.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from medllava.geometry import Box, clipped_box
from medllava.instruct_gen.records import TracePoint, Utterance

Floats = npt.NDArray[np.float64]

LEAD_S = 0.2
"""People are already at a finding when they begin to name it."""

SHORTEST_S = 0.7
"""Shortest pointing spell."""

LARGEST_AREA = 0.7
"""Boxes above this fraction of the image show nothing in particular (as in Quilt-LLaVA)."""

SMALLEST_SIDE = 0.015
"""Boxes with a side below this fraction of the image's are widened to it."""

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


def ground(utterance: Utterance, trace: Sequence[TracePoint], size: tuple[int, int]) -> Box | None:
    """The region pointed at during ``utterance``; None if the cursor showed none.

    ``size``: width and height of the image in pixels, which give the trace its true proportions.
    """
    rows = [
        (p.t_s, p.x * size[0], p.y * size[1])
        for p in trace
        if utterance.start_s - LEAD_S <= p.t_s <= utterance.end_s
    ]
    if len(rows) < 4:
        return None
    diagonal = float(np.hypot(*size))
    t_s, x, y = np.array(rows, dtype=np.float64).T
    xy = np.stack([x, y], 1) / diagonal
    spell = _pointing_spell(t_s, xy)
    if spell is None or not _is_deliberate(xy[spell]):
        return None
    wanders = _wanders(t_s[spell], xy[spell])
    return _box(xy[spell] * diagonal, size, wanders)


def _pointing_spell(t_s: Floats, xy: Floats) -> slice | None:
    """The stretch of at least SHORTEST_S that is least likely by chance: many moving points in a small place."""
    step = np.hypot(*np.diff(xy, axis=0).T)
    speed = step / np.maximum(np.diff(t_s), 1e-3)
    moves = np.concatenate([speed[:1], np.maximum(speed[:-1], speed[1:]), speed[-1:]]) > RESTING
    # A resting cursor is evidence of nothing, however small its place.
    weight = np.cumsum(np.concatenate([[0.0], np.where(moves, 1.0, 0.1)]))
    best, found = 0.0, None
    for first in range(len(t_s)):
        low, high = xy[first].copy(), xy[first].copy()
        for last in range(first + 1, len(t_s)):
            low, high = np.minimum(low, xy[last]), np.maximum(high, xy[last])
            if t_s[last] - t_s[first] < SHORTEST_S:
                continue
            area = float(np.prod(np.maximum(high - low, 0.03)))
            evidence = (weight[last + 1] - weight[first]) * -np.log(2 * area)
            if evidence > best:
                best, found = evidence, slice(first, last + 1)
    return found


def _is_deliberate(xy: Floats) -> bool:
    # Steps within the tracker's own unrest do not add up to a gesture.
    kept = [xy[0]]
    for point in xy[1:]:
        if np.hypot(*(point - kept[-1])) >= 0.002:
            kept.append(point)
    way = np.array(kept)
    path = float(np.hypot(*np.diff(way, axis=0).T).sum()) if len(way) > 1 else 0.0
    extent = float(np.hypot(*np.ptp(xy, axis=0)))
    return path >= SHORTEST_PATH and extent >= SMALLEST_EXTENT and path >= DELIBERATE * extent


def _wanders(t_s: Floats, xy: Floats) -> bool:
    """Is it a slow, small motion about a place, rather than one along an outline or over an area?"""
    extent = np.maximum(np.ptp(xy, axis=0), 1e-6)
    path = np.hypot(*np.diff(xy, axis=0).T).sum()
    rate = path / np.hypot(*extent) / (t_s[-1] - t_s[0])
    about = xy - (xy.max(0) + xy.min(0)) / 2
    angle = np.unwrap(np.arctan2(about[:, 1], about[:, 0]))
    turns = abs(angle[-1] - angle[0]) / (2 * np.pi)
    return bool(rate < SLOW and turns < 0.95 and extent[1] >= UNDERLINE * extent[0])


def _box(xy: Floats, size: tuple[int, int], wanders: bool) -> Box | None:
    """A padded box (0..1) around the 5-95 % range of the points (pixels)."""
    (x1, y1), (x2, y2) = np.quantile(xy, (0.05, 0.95), axis=0)
    if y2 - y1 < UNDERLINE * (x2 - x1):
        y1 = y2 - (x2 - x1)
    pad = PAD + (MIDDLE - 1) / 2 * wanders
    across, down = pad * (x2 - x1), pad * (y2 - y1)
    across = max(across, (SMALLEST_SIDE * size[0] - (x2 - x1)) / 2)
    down = max(down, (SMALLEST_SIDE * size[1] - (y2 - y1)) / 2)
    box = clipped_box((x1 - across) / size[0], (y1 - down) / size[1], (x2 + across) / size[0], (y2 + down) / size[1])
    return box if box is not None and box.area <= LARGEST_AREA else None
