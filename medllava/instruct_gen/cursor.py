"""Where a cursor may be in each frame: small spots that differ from the picture behind it.

The background is the median over a window of frames; the noise at each pixel is what neighbouring samples usually
differ by, so a cursor at rest does not raise it. What exceeds both in luma or chroma is gathered into spots. Which of
the spots is the cursor is decided later, over time (:mod:`medllava.instruct_gen.track`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import cv2
import numpy as np
import numpy.typing as npt

from medllava.instruct_gen.background import Thinned, median, pixel_ranks, spread
from medllava.instruct_gen.video import Frame, Plane

Floats = npt.NDArray[np.float32]

SAMPLES = 25
"""Frames whose median is the background of a window."""

MOST_SPOTS = 18
"""Spots kept per frame, strongest first."""

NOISE_RANK, NOISE_FACTOR = 0.35, 3.5
"""The noise threshold is this multiple of this quantile of the differences between neighbouring samples."""

WIDEST = 0.3
"""Spots larger than this fraction of the picture's height are no cursor."""

CELL = 4
"""Side, in pixels of the working luma, of the cells in which spots are found."""

REACH = 12
"""Half side, in pixels of the chroma planes, of the patch that describes a spot."""

MOST_PATCHES = 600
"""Moving spots whose surroundings are kept, spread over the video, to learn the cursor's shape from."""

LOOKS = 8
"""Numbers that describe what a spot looks like."""

LAG = 3
"""Frames before and after with which a spot is compared to see whether it moves."""

FLICKER = 1.2
"""Grey levels by which a frame's mean may be off before its brightness is mended."""

SPAN_S = 2.0
"""Zones of steady change are found by how many spans of this length they change in."""


@dataclass(frozen=True)
class Background:
    """Median picture of a window (``y`` at working size; ``u``, ``v`` half) and how far noise carries each pixel."""

    y: Plane
    u: Plane
    v: Plane
    noise_y: Plane
    noise_u: Plane
    noise_v: Plane

    @classmethod
    def of(cls, frames: Sequence[Frame]) -> Background:
        picked = spread(frames, SAMPLES)
        stacks = [[f.y for f in picked], [f.u for f in picked], [f.v for f in picked]]
        y, u, v = (median(stack) for stack in stacks)
        luma, *chroma = (_noise(stack, floor) for stack, floor in zip(stacks, (5.0, 3.0, 3.0), strict=True))
        return cls(y, u, v, luma, *chroma)

    def difference(self, a: Frame | Background, b: Frame | Background, into: Plane) -> None:
        """How far the two differ beyond the noise at each chroma pixel, luma and both chromas together."""
        height, width = self.u.shape
        luma, u, v = self._spare
        cv2.absdiff(a.y, b.y, dst=luma)
        cv2.subtract(luma, self.noise_y, dst=luma)
        cv2.resize(luma, (width, height), dst=into, interpolation=cv2.INTER_AREA)
        for plane, one, other, noise in ((u, a.u, b.u, self.noise_u), (v, a.v, b.v, self.noise_v)):
            cv2.absdiff(one, other, dst=plane)
            cv2.subtract(plane, noise, dst=plane)
        cv2.add(u, v, dst=u)
        cv2.add(into, u, dst=into)
        cv2.add(into, u, dst=into)

    @cached_property
    def _spare(self) -> tuple[Plane, Plane, Plane]:
        """Room for intermediate results: to ask the system for it anew would take as long as the arithmetic."""
        return np.empty_like(self.y), np.empty_like(self.u), np.empty_like(self.v)


@dataclass(frozen=True)
class Spots:
    """Spots of successive frames, one row each.

    ``frame``: number of the frame; ``t_s``; ``xy``: place in pixels of the working luma, n x 2; ``looks``: n x 8: log
    of the summed difference, rms radius (chroma pixels), then y, u, v, each as it is and against the background;
    ``moving`` 0..1: how much of the spot is new against the frames shortly before *and* shortly after.
    """

    frame: npt.NDArray[np.int32]
    t_s: Floats
    xy: Floats
    looks: Floats
    moving: Floats

    def only(self, rows: npt.NDArray[np.bool_]) -> Spots:
        """Those rows."""
        return Spots(self.frame[rows], self.t_s[rows], self.xy[rows], self.looks[rows], self.moving[rows])


