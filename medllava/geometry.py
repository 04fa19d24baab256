"""Point and Box: the one coordinate frame of the whole project.

Coordinates are fractions 0..1 of the **original** image (after EXIF rotation), origin top-left, x to the right, y down.
Data files, prompts, the API, the web chat and the reports all use this frame. Only this file converts to pixels, to
the square that the model's pixel path pads to, or to and from text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

QUADRANTS = ("upper left", "upper right", "lower left", "lower right")

_NUMBER = r"\s*(-?\d*\.?\d+)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")


class Point(BaseModel):
    """A place in the image: x, y in 0..1. On disk: ``[x, y]``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    x: float = Field(ge=0, le=1)
    y: float = Field(ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            if len(value) != 2:
                raise ValueError(f"a point is [x, y], got {len(value)} numbers")
            return {"x": value[0], "y": value[1]}
        return value

    @model_serializer
    def _to_list(self) -> list[float]:
        return [round(self.x, 4), round(self.y, 4)]

    def quadrant(self) -> str:
        """Name of the quarter of the image that holds the point, one of :data:`QUADRANTS`."""
        return QUADRANTS[2 * (self.y >= 0.5) + (self.x >= 0.5)]


class Box(BaseModel):
    """A rectangle in 0..1 of the original image with x1 < x2 and y1 < y2. On disk: ``[x1, y1, x2, y2]``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    x1: float = Field(ge=0, le=1)
    y1: float = Field(ge=0, le=1)
    x2: float = Field(ge=0, le=1)
    y2: float = Field(ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            if len(value) != 4:
                raise ValueError(f"a box is [x1, y1, x2, y2], got {len(value)} numbers")
            return dict(zip(("x1", "y1", "x2", "y2"), value, strict=True))
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Box:
        if not (self.x1 < self.x2 and self.y1 < self.y2):
            raise ValueError(f"a box needs x1 < x2 and y1 < y2, got {[self.x1, self.y1, self.x2, self.y2]}")
        return self

    @model_serializer
    def _to_list(self) -> list[float]:
        return [round(v, 4) for v in self.as_tuple()]

    def as_tuple(self) -> tuple[float, float, float, float]:
        return self.x1, self.y1, self.x2, self.y2

    @property
    def area(self) -> float:
        """Fraction of the image that the box covers."""
        return (self.x2 - self.x1) * (self.y2 - self.y1)

    @property
    def centre(self) -> Point:
        return Point(x=(self.x1 + self.x2) / 2, y=(self.y1 + self.y2) / 2)

    def contains(self, point: Point) -> bool:
        return self.x1 <= point.x <= self.x2 and self.y1 <= point.y <= self.y2

    def iou(self, other: Box) -> float:
        """Intersection over union, 0..1."""
        width = min(self.x2, other.x2) - max(self.x1, other.x1)
        height = min(self.y2, other.y2) - max(self.y1, other.y1)
        if width <= 0 or height <= 0:
            return 0.0
        shared = width * height
        return shared / (self.area + other.area - shared)

    def to_pixels(self, width: int, height: int) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) in pixels of an image of that size; fractions of a pixel are kept."""
        return self.x1 * width, self.y1 * height, self.x2 * width, self.y2 * height

    def to_padded(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The same rectangle in 0..1 of the centred square that the pixel path pads a width x height image to."""
        side = max(width, height)
        dx, dy = (side - width) / 2, (side - height) / 2
        x0, y0, x1, y1 = self.to_pixels(width, height)
        return (x0 + dx) / side, (y0 + dy) / side, (x1 + dx) / side, (y1 + dy) / side


def clipped_box(x1: float, y1: float, x2: float, y2: float, *, smallest: float = 0.0) -> Box | None:
    """A Box from any four numbers, ordered and cut to the frame; None if less than ``smallest`` of a side is left."""
    x1, x2 = sorted((min(max(x1, 0.0), 1.0), min(max(x2, 0.0), 1.0)))
    y1, y2 = sorted((min(max(y1, 0.0), 1.0), min(max(y2, 0.0), 1.0)))
    if x2 - x1 <= smallest or y2 - y1 <= smallest:
        return None
    return Box(x1=x1, y1=y1, x2=x2, y2=y2)


def box_from_pixels(x0: float, y0: float, x1: float, y1: float, width: int, height: int) -> Box | None:
    """A Box from pixel corners of a width x height image, cut to the frame; None if nothing is left."""
    return clipped_box(x0 / width, y0 / height, x1 / width, y1 / height)


def into_frame(box: Box, frame: Box) -> Box | None:
    """``box`` of the picture in 0..1 of ``frame``, cut to it; None if nothing is left."""
    width, height = frame.x2 - frame.x1, frame.y2 - frame.y1
    return clipped_box(
        (box.x1 - frame.x1) / width, (box.y1 - frame.y1) / height, (box.x2 - frame.x1) / width,
        (box.y2 - frame.y1) / height,
    )


def out_of_frame(box: Box, frame: Box) -> Box:
    """``box`` in 0..1 of ``frame``, in 0..1 of the picture."""
    width, height = frame.x2 - frame.x1, frame.y2 - frame.y1
    whole = clipped_box(
        frame.x1 + box.x1 * width, frame.y1 + box.y1 * height, frame.x1 + box.x2 * width, frame.y1 + box.y2 * height
    )
    assert whole is not None, "a box of a part of the picture is a box of the picture"
    return whole


def format_box(box: Box) -> str:
    """The box as prompts and answers write it: ``[0.12, 0.34, 0.56, 0.78]``."""
    return "[" + ", ".join(f"{value:.2f}" for value in box.as_tuple()) + "]"


def parse_boxes(text: str) -> list[Box]:
    """Every well-formed box written in ``text``, in order; rectangles outside 0..1 or of no area are left out."""
    found: list[Box] = []
    for match in _BOX.finditer(text):
        x1, y1, x2, y2 = (float(value) for value in match.groups())
        if 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1:
            found.append(Box(x1=x1, y1=y1, x2=x2, y2=y2))
    return found


def malformed_boxes(text: str) -> list[str]:
    """Every bracket of four numbers in ``text`` that is no box of the 0..1 frame, as it is written."""
    wrong: list[str] = []
    for match in _BOX.finditer(text):
        x1, y1, x2, y2 = (float(value) for value in match.groups())
        if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
            wrong.append(match.group())
    return wrong


def map_boxes(text: str, change: Callable[[Box], Box]) -> str:
    """``text`` with every well-formed box in it replaced by its changed self; all else stays as it is."""

    def replace(match: re.Match[str]) -> str:
        boxes = parse_boxes(match.group(0))
        return format_box(change(boxes[0])) if boxes else match.group(0)

    return _BOX.sub(replace, text)


def strip_boxes(text: str) -> str:
    """``text`` without the boxes written in it, spaces tidied."""
    return re.sub(r"\s+([.,;:?!])", r"\1", re.sub(r"\s{2,}", " ", _BOX.sub("", text))).strip()
