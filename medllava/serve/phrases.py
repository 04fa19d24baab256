"""The places that an answer names: boxes written as coordinates with the words before them, and quadrants."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from medllava.geometry import Box, parse_boxes
from medllava.images import BOX_COLOURS

_BRACKET = re.compile(r"\[[^\[\]]*\]")
_QUADRANT = re.compile(
    r"\b(upper|top|lower|bottom)[ -](left|right)\b(?:[ -](?:quadrant|quarter|corner|part|area|region|side))?",
    re.IGNORECASE,
)
# What ends the words that belong to a box: the end of a sentence, a comma, "and" - never the point of a number.
_BORDER = re.compile(r"[.!?;:](?=\s)|,\s|\n|\band\s", re.IGNORECASE)
_LINKING = re.compile(r"\s+(?:at|in|near|around|is|are|located|here)$", re.IGNORECASE)
_MOST_WORDS = 8


@dataclass(frozen=True)
class Phrase:
    """``text[start:end]`` names ``box`` (0..1 of what the model saw). ``index``: the box's place among the answer's
    different boxes, which is its number and its colour; ``label``: the words without the coordinates."""

    start: int
    end: int
    index: int
    label: str
    box: Box


def phrases_of(text: str) -> list[Phrase]:
    """The phrases of an answer in order; none overlap. Boxes out of range or without an area are left out.

    >>> [(one.label, one.index) for one in phrases_of("A gland [0.1, 0.2, 0.4, 0.6] in the upper left.")]
    [('A gland', 0), ('upper left', 1)]
    """
    found: list[tuple[int, int, str, Box]] = []
    behind = 0
    for bracket in _BRACKET.finditer(text):
        boxes = parse_boxes(bracket.group())
        if boxes:
            start, label = _words_before(text, behind, bracket.start())
            found.append((start, bracket.end(), label, boxes[0]))
        behind = bracket.end()
    for named in _QUADRANT.finditer(text):
        if not any(start < named.end() and named.start() < end for start, end, _, _ in found):
            found.append((named.start(), named.end(), named.group(), _quadrant(named.group(1), named.group(2))))
    phrases: list[Phrase] = []
    boxes_seen: list[Box] = []
    for start, end, label, box in sorted(found, key=lambda one: one[0]):
        if box not in boxes_seen:
            boxes_seen.append(box)
        index = boxes_seen.index(box)
        phrases.append(Phrase(start, end, index, label or f"box {index + 1}", box))
    return phrases


def colour_of(index: int) -> str:
    """``#rrggbb`` of the box with that number, the same on the picture, in the text and in exports."""
    return BOX_COLOURS[index % len(BOX_COLOURS)]


def different(phrases: Sequence[Phrase]) -> list[Phrase]:
    """The first phrase of each different box, in the order of their numbers."""
    first: dict[int, Phrase] = {}
    for phrase in phrases:
        first.setdefault(phrase.index, phrase)
    return [first[index] for index in sorted(first)]


def _words_before(text: str, behind: int, bracket: int) -> tuple[int, str]:
    """Where the words that name a box begin, and those words; nothing but the box if there are none."""
    words = text[behind:bracket].rstrip(" \t\n.,:;(-")
    borders = [border.end() for border in _BORDER.finditer(words)]
    start = borders[-1] if borders else 0
    last = list(re.finditer(r"\S+", words[start:]))[-_MOST_WORDS:]
    if not last:
        return bracket, ""
    start += last[0].start()
    return behind + start, _LINKING.sub("", words[start:])


def _quadrant(vertical: str, horizontal: str) -> Box:
    x = 0.0 if horizontal.lower() == "left" else 0.5
    y = 0.0 if vertical.lower() in {"upper", "top"} else 0.5
    return Box(x1=x, y1=y, x2=x + 0.5, y2=y + 0.5)
