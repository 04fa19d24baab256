"""What one open page of the web chat holds: its pictures and its conversation. In memory only, without Gradio.

A conversation is a list of exchanges. Each belongs to the picture it was asked about, and keeps what was sent for it:
the picture as a data URI and the part of the picture (``frame``) that this URI shows. For a photograph the frame is the
whole; a source that sends only a part, such as the view of a whole slide, says so in :class:`Sight`, and the boxes of
questions and answers are carried between the two frames here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from medllava import regions
from medllava.conversation import Turn
from medllava.errors import DataError
from medllava.geometry import Box, Point, clipped_box, into_frame, out_of_frame
from medllava.images import load_image, to_data_uri
from medllava.serve.phrases import colour_of, different, phrases_of

SENT_SIDE = 2048
"""Longest side in pixels of the picture that is shown and sent; a larger original is shrunk to it. Boxes are fractions,
so they hold for both."""
THUMBNAIL_SIDE = 160
WHOLE = Box(x1=0, y1=0, x2=1, y2=1)


@dataclass(frozen=True)
class Region:
    """What is marked in the viewer, in 0..1 of the picture: a box, and the clicked point or the freehand path that it
    stands for."""

    box: Box
    point: Point | None = None
    path: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of_point(cls, x: float, y: float) -> Region:
        point = Point(x=x, y=y)
        return cls(regions.around(point), point)

    def within(self, frame: Box) -> regions.Region | None:
        """The region as the model is asked about it, in 0..1 of ``frame``; None if it lies outside."""
        box = into_frame(self.box, frame)
        if box is None:
            return None
        width, height = frame.x2 - frame.x1, frame.y2 - frame.y1

        def place(x: float, y: float) -> Point:
            return Point(x=_fraction((x - frame.x1) / width), y=_fraction((y - frame.y1) / height))

        if self.point is not None:
            return place(self.point.x, self.point.y)
        return tuple(place(x, y) for x, y in self.path) or box


@dataclass(frozen=True)
class NamedRegion:
    """A region that was read from a file, to choose from. ``colour``: ``#rrggbb``."""

    region: Region
    name: str
    colour: str


@dataclass(frozen=True)
class Place:
    """A place that an answer names, in 0..1 of the whole picture."""

    label: str
    box: Box
    colour: str


@dataclass(frozen=True)
class Sight:
    """What a question shows to the model: a data URI, and which part of the picture that is."""

    uri: str
    frame: Box = WHOLE


class Source(Protocol):
    """A picture of the conversation. ``size``: width and height of the original in pixels."""

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def thumbnail(self) -> str: ...
    def viewer(self) -> dict[str, Any]:
        """How the viewer shows it: the properties that ``viewer.js`` names."""
        ...

    def sight(self, marked: Box | None, view: Box | None) -> Sight:
        """What is sent with a question about ``marked`` (None: about what is visible), while ``view`` is the visible
        part (None if the viewer did not say)."""
        ...


@dataclass(frozen=True)
class Picture:
    """A photograph, and the copy of at most :data:`SENT_SIDE` pixels that is shown and sent, as a data URI."""

    image: Image.Image
    uri: str
    thumbnail: str = ""

    @property
    def size(self) -> tuple[int, int]:
        return self.image.size

    def viewer(self) -> dict[str, Any]:
        return {"src": self.uri, "size": list(self.size)}

    def sight(self, marked: Box | None, view: Box | None) -> Sight:
        return Sight(self.uri)


@dataclass(frozen=True)
class Looking:
    """Where the model looked, to show: what was found as a sentence, and pictures (JPEG data URIs) with a caption."""

    text: str
    pictures: tuple[tuple[str, str], ...] = ()


@dataclass(eq=False)
class Exchange:
    """One question and its answer. ``picture`` is a place in the session's list, None for a question without one.

    ``typed`` is what the person wrote, ``asked`` what the model reads: with the region written into it, or with ``uri``
    a picture on which the region is marked. Boxes there and in ``answer`` are in 0..1 of ``sight.frame``.
    """

    picture: int | None
    typed: str
    region: Region | None
    sight: Sight | None
    asked: str = ""
    uri: str | None = None
    answer: str = ""
    state: Literal["answering", "done", "stopped", "failed"] = "answering"
    note: str = ""
    """What a person should know of how the answer came about: stopped, failed, moved to another worker."""
    model: str = ""
    position: int = 0
    """Place in the worker's line while it waits there; 0 otherwise."""
    worker: str = ""
    """URL of the worker that was asked, or asked last."""
    vote: Literal["up", "down"] | None = None
    looked: Looking | None = None

    def waits(self) -> bool:
        """True while it is being answered."""
        return self.state == "answering"

    def address(self, ways: Sequence[str]) -> None:
        """Put the question as a model is asked that takes regions in these ways, see :mod:`medllava.regions`."""
        region = self.region.within(self.sight.frame) if self.region and self.sight else None
        self.asked = regions.with_region(self.typed, region)
        self.uri = self.sight.uri if self.sight else None
        if self.sight and regions.way_of(ways) == "mark":
            # The picture is decoded only where it is drawn upon.
            image = load_image(self.sight.uri)
            marked, self.asked = regions.asked(image, self.typed, region, ways)
            self.uri = self.sight.uri if marked is image or marked is None else to_data_uri(marked)

    def places(self) -> list[Place]:
        """The different places of the answer, by number, on the whole picture. Without a picture there are none."""
        if self.sight is None:
            return []
        return [
            Place(phrase.label, out_of_frame(phrase.box, self.sight.frame), colour_of(phrase.index))
            for phrase in different(phrases_of(self.answer))
        ]


