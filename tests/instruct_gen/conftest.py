"""A small narrated lecture, encoded once: title, a field with a crosshair, a pan, a second field without a cursor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

WIDTH, HEIGHT, FPS = 320, 240, 15
TITLE_S, PAN_S, SETTLED_S, END_S = 2.6, 9.0, 9.8, 14.0
FINDING = (90, 70, 170, 150)

TRANSCRIPT = """1
00:00:00,200 --> 00:00:02,200
Welcome to this case.

2
00:00:03,500 --> 00:00:07,200
Here is a gland with a lumen.

3
00:00:10,300 --> 00:00:13,000
Take your time with cases like these.
"""


@dataclass(frozen=True)
class Lecture:
    """A video with its transcript and where its crosshair is: seconds -> (x, y) pixels or None."""

    path: Path
    first_field: np.ndarray

    def cursor(self, t_s: float) -> tuple[float, float] | None:
        return cursor_at(t_s)


def cursor_at(t_s: float) -> tuple[float, float] | None:
    """Round the finding from 3.2 s to 7.3 s, then off to a corner and hidden from the pan on."""
    x0, y0, x1, y1 = FINDING
    if t_s < TITLE_S or t_s >= PAN_S - 0.3:
        return None
    angle = 2 * np.pi * (min(max(t_s, 3.2), 7.3) - 3.2) / 1.6
    x, y = (x0 + x1) / 2 + (x1 - x0) / 2 * np.cos(angle), (y0 + y1) / 2 + (y1 - y0) / 2 * np.sin(angle)
    if t_s > 7.3:
        share = min((t_s - 7.3) / 0.6, 1.0)
        x, y = x + share * (280 - x), y + share * (30 - y)
    return float(x), float(y)


def tissue(width: int, height: int) -> np.ndarray:
    """Pink noise in two grains, RGB."""
    rng = np.random.default_rng(3)
    fine = cv2.GaussianBlur(rng.normal(size=(height, width)), (0, 0), 1.2)
    coarse = cv2.GaussianBlur(rng.normal(size=(height, width)), (0, 0), 12)
    grain = 16 * fine / fine.std() + 14 * coarse / coarse.std()
    return np.clip(np.array([214, 140, 190]) + grain[..., None] * np.array([0.8, 1.1, 0.7]), 0, 255).astype(np.uint8)


def picture_at(slide: np.ndarray, t_s: float) -> np.ndarray:
    if t_s < TITLE_S:
        page = np.full((HEIGHT, WIDTH, 3), 250, np.uint8)
        cv2.putText(page, "Case 7", (60, 110), cv2.FONT_HERSHEY_SIMPLEX, 1.5, (20, 30, 120), 3)
        return page
    left = round(300 * min(max((t_s - PAN_S) / (SETTLED_S - PAN_S), 0), 1))
    page = slide[:, left : left + WIDTH].copy()
    place = cursor_at(t_s)
    if place is not None:
        x, y = map(round, place)
        cv2.line(page, (x - 8, y), (x + 8, y), (0, 0, 0), 2)
        cv2.line(page, (x, y - 8), (x, y + 8), (0, 0, 0), 2)
    return page


def encode(path: Path, pictures: list[np.ndarray], fps: int = FPS, **options: str) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "23", "preset": "veryfast", **options})
        stream.width, stream.height, stream.pix_fmt = pictures[0].shape[1], pictures[0].shape[0], "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def lecture(tmp_path_factory: pytest.TempPathFactory) -> Lecture:
    path = tmp_path_factory.mktemp("lecture") / "case7.mp4"
    slide = tissue(WIDTH + 300, HEIGHT)
    encode(path, [picture_at(slide, number / FPS) for number in range(round(END_S * FPS))])
    path.with_suffix(".srt").write_text(TRANSCRIPT)
    return Lecture(path, slide[:, :WIDTH])


AUDIO_RATE = 16000


def make_sound(length_s: float, spoken: list[tuple[float, float]], room: float, level: float = 0.1) -> np.ndarray:
    """Noise that comes in syllables while speaking, and the room's own noise."""
    rng = np.random.default_rng(5)
    t = np.arange(round(length_s * AUDIO_RATE)) / AUDIO_RATE
    wave = room * rng.normal(size=len(t))
    for start_s, end_s in spoken:
        syllables = 0.5 + 0.5 * np.sin(2 * np.pi * 4 * t)
        wave += np.where((t >= start_s) & (t < end_s), level * syllables * rng.normal(size=len(t)), 0)
    return np.clip(wave, -1, 1).astype(np.float32)


def add_sound(video: Path, out: Path, wave: np.ndarray) -> Path:
    """``video`` copied with ``wave`` as its AAC track."""
    with av.open(str(video)) as old, av.open(str(out), "w") as new:
        picture = new.add_stream_from_template(old.streams.video[0])
        track = new.add_stream("aac", rate=AUDIO_RATE, layout="mono")
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = picture
                new.mux(packet)
        for start in range(0, len(wave), 1024):
            frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = AUDIO_RATE, start
            new.mux(track.encode(frame))
        new.mux(track.encode())
    return out


@pytest.fixture(scope="session")
def sound() -> Callable[..., np.ndarray]:
    return make_sound


@pytest.fixture(scope="session")
def with_sound() -> Callable[..., Path]:
    return add_sound
