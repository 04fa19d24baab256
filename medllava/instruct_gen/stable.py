"""Where a video holds still: runs of frames that show the same picture, whatever cursor or talking head moves on it.

Each frame is compared with the *anchor*, an early frame of its run, block by block at a quarter of the working
resolution: by correlation (another field, a cut) and by displacement (a slow pan, a zoom). Medians over blocks make
both blind to what moves locally, and both ignore brightness, so flicker does not end a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from math import hypot

import cv2
import numpy as np
import numpy.typing as npt

from medllava.instruct_gen.video import Frame, Plane

Array = npt.NDArray[np.float32]

SHORTEST_S = 3.0
"""Shorter runs are not stable chunks."""

BLOCK = 10
"""Side of a block in pixels of the reduced luma (40 pixels at 360 lines)."""

QUIET = 1
"""Median block difference (grey levels) up to which frames are the same without a closer look."""

FLAT = 6.0
"""Variance below which a block has no texture to compare."""

SAME = 0.55
"""Median block correlation with the anchor above which the field is the same."""

DRIFT = 0.2
"""Displacement against the anchor, in pixels of the reduced luma, above which the view has moved."""

SETTLED_S = 0.5
"""Age at which a run takes its newest frame as the anchor: its first frames may still be coming to rest."""


def stable_runs(frames: Iterator[Frame]) -> Iterator[tuple[int, Frame]]:
    """(run number, frame) for each frame; frames of one run show one still picture. A run may be of any length.

    A single deviating frame inside a run (a flash, a damaged frame) is left out.
    """
    run = 0
    anchor: _Anchor | None = None
    since_s, settled = 0.0, False
    odd: tuple[Frame, _Look] | None = None
    for frame in frames:
        look = _Look(reduced(frame.y))
        if anchor is not None and anchor.matches(look):
            odd = None
            if not settled and frame.t_s - since_s >= SETTLED_S:
                anchor, settled = _Anchor(look), True
            yield run, frame
        elif anchor is not None and odd is None:
            odd = frame, look
        else:
            run += 1
            since_s, settled = frame.t_s, False
            if odd is not None:
                anchor = _Anchor(odd[1])
                if anchor.matches(look):
                    yield run, odd[0]
                    since_s = odd[0].t_s
                else:
                    anchor = _Anchor(look)
            else:
                anchor = _Anchor(look)
            odd = None
            yield run, frame


def reduced(luma: Plane) -> Plane:
    """A quarter of the working luma, cut to whole blocks."""
    height, width = luma.shape
    half = cv2.resize(luma, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    quarter = cv2.resize(half, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
    rows, columns = (max(BLOCK, size // BLOCK * BLOCK) for size in quarter.shape)
    if quarter.shape[0] < rows or quarter.shape[1] < columns:
        quarter = cv2.resize(half, (columns, rows), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(quarter[:rows, :columns], dtype=np.uint8)


def block_mean(values: npt.NDArray[np.generic]) -> Array:
    """Mean of each block; for uint8 input the means are rounded to whole levels."""
    rows, columns = values.shape
    means = cv2.resize(values, (columns // BLOCK, rows // BLOCK), interpolation=cv2.INTER_AREA)
    return np.asarray(means, dtype=np.float32)


def _median(values: npt.NDArray[np.floating]) -> float:
    """What ``np.median`` gives, which takes five times as long on a few hundred values."""
    ordered = np.sort(values, axis=None)
    middle = len(ordered) // 2
    return float(ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2)


class _Look:
    """A frame's luma and the statistics of its blocks, made when they are first asked for: while a picture holds still,
    or changes beyond likeness, most of them never are.
    """

    def __init__(self, small: Plane) -> None:
        self.small = small

    @cached_property
    def luma(self) -> Array:
        return self.small.astype(np.float32)

    @cached_property
    def mean(self) -> Array:
        return block_mean(self.luma)

    @cached_property
    def variance(self) -> Array:
        return block_mean(self.luma * self.luma) - self.mean**2

    @cached_property
    def textured(self) -> npt.NDArray[np.bool_]:
        return self.variance > FLAT

    @cached_property
    def gradients(self) -> tuple[Array, ...]:
        """Along x and y; their block means; their block covariances xx, yy, xy and the determinant of these."""
        gx = cv2.Sobel(self.luma, cv2.CV_32F, 1, 0, scale=1 / 8)
        gy = cv2.Sobel(self.luma, cv2.CV_32F, 0, 1, scale=1 / 8)
        # Gradients without their block mean: a change of brightness then cannot look like a displacement.
        gx_mean, gy_mean = block_mean(gx), block_mean(gy)
        ridge = 0.2
        xx = block_mean(gx**2) - gx_mean**2 + ridge
        yy = block_mean(gy**2) - gy_mean**2 + ridge
        xy = block_mean(gx * gy) - gx_mean * gy_mean
        return gx, gy, gx_mean, gy_mean, xx, yy, xy, xx * yy - xy**2


class _Anchor:
    """A frame that others are compared with."""

    def __init__(self, look: _Look) -> None:
        self._look = look
        # How often each block changed while the picture as a whole did not: a talking head has no say in the matter.
        self._restless = np.zeros([size // BLOCK for size in look.small.shape], dtype=np.float32)

    def matches(self, other: _Look) -> bool:
        """Does ``other`` show the anchor's picture, not moved?"""
        difference = block_mean(cv2.absdiff(self._look.small, other.small))
        if _median(difference) <= QUIET and np.count_nonzero(difference > 6 * QUIET) < 0.25 * difference.size:
            self._restless += 0.1 * ((difference > 3 * QUIET) - self._restless)
            return True
        look, mean = self._look, other.mean
        voters = (look.textured | other.textured) & (self._restless < 0.5)
        if np.count_nonzero(voters) < 4:
            return _median(np.abs((mean - look.mean) - _median(mean - look.mean))) <= 2
        covariance = block_mean(look.luma * other.luma) - mean * look.mean
        correlation = covariance / np.sqrt(np.maximum(other.variance * look.variance, 0) + FLAT)
        if _median(correlation[voters]) < SAME:
            return False
        moved = self._displacement(other, voters & look.textured)
        self._restless += 0.1 * ((correlation < SAME) - self._restless)
        return moved <= DRIFT

    def _displacement(self, other: _Look, voters: npt.NDArray[np.bool_]) -> float:
        """Largest displacement (pixels) of a quadrant, by one Lucas-Kanade step in each block."""
        gx, gy, gx_mean, gy_mean, xx, yy, xy, determinant = self._look.gradients
        change = other.luma - self._look.luma
        change_mean = other.mean - self._look.mean
        xd = block_mean(gx * change) - gx_mean * change_mean
        yd = block_mean(gy * change) - gy_mean * change_mean
        dx = (xy * yd - yy * xd) / determinant
        dy = (xy * xd - xx * yd) / determinant
        rows, columns = voters.shape
        fewest = max(4, 0.1 * np.count_nonzero(voters))
        largest = 0.0
        for top in (0, rows // 2):
            for left in (0, columns // 2):
                part = np.s_[top : top + (rows + 1) // 2, left : left + (columns + 1) // 2]
                chosen = voters[part]
                if np.count_nonzero(chosen) >= fewest:
                    largest = max(largest, hypot(_median(dx[part][chosen]), _median(dy[part][chosen])))
        return largest
