"""A region of interest in a question: how a drawn box or a clicked point becomes text.

The model was taught regions as text, ``[x1, y1, x2, y2]`` in 0..1 of the original image; the terminal chat and the web
chat both write them with :func:`with_region`, so a drawn box and a typed one are the same question.
"""

from __future__ import annotations

import re

from medllava.geometry import Box, Point, clipped_box, format_box, parse_boxes

POINT_SIDE = 0.16
"""Side of the box that stands for a clicked point, in 0..1 of the image's width and of its height."""

_MENTION = re.compile(r"\b(?:this|that|the)\s+(?:marked\s+)?(region|box|area)\b", re.IGNORECASE)


def with_region(text: str, box: Box | None) -> str:
    """``text`` with ``box`` written into it: after "this region", "the box" or "this area" if the text says so, at its
    end if not; an empty text asks what the region holds. A text that already holds a box is left as it is.

    >>> with_region("What is in this region?", Box(x1=0.12, y1=0.3, x2=0.45, y2=0.6))
    'What is in the region [0.12, 0.30, 0.45, 0.60]?'
    """
    text = text.strip()
    if box is None or parse_boxes(text):
        return text
    written = format_box(box)
    if not parse_boxes(written):
        # Thinner than the two decimals of a written box: the same place, a hundredth wide.
        written = format_box(_widened(box))
    if not text:
        return f"What is in the region {written}?"
    named, count = _MENTION.subn(lambda found: f"the {found.group(1).lower()} {written}", text, count=1)
    return named[0].upper() + named[1:] if count else f"{text} Region: {written}"


def _widened(box: Box) -> Box:
    wider = clipped_box(box.x1 - 0.005, box.y1 - 0.005, box.x2 + 0.005, box.y2 + 0.005)
    assert wider is not None, "a box of the image does not get smaller"
    return wider


def mentions_region(text: str) -> bool:
    """True if ``text`` speaks of a region that must have been marked, such as "this box"."""
    return _MENTION.search(text) is not None


def around(point: Point) -> Box:
    """The box that stands for a clicked point: :data:`POINT_SIDE` wide and high, centred on it, cut to the image."""
    half = POINT_SIDE / 2
    box = clipped_box(point.x - half, point.y - half, point.x + half, point.y + half)
    assert box is not None, "a point of the image always keeps a quarter of its box"
    return box
