from __future__ import annotations

import cv2
import numpy as np
import pytest

from medllava.instruct_gen.magnification import (
    NUCLEUS_UM,
    Scale,
    estimate_scale,
    magnification,
    magnification_said,
    nucleus_diameters,
)
from medllava.phantom.tissue import render_tissue, sample_field, sample_stain

PHANTOM_NUCLEUS_PX = 5.0
"""Mean diameter of the phantom's nuclei at scale 1."""


def phantom(seed: int, width: int, height: int, scale: float) -> np.ndarray:
    rng = np.random.default_rng([seed, width])
    return render_tissue(rng, width, height, sample_field(rng, width, height), sample_stain(rng), scale)


def test_the_phantoms_scale_is_found() -> None:
    """Over three frame sizes and five scales (an eightfold range of micrometres per pixel)."""
    errors, given, total = [], 0, 0
    for width, height in ((320, 240), (640, 480), (1280, 720)):
        for scale in (0.8, 1.0, 1.5, 2.0, 3.0):
            for seed in range(3):
                found = estimate_scale(phantom(seed, width, height, scale))
                total += 1
                if found is not None:
                    given += 1
                    errors.append(abs(np.log(found.mpp * PHANTOM_NUCLEUS_PX * scale / NUCLEUS_UM)))
    assert given >= 0.7 * total
    assert np.median(errors) < np.log(1.12)
    assert np.max(errors) < np.log(1.55)


def test_an_enlarged_picture_has_smaller_pixels() -> None:
    picture = phantom(1, 640, 480, 1.0)
    small = estimate_scale(picture)
    large = estimate_scale(cv2.resize(picture, None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC))
    assert small is not None and large is not None
    assert small.mpp / large.mpp == pytest.approx(3, rel=0.12)


@pytest.mark.parametrize("seed", range(3))
def test_no_nuclei_no_estimate(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pink = np.clip(np.array([230, 160, 200]) + rng.normal(0, 4, (240, 320, 1)), 0, 255).astype(np.uint8)
    assert estimate_scale(pink) is None
    assert estimate_scale(np.full((240, 320, 3), 255, np.uint8)) is None


def test_discs_are_measured_to_a_pixel() -> None:
    page = np.full((300, 400, 3), (235, 190, 215), np.uint8)
    for row in range(5):
        for column in range(8):
            cv2.circle(page, (30 + 48 * column, 30 + 55 * row), 6, (70, 50, 130), -1, cv2.LINE_AA)
    diameters = nucleus_diameters(page)
    assert len(diameters) == 40
    assert np.median(diameters) == pytest.approx(13, abs=1)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Let us go to forty x.", "40x"), ("This is at 20x.", "20x"), ("at 10 × here", "10x"),
        ("A high power view", "40x"),
        ("On low-power we see", "4x"), ("first low power, then 40x", "40x"), ("There are 3 mitoses in 10 fields", None),
        ("It came back ten times", None), ("a powerful sign", None), ("500x", None),
    ],
)
def test_what_the_narrator_calls_it(said: str, expected: str | None) -> None:
    assert magnification_said([said]) == expected


def test_words_go_before_nuclei() -> None:
    scale = Scale(mpp=0.5, confidence=0.9, nuclei=80)
    told, measured = magnification(scale, ["Here at 40x"]), magnification(scale, ["Here is a gland"])
    assert told is not None and (told.objective, told.source) == ("40x", "transcript")
    assert measured is not None and (measured.objective, measured.source) == ("20x", "nuclei")
    assert magnification(None, ["Here is a gland"]) is None
