"""The pointer of a narrated video: what it looks like, and where it is at every frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

STYLES = ("arrow_white", "arrow_black", "laser_red", "laser_green", "crosshair", "halo")

_SIZES = {
    "arrow_white": (0.065, 0.11), "arrow_black": (0.065, 0.11), "laser_red": (0.045, 0.075),
    "laser_green": (0.045, 0.075), "crosshair": (0.08, 0.13), "halo": (0.09, 0.14),
}
"""Range of the sprite's height by style, as a fraction of the frame's height."""

_ARROW = np.array([(0, 0), (0, 16), (3.7, 12.6), (6.2, 18), (8.6, 17), (6.2, 11.8), (11.3, 11.6)]) / 18
_SUPERSAMPLE = 8
_TRAVEL_S = 0.45
"""Longest time that a move between two gestures takes; before it, the pointer stays where it was."""


@dataclass(frozen=True)
class Pointing:
    """The pointer moves over a box (frame pixels): round it, over it, or once along its outline.

    ``reach`` is the part of the box's half sides that the motion covers, ``turn`` the starting angle in radians.
    """

    start_s: float
    end_s: float
    box_px: tuple[float, float, float, float]
    manner: Literal["circle", "hover", "trace"]
    reach: float
    turn: float
    period_s: float

    def at(self, t_s: float) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box_px
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        rx, ry = (x1 - x0) / 2 * self.reach, (y1 - y0) / 2 * self.reach
        angle = 2 * np.pi * (t_s - self.start_s) / self.period_s
        if self.manner == "hover":
            return x + rx * float(np.sin(angle + self.turn)), y + ry * float(np.sin(1.37 * angle + 2 * self.turn))
        # A hand does not draw a perfect ellipse.
        hand = 1 - 0.06 * (1 + float(np.sin(2.3 * angle + self.turn)))
        return x + rx * hand * float(np.cos(angle + self.turn)), y + ry * hand * float(np.sin(angle + self.turn))


@dataclass(frozen=True)
class Rest:
    """The pointer lies still; ``xy`` None: it is not on the screen."""

    start_s: float
    end_s: float
    xy: tuple[float, float] | None

    def at(self, t_s: float) -> tuple[float, float] | None:
        return self.xy


Gesture = Pointing | Rest


def sample_size(rng: np.random.Generator, style: str, height: int) -> int:
    """The sprite's height in pixels on a frame of ``height`` pixels."""
    return max(7, round(float(rng.uniform(*_SIZES[style])) * height))


def sample_pointing(
    rng: np.random.Generator, start_s: float, end_s: float, box_px: tuple[float, float, float, float]
) -> Pointing:
    """A gesture over a box that lasts from ``start_s`` to ``end_s``."""
    manners: tuple[Literal["circle", "hover", "trace"], ...] = ("circle", "hover", "trace")
    manner = manners[int(rng.integers(3))]
    period = (end_s - start_s) * 0.95 if manner == "trace" else float(rng.uniform(1.1, 1.8))
    reach = float(rng.uniform(0.9, 1.05)) if manner == "trace" else float(rng.uniform(0.82, 1.0))
    return Pointing(start_s, end_s, box_px, manner, reach, float(rng.uniform(0, 2 * np.pi)), period)


def track(gestures: Sequence[Gesture], frames: int, fps: float) -> list[tuple[int, int] | None]:
    """The pointer's whole-pixel position at each frame, None where it is hidden.

    ``gestures`` are in order of time and do not overlap; between two of them the pointer stays, then eases over to
    the next one's start. Before the first gesture it is hidden.
    """
    positions: list[tuple[int, int] | None] = []
    current = -1
    for frame in range(frames):
        t = frame / fps
        while current + 1 < len(gestures) and gestures[current + 1].start_s <= t:
            current += 1
        positions.append(_position(gestures, current, t))
    return positions


def _position(gestures: Sequence[Gesture], current: int, t_s: float) -> tuple[int, int] | None:
    if current < 0:
        return None
    gesture = gestures[current]
    place = gesture.at(min(t_s, gesture.end_s))
    if place is None:
        return None
    if t_s > gesture.end_s and current + 1 < len(gestures):
        following = gestures[current + 1]
        goal = following.at(following.start_s)
        travel = min(following.start_s - gesture.end_s, _TRAVEL_S)
        share = 1 - (following.start_s - t_s) / travel if travel > 0 else 1.0
        if goal is not None and share > 0:
            share = share * share * (3 - 2 * share)
            place = place[0] + share * (goal[0] - place[0]), place[1] + share * (goal[1] - place[1])
    return round(place[0]), round(place[1])


