"""From spots to the cursor's path: the likeliest sequence of spots, where "not visible" is always an answer.

A cursor keeps its looks and moves continuously; noise, subtitles and ghosts do one or the other, seldom both. A first
pass asks only for that. What its moving parts look like then becomes the cursor's own appearance, and a second pass
asks for likeness with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medllava.instruct_gen.cursor import Floats, Patch, Spots

MEMORY = 8
"""Frames over which a path may jump without seeing the cursor."""

LINKED_TOGETHER = 64
"""Frames whose ways from spot to spot are computed at once."""

RESTART = 4.0
"""Cost of a path that goes on at an unrelated place."""


SHORTEST_REST_S = 0.6
"""Gaps in a path shorter than this are not looked into."""

LONG_REST_S = 2 * SHORTEST_REST_S
"""Gaps in a path longer than this need only begin or end near the place of a rest."""

MELTED, WINDOW_S = 0.4, 20.0
"""Least share of a window (of so many seconds, or the chunk) that a cursor must rest at a place for the median to hold
it there: a half, less some for uneven sampling."""

DOUBTFUL = -0.35
"""Mean score below which a long rest is what compression left of a cursor that has gone, rather than the cursor."""

NEAR = 35
"""Distance, in pixels of the working luma, from where a cursor is lost to where it may have come to rest."""

NEGATIVE = 3.0
"""How opposite to the cursor's (in squared spreads) a spot's difference in colour is where the cursor is missing."""

OPPOSITE = 0.35
"""Share of the cursor's own difference in colour that the negative of it must at least have."""

OLD, OLD_COST = 2, 2.5
"""Cost of a path that jumps to what had lain there for more than so many frames."""

FINEST = np.array([0.25, 0.4, 6, 6, 3, 3, 3, 3], np.float32)
"""Smallest spread of looks that is believed."""

LEFT = 0.35
"""A cursor whose top lies left of this share of its width is an arrow and points with its upper left corner."""

OUTLINE = 0.25
"""Share of the strongest part of a dark cursor that its light outline shows at least."""

LUMA, DARK = 2, 90
"""Which of the looks is a spot's luma, and below which of it a cursor is dark."""

FARTHEST = np.array([60, 8, 8, 8, 8, 8, 8, 8], np.float32)
"""Squared deviation beyond which a look does not count further against a spot."""

LOOKS_OF_NOISE = np.random.default_rng(0).normal(
    (5.5, 2.0, 150, 0, 128, 0, 140, 0), (1.5, 0.8, 30, 20, 8, 6, 10, 6), (60, 8)
).astype(np.float32)
"""Stand-in for other spots in videos that have hardly any."""


@dataclass(frozen=True)
class Appearance:
    """What the cursor of a video looks like: centre and spread of each of the looks."""

    centre: Floats
    spread: Floats
    other_centre: Floats
    other_spread: Floats

    def score(self, looks: Floats) -> Floats:
        """Log-likelihood ratio of being the cursor against being any other spot."""
        z = (looks - self.centre) / self.spread
        other = (looks - self.other_centre) / self.other_spread
        ratio = (np.minimum(other * other, 12) - np.minimum(z * z, FARTHEST)) / 2
        ratio += np.log(self.other_spread / self.spread)
        return np.asarray(np.clip(1.0 + 0.45 * ratio.sum(1), -6, 5), np.float32)


