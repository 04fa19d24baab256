from __future__ import annotations

import collections

import pytest
import torch

from medllava.geometry import Box, parse_boxes
from medllava.train.augment import choose_variant, flip_box, flip_pixels, flip_text

TEXTS = [
    "In the upper left.", "A gland [0.10, 0.20, 0.35, 0.40] lies above the vessel, to its right.",
    "LOWER RIGHT and Left; the top and the bottom.", "Bright, leftover, copyright: no words of place.",
    "[0.10, 0.20] 1.5",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("variant", range(4))
def test_two_mirrors_are_none(text: str, variant: int) -> None:
    assert flip_text(flip_text(text, variant), variant) == text


def test_words_and_boxes_follow_the_picture() -> None:
    assert flip_text(TEXTS[0], 1) == "In the upper right."
    assert flip_text(TEXTS[0], 2) == "In the lower left."
    assert flip_text(TEXTS[0], 3) == "In the lower right."
    assert flip_text(TEXTS[1], 1) == "A gland [0.65, 0.20, 0.90, 0.40] lies above the vessel, to its left."
    assert flip_text(TEXTS[1], 2) == "A gland [0.10, 0.60, 0.35, 0.80] lies below the vessel, to its right."
    assert flip_text(TEXTS[2], 3) == "UPPER LEFT and Right; the bottom and the top."
    assert all(flip_text(TEXTS[3], variant) == TEXTS[3] for variant in range(4))


@pytest.mark.parametrize("variant", range(4))
def test_the_mirrored_box_holds_the_mirrored_pixels(variant: int) -> None:
    box = Box(x1=0.1, y1=0.2, x2=0.4, y2=0.3)
    pixels = torch.zeros(3, 100, 100)
    x0, y0, x1, y1 = (round(value) for value in box.to_pixels(100, 100))
    pixels[:, y0:y1, x0:x1] = 1
    x0, y0, x1, y1 = (round(value) for value in flip_box(box, variant).to_pixels(100, 100))
    assert flip_pixels(pixels, variant)[:, y0:y1, x0:x1].sum() == pixels.sum()
    text = flip_text("[0.10, 0.20, 0.40, 0.30]", variant)
    assert parse_boxes(text)[0].as_tuple() == pytest.approx(flip_box(box, variant).as_tuple())


def test_each_mirror_as_often_and_always_the_same() -> None:
    chosen = [choose_variant(3, epoch, index) for epoch in range(4) for index in range(500)]
    assert chosen == [choose_variant(3, epoch, index) for epoch in range(4) for index in range(500)]
    assert chosen != [choose_variant(4, epoch, index) for epoch in range(4) for index in range(500)]
    assert all(400 < count < 600 for count in collections.Counter(chosen).values())
