"""Frames of a planned case as I420 (planar YUV 4:2:0), the form in which video is encoded.

The background of a dwell is drawn once; after that a frame costs one copy and the cursor's few pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from medllava.phantom.cursor import Sprite, track
from medllava.phantom.session import SLIDE_FIELD_WIDTH, Dwell, Session
from medllava.phantom.tissue import REFERENCE_WIDTH, Finding, Stain, render_tissue, sample_stain

Frame = NDArray[np.uint8]
"""One I420 frame: (height * 3 / 2, width) bytes."""

_HEAD_PERIOD_FRAMES = 24
_NOISE_TILE = 32


def render_frames(session: Session) -> Iterator[Frame]:
    """Every frame of the case in order. The array is the same each time: use it before asking for the next."""
    compositor = _Compositor(session)
    yield from compositor.hold(_to_i420(_title_slide(session)), session.dwells[0].start)
    rng = np.random.default_rng([session.seed, session.index, 1])
    stain = sample_stain(rng)
    size = (session.settings.width, session.settings.height)
    previous: Dwell | None = None
    for dwell in session.dwells:
        if previous is None or previous.slide != dwell.slide:
            slide = _render_slide(rng, session, dwell.slide, stain)
        else:
            steps = dwell.start - previous.end
            for step in range(1, steps + 1):
                window = _between(previous.window, dwell.window, step / (steps + 1))
                yield from compositor.hold(_to_i420(_view(slide, window, size)), 1)
        yield from compositor.hold(_to_i420(_view(slide, dwell.window, size)), dwell.end - dwell.start)
        previous = dwell


class _Compositor:
    """Puts inset, sensor noise and cursor over backgrounds, frame after frame."""

    def __init__(self, session: Session) -> None:
        settings = session.settings
        self._positions = track(session.gestures, session.frames, settings.fps)
        self._sprite = Sprite(session.cursor, session.cursor_size_px)
        self._webcam_px = session.webcam_px
        self._heads = _talking_head(session) if session.webcam_px else []
        self._frame = np.empty((settings.height * 3 // 2, settings.width), np.uint8)
        self._planes = _split(self._frame)
        self._rng = np.random.default_rng([session.seed, session.index, 2])
        tile = self._rng.normal(0, settings.noise, (settings.height + _NOISE_TILE, settings.width + _NOISE_TILE))
        self._noise: NDArray[np.int16] | None = np.round(tile).astype(np.int16) if settings.noise else None
        self._count = 0

    def hold(self, background: Frame, frames: int) -> Iterator[Frame]:
        for _ in range(frames):
            self._frame[:] = background
            if self._webcam_px:
                self._stamp_head()
            if self._noise is not None:
                self._add_noise()
            position = self._positions[self._count]
            if position is not None:
                self._sprite.stamp(self._planes, *position)
            self._count += 1
            yield self._frame

    def _stamp_head(self) -> None:
        assert self._webcam_px is not None
        x0, y0, x1, y1 = self._webcam_px
        head = self._heads[self._count % len(self._heads)]
        for plane, part, share in zip(self._planes, _split(head), (1, 2, 2), strict=True):
            plane[y0 // share : y1 // share, x0 // share : x1 // share] = part

    def _add_noise(self) -> None:
        assert self._noise is not None
        luma = self._planes[0]
        dy, dx = self._rng.integers(0, _NOISE_TILE, 2)
        noise = self._noise[dy : dy + luma.shape[0], dx : dx + luma.shape[1]]
        luma[:] = np.clip(luma + noise, 0, 255)


def _split(frame: Frame) -> tuple[Frame, Frame, Frame]:
    """Views of the Y, U and V planes of an I420 frame."""
    height, width = frame.shape[0] * 2 // 3, frame.shape[1]
    flat = frame.reshape(-1)
    luma, quarter = height * width, height * width // 4
    half = (height // 2, width // 2)
    return (
        flat[:luma].reshape(height, width),
        flat[luma : luma + quarter].reshape(half),
        flat[luma + quarter :].reshape(half),
    )


def _to_i420(rgb: NDArray[np.uint8]) -> Frame:
    return np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2YUV_I420))


def _render_slide(rng: np.random.Generator, session: Session, number: int, stain: Stain) -> NDArray[np.uint8]:
    """All tissue of one slide, (H, W, 3) RGB, with the findings of its fields."""
    width, height = session.slides[number]
    settings = session.settings
    findings = []
    for dwell in session.dwells:
        if dwell.slide != number:
            continue
        x, y, w, h = dwell.window
        sx, sy = w / settings.width, h / settings.height
        for finding in dwell.findings:
            x0, y0, x1, y1 = finding.box_px
            findings.append(Finding(finding.kind, (x + x0 * sx, y + y0 * sy, x + x1 * sx, y + y1 * sy)))
    scale = min(settings.width, SLIDE_FIELD_WIDTH) / REFERENCE_WIDTH
    return render_tissue(rng, width, height, findings, stain, scale)


def _between(
    a: tuple[int, int, int, int], b: tuple[int, int, int, int], share: float
) -> tuple[float, float, float, float]:
    """The window at ``share`` 0..1 of a pan from ``a`` to ``b`` that starts and stops gently."""
    eased = share * share * (3 - 2 * share)
    x, y, w, h = (p + eased * (q - p) for p, q in zip(a, b, strict=True))
    return x, y, w, h


def _view(
    slide: NDArray[np.uint8], window: tuple[float, float, float, float], size: tuple[int, int]
) -> NDArray[np.uint8]:
    """The window of the slide at the frame's size (width, height)."""
    x, y, w, h = window
    if w == size[0] and h == size[1] and float(x).is_integer() and float(y).is_integer():
        return np.ascontiguousarray(slide[int(y) : int(y) + int(h), int(x) : int(x) + int(w)])
    sx, sy = w / size[0], h / size[1]
    matrix = np.array([[sx, 0, x + sx / 2 - 0.5], [0, sy, y + sy / 2 - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(slide, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE))


def _title_slide(session: Session) -> NDArray[np.uint8]:
    width, height = session.settings.width, session.settings.height
    slide = Image.new("RGB", (width, height), "#f4f4f6")
    pen = ImageDraw.Draw(slide)
    pen.rectangle((0, 0, width, height * 0.16), fill="#27406b")
    for text, share, size, colour in (
        (f"Case {session.index}", 0.45, 0.13, "#1c2a44"),
        ("Histopathology teaching session", 0.64, 0.06, "#44506a"),
    ):
        font = ImageFont.load_default(size=height * size)
        pen.text((width / 2, height * share), text, fill=colour, font=font, anchor="mm")
    return np.asarray(slide)


def _talking_head(session: Session) -> list[Frame]:
    """One period of a nodding, speaking head, as I420 pictures of the inset's size."""
    assert session.webcam_px is not None
    x0, y0, x1, y1 = session.webcam_px
    width, height = x1 - x0, y1 - y0
    rng = np.random.default_rng([session.seed, session.index, 3])
    wall, shirt = (tuple(int(v) for v in rng.integers(40, 150, 3)) for _ in range(2))
    skin = tuple(int(v) for v in rng.uniform(0.45, 1.0) * np.array([238, 200, 172]))
    pictures = []
    for step in range(_HEAD_PERIOD_FRAMES):
        angle = 2 * np.pi * step / _HEAD_PERIOD_FRAMES
        picture = np.full((height, width, 3), wall, np.uint8)
        x = round(width * (0.5 + 0.04 * np.sin(angle)))
        y = round(height * (0.44 + 0.025 * np.sin(2 * angle)))
        cv2.ellipse(picture, (x, height), (round(width * 0.36), round(height * 0.3)), 0, 0, 360, shirt, -1, cv2.LINE_AA)
        axes = (round(width * 0.17), round(height * 0.29))
        cv2.ellipse(picture, (x, y), axes, 0, 0, 360, skin, -1, cv2.LINE_AA)
        cv2.ellipse(picture, (x, y - axes[1] // 2), (axes[0], axes[1] // 2), 0, 180, 360, (50, 35, 30), -1, cv2.LINE_AA)
        mouth = (max(axes[0] // 3, 1), 1 + round(axes[1] * 0.12 * (1 + np.sin(5 * angle))))
        cv2.ellipse(picture, (x, y + axes[1] // 2), mouth, 0, 0, 360, (120, 40, 40), -1, cv2.LINE_AA)
        pictures.append(_to_i420(picture))
    return pictures
