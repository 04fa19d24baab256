from __future__ import annotations

import cv2
import numpy as np
import pytest

from medllava.instruct_gen.background import Thinned, median, pixel_ranks, spread
from medllava.instruct_gen.cursor import REACH, Background, Layers, SpotFinder
from medllava.instruct_gen.track import hot_spot, learn_appearance, likeliest
from medllava.instruct_gen.video import Frame

ARROW = np.array([(0, 0), (0, 16), (4, 13), (6, 18), (9, 17), (6, 12), (11, 12)])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 12, 25])
def test_ranks_equal_those_of_a_sort(count):
    rng = np.random.default_rng(count)
    stack = [rng.integers(0, 256, (20, 30), dtype=np.uint8) for _ in range(count)]
    given = [image.copy() for image in stack]
    ordered = np.sort(np.stack(stack), axis=0)
    ranks = sorted({0, count // 3, (count - 1) // 2, count - 1})
    for rank, found in zip(ranks, pixel_ranks(stack, ranks), strict=True):
        assert (found == ordered[rank]).all()
    assert (median(stack) == ordered[(count - 1) // 2]).all()
    assert all((image == before).all() for image, before in zip(stack, given, strict=True))


def test_patches_are_those_of_whole_planes_with_nothing_around_them():
    rng = np.random.default_rng(5)

    def picture() -> Frame:
        y, u, v = (rng.integers(0, 256, size, dtype=np.uint8) for size in ((80, 120), (40, 60), (40, 60)))
        return Frame(0.0, y, u, v, None)

    frames = [picture(), picture()]
    background = Background.of([picture(), picture(), picture()])
    maps = rng.integers(0, 256, (2, 2, 40, 60), dtype=np.uint8)
    layers = Layers(background)
    for frame, (still, fresh), centres in zip(frames, maps, ([(0, 0), (30, 20)], [(59, 39), (3, 38)]), strict=True):
        layers.show(frame, still, fresh)
        shown = [(p.y.reshape(40, 2, 60, 2).sum((1, 3), dtype=int) + 2) // 4 for p in (frame, background)]
        planes = [still, fresh, shown[0], frame.u, frame.v, shown[1], background.u, background.v]
        patches = layers.around(centres)
        for number, (x, y) in enumerate(centres):
            for plane, patch in zip(planes, patches[:, number], strict=True):
                around = np.pad(plane, REACH)[y : y + 2 * REACH + 1, x : x + 2 * REACH + 1]
                assert (patch == around).all()


def test_thinned_stays_small_and_evenly_spread():
    kept: Thinned[int] = Thinned(8)
    for number in range(1000):
        kept.add(number)
    assert 4 <= len(kept.items) <= 8
    assert len(set(np.diff(kept.items))) == 1
    assert kept.items[0] == 0
    assert spread(list(range(100)), 5) == [0, 25, 50, 74, 99]


def scene(style: str, seconds: float = 10, seed: int = 0, size: float = 1.0) -> tuple[list[Frame], list]:
    """A cursor that circles, rests and hides over tissue, at eight frames a second; and where it truly is."""
    rng = np.random.default_rng(seed)
    height, width = 240, 320
    noise = cv2.GaussianBlur(rng.normal(size=(height, width)), (0, 0), 2)
    base = np.clip(170 + 20 * noise / noise.std(), 0, 255)
    u, v = np.full((height // 2, width // 2), 135.0), np.full((height // 2, width // 2), 150.0)
    frames, truth = [], []
    for number in range(round(seconds * 8)):
        t = number / 8
        if t < seconds / 2:
            place = 120 + 60 * np.cos(2.2 * t), 110 + 50 * np.sin(2.2 * t)
        elif t < seconds * 0.7:
            place = 250.0, 60.0
        else:
            place = None
        luma, cb, cr = base + rng.normal(0, 2, base.shape), u.copy(), v.copy()
        if place is not None:
            x, y = round(place[0]), round(place[1])
            place = float(x), float(y)
            if style == "arrow":
                points = np.round(ARROW * size + (x, y)).astype(np.int32)
                cv2.fillPoly(luma, [points], 235)
                cv2.polylines(luma, [points], True, 20, 1)
                cv2.fillPoly(cb, [points // 2], 128)
                cv2.fillPoly(cr, [points // 2], 128)
            elif style == "laser":
                cv2.circle(luma, (x, y), 4, 110, -1)
                cv2.circle(cb, (x // 2, y // 2), 2, 100, -1)
                cv2.circle(cr, (x // 2, y // 2), 2, 220, -1)
            else:
                cv2.line(luma, (x - 7, y), (x + 7, y), 15, 1)
                cv2.line(luma, (x, y - 7), (x, y + 7), 15, 1)
        planes = (np.clip(p, 0, 255).astype(np.uint8) for p in (luma, cb, cr))
        frames.append(Frame(t, *planes, source=None))
        truth.append(place)
    return frames, truth


@pytest.mark.parametrize("style", ["arrow", "laser", "crosshair"])
def test_the_cursor_is_followed_and_its_absence_seen(style):
    frames, truth = scene(style)
    finder = SpotFinder()
    spots = finder.find(frames, Background.of(frames), range(len(frames)), 0)
    appearance = learn_appearance([spots])
    assert appearance is not None
    offset = hot_spot(finder.patches.items, appearance)
    path = likeliest(spots, appearance)
    found = {int(spots.frame[row]): spots.xy[row] + offset for row in path}
    assert len(found) == len(path)
    visible = {number: place for number, place in enumerate(truth) if place is not None}
    errors = {n: float(np.hypot(*(found[n] - place))) for n, place in visible.items() if n in found}
    assert len(errors) >= 0.9 * len(visible)
    assert np.median(list(errors.values())) < 1.5
    assert sum(error < 8 for error in errors.values()) >= 0.97 * len(errors)
    assert len(set(found) - set(visible)) <= 2


def test_only_an_arrow_points_with_its_corner():
    offsets = {}
    for style in ("arrow", "laser", "crosshair"):
        frames, _ = scene(style)
        finder = SpotFinder()
        spots = finder.find(frames, Background.of(frames), range(len(frames)), 0)
        appearance = learn_appearance([spots])
        assert appearance is not None
        offsets[style] = hot_spot(finder.patches.items, appearance)
    assert offsets["arrow"][0] < -2 and offsets["arrow"][1] < -4
    assert not offsets["laser"].any() and not offsets["crosshair"].any()


def test_nothing_is_found_where_nothing_moves():
    frames, _ = scene("arrow")
    hidden = frames[60:] * 2
    spots = SpotFinder().find(hidden, Background.of(hidden), range(len(hidden)), 0)
    assert learn_appearance([spots]) is None


def test_a_talking_head_is_learnt_as_a_zone():
    finder = SpotFinder()
    rng = np.random.default_rng(5)
    for part in range(3):
        frames, _ = scene("laser", seed=part)
        talking = []
        for frame in frames:
            luma = frame.y.copy()
            luma[180:, 250:] = 60
            head = 285 + rng.integers(-5, 6), 215 + rng.integers(-5, 6)
            cv2.ellipse(luma, tuple(map(int, head)), (16, 22), 0, 0, 360, 180, -1)
            cv2.ellipse(luma, (int(head[0]), int(head[1]) + 8), (6, int(rng.integers(1, 6))), 0, 0, 360, 40, -1)
            talking.append(Frame(frame.t_s + 10 * part, luma, frame.u, frame.v, frame.source))
        spots = finder.find(talking, Background.of(talking), range(len(talking)), 0)
    zone = finder.zone()
    assert zone is not None
    assert zone[49:58, 68:75].mean() > 200 and zone[:40].mean() < 20
    kept = finder.outside_zone(spots)
    assert not ((kept.xy[:, 0] > 264) & (kept.xy[:, 1] > 192)).any()
