"""A region of interest in a question, and the two ways in which it reaches a model.

- ``text``: as coordinates in the question, ``[x1, y1, x2, y2]`` in 0..1 of the original image;
- ``mark``: as a red mark on the picture, of which the question speaks ("the region marked in red"): an ellipse round a
  box, as in Quilt-VQA-RED and in "What does CLIP know about a red circle?" (Shtedritski et al. 2023), a ringed dot for
  a point, the line itself for a freehand outline.

Which of them a checkpoint was trained on stands in its manifest (``regions``). Training, evaluation, terminal and web
chat all ask through this file, so that the same region is the same question everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, TypeAlias, cast

from PIL import Image, ImageDraw
from pydantic import ValidationError

from medllava.errors import ConfigError, DataError
from medllava.geometry import Box, Point, clipped_box, format_box, parse_boxes
from medllava.jsonl import describe

Way = Literal["text", "mark"]
Kind = Literal["ellipse", "box", "point", "outline"]
Region: TypeAlias = Box | Point | tuple[Point, ...]
"""A box, a point, or the corners of a freehand outline."""

WAYS: tuple[Way, ...] = ("text", "mark")
POINT_SIDE = 0.16
"""Side of the box that stands for a clicked point, in 0..1 of the image's width and of its height."""
MARK_COLOUR = (255, 0, 0)
MARK_WIDTH = 0.01
"""Width of a mark's line, in 0..1 of the picture's longer side: 3 pixels of the 336 that an encoder sees."""
MARKED = "region marked in red"

_MENTION = re.compile(r"\b(?:this|that|the)\s+(?:marked\s+)?(region|box|area)\b(?! marked)", re.IGNORECASE)
_WRITTEN = re.compile(r"(?:\b(?:(?:this|that|the)\s+)?(?:region|box|area)\s+)?(\[[\d\s.,]+\])", re.IGNORECASE)
_APPENDED = re.compile(r"\bRegion:\s*\[[\d\s.,]+\]\s*$")
_ABOUT_MARK = f"The question is about the {MARKED}."
_NAME = re.compile(r"(?P<file>.+)#(?P<kind>ellipse)=(?P<box>\[[\d., ]+\])")


# -- both ways


def asked(
    image: Image.Image | None, text: str, region: Region | None, ways: Sequence[str]
) -> tuple[Image.Image | None, str]:
    """The picture and the text that ask ``text`` about ``region`` in a way that the model knows.

    ``ways``: of the model, such as ``("text",)``; where it knows both, coordinates are used, which leave the picture
    as it is. A model that knows marks alone gets a box that was typed into the text as a mark, too. Without a picture
    there is nothing to mark, so coordinates are used.

    >>> asked(None, "What is in this region?", Box(x1=0.12, y1=0.3, x2=0.45, y2=0.6), ("text",))[1]
    'What is in the region [0.12, 0.30, 0.45, 0.60]?'
    """
    if image is None or way_of(ways) == "text":
        return image, with_region(text, region)
    typed = as_mark(text)
    if typed is not None:
        text, region = typed
    elif region is None or parse_boxes(text):
        return image, text.strip()
    return draw_mark(image, region), with_mark(text)


def way_of(ways: Sequence[str]) -> Way:
    """The way in which a model that knows ``ways`` is asked; one that names none is asked in text."""
    return "mark" if "mark" in ways and "text" not in ways else "text"


def parse_ways(text: str) -> tuple[Way, ...]:
    """``text``, ``mark`` or ``both``, as options and recipes write it. Raises ConfigError."""
    known: dict[str, tuple[Way, ...]] = {"text": ("text",), "mark": ("mark",), "both": WAYS}
    if text not in known:
        raise ConfigError(f"regions {text!r}: choose one of {', '.join(known)}")
    return known[text]


def mentions_region(text: str) -> bool:
    """True if ``text`` speaks of a region that must have been marked, such as "this box"."""
    return _MENTION.search(text) is not None


def as_region(given: Region | Sequence[float] | None) -> Region | None:
    """A region from four numbers x1, y1, x2, y2 or two x, y in 0..1; regions are left as they are. Raises DataError."""
    if given is None or isinstance(given, Box | Point):
        return given
    if len(given) and all(isinstance(corner, Point) for corner in given):
        return cast("tuple[Point, ...]", tuple(given))
    try:
        return Point.model_validate(list(given)) if len(given) == 2 else Box.model_validate(list(given))
    except ValidationError as error:
        raise DataError(f"region {given!r}: {describe(error)}") from error


def bounds(region: Region) -> Box:
    """The box of a region: around a point, a box :data:`POINT_SIDE` wide and high."""
    if isinstance(region, Box):
        return region
    if isinstance(region, Point):
        return around(region)
    xs, ys = [point.x for point in region], [point.y for point in region]
    found = clipped_box(min(xs), min(ys), max(xs), max(ys))
    # A straight line has no area.
    return found or around(Point(x=(min(xs) + max(xs)) / 2, y=(min(ys) + max(ys)) / 2))


def around(point: Point) -> Box:
    """The box that stands for a clicked point: :data:`POINT_SIDE` wide and high, centred on it, cut to the image."""
    half = POINT_SIDE / 2
    box = clipped_box(point.x - half, point.y - half, point.x + half, point.y + half)
    assert box is not None, "a point of the image always keeps a quarter of its box"
    return box


