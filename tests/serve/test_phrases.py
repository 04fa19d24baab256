from __future__ import annotations

import pytest

from medllava.serve.phrases import colour_of, different, phrases_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A gland. [0.10, 0.20, 0.40, 0.60]", [("A gland", "A gland. [0.10, 0.20, 0.40, 0.60]")]),
        (
            "The region [0.1, 0.2, 0.4, 0.6] holds a vessel.",
            [("The region", "The region [0.1, 0.2, 0.4, 0.6]")],
        ),
        (
            "It is 5.2 mm wide. There is a gland at [0.1,0.2,0.3,0.4] and a vessel near [0.5,0.5,0.6,0.6].",
            [
                ("There is a gland", "There is a gland at [0.1,0.2,0.3,0.4]"),
                ("a vessel", "a vessel near [0.5,0.5,0.6,0.6]"),
            ],
        ),
        ("[0.1,0.2,0.3,0.4]", [("box 1", "[0.1,0.2,0.3,0.4]")]),
        ("Necrosis, in the Upper-Left corner.", [("Upper-Left corner", "Upper-Left corner")]),
        ("In the top right [0.6, 0.1, 0.9, 0.4].", [("In the top right", "In the top right [0.6, 0.1, 0.9, 0.4]")]),
        ("[0.9, 0.2, 0.3, 0.4] [1, 2] [a, b, c, d] nothing", []),
        ("", []),
    ],
)
def test_the_words_that_name_a_place(text: str, expected: list[tuple[str, str]]) -> None:
    assert [(one.label, text[one.start : one.end]) for one in phrases_of(text)] == expected


def test_the_same_box_keeps_its_number_and_colour() -> None:
    text = "A [0.1,0.2,0.3,0.4], B [0.5,0.2,0.6,0.4], again [0.1,0.2,0.3,0.4]; lower left."
    phrases = phrases_of(text)
    assert [one.index for one in phrases] == [0, 1, 0, 2]
    assert [one.label for one in different(phrases)] == ["A", "B", "lower left"]
    assert different(phrases)[2].box.as_tuple() == (0.0, 0.5, 0.5, 1.0)
    assert colour_of(0) == colour_of(8) != colour_of(1)