def _noise(stack: Sequence[Plane], floor: float) -> Plane:
    """Threshold plane: a multiple of the usual difference between neighbouring samples, at least ``floor``."""
    if len(stack) < 2:
        return np.full_like(stack[0], round(floor))
    steps = [np.asarray(cv2.absdiff(a, b), np.uint8) for a, b in zip(stack, stack[1:], strict=False)]
    # A low rank: where a cursor goes round and round, most neighbouring samples differ by more than noise.
    usual = pixel_ranks(steps, [int(NOISE_RANK * len(steps))])[0].astype(np.float32)
    np.maximum(usual, cv2.blur(usual, (5, 5)), out=usual)
    usual *= NOISE_FACTOR
    usual += floor
    return np.minimum(usual, 40, out=usual).astype(np.uint8)


def steadied(frames: Sequence[Frame]) -> list[Frame]:
    """The frames brought to one brightness: flicker would otherwise change every pixel at once."""
    # Bit for bit what ``cv2.mean`` gives, in a third of its time.
    means = [cv2.sumElems(frame.y)[0] * (1 / frame.y.size) for frame in frames]
    usual = float(np.median(means))
    return [
        replace(frame, y=cv2.convertScaleAbs(frame.y, alpha=usual / mean)) if mean > 1 and abs(mean - usual) > FLICKER
        else frame
        for frame, mean in zip(frames, means, strict=True)
    ]


def joined(parts: Sequence[Spots]) -> Spots:
    """Spots of successive windows as one."""
    fields = ((p.frame, p.t_s, p.xy, p.looks, p.moving) for p in parts)
    return Spots(*(np.concatenate(field) for field in zip(*fields, strict=True)))


@dataclass(frozen=True)
class Patch:
    """A moving spot up close: its ``looks``, ``shape`` (difference to the background, pixels of the working luma, a
    square of 4 REACH + 1) and ``centre`` (x, y) of the spot within ``shape``."""

    looks: Floats
    shape: Plane
    centre: Floats


class Layers:
    """What spots are cut out of: eight planes of chroma size, one upon the other, with nothing (0) around them. They
    are a frame's difference to the background, what is fresh in it, its luma (halved), u and v, and the background's.
    """

    def __init__(self, background: Background) -> None:
        height, width = background.u.shape
        self._all = np.zeros((8, height + 2 * REACH, width + 2 * REACH), np.uint8)
        self._inner = self._all[:, REACH:-REACH, REACH:-REACH]
        for layer, plane in zip(self._inner[5:], (_halved(background), background.u, background.v), strict=True):
            layer[:] = plane

    def show(self, frame: Frame, still: Plane, fresh: Plane) -> None:
        """Put a frame on top, and its two differences."""
        for layer, plane in zip(self._inner, (still, fresh, _halved(frame), frame.u, frame.v), strict=False):
            layer[:] = plane

    def around(self, centres: Sequence[tuple[float, float]]) -> npt.NDArray[np.uint8]:
        """8 x n x side x side: all layers around each centre (chroma pixels)."""
        side = 2 * REACH + 1
        patches = np.empty((8, len(centres), side, side), np.uint8)
        for number, (x, y) in enumerate(centres):
            left, top = round(x), round(y)
            patches[:, number] = self._all[:, top : top + side, left : left + side]
        return patches


