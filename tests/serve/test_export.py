"""Conversations and regions as files."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medllava.errors import DataError
from medllava.geometry import Box
from medllava.images import to_data_uri
from medllava.serve.export import as_geojson, as_json, as_markdown, read_geojson
from medllava.serve.session import Picture, Region, Session

BOX = Box(x1=0.1, y1=0.2, x2=0.4, y2=0.6)
OUTLINE = ((0.1, 0.2), (0.4, 0.3), (0.2, 0.6))


@pytest.fixture
def session() -> Session:
    session = Session()
    image = Image.new("RGB", (1200, 600), "pink")
    session.open(Picture(image, to_data_uri(image)))
    for typed, region in [
        ("What is in this region?", Region(BOX)), ("And *here*?", Region.of_point(0.5, 0.5)),
        ("<b>Outline</b>?", Region(BOX, path=OUTLINE)),
    ]:
        exchange = session.ask(typed, region)
        exchange.answer, exchange.state, exchange.model = "A gland [0.50, 0.50, 0.75, 1.00].", "done", "stage2"
    return session


def test_json_holds_the_whole_conversation(session: Session) -> None:
    text = as_json(session)
    assert "data:image" not in text
    whole = json.loads(text)
    assert whole["pictures"] == [{"number": 1, "width": 1200, "height": 600}]
    first, second, third = whole["exchanges"]
    assert first == {
        "picture": 1, "question": "What is in this region?", "asked": "What is in the region [0.10, 0.20, 0.40, 0.60]?",
        "region": {"box": [0.1, 0.2, 0.4, 0.6], "point": None, "path": None}, "shown": None,
        "answer": "A gland [0.50, 0.50, 0.75, 1.00].",
        "boxes": [{"box": [0.5, 0.5, 0.75, 1.0], "text": "A gland", "colour": "#e6194b"}],
        "state": "done", "note": "", "model": "stage2",
    }
    assert second["region"]["point"] == [0.5, 0.5]
    assert third["region"]["path"] == [list(corner) for corner in OUTLINE]
    assert json.loads(as_json(session, with_pictures=True))["pictures"][0]["image"].startswith("data:image/png")


def test_markdown_is_text_that_runs_nothing(session: Session) -> None:
    hostile = session.ask("![x](http://evil.example/a.png) <img src=x onerror=alert(1)>\n# no heading")
    hostile.answer = "[a](javascript:alert(1)) <script>\nhttp://evil.example"
    hostile.state, hostile.model = "done", "m](x"
    text = as_markdown(session)
    assert "data:image" not in text and "![Picture 1](data:image/png" in as_markdown(session, with_pictures=True)
    assert "> What is in the region [0.10, 0.20, 0.40, 0.60]?" in text
    assert "Region (freehand): `[0.10, 0.20, 0.40, 0.60]`" in text
    assert "- A gland: `[0.50, 0.50, 0.75, 1.00]`" in text
    markdown_it = pytest.importorskip("markdown_it")
    html = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).render(text)
    for sign in ("<img", "<a ", "<script", "<b>"):
        assert sign not in html
    assert html.count("<h1") == 1


def test_geojson_is_in_pixels_of_the_original(session: Session) -> None:
    features = json.loads(as_geojson(session, 0))["features"]
    assert [one["properties"]["name"] for one in features] == [
        "Question 1", "Answer 1", "Question 2", "Answer 2", "Question 3", "Answer 3"
    ]
    assert features[0]["geometry"] == {
        "type": "Polygon", "coordinates": [[[120, 120], [480, 120], [480, 360], [120, 360], [120, 120]]]
    }
    assert features[1]["properties"]["classification"] == {"name": "A gland", "color": [230, 25, 75]}
    assert features[2]["geometry"] == {"type": "Point", "coordinates": [600, 300]}
    assert features[4]["geometry"]["coordinates"][0] == [[120, 120], [480, 180], [240, 360], [120, 120]]


def test_geojson_comes_back_as_it_went(session: Session) -> None:
    back = read_geojson(as_geojson(session, 0), (1200, 600))
    assert [one.name for one in back][:2] == ["Question 1 - Asked about", "Answer 1 - A gland"]
    assert [one.colour for one in back][1] == "#e6194b"
    assert back[0].region.box.as_tuple() == pytest.approx(BOX.as_tuple())
    assert back[0].region.path == ()
    assert back[2].region.point is not None and back[2].region.point.x == 0.5
    assert np.allclose(back[4].region.path, OUTLINE)


def test_what_qupath_writes_is_read() -> None:
    """Shapes of QuPath 0.2 to 0.5: a list or a collection, colorRGB as a signed integer, holes, several polygons."""
    hole = [[20, 20], [30, 20], [30, 30], [20, 20]]
    square = [[10, 10], [50, 10], [50, 40], [10, 40], [10, 10]]
    triangle = [[60, 60], [90, 70], [65, 95], [60, 60]]
    old: dict[str, Any] = {
        "type": "Feature", "id": "PathAnnotationObject",
        "geometry": {"type": "MultiPolygon", "coordinates": [[square, hole], [triangle]]},
        "properties": {"classification": {"name": "Tumor", "colorRGB": -3670016}, "isLocked": False},
    }
    first, second = read_geojson(json.dumps([old]), (100, 100))
    assert (first.name, first.colour) == ("Tumor", "#c80000")
    assert first.region.box.as_tuple() == (0.1, 0.1, 0.5, 0.4)
    assert second.region.path == ((0.6, 0.6), (0.9, 0.7), (0.65, 0.95))
    beyond = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[-10, -10], [20, -10], [20, 200]]]}}
    (cut,) = read_geojson(json.dumps(beyond), (100, 100))
    assert (cut.name, cut.region.box.as_tuple()) == ("Region 1", (0.0, 0.0, 0.2, 1.0))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("no json", "not a GeoJSON file"),
        ("[" * 100_000, "not a GeoJSON file"),
        ("3", "expected a FeatureCollection"),
        ('{"type": "FeatureCollection"}', "expected a FeatureCollection"),
        ('{"type": "FeatureCollection", "features": []}', "no regions in this file"),
        ('{"type": "Feature", "geometry": null}', "feature 1: its geometry cannot be read .*without coordinates"),
        ('[{"geometry": {"type": "Polygon", "coordinates": [["a", "b"]]}}]', "feature 1: its geometry cannot be read"),
        ('[{"geometry": {"type": "Polygon", "coordinates": []}}]', "feature 1: its geometry cannot be read"),
        ('[{"geometry": {"type": "Point", "coordinates": [NaN, 3]}}]', "a coordinate that is no number"),
        ('[{"geometry": {"type": "Circle", "coordinates": [1, 3]}}]', "type 'Circle'"),
        ('[{"geometry": {"type": "Point", "coordinates": [500, 3]}}]', "all 1 regions lie outside this image of 100 x"),
    ],
)
def test_bad_files_are_told_apart(text: str, why: str) -> None:
    with pytest.raises(DataError, match=why):
        read_geojson(text, (100, 100))
