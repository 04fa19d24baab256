from __future__ import annotations

import pytest

from medllava.geometry import Box, Point, parse_boxes
from medllava.regions import around, with_region

BOX = Box(x1=0.12, y1=0.3, x2=0.45, y2=0.6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is in this region?", "What is in the region [0.12, 0.30, 0.45, 0.60]?"),
        ("what does the box show?", "What does the box [0.12, 0.30, 0.45, 0.60] show?"),
        ("This area looks odd; why?", "The area [0.12, 0.30, 0.45, 0.60] looks odd; why?"),
        ("Is it malignant?", "Is it malignant? Region: [0.12, 0.30, 0.45, 0.60]"),
        ("", "What is in the region [0.12, 0.30, 0.45, 0.60]?"),
    ],
)
def test_the_box_is_written_where_the_text_speaks_of_it(text: str, expected: str) -> None:
    assert with_region(text, BOX) == expected
    assert parse_boxes(with_region(text, BOX)) == [BOX]


def test_a_text_with_its_own_box_or_without_any_stays() -> None:
    typed = "What is in the region [0.50, 0.50, 0.70, 0.90]?"
    assert with_region(typed, BOX) == typed
    assert with_region("  Where is the gland? ", None) == "Where is the gland?"


def test_only_the_first_mention_gets_the_box() -> None:
    text = with_region("Is this region like the region beside it?", BOX)
    assert text == "Is the region [0.12, 0.30, 0.45, 0.60] like the region beside it?"


@pytest.mark.parametrize(
    "thin",
    [(0.2951, 0.1, 0.299, 0.9), (0.0, 0.0, 0.0001, 0.0001), (0.9999, 0.5, 1.0, 0.5001), (0.125, 0.3, 0.1251, 0.31)],
)
def test_a_box_thinner_than_two_decimals_stays_a_box(thin: tuple[float, float, float, float]) -> None:
    box = Box.model_validate(thin)
    written = parse_boxes(with_region("What is in this region?", box))
    assert len(written) == 1
    assert all(abs(a - b) <= 0.011 for a, b in zip(written[0].as_tuple(), thin, strict=True))


@pytest.mark.parametrize(("x", "y"), [(0.5, 0.5), (0.0, 0.0), (1.0, 1.0), (0.0, 0.7), (0.97, 0.01)])
def test_a_point_becomes_a_small_box_that_holds_it(x: float, y: float) -> None:
    point = Point(x=x, y=y)
    box = around(point)
    assert box.contains(point)
    assert box.x2 - box.x1 <= 0.16 + 1e-9 and box.y2 - box.y1 <= 0.16 + 1e-9
    assert box.area >= 0.08 * 0.08 - 1e-9