def _halved(shown: Frame | Background) -> Plane:
    height, width = shown.u.shape
    return np.asarray(cv2.resize(shown.y, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


class SpotFinder:
    """Finds spots in windows of one video and learns, over the whole video, where something changes all the time."""

    def __init__(self) -> None:
        self.patches: Thinned[Patch] = Thinned(MOST_PATCHES)
        self._spans = 0
        self._active: npt.NDArray[np.uint16] | None = None
        self._zone_after: tuple[int, Plane | None] = 0, None

    def find(self, frames: Sequence[Frame], background: Background, only: range, first: int) -> Spots:
        """Spots of the frames ``only`` (indices in ``frames``, the others are context); ``frames[0]`` has the number
        ``first``. Also learns from them where something changes all the time.
        """
        zone = self.zone()
        outside = None if zone is None else np.asarray(cv2.bitwise_not(zone), np.uint8)
        layers = Layers(background)
        cells: list[Plane] = []
        patches = [layers.around([])]
        rows: list[tuple[int, int, float, float]] = []
        # Each frame is worked on to the end, in the same room: it and what is made of it then stay in the cache.
        for number, (frame, still, fresh) in enumerate(_differences(frames, background, only)):
            cells.append(_cells(still))
            moving = _blobs(_cells(fresh), outside)
            resting = _blobs(cells[-1], outside)
            resting = [p for p in resting if all(abs(p[0] - a) + abs(p[1] - b) > 4 for a, b in moving)]
            if moving or resting:
                rows.extend((number, 1, x, y) for x, y in moving)
                rows.extend((number, 0, x, y) for x, y in resting)
                layers.show(frame, still, fresh)
                patches.append(layers.around(moving + resting))
        shown = [frames[i] for i in only]
        self._learn_zones(shown, cells)
        place = np.array(rows, dtype=np.float32).reshape(-1, 4)
        index, kind = place[:, 0].astype(np.int32), place[:, 1].astype(np.int32)
        t_s = np.array([shown[i].t_s for i in index], np.float32)
        spots = Spots(index, t_s, *_describe(np.concatenate(patches, axis=1), kind, place[:, 2:]))
        self._keep_patches(shown, background, spots)
        return replace(spots, frame=index + np.int32(first + only.start))

    def outside_zone(self, spots: Spots) -> Spots:
        """The spots that do not lie where something changes all the time, as far as is known by now."""
        zone = self.zone()
        if zone is None:
            return spots
        cell = (spots.xy / CELL).astype(int).clip(0, (zone.shape[1] - 1, zone.shape[0] - 1))
        return spots.only(zone[cell[:, 1], cell[:, 0]] == 0)

    def _keep_patches(self, frames: Sequence[Frame], background: Background, spots: Spots) -> None:
        height, width = background.y.shape
        side = 4 * REACH + 1
        for row in np.flatnonzero(spots.moving > 0.7)[::3]:
            x, y = spots.xy[row]
            left, top = round(float(x)) - 2 * REACH, round(float(y)) - 2 * REACH
            if left >= 0 and top >= 0 and left + side <= width and top + side <= height:
                place = np.s_[top : top + side, left : left + side]
                shape = cv2.absdiff(frames[spots.frame[row]].y[place], background.y[place])
                shape = np.asarray(cv2.subtract(shape, background.noise_y[place]), np.uint8)
                self.patches.add(Patch(spots.looks[row], shape, np.array([x - left, y - top], np.float32)))

    def zone(self) -> Plane | None:
        """255 in cells that change in most spans of the video (talking head, clock, subtitles); None if unknown yet."""
        if self._zone_after[0] != self._spans:
            self._zone_after = self._spans, self._found_zone()
        return self._zone_after[1]

    def _found_zone(self) -> Plane | None:
        if self._active is None or self._spans < 10:
            return None
        zone = np.where(self._active > 0.5 * self._spans, 255, 0).astype(np.uint8)
        # The quiet parts between a face's moving outlines belong to it as well: such zones are rectangles.
        joined = cv2.morphologyEx(zone, cv2.MORPH_CLOSE, np.ones((9, 9), np.uint8))
        _, _, boxes, _ = cv2.connectedComponentsWithStats(joined)
        for x, y, width, height, area in boxes[1:].tolist():
            if area >= 4:
                zone[y : y + height, x : x + width] = 255
        return zone

    def _learn_zones(self, frames: Sequence[Frame], cells: Sequence[Plane]) -> None:
        if self._active is None:
            self._active = np.zeros(cells[0].shape, np.uint16)
        changed = np.zeros(cells[0].shape, np.uint8)
        start_s = frames[0].t_s
        for frame, before, after in zip(frames[1:], cells, cells[1:], strict=False):
            changed |= np.asarray(cv2.threshold(cv2.absdiff(before, after), 4, 1, cv2.THRESH_BINARY)[1], np.uint8)
            if frame.t_s - start_s >= SPAN_S:
                self._active += changed
                self._spans += 1
                changed[:] = 0
                start_s = frame.t_s


def _differences(
    frames: Sequence[Frame], background: Background, only: range
) -> Iterator[tuple[Frame, Plane, Plane]]:
    """Each of the frames ``only``, its difference to the background, and what was not there shortly before nor is there
    shortly after. The planes are overwritten when the next one is asked for."""
    still, fresh, *steps = np.empty((3 + LAG, *background.u.shape), np.uint8)
    for i in range(max(0, only.start - LAG), only.stop):
        later = i + LAG < len(frames)
        step = steps[i % len(steps)]
        if later:
            background.difference(frames[i + LAG], frames[i], step)
        if i >= only.start:
            background.difference(frames[i], background, still)
            cv2.min(steps[(i - LAG) % len(steps)] if i >= LAG else still, step if later else still, dst=fresh)
            yield frames[i], still, fresh


def _cells(difference: Plane) -> Plane:
    height, width = difference.shape
    cells = cv2.resize(difference, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.blur(cells, (3, 3)), np.uint8)


def _blobs(cells: Plane, outside: Plane | None) -> list[tuple[float, float]]:
    """Centres (chroma pixels) of the strongest connected spots, all or ``outside`` the zone only (255)."""
    if outside is not None:
        cells = np.asarray(cv2.bitwise_and(cells, outside), np.uint8)
    # A frame that is off as a whole (just after a pan, a low-quality frame) has to be clearer.
    least = 2 + 6 * cv2.mean(cells)[0]
    if cv2.minMaxLoc(cells)[1] <= least:
        return []
    mask = cv2.threshold(cells, least, 255, cv2.THRESH_BINARY)[1]
    largest = WIDEST * cells.shape[0]
    found = []
    for outline in cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0][:60]:
        x, y, width, height = cv2.boundingRect(outline)
        if width <= largest and height <= largest:
            energy = cv2.sumElems(cells[y : y + height, x : x + width])[0]
            found.append((energy, 2 * x + width - 0.5, 2 * y + height - 0.5))
    found.sort(reverse=True)
    return [(x, y) for _, x, y in found[:MOST_SPOTS]]


def _describe(
    patches: npt.NDArray[np.uint8], kind: npt.NDArray[np.int32], centres: Floats
) -> tuple[Floats, Floats, Floats]:
    """Refined places (pixels of the working luma), looks and ``moving`` of the spots near ``centres`` (chroma pixels).

    ``patches``: as :class:`Layers` cuts them; ``kind``: which of the first two of them showed a spot.
    """
    if len(kind) == 0:
        return np.zeros((0, 2), np.float32), np.zeros((0, LOOKS), np.float32), np.zeros(0, np.float32)
    steps = np.arange(-REACH, REACH + 1)
    nearest = np.rint(centres).astype(np.int32)
    still, fresh, *colours = patches
    whole = np.where(kind[:, None, None] == 1, fresh, still).astype(np.float32)
    dx = dy = np.zeros(len(kind), np.float32)
    for reach in (REACH, REACH - 2):
        near_x, near_y = np.abs(steps - dx[:, None]) <= reach, np.abs(steps - dy[:, None]) <= reach
        weights = whole * (near_y[:, :, None] & near_x[:, None, :])
        # Only what stands out as the spot's own core does counts, not the noise around it.
        weights -= 0.25 * weights.max((1, 2), keepdims=True)
        np.maximum(weights, 0, out=weights)
        total = weights.sum((1, 2)) + 1e-3
        dx, dy = weights.sum(1) @ steps / total, weights.sum(2) @ steps / total
    centres = (nearest + np.stack([dx, dy], 1)).astype(np.float32)
    # Looks are taken from the difference to the background, whichever map showed the spot, and from near its core only.
    square = (weights.sum(1) @ steps**2 + weights.sum(2) @ steps**2) / total - dx**2 - dy**2
    core = (2 * np.sqrt(np.maximum(square, 0)) + 1.5) ** 2
    away = ((steps - dy[:, None]) ** 2)[:, :, None] + ((steps - dx[:, None]) ** 2)[:, None, :]
    body = np.maximum(still, fresh) * (away <= core[:, None, None]).astype(np.float32)
    body -= 0.25 * body.max((1, 2), keepdims=True)
    np.maximum(body, 0, out=body)
    mass = body.sum((1, 2)) + 1e-3
    looks = [np.log(mass), np.sqrt(np.einsum("nij,nij->n", body, away) / mass)]
    seen = [np.einsum("nij,nij->n", colour.astype(np.float32), body) / mass for colour in colours]
    for shown, behind in zip(seen[:3], seen[3:], strict=True):
        looks.extend((shown, shown - behind))
    moving = np.minimum(fresh, weights).sum((1, 2)) / total
    # A chroma pixel's centre lies between two luma pixels.
    return (2 * centres + 0.5).astype(np.float32), np.stack(looks, 1).astype(np.float32), moving.astype(np.float32)

