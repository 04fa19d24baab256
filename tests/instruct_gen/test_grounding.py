from __future__ import annotations

import numpy as np
import pytest

from medllava.geometry import Box
from medllava.instruct_gen.grounding import RESTING, SHORTEST_S, _pointing_spell, ground, grounded_phrases
from medllava.instruct_gen.records import TracePoint, Utterance

SAID = Utterance(start_s=10, end_s=13, text="Here is a gland.")
SIZE = (640, 360)
TIMES = np.arange(9, 14, 0.125)


def trace(place) -> list[TracePoint]:
    return [TracePoint(t_s=t, x=x, y=y) for t in TIMES for x, y in [place(t)]]


def circle(t: float, rx: float = 0.1, ry: float = 0.15) -> tuple[float, float]:
    return 0.4 + rx * np.cos(4 * t), 0.5 + ry * np.sin(4 * t)


def test_a_circle_gives_its_box():
    box = ground(SAID, trace(circle), SIZE).box
    assert box is not None
    assert box.iou(Box(x1=0.3, y1=0.35, x2=0.5, y2=0.65)) > 0.7


def test_the_way_there_is_left_out():
    def place(t):
        if t < 10.5:
            return 0.95 - max(t - 10, 0) * 0.9, 0.9 - max(t - 10, 0) * 0.5
        return circle(t)

    box = ground(SAID, trace(place), SIZE).box
    assert box is not None
    assert box.iou(Box(x1=0.3, y1=0.35, x2=0.5, y2=0.65)) > 0.7


def test_the_finding_is_above_an_underline():
    box = ground(SAID, trace(lambda t: (0.4 + 0.1 * np.sin(5 * t), 0.7)), SIZE).box
    assert box is not None
    assert box.y1 < 0.45 and box.y2 < 0.75


def test_a_slow_wander_is_the_middle_of_a_finding():
    box = ground(SAID, trace(lambda t: (0.4 + 0.03 * np.sin(1.6 * t), 0.5 + 0.05 * np.sin(1.1 * t + 1))), SIZE).box
    assert box is not None
    assert 0.1 < box.x2 - box.x1 < 0.22 and 0.15 < box.y2 - box.y1 < 0.35


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        pytest.param(lambda t: (0.4, 0.5), "rests", id="rest"),
        pytest.param(lambda t: (0.1 + 0.15 * (t - 9), 0.8 - 0.1 * (t - 9)), "passes", id="one straight way"),
        pytest.param(lambda t: (0.2, 0.5) if t < 11 else (0.7, 0.3), "rests", id="a jump between rests"),
        pytest.param(lambda t: (0.4 + 0.002 * np.sin(9 * t), 0.5), "rests", id="unrest of the tracker"),
        pytest.param(lambda t: (0.5 + 0.48 * np.cos(9 * t), 0.5 + 0.48 * np.sin(9 * t)), "too large", id="all of it"),
        pytest.param(lambda t: (0.4 + 0.006 * np.cos(9 * t), 0.5 + 0.006 * np.sin(9 * t)), "too small", id="a dot"),
    ],
)
def test_what_shows_nothing_gives_no_box_but_a_reason(place, reason):
    shown = ground(SAID, trace(place), SIZE)
    assert (shown.box, shown.confidence, shown.reason) == (None, None, reason)


def test_no_cursor_no_box():
    assert ground(SAID, [], SIZE).reason == "no cursor"
    assert ground(SAID, [p for p in trace(circle) if p.t_s < 9.9], SIZE).reason == "no cursor"


def test_confidence_orders_boxes():
    def confidence(place, sure: float = 1.0) -> float:
        points = [point.model_copy(update={"confidence": sure}) for point in trace(place)]
        found = ground(SAID, points, SIZE).confidence
        assert found is not None and 0 < found <= 1
        return found

    round_and_round = confidence(circle)
    assert round_and_round > 0.8
    assert confidence(circle, sure=0.5) < 0.6 * round_and_round
    assert confidence(lambda t: circle(t, 0.03, 0.04)) < round_and_round
    assert confidence(lambda t: (0.4 + 0.1 * np.sin(5 * t), 0.7)) <= 0.5
    assert confidence(lambda t: (0.4 + 0.03 * np.sin(1.6 * t), 0.5 + 0.05 * np.sin(1.1 * t + 1))) < 0.5


def test_phrases_by_either_rule():
    aside = Utterance(start_s=13, end_s=14, text="Well, then.")
    points = [p for p in trace(circle) if p.t_s < 13]
    phrases, no_box = grounded_phrases([SAID, aside], points, SIZE, "pointing", 0)
    assert [phrase.text for phrase in phrases] == [SAID.text, aside.text]
    assert phrases[0].box is not None and phrases[0].confidence is not None
    assert phrases[1].box is None and no_box == {"no cursor": 1}

    # The published rule gives all that is said the nearest cluster, an aside too, and no confidence.
    published, no_box = grounded_phrases([SAID, aside], points, SIZE, "paper", 7)
    assert published[0].box is not None and published[0].box == published[1].box
    assert {phrase.confidence for phrase in published} == {None} and not no_box
    assert grounded_phrases([SAID, aside], points, SIZE, "paper", 7)[0] == published
    phrases, no_box = grounded_phrases([SAID, aside], [], SIZE, "paper", 0)
    assert [phrase.box for phrase in phrases] == [None, None] and no_box == {"no cluster": 2}


def test_boxes_stay_inside_the_image():
    box = ground(SAID, trace(lambda t: (max(0.0, 0.03 + 0.06 * np.cos(4 * t)), 0.95 + 0.05 * np.sin(4 * t))), SIZE).box
    assert box is not None
    assert 0 <= box.x1 < box.x2 <= 1 and 0 <= box.y1 < box.y2 <= 1


def test_the_pointing_spell_is_the_best_of_all_stretches():
    rng = np.random.default_rng(2)
    for _ in range(10):
        t_s = np.sort(rng.uniform(0, 5, 30))
        xy = np.cumsum(rng.normal(0, 0.02, (30, 2)) * (rng.random((30, 1)) < 0.7), axis=0)
        speed = np.hypot(*np.diff(xy, axis=0).T) / np.maximum(np.diff(t_s), 1e-3)
        moves = np.maximum(np.append(speed, speed[-1]), np.insert(speed, 0, speed[0])) > RESTING
        found, best = None, 0.0
        for first in range(30):
            for last in range(first + 1, 30):
                stretch = slice(first, last + 1)
                area = np.prod(np.maximum(np.ptp(xy[stretch], axis=0), 0.03))
                evidence = np.where(moves[stretch], 1.0, 0.1).sum() * -np.log(2 * area)
                if t_s[last] - t_s[first] >= SHORTEST_S and evidence > best + 1e-9:
                    found, best = stretch, evidence
        assert _pointing_spell(t_s, xy) == found