def likeliest(spots: Spots, appearance: Appearance | None) -> npt.NDArray[np.int32]:
    """Indices of the spots on the likeliest path, at most one a frame."""
    count = len(spots.frame)
    if count == 0:
        return np.zeros(0, np.int32)
    if appearance is None:
        gain = 0.3 + 3 * spots.moving
    else:
        # Whatever rests earns little: it holds a path that came to rest there, but cannot draw one away.
        gain = np.minimum(appearance.score(spots.looks) + 3 * spots.moving - 0.8, 0.3 + 4 * spots.moving)
        # There is one cursor: where one is seen moving, what rests in the same frame is something it left behind.
        busiest = np.zeros(int(spots.frame[-1]) + 1, np.float32)
        np.maximum.at(busiest, spots.frame, np.where(spots.moving > 0.5, gain, 0))
        gain = np.where(spots.moving < 0.3, gain - np.minimum(busiest[spots.frame], 1.0), gain)
    scale = np.array([0.7, 1.0, 30, 30, 9, 9, 9, 9], np.float32) if appearance is None else 3 * appearance.spread
    looks = spots.looks / scale
    best = np.zeros(count, np.float32)
    back = np.full(count, -1, np.int32)
    age = np.zeros(count, np.int32)
    starts = np.searchsorted(spots.frame, np.arange(int(spots.frame[-1]) + 2))
    # Being visible from the start is no surprise.
    finished, finished_at = RESTART - 1.0, -1
    for low, high, first, links in _links(spots, looks, gain, starts):
        here = slice(low, high)
        value = finished - RESTART + gain[here]
        back[here] = finished_at
        if first < low:
            was_there, cost, far, earned = links
            # What lay there before the cursor could get there is something else.
            ages = (was_there * (age[first:low] + 1)).max(1)
            age[here] = ages
            if ages.max() > OLD:
                old = OLD_COST * (ages > OLD)
                value -= old
                cost = cost + np.where(far, old[:, None], 0)
            via = best[first:low] - cost + earned
            choice = via.argmax(1)
            linked = via.max(1)
            better = linked > value
            value = np.where(better, linked, value)
            back[here] = np.where(better, first + choice, finished_at)
        best[here] = value
        top = low + int(best[here].argmax())
        if best[top] > finished:
            finished, finished_at = float(best[top]), top
    path = []
    at = finished_at
    while at >= 0:
        path.append(at)
        at = int(back[at])
    return np.array(path[::-1], np.int32)


def _links(
    spots: Spots, looks: Floats, gain: Floats, starts: npt.NDArray[np.intp]
) -> Iterator[tuple[int, int, int, list[npt.NDArray[Any]]]]:
    """(low, high, first, links) for each frame that has spots, which are those from ``low`` to ``high``.

    ``links``: for each pair of one of them (rows) and one of the spots ``first`` to ``low`` (columns): was it there
    already, what the way costs, is it far, what going there earns? Computed for many frames at once, because arithmetic
    on the few pairs of one frame costs mostly calls; not for all, because memory would grow with the chunk.
    """
    for begin in range(0, len(starts) - 1, LINKED_TOGETHER):
        frames = np.arange(begin, min(begin + LINKED_TOGETHER, len(starts) - 1))
        counts = starts[frames + 1] - starts[frames]
        firsts, lows = starts[np.maximum(frames - MEMORY, 0)], starts[frames]
        width = np.repeat(lows - firsts, counts)
        here = np.repeat(np.arange(lows[0], lows[0] + len(width)), width)
        before = np.arange(len(here)) - np.repeat(np.cumsum(width) - width - np.repeat(firsts, counts), width)
        dt = spots.t_s[here] - spots.t_s[before]
        distance = np.hypot(spots.xy[here, 0] - spots.xy[before, 0], spots.xy[here, 1] - spots.xy[before, 1])
        unlike = np.minimum(((looks[here] - looks[before]) ** 2).sum(1), 9.0)
        skipped = spots.frame[here] - spots.frame[before] - 1
        cost = 1.3 * np.log1p(distance / (6 + 50 * dt)) + 0.3 * unlike + 0.25 * skipped
        # What stays where it was and as it was goes on being the cursor, unless it looks like none at all.
        earned = gain[here]
        stays = (distance < 8) & (unlike < 4) & (earned > -2.5)
        np.maximum(earned, 0.2, out=earned, where=stays)
        flat = (distance < 3) & (skipped < 2), cost, distance > 15, earned
        at = 0
        for low, count, first in zip(lows.tolist(), counts.tolist(), firsts.tolist(), strict=True):
            if count:
                shape = count, low - first
                pairs = slice(at, at + shape[0] * shape[1])
                yield low, low + count, first, [values[pairs].reshape(shape) for values in flat]
                at = pairs.stop