@dataclass(eq=False)
class Session:
    """One open page. ``shown``: which picture the viewer shows."""

    pictures: list[Source] = field(default_factory=list)
    shown: int | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    loaded: dict[int, list[NamedRegion]] = field(default_factory=dict)
    """Regions read from files, by the place of their picture."""
    drawn: Exchange | None = None
    """The exchange whose places are drawn on the picture."""
    reading: bool = False
    """The field of a slide is being read for a question that is not among the exchanges yet."""
    flashes: int = 0
    saves: int = 0
    """How often a place was flashed and a file was saved, so that the browser does each once."""

    @property
    def answering(self) -> bool:
        return bool(self.exchanges) and self.exchanges[-1].waits()

    def picture(self) -> Source | None:
        return None if self.shown is None else self.pictures[self.shown]

    def open(self, picture: Source) -> None:
        """Add a picture to the conversation and show it."""
        self.pictures.append(picture)
        self.show(len(self.pictures) - 1)

    def show(self, number: int) -> None:
        """Show picture ``number``, with the places of the last answer about it. Raises IndexError."""
        if not 0 <= number < len(self.pictures):
            raise IndexError(f"there are {len(self.pictures)} pictures")
        self.shown = number
        about = [one for one in self.exchanges if one.picture == number and one.places()]
        self.drawn = about[-1] if about else None

    def ask(self, typed: str, region: Region | None = None, view: Box | None = None) -> Exchange:
        """Append a question about the shown picture, to be answered."""
        picture = self.picture()
        sight = picture.sight(region.box if region else None, view) if picture else None
        exchange = Exchange(self.shown, typed.strip(), region, sight)
        exchange.address(("text",))
        self.exchanges.append(exchange)
        self.drawn = None
        return exchange

    def stop(self) -> None:
        """End the answer that is being made; what was said stays part of the conversation."""
        if self.answering:
            self.exchanges[-1].state = "stopped"

    def again(self, number: int, typed: str | None = None) -> Exchange:
        """Ask question ``number`` once more, or ``typed`` in its place; it and what came after it are dropped."""
        before = self.cut(number)
        wanted = before.typed if typed is None else typed.strip()
        exchange = Exchange(before.picture, wanted, before.region, before.sight)
        exchange.address(("text",))
        self.exchanges.append(exchange)
        self.shown, self.drawn = (self.shown if before.picture is None else before.picture), None
        return exchange

    def cut(self, number: int) -> Exchange:
        """Drop exchange ``number`` and all after it. Returns that one; raises IndexError if there is none."""
        if not 0 <= number < len(self.exchanges):
            raise IndexError(f"there are {len(self.exchanges)} questions")
        self.stop()
        # A new list: an answer that is just being stopped ends in the old one.
        self.exchanges, dropped = self.exchanges[:number], self.exchanges[number]
        self.drawn = self.drawn if self.drawn in self.exchanges else None
        return dropped

    def forget(self) -> None:
        """A new conversation: no pictures, no exchanges."""
        self.stop()
        self.pictures, self.shown, self.exchanges, self.loaded, self.drawn = [], None, [], {}, None

    def prompt(self, exchange: Exchange) -> tuple[list[Turn], dict[int, str]]:
        """The turns up to ``exchange``'s question, and by turn the picture that comes with it: each where it first
        belongs, and again where the conversation comes back to it. Questions that got no answer are left out."""
        turns: list[Turn] = []
        pictures: dict[int, str] = {}
        last: str | None = None
        for one in self.exchanges[: self.exchanges.index(exchange) + 1]:
            if one is not exchange and not one.answer:
                continue
            if one.uri and one.uri != last:
                pictures[len(turns)] = last = one.uri
            turns.append(Turn(role="user", text=one.asked))
            if one is not exchange:
                turns.append(Turn(role="assistant", text=one.answer))
        return turns, pictures


def open_picture(source: str | Path) -> Picture:
    """Open a data URI, or a file that the operator named: only a Path is one. Raises DataError."""
    if not isinstance(source, Path) and not str(source).startswith("data:"):
        raise DataError("a picture comes as a data URI; this server opens no file for a browser")
    image = load_image(source)
    sent = image
    if max(image.size) > SENT_SIDE:
        sent = image.copy()
        sent.thumbnail((SENT_SIDE, SENT_SIDE), Image.Resampling.LANCZOS)
    return Picture(image, to_data_uri(sent), thumbnail_of(sent))


def thumbnail_of(image: Image.Image) -> str:
    """A small copy as a data URI."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    return to_data_uri(small, "JPEG")


def region_of(value: Any) -> Region | None:
    """The region that the viewer holds, if any; its value comes from a browser and may be anything."""
    if not isinstance(value, dict):
        return None
    corners = _numbers(value.get("box"), 4)
    box = clipped_box(*corners) if corners else None
    if box is None:
        return None
    place = _numbers(value.get("point"), 2)
    drawn = value.get("path")
    path = [_numbers(step, 2) for step in drawn] if isinstance(drawn, list) else []
    point = Point(x=_fraction(place[0]), y=_fraction(place[1])) if place else None
    return Region(box, point, tuple((_fraction(step[0]), _fraction(step[1])) for step in path if step))


def view_of(value: Any) -> Box | None:
    """The part of the picture that the viewer shows, if it says so."""
    corners = _numbers(value.get("view"), 4) if isinstance(value, dict) else None
    return clipped_box(*corners) if corners else None


def _numbers(value: Any, count: int) -> Sequence[float] | None:
    if not isinstance(value, list) or len(value) != count:
        return None
    return value if all(isinstance(one, int | float) and one == one for one in value) else None


def _fraction(value: float) -> float:
    return min(max(value, 0.0), 1.0)
