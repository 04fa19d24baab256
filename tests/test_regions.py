from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from medllava.errors import ConfigError
from medllava.geometry import Box, Point, parse_boxes
from medllava.regions import (
    around,
    as_mark,
    asked,
    bounds,
    draw_mark,
    marked_name,
    named_mark,
    parse_ways,
    with_mark,
    with_region,
)

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


# -- marks


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is in this region?", "What is in the region marked in red?"),
        ("what does the box show?", "What does the region marked in red show?"),
        ("This area looks odd; why?", "The region marked in red looks odd; why?"),
        ("Is it malignant?", "Is it malignant? The question is about the region marked in red."),
        ("", "What is in the region marked in red?"),
        ("What does the red circle show?", "What does the red circle show?"),
        ("What is in the region marked in red?", "What is in the region marked in red?"),
    ],
)
def test_the_question_speaks_of_the_mark(text: str, expected: str) -> None:
    assert with_mark(text) == expected


@pytest.mark.parametrize(
    "text", ["What is in this region?", "what does the box show?", "This area looks odd; why?", "Is it malignant?", ""]
)
def test_a_written_region_and_a_drawn_one_become_the_same_question(text: str) -> None:
    assert as_mark(with_region(text, BOX)) == (with_mark(text), BOX)


def test_two_regions_or_none_cannot_be_one_mark() -> None:
    assert as_mark("Where is the gland?") is None
    assert as_mark("Is [0.1, 0.1, 0.2, 0.2] like [0.5, 0.5, 0.6, 0.6]?") is None
    assert as_mark("Answer with one box [x1, y1, x2, y2].") is None
    twice = as_mark("<image>\nWhat is [0.1, 0.1, 0.2, 0.2]? Is [0.10, 0.10, 0.20, 0.20] round?")
    assert twice is not None
    assert twice[0] == "<image>\nWhat is the region marked in red? Is the region marked in red round?"


def red(image: Image.Image) -> Any:
    return (np.asarray(image) == (255, 0, 0)).all(2)


@pytest.mark.parametrize("size", [(300, 300), (1203, 77), (96, 400), (4000, 3000)])
@pytest.mark.parametrize("kind", ["ellipse", "box"])
def test_the_line_goes_round_the_region_and_covers_none_of_it(size: tuple[int, int], kind: Any) -> None:
    image = Image.new("RGB", size, "white")
    box = Box(x1=0.3, y1=0.3, x2=0.6, y2=0.7)
    marks = red(draw_mark(image, box, kind))
    assert not red(image).any(), "the picture itself stays as it is"
    width, height = size
    rows, columns = np.nonzero(marks)
    middle = marks[round(0.45 * height) : round(0.55 * height) + 1, round(0.35 * width) : round(0.55 * width)]
    assert not middle.any()
    if min(size) > 100:
        assert columns.min() / width <= 0.3 and columns.max() / width >= 0.6 - 1 / width
        assert rows.min() / height <= 0.3 and rows.max() / height >= 0.7 - 1 / height
    line = max(2, round(0.01 * max(size)))
    at = round(0.5 * height)
    assert abs(int(marks[at, : round(0.45 * width)].sum()) - line) <= 2


def test_a_point_is_a_ringed_dot_and_an_outline_is_drawn_as_it_was() -> None:
    image = Image.new("RGB", (400, 300), "white")
    dot = red(draw_mark(image, Point(x=0.25, y=0.5)))
    assert dot[150, 100] and not dot[150, 111 - 4] and dot[150, 100 + 14] and dot.sum() < 0.02 * dot.size
    corners = (Point(x=0.2, y=0.2), Point(x=0.8, y=0.2), Point(x=0.5, y=0.8))
    outline = red(draw_mark(image, corners))
    assert outline[60, 80] and outline[60, 200] and outline[60, 320] and outline[232:242, 196:205].any()
    assert not outline[120, 200]
    assert bounds(corners) == Box(x1=0.2, y1=0.2, x2=0.8, y2=0.8)
    straight = bounds((Point(x=0.2, y=0.5), Point(x=0.8, y=0.5)))
    assert straight.contains(Point(x=0.5, y=0.5))


@pytest.mark.parametrize("region", [
    Point(x=0, y=0), Point(x=1, y=1), Box(x1=0, y1=0, x2=1, y2=1), Box(x1=0.5, y1=0.5, x2=0.5001, y2=0.5001),
    (Point(x=0.5, y=0.5),), (Point(x=0.0, y=0.0), Point(x=1.0, y=1.0)),
])
def test_odd_regions_can_be_marked(region: Any) -> None:
    image = Image.new("RGB", (200, 100), "white")
    marked = draw_mark(image, region)
    assert marked.size == image.size
    assert red(marked).sum() > 20


def test_asked_in_the_way_the_model_knows() -> None:
    image = Image.new("RGB", (200, 100), "white")
    for ways in (("text",), ("text", "mark"), ()):
        same, text = asked(image, "What is in this region?", BOX, ways)
        assert same is image and text == "What is in the region [0.12, 0.30, 0.45, 0.60]?"
    marked, text = asked(image, "What is in this region?", BOX, ("mark",))
    assert marked is not None and red(marked).any() and text == "What is in the region marked in red?"
    typed, text = asked(image, "What is in the region [0.12, 0.30, 0.45, 0.60]?", None, ("mark",))
    assert typed is not None and typed.tobytes() == marked.tobytes() and text == "What is in the region marked in red?"
    assert asked(image, "Where is the gland?", None, ("mark",)) == (image, "Where is the gland?")
    assert asked(None, "Is it?", BOX, ("mark",)) == (None, "Is it? Region: [0.12, 0.30, 0.45, 0.60]")


def test_marked_names_and_options() -> None:
    name = marked_name("frames/a#1.png", BOX)
    assert named_mark(name) == ("frames/a#1.png", BOX)
    assert named_mark("frames/a#ellipse=.png") == ("frames/a#ellipse=.png", None)
    assert parse_ways("both") == ("text", "mark")
    with pytest.raises(ConfigError, match="text, mark, both"):
        parse_ways("circle")