def melted_rests(
    spots: Spots, path: npt.NDArray[np.int32], appearance: Appearance, start_s: float, end_s: float
) -> list[tuple[float, float, float]]:
    """(t_s, x, y) of a cursor that rested for so long that the median took it for background.

    While it rests nothing is seen of it. While it is elsewhere, its place shows its negative: the background has the
    cursor and the frame has not. A gap in the path that begins or ends near such a negative, and in which it is not
    seen, is a rest; any other gap is a hidden cursor.
    """
    if len(path) == 0:
        return []
    colours = [3, 5, 7]
    usual, weight = appearance.centre[colours], appearance.spread[colours] ** -2.0
    likeness = (spots.looks[:, colours] * usual * weight).sum(1)
    negative = (spots.moving < 0.3) & (likeness < -NEGATIVE) & (likeness < -OPPOSITE * (usual**2 * weight).sum())
    t_s, xy = spots.t_s[path].astype(float), spots.xy[path].astype(float)
    # Gaps before the path's first point, after its last, and between its points: (from, to, last seen, next seen).
    gaps = [(start_s, t_s[0], xy[0], xy[0]), (t_s[-1], end_s, xy[-1], xy[-1])]
    gaps += [(t_s[i], t_s[i + 1], xy[i], xy[i + 1]) for i in range(len(path) - 1)]
    found = []
    for low, high, before, after in gaps:
        if high - low < SHORTEST_REST_S:
            continue
        near_before, near_after = (np.hypot(*(spots.xy - place).T) < NEAR for place in (before, after))
        # A quick cursor may be seen again only further on; a short gap of that kind it may have spent on its way.
        either = high - low > LONG_REST_S
        near = negative & (near_before | near_after if either else near_before & near_after)
        inside = (spots.t_s > low + 0.3) & (spots.t_s < high - 0.3)
        outside = (spots.t_s < low - 0.3) | (spots.t_s > high + 0.3)
        seen, times = len(np.unique(spots.t_s[near & outside])), len(np.unique(spots.t_s[outside]))
        if seen >= 4 and seen >= 0.4 * times and not (near & inside).any():
            x, y = np.median(spots.xy[near & outside], 0).tolist()
            # All gaps at this place together: a cursor that comes back to it rests there several times.
            rested = sum(
                b - a for a, b, p, q in gaps
                if (min if b - a > LONG_REST_S else max)(np.hypot(*(p - (x, y))), np.hypot(*(q - (x, y)))) < NEAR
            )
            if rested < MELTED * min(end_s - start_s, WINDOW_S):
                continue
            count = max(2, int((high - low) / 0.2))
            found += [(float(t), x, y) for t in np.linspace(low, high, count + 1)[1:-1]]
    return found


def doubtful_rests(spots: Spots, path: npt.NDArray[np.int32], score: Floats) -> npt.NDArray[np.bool_]:
    """Which points of the path belong to a rest that does not look like the cursor; ``score`` as of the path's points.

    When a cursor hides, a sparing encoder may leave its faint picture in place until the next key frame.
    """
    doubtful = np.zeros(len(path), np.bool_)
    t_s, xy = spots.t_s[path], spots.xy[path]
    first = 0
    for last in range(1, len(path) + 1):
        if last < len(path) and np.hypot(*(xy[last] - xy[first])) < 4:
            continue
        if t_s[last - 1] - t_s[first] > SHORTEST_REST_S:
            rest = np.s_[first:last]
            # All of it, or from where it no longer looks like the cursor, which itself rested there before.
            low_from_here_on = np.logical_and.accumulate((score[rest] < DOUBTFUL)[::-1])[::-1]
            doubtful[rest] = low_from_here_on | (score[rest].mean() < DOUBTFUL)
        first = last
    return doubtful


