from __future__ import annotations

from itertools import groupby

import cv2
import numpy as np
import pytest

from medllava.instruct_gen.stable import SHORTEST_S, _median, stable_runs
from medllava.instruct_gen.video import Frame, VideoReader

CHROMA = np.full((90, 160), 128, np.uint8)


def frame(t_s: float, luma: np.ndarray) -> Frame:
    return Frame(t_s, np.clip(luma, 0, 255).astype(np.uint8), CHROMA, CHROMA, source=None)


def field(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.normal(size=(180, 520)), (0, 0), 3)
    return 140 + 35 * noise / noise.std()


def spans(frames: list[Frame], shortest_s: float = 1.0) -> list[tuple[float, float]]:
    found = []
    for _, run in groupby(stable_runs(iter(frames)), key=lambda pair: pair[0]):
        times = [f.t_s for _, f in run]
        if times[-1] - times[0] >= shortest_s:
            found.append((times[0], times[-1]))
    return found


def times(start_s: float, end_s: float) -> np.ndarray:
    return np.arange(start_s, end_s, 0.125)


def test_a_lecture_falls_into_title_and_two_fields(lecture):
    found = spans(list(VideoReader(lecture.path).frames()), SHORTEST_S)
    assert [list(span) for span in found] == [
        pytest.approx([2.6, 9.0], abs=0.25),
        pytest.approx([9.8, 14.0], abs=0.25),
    ]


def test_a_cut_ends_a_run():
    a, b = field(1)[:, :320], field(2)[:, :320]
    found = spans([frame(t, a) for t in times(0, 4)] + [frame(t, b) for t in times(4, 8)])
    assert [list(span) for span in found] == [pytest.approx([0, 3.875]), pytest.approx([4, 7.875])]


def test_noise_flicker_and_a_talking_head_do_not_end_a_run():
    rng = np.random.default_rng(0)
    still = field(1)[:, :320]
    frames = []
    for number, t in enumerate(times(0, 8)):
        luma = still * (1 + 0.05 * np.sin(number)) + rng.normal(0, 5, still.shape)
        luma[110:, 230:] = rng.normal(128, 40, (70, 90))
        frames.append(frame(t, luma))
    assert spans(frames) == [(0.0, 7.875)]


def test_one_odd_frame_is_left_out():
    still, flash = field(1)[:, :320], np.full((180, 320), 250.0)
    frames = [frame(t, flash if number == 20 else still) for number, t in enumerate(times(0, 6))]
    (run,) = [list(run) for _, run in groupby(stable_runs(iter(frames)), key=lambda pair: pair[0])]
    assert len(run) == len(frames) - 1


@pytest.mark.parametrize("speed", [4.0, 20.0, 120.0])
def test_a_pan_is_never_still(speed):
    wide = field(1).astype(np.float32)
    frames = []
    for t in times(0, 1.6 if speed > 100 else 8):
        shift = np.float32([[1, 0, -speed * t], [0, 1, 0]])
        frames.append(frame(t, cv2.warpAffine(wide, shift, (320, 180), flags=cv2.INTER_LINEAR)))
    assert spans(frames) == []


def test_a_slow_zoom_is_never_still():
    wide = field(1).astype(np.float32)
    frames = []
    for t in times(0, 6):
        scale = 1.04**t
        about = np.float32([[scale, 0, 160 * (1 - scale)], [0, scale, 90 * (1 - scale)]])
        frames.append(frame(t, cv2.warpAffine(wide, about, (320, 180), flags=cv2.INTER_LINEAR)))
    assert spans(frames, 1.5) == []


@pytest.mark.parametrize("count", [1, 2, 7, 144])
def test_the_median_is_numpys(count):
    values = np.random.default_rng(count).normal(size=(count, 1)).astype(np.float32)
    assert _median(values) == np.median(values)
