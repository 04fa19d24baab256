from __future__ import annotations

import numpy as np
import pytest

from medllava.geometry import Box
from medllava.instruct_gen.grounding import ground
from medllava.instruct_gen.records import TracePoint, Utterance

SAID = Utterance(start_s=10, end_s=13, text="Here is a gland.")
SIZE = (640, 360)
TIMES = np.arange(9, 14, 0.125)


def trace(place) -> list[TracePoint]:
    return [TracePoint(t_s=t, x=x, y=y) for t in TIMES for x, y in [place(t)]]


def circle(t: float, rx: float = 0.1, ry: float = 0.15) -> tuple[float, float]:
    return 0.4 + rx * np.cos(4 * t), 0.5 + ry * np.sin(4 * t)


def test_a_circle_gives_its_box():
    box = ground(SAID, trace(circle), SIZE)
    assert box is not None
    assert box.iou(Box(x1=0.3, y1=0.35, x2=0.5, y2=0.65)) > 0.7


def test_the_way_there_is_left_out():
    def place(t):
        if t < 10.5:
            return 0.95 - max(t - 10, 0) * 0.9, 0.9 - max(t - 10, 0) * 0.5
        return circle(t)

    box = ground(SAID, trace(place), SIZE)
    assert box is not None
    assert box.iou(Box(x1=0.3, y1=0.35, x2=0.5, y2=0.65)) > 0.7


def test_the_finding_is_above_an_underline():
    box = ground(SAID, trace(lambda t: (0.4 + 0.1 * np.sin(5 * t), 0.7)), SIZE)
    assert box is not None
    assert box.y1 < 0.45 and box.y2 < 0.75


def test_a_slow_wander_is_the_middle_of_a_finding():
    box = ground(SAID, trace(lambda t: (0.4 + 0.03 * np.sin(1.6 * t), 0.5 + 0.05 * np.sin(1.1 * t + 1))), SIZE)
    assert box is not None
    assert 0.1 < box.x2 - box.x1 < 0.22 and 0.15 < box.y2 - box.y1 < 0.35


@pytest.mark.parametrize(
    "place",
    [
        lambda t: (0.4, 0.5),
        lambda t: (0.1 + 0.15 * (t - 9), 0.8 - 0.1 * (t - 9)),
        lambda t: (0.2, 0.5) if t < 11 else (0.7, 0.3),
        lambda t: (0.4 + 0.002 * np.sin(9 * t), 0.5),
    ],
    ids=["rest", "one straight way", "a jump between rests", "unrest of the tracker"],
)
def test_without_deliberate_motion_there_is_no_box(place):
    assert ground(SAID, trace(place), SIZE) is None


def test_no_cursor_no_box():
    assert ground(SAID, [], SIZE) is None
    assert ground(SAID, [p for p in trace(circle) if p.t_s < 9.9], SIZE) is None


def test_what_fills_the_image_is_no_region():
    assert ground(SAID, trace(lambda t: (0.5 + 0.48 * np.cos(3 * t), 0.5 + 0.48 * np.sin(3 * t))), SIZE) is None


def test_boxes_stay_inside_the_image():
    box = ground(SAID, trace(lambda t: (max(0.0, 0.03 + 0.06 * np.cos(4 * t)), 0.95 + 0.05 * np.sin(4 * t))), SIZE)
    assert box is not None
    assert 0 <= box.x1 < box.x2 <= 1 and 0 <= box.y1 < box.y2 <= 1