def learn_appearance(chunks: Iterable[Spots]) -> Appearance | None:
    """Looks of what moves steadily through the video's chunks; None if nothing does."""
    moving, others = [], []
    for spots in chunks:
        path = likeliest(spots, None)
        if len(path) < 3:
            continue
        xy, t_s = spots.xy[path], spots.t_s[path]
        # A moving middle of three near neighbours in time: neither a jump nor at rest.
        before, after = np.diff(xy, axis=0)[:-1], np.diff(xy, axis=0)[1:]
        step_b, step_a = np.hypot(*before.T), np.hypot(*after.T)
        near = (t_s[2:] - t_s[:-2]) < 0.5
        steady = near & (spots.moving[path[1:-1]] > 0.5)
        steady &= (np.minimum(step_b, step_a) > 1.5) & (np.maximum(step_b, step_a) < 40)
        steady &= np.hypot(*(after - before).T) < 1.2 * np.maximum(step_a, step_b)
        moving.append(spots.looks[path[1:-1][steady]])
        others.append(np.delete(spots.looks, path, 0))
    looks = np.concatenate(moving) if moving else np.zeros((0, 8), np.float32)
    if len(looks) < 8:
        return None
    rest = np.concatenate([*others, LOOKS_OF_NOISE])
    centre, width = _centre_and_spread(looks)
    other_centre, other_width = _centre_and_spread(rest)
    return Appearance(centre, np.maximum(width, FINEST), other_centre, np.maximum(other_width, 1.5 * FINEST))


def _centre_and_spread(looks: Floats) -> tuple[Floats, Floats]:
    # A column at a time: of an hour's spots, copies of all would take more memory than the spots.
    centre = np.array([np.median(column) for column in looks.T], np.float32)
    spread = [np.median(np.abs(column - middle)) for column, middle in zip(looks.T, centre, strict=True)]
    return centre, (1.48 * np.array(spread, np.float32)).astype(np.float32)


def hot_spot(patches: Sequence[Patch], appearance: Appearance) -> Floats:
    """Offset (x, y in pixels of the working luma) from a spot's place to the point that the cursor points with.

    Dots, crosshairs and rings point with their centre; an arrow points with its upper left corner.
    """
    if len(patches) < 5:
        return np.zeros(2, np.float32)
    shapes, centres = [], []
    for patch, score in zip(patches, appearance.score(np.stack([patch.looks for patch in patches])), strict=True):
        if score > 1.5:
            shapes.append(patch.shape.astype(np.float32) / max(1, int(patch.shape.max())))
            centres.append(patch.centre)
    if len(shapes) < 5:
        return np.zeros(2, np.float32)
    whole = np.mean(shapes, 0)
    shape = np.maximum(whole - 0.4 * whole.max(), 0)
    rows, columns = np.flatnonzero(shape.any(1)), np.flatnonzero(shape.any(0))
    body = shape[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    top = body[: max(1, len(body) // 5)].sum(0)
    middle = float(top @ (np.arange(len(top)) + 0.5)) / (float(top.sum()) * len(top))
    if middle > LEFT:
        return np.zeros(2, np.float32)
    # A dark arrow's light outline differs less from tissue than its body, but holds its tip.
    faint = whole > (OUTLINE if appearance.centre[LUMA] < DARK else 0.4) * whole.max()
    corner = np.array([_run_start(faint.any(0), columns[0]), _run_start(faint.any(1), rows[0])], np.float32)
    return np.asarray(corner - np.mean(centres, 0), np.float32)


def _run_start(present: npt.NDArray[np.bool_], at: int) -> int:
    """Where the unbroken run of ``present`` places that holds ``at`` begins."""
    while at > 0 and present[at - 1]:
        at -= 1
    return at