class Sprite:
    """A cursor image ready to be blended into I420 frames, its hot spot on whole pixels."""

    def __init__(self, style: str, size: int) -> None:
        rgba, self._hot = _draw(style, size)
        # Chroma has half the resolution: one version for each parity of the sprite's corner.
        self._versions = {(dx, dy): _to_planes(rgba, dx, dy) for dx in (0, 1) for dy in (0, 1)}

    def stamp(self, planes: Sequence[NDArray[np.uint8]], x: int, y: int) -> None:
        """Blend the sprite into the Y, U and V planes (views of one frame) with its hot spot at pixel (x, y)."""
        left, top = x - self._hot[0], y - self._hot[1]
        version = self._versions[left & 1, top & 1]
        for plane, (keep, add), share in zip(planes, version, (1, 2, 2), strict=True):
            _blend(plane, keep, add, (left - (left & 1)) // share, (top - (top & 1)) // share)


def _blend(
    plane: NDArray[np.uint8], keep: NDArray[np.float32], add: NDArray[np.float32], left: int, top: int
) -> None:
    height, width = plane.shape
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + keep.shape[1], width), min(top + keep.shape[0], height)
    if x0 >= x1 or y0 >= y1:
        return
    cut = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    plane[y0:y1, x0:x1] = plane[y0:y1, x0:x1] * keep[cut] + add[cut]


def _draw(style: str, size: int) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """(H, W, 4) RGBA in 0..255 with alpha in 0..1, drawn large and reduced, and the hot spot in its pixels."""
    side = size + 4 + size % 2
    large = np.zeros((side * _SUPERSAMPLE, side * _SUPERSAMPLE, 4), np.float32)
    middle = side * _SUPERSAMPLE / 2
    yy, xx = np.mgrid[: large.shape[0], : large.shape[1]].astype(np.float32) + 0.5
    distance = np.hypot(xx - middle, yy - middle) / _SUPERSAMPLE
    hot = (side // 2, side // 2)
    if style.startswith("arrow"):
        fill, edge = ((255, 255, 255), (20, 20, 20)) if style == "arrow_white" else ((15, 15, 15), (250, 250, 250))
        outline = np.round((_ARROW * size + 2) * _SUPERSAMPLE).astype(np.int32)
        cv2.polylines(large, [outline], True, (*edge, 1.0), round(_SUPERSAMPLE * max(size / 9, 1.6)))
        cv2.fillPoly(large, [outline], (*fill, 1.0))
        hot = (2, 2)
    elif style.startswith("laser"):
        colour = (255, 40, 40) if style == "laser_red" else (50, 255, 70)
        large[..., :3] = colour
        core = distance < size * 0.2
        large[core, :3] = np.array(colour) * 0.4 + 255 * 0.6
        large[..., 3] = np.where(distance < size * 0.33, 1.0, np.clip((size * 0.5 - distance) / (size * 0.3), 0, 1))
    elif style == "crosshair":
        thick = max(size / 14, 1.0) * _SUPERSAMPLE / 2
        arms = ((np.abs(xx - middle) < thick) | (np.abs(yy - middle) < thick)) & (
            np.maximum(np.abs(xx - middle), np.abs(yy - middle)) < size / 2 * _SUPERSAMPLE
        )
        large[..., :3] = (10, 10, 10)
        large[..., 3] = arms
    else:
        rim = np.abs(distance - size * 0.43) < max(size * 0.05, 0.9)
        large[..., :3] = (255, 230, 30)
        large[..., 3] = np.where(rim, 0.95, np.where(distance < size * 0.43, 0.28, 0.0))
    large[..., :3] *= large[..., 3:]
    reduced = np.asarray(cv2.resize(large, (side, side), interpolation=cv2.INTER_AREA), np.float32)
    return reduced, hot


def _to_planes(
    premultiplied: NDArray[np.float32], dx: int, dy: int
) -> tuple[tuple[NDArray[np.float32], NDArray[np.float32]], ...]:
    """What to keep of the background and what to add, for Y, U and V (BT.601, limited range)."""
    height, width = premultiplied.shape[:2]
    padded = np.zeros((height + 2, width + 2, 4), np.float32)
    padded[dy : dy + height, dx : dx + width] = premultiplied
    half = padded.reshape(padded.shape[0] // 2, 2, padded.shape[1] // 2, 2, 4).mean(axis=(1, 3))
    luma = padded[..., :3] @ np.array([0.257, 0.504, 0.098], np.float32) + 16 * padded[..., 3]
    blue = half[..., :3] @ np.array([-0.148, -0.291, 0.439], np.float32) + 128 * half[..., 3]
    red = half[..., :3] @ np.array([0.439, -0.368, -0.071], np.float32) + 128 * half[..., 3]
    keep, keep_half = 1 - padded[..., 3], 1 - half[..., 3]
    # Half a step is added because bytes are cut off, not rounded.
    return (keep, luma + 0.5 * (keep < 1)), (keep_half, blue + 0.5 * (keep_half < 1)), (
        keep_half, red + 0.5 * (keep_half < 1)
    )