# -- coordinates in the text


def with_region(text: str, region: Region | None) -> str:
    """``text`` with the region's box written into it: after "this region", "the box" or "this area" if the text says
    so, at its end if not; an empty text asks what the region holds. A text that already holds a box is left as it is.

    >>> with_region("What is in this region?", Box(x1=0.12, y1=0.3, x2=0.45, y2=0.6))
    'What is in the region [0.12, 0.30, 0.45, 0.60]?'
    """
    text = text.strip()
    if region is None or parse_boxes(text):
        return text
    box = bounds(region)
    written = format_box(box)
    if not parse_boxes(written):
        # Thinner than the two decimals of a written box: the same place, a hundredth wide.
        written = format_box(_widened(box))
    if not text:
        return f"What is in the region {written}?"
    named, count = _MENTION.subn(lambda found: f"the {found.group(1).lower()} {written}", text, count=1)
    return _capital(named) if count else f"{text} Region: {written}"


def _widened(box: Box) -> Box:
    wider = clipped_box(box.x1 - 0.005, box.y1 - 0.005, box.x2 + 0.005, box.y2 + 0.005)
    assert wider is not None, "a box of the image does not get smaller"
    return wider


# -- a mark on the picture


def draw_mark(image: Image.Image, region: Region, kind: Kind | None = None) -> Image.Image:
    """A copy of ``image`` with the region marked in red; what a line covers is lost to the model, nothing else.

    ``kind``: by default an ellipse for a box, a ringed dot for a point, the line for an outline. The line is
    :data:`MARK_WIDTH` of the picture's longer side wide, at least 2 pixels.
    """
    drawn = image.convert("RGB").copy()
    pen = ImageDraw.Draw(drawn)
    width = max(2, round(MARK_WIDTH * max(image.size)))
    kind = kind or ("ellipse" if isinstance(region, Box) else "point" if isinstance(region, Point) else "outline")
    if kind == "outline" and isinstance(region, tuple) and len(region) > 1:
        corners = [(point.x * image.width, point.y * image.height) for point in (*region, region[0])]
        pen.line(corners, fill=MARK_COLOUR, width=width, joint="curve")
        return drawn
    box = bounds(region)
    if kind == "point":
        middle = region if isinstance(region, Point) else box.centre
        x, y = middle.x * image.width, middle.y * image.height
        for radius, filled in ((1.5 * width, MARK_COLOUR), (4.0 * width, None)):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), filled, MARK_COLOUR, width)
        return drawn
    # Around the box, so that the line covers none of what it marks; never smaller than the line can show, and within
    # the picture, so that it can be seen.
    part = 0.1 if kind == "ellipse" else 0.0
    x0, x1 = _grown(*box.to_pixels(*image.size)[0::2], width, part, image.width)
    y0, y1 = _grown(*box.to_pixels(*image.size)[1::2], width, part, image.height)
    draw = pen.ellipse if kind == "ellipse" else pen.rectangle
    draw((x0, y0, x1, y1), None, MARK_COLOUR, width)
    return drawn


def _grown(low: float, high: float, line: int, part: float, size: int) -> tuple[float, float]:
    """Where a mark around ``low`` to ``high`` begins and ends, in pixels."""
    more = max(0.0, 3.0 * line - (high - low) / 2) + line + part * (high - low)
    return max(low - more, 0.0), min(high + more, size - 1.0)


def with_mark(text: str) -> str:
    """``text`` as it is asked about a picture with a mark.

    >>> with_mark("What is in this region?")
    'What is in the region marked in red?'
    """
    text = text.strip()
    if not text:
        return f"What is in the {MARKED}?"
    if re.search(r"\b(?:marked|circled|outlined) in red\b|\bred (?:circle|ellipse|box|mark)\b", text, re.IGNORECASE):
        return text
    named, count = _MENTION.subn(f"the {MARKED}", text, count=1)
    return _capital(named) if count else f"{text} {_ABOUT_MARK}"


def as_mark(text: str) -> tuple[str, Box] | None:
    """A question with a box in its text as one about a mark, and the box; None unless it names exactly one box.

    >>> as_mark("What does the box [0.10, 0.20, 0.30, 0.40] show?")[0]
    'What does the region marked in red show?'
    """
    boxes = parse_boxes(text)
    if not boxes or any(box != boxes[0] for box in boxes):
        return None
    if _APPENDED.search(text):
        return with_mark(_APPENDED.sub("", text)), boxes[0]
    named = _WRITTEN.sub(lambda found: f"the {MARKED}" if parse_boxes(found.group(1)) else found.group(), text)
    start = len(named) - len(named.lstrip())
    return named[:start] + _capital(named[start:]), boxes[0]


def marked_name(name: str, box: Box) -> str:
    """The name of a picture with a mark, for lists of files: it is drawn when the picture is opened."""
    return f"{name}#ellipse={format_box(box)}"


def named_mark(name: str) -> tuple[str, Box | None]:
    """The file behind a name, and the box that is to be marked on it; undoes :func:`marked_name`."""
    found = _NAME.fullmatch(name)
    boxes = parse_boxes(found["box"]) if found else []
    return (found["file"], boxes[0]) if found and boxes else (name, None)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
