"""The conversation of one open page, without a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medllava.geometry import Box
from medllava.images import BOX_COLOURS, load_image, to_data_uri
from medllava.regions import draw_mark
from medllava.serve.session import Picture, Region, Session, Sight, open_picture, region_of, view_of

BOX = Box(x1=0.1, y1=0.2, x2=0.4, y2=0.6)


def picture(name: str) -> Picture:
    return Picture(Image.new("RGB", (40, 20)), f"data:{name}")


def answered(session: Session, text: str, answer: str, region: Region | None = None) -> None:
    exchange = session.ask(text, region)
    exchange.answer, exchange.state = answer, "done"


def test_a_picture_goes_with_the_turn_it_first_belongs_to() -> None:
    session = Session()
    session.open(picture("a"))
    answered(session, "What is in this region?", "A gland.", Region(BOX))
    session.open(picture("b"))
    answered(session, "And here?", "A vessel.")
    turns, pictures = session.prompt(session.ask("Sure?"))
    assert [turn.text for turn in turns] == [
        "What is in the region [0.10, 0.20, 0.40, 0.60]?", "A gland.", "And here?", "A vessel.", "Sure?"
    ]
    assert pictures == {0: "data:a", 2: "data:b"}
    session.stop()
    session.shown = 0
    _, pictures = session.prompt(session.ask("Back to the first?"))
    assert pictures == {0: "data:a", 2: "data:b", 4: "data:a"}  # so that it is clear which is meant


def test_what_got_no_answer_is_not_sent_again_and_what_was_stopped_is() -> None:
    session = Session()
    session.open(picture("a"))
    session.ask("Fails?").state = "failed"
    stopped = session.ask("Stopped?")
    stopped.answer = "A gl"
    session.stop()
    assert stopped.state == "stopped"
    turns, pictures = session.prompt(session.ask("Next?"))
    assert [turn.text for turn in turns] == ["Stopped?", "A gl", "Next?"]
    assert pictures == {0: "data:a"}


def test_cutting_returns_the_question_and_ends_its_answer() -> None:
    session = Session()
    answered(session, "one", "1")
    running = session.ask("two")
    assert session.answering
    kept = session.exchanges
    assert session.cut(1) is running
    assert running.state == "stopped"
    assert (len(session.exchanges), len(kept), session.answering) == (1, 2, False)
    for number in (1, -1):
        with pytest.raises(IndexError, match="there are 1 questions"):
            session.cut(number)


def test_asking_again_keeps_picture_and_region() -> None:
    session = Session()
    session.open(picture("a"))
    answered(session, "What is in this region?", "A gland.", Region(BOX))
    session.open(picture("b"))
    answered(session, "And here?", "A vessel.")
    edited = session.again(0, "Is this box a gland?")
    assert (edited.asked, edited.uri, session.shown) == ("Is the box [0.10, 0.20, 0.40, 0.60] a gland?", "data:a", 0)
    assert session.exchanges == [edited]
    assert session.again(0).typed == "Is this box a gland?"


def test_a_model_that_knows_marks_gets_the_region_drawn() -> None:
    session = Session()
    image = Image.new("RGB", (200, 100), "white")
    session.open(Picture(image, to_data_uri(image)))
    exchange = session.ask("What is in this region?", Region(BOX))
    exchange.address(("mark",))
    assert exchange.asked == "What is in the region marked in red?"
    assert exchange.uri is not None and exchange.sight is not None and exchange.uri != exchange.sight.uri
    assert np.array_equal(load_image(exchange.uri), draw_mark(image, BOX))
    assert session.prompt(exchange)[1] == {0: exchange.uri}
    exchange.address(("text", "mark"))
    assert (exchange.asked, exchange.uri) == ("What is in the region [0.10, 0.20, 0.40, 0.60]?", exchange.sight.uri)


def test_an_answer_that_ends_late_does_not_enter_the_next_conversation() -> None:
    session = Session()
    session.open(picture("a"))
    late = session.ask("slow?")
    session.forget()
    late.answer = "late"
    assert (session.pictures, session.exchanges, session.shown, session.answering) == ([], [], None, False)


def test_boxes_of_a_part_of_the_picture() -> None:
    @dataclass(frozen=True)
    class Slide:
        size = (4000, 2000)
        thumbnail = ""

        def sight(self, marked: Box | None, view: Box | None) -> Sight:
            assert view is not None
            return Sight("data:part", view)

    session = Session()
    session.open(Slide())
    marked, view = Region(Box(x1=0.6, y1=0.55, x2=0.7, y2=0.6)), Box(x1=0.5, y1=0.5, x2=1, y2=0.7)
    exchange = session.ask("This box?", marked, view)
    assert exchange.asked == "The box [0.20, 0.25, 0.40, 0.50]?"
    exchange.answer = "A gland [0.20, 0.00, 1.00, 0.50]."
    (place,) = exchange.places()
    assert (place.label, place.colour) == ("A gland", BOX_COLOURS[0])
    assert place.box.as_tuple() == pytest.approx((0.6, 0.5, 1.0, 0.6))


def test_regions_from_the_page() -> None:
    assert region_of({"box": [0.1, 0.2, 0.4, 0.6], "point": None}) == Region(BOX)
    drawn = {"picture": 0, "box": [0.1, 0.2, 0.4, 0.6], "point": [0.2, 0.4], "path": [[0.1, 0.2], [7, 0.6], "x"]}
    region = region_of(drawn)
    assert region is not None and region.point is not None
    assert (region.point.x, region.path) == (0.2, ((0.1, 0.2), (1.0, 0.6)))
    for value in (None, "", {}, {"box": None}, {"box": [1, 2]}, {"box": [1, "2", 3, 4]}, {"box": [float("nan")] * 4}):
        assert region_of(value) is None
    view = view_of({"view": [0.5, 0.5, 1, 1]})
    assert view is not None and view.as_tuple() == (0.5, 0.5, 1, 1)
    assert view_of({"view": "all"}) is None


def test_a_large_picture_is_sent_smaller_and_kept_whole(tmp_path: Path) -> None:
    Image.new("RGB", (5000, 1000), "white").save(tmp_path / "wide.png")
    opened = open_picture(tmp_path / "wide.png")
    assert opened.size == (5000, 1000)
    assert open_picture(opened.uri).size == (2048, 410)
    assert max(open_picture(opened.thumbnail).size) == 160
