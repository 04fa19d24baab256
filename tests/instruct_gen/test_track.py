from __future__ import annotations

import numpy as np
import pytest

from medllava.instruct_gen import track
from medllava.instruct_gen.cursor import LOOKS, Spots
from medllava.instruct_gen.track import Appearance, doubtful_rests, likeliest, melted_rests

RED = np.array([6, 1.2, 160, 0, 107, -32, 200, 50], np.float32)
APPEARANCE = Appearance(
    RED, np.array([0.3, 0.4, 10, 8, 4, 4, 4, 4], np.float32),
    np.full(LOOKS, 100, np.float32), np.full(LOOKS, 30, np.float32),
)


def spots(rows: list[tuple[float, float, float, np.ndarray, float]]) -> Spots:
    """(t_s, x, y, looks, moving) a row."""
    t_s, x, y, looks, moving = (list(column) for column in zip(*rows, strict=True))
    return Spots(
        np.array([round(8 * t) for t in t_s], np.int32), np.array(t_s, np.float32), np.array([x, y], np.float32).T,
        np.array(looks, np.float32), np.array(moving, np.float32),
    )


@pytest.mark.parametrize(("share", "gone_s", "is_rest"), [(-1.0, 6.0, True), (-0.1, 6.0, False), (-1.0, 1.5, False)])
def test_a_long_rest_is_inferred_from_the_cursors_full_negative_only(share, gone_s, is_rest):
    """The cursor moves about for the rest of 10 s; meanwhile something opposite in colour lies where it was lost."""
    other = RED * np.array([1, 1, 1, share, 1, share, 1, share])
    rows = []
    for t in np.arange(0, 10 - gone_s, 0.125):
        rows.append((float(t), 100.0 + 30 * (10 - gone_s - t), 80.0, RED, 1.0))
        rows.append((float(t), 100.0, 80.0, other, 0.0))
    found = spots(rows)
    path = np.arange(0, len(rows), 2, dtype=np.int32)
    rests = melted_rests(found, path, APPEARANCE, 0.0, 10.0)
    assert bool(rests) == is_rest
    assert all((x, y) == (100, 80) and t > 10 - gone_s - 0.2 for t, x, y in rests)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_cursor_that_left_its_rest_too_quickly_to_be_seen_near_it_has_rested(hidden):
    """Seen again only far off; were it hidden meanwhile, its place would show its negative."""
    opposite = RED * np.array([1, 1, 1, -1, 1, -1, 1, -1])
    times = [*np.arange(0, 4, 0.125), *np.arange(9, 10, 0.125)]
    rows = [(float(t), 100.0 + 30 * (4 - t) if t < 4 else 300.0 + 40 * (t - 9), 80.0, RED, 1.0) for t in times]
    rows += [(float(t), 100.0, 80.0, opposite, 0.0) for t in [*times, *(np.arange(4, 9, 0.125) if hidden else [])]]
    rests = melted_rests(spots(rows), np.arange(len(times), dtype=np.int32), APPEARANCE, 0.0, 10.0)
    assert bool(rests) != hidden
    assert all((x, y) == (100, 80) and 3.8 < t < 9.1 for t, x, y in rests)


def test_what_was_not_seen_for_a_moment_on_its_way_from_a_later_rest_did_not_rest_there():
    opposite = RED * np.array([1, 1, 1, -1, 1, -1, 1, -1])
    times = [*np.arange(0, 1, 0.125), *np.arange(1.7, 4, 0.125)]
    rows = [(float(t), 110.0 + 20 * t if t < 1 else 100.0 + 80 * (4 - t), 80.0, RED, 1.0) for t in times]
    rows += [(float(t), 100.0, 80.0, opposite, 0.0) for t in times]
    rests = melted_rests(spots(rows), np.arange(len(times), dtype=np.int32), APPEARANCE, 0.0, 10.0)
    assert rests and all(t > 3.9 for t, _, _ in rests)


def test_a_faint_picture_left_behind_is_no_resting_cursor():
    rows = [(t / 8, 10.0 * t, 50.0, RED, 1.0) for t in range(8)]
    rows += [(1 + t / 8, 80.0, 50.0, RED, 0.0) for t in range(24)]
    found, path = spots(rows), np.arange(32, dtype=np.int32)
    score = np.concatenate([np.full(8, 4.0), np.full(8, 1.0), np.full(16, -1.0)]).astype(np.float32)
    doubtful = doubtful_rests(found, path, score)
    assert not doubtful[:16].any() and doubtful[16:].all()
    assert not doubtful_rests(found, path, np.abs(score)).any()
    # While it moves it may look like anything.
    assert not doubtful_rests(found, path[:8], -np.ones(8, np.float32)).any()


@pytest.mark.parametrize("together", [1, 7, 1000])
def test_the_path_does_not_depend_on_how_many_frames_are_computed_at_once(monkeypatch, together):
    rng = np.random.default_rng(3)
    rows = []
    for t in np.arange(0, 20, 0.125):
        if rng.random() < 0.8:  # hidden now and then
            rows.append((float(t), 100 + 60 * np.cos(t), 80 + 40 * np.sin(t), RED + rng.normal(0, 1, LOOKS), 0.9))
        for _ in range(rng.integers(0, 3)):
            rows.append((float(t), *rng.uniform(0, 200, 2), rng.normal(100, 30, LOOKS), rng.random()))
    found = spots(rows)
    usual = likeliest(found, APPEARANCE)
    circles = np.abs(np.hypot(found.xy[usual, 0] - 100, 1.5 * (found.xy[usual, 1] - 80)) - 60) < 1
    assert len(usual) > 100 and circles.mean() > 0.9
    monkeypatch.setattr(track, "LINKED_TOGETHER", together)
    assert (likeliest(found, APPEARANCE) == usual).all()
