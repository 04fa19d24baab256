"""A conversation as Markdown or JSON, and regions as the GeoJSON that QuPath writes and reads.

Nothing here touches a disk: the page hands the texts to the browser, which saves them. No file names of the user's
disk are known here, so none can be written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from medllava.errors import DataError
from medllava.geometry import clipped_box, format_box
from medllava.serve.phrases import colour_of
from medllava.serve.session import WHOLE, Exchange, NamedRegion, Region, Session

FRAME = "0..1 of the original image, origin top left, x to the right, y down"
CAUTION = "Research only, not for diagnosis."
MOST_REGIONS = 500
"""Regions of a GeoJSON file that are listed; a page with a whole slide's cells would not be usable."""
QUESTION_COLOUR = "#1d1d1f"


# -- the conversation


def as_json(session: Session, *, with_pictures: bool = False) -> str:
    """Pictures (size, and with ``with_pictures`` the copy that the model saw), questions, regions, answers, boxes."""
    pictures = [
        {"number": number, "width": picture.size[0], "height": picture.size[1]}
        | ({"image": picture.sight(None, None).uri} if with_pictures else {})
        for number, picture in enumerate(session.pictures, start=1)
    ]
    whole = {
        "caution": CAUTION, "coordinates": FRAME, "pictures": pictures,
        "exchanges": [_exchange(one) for one in session.exchanges],
    }
    return json.dumps(whole, ensure_ascii=False, indent=1) + "\n"


def _exchange(one: Exchange) -> dict[str, Any]:
    return {
        "picture": None if one.picture is None else one.picture + 1,
        "question": one.typed,
        "asked": one.asked,
        "region": None if one.region is None else region_json(one.region),
        "shown": None if one.sight is None or one.sight.frame == WHOLE else one.sight.frame.model_dump(),
        "answer": one.answer,
        "boxes": [
            {"box": place.box.model_dump(), "text": place.label, "colour": place.colour} for place in one.places()
        ],
        "state": one.state,
        "note": one.note,
        "model": one.model,
    }


def region_json(region: Region) -> dict[str, Any]:
    """A region for files: its box, and the point or the path that it stands for."""
    return {
        "box": region.box.model_dump(),
        "point": None if region.point is None else region.point.model_dump(),
        "path": [[round(x, 5), round(y, 5)] for x, y in region.path] or None,
    }


def as_markdown(session: Session, *, with_pictures: bool = False) -> str:
    """The conversation to read. What people and models wrote stands in quotes and runs nothing where it is shown."""
    lines = ["# Conversation", "", f"{CAUTION} Coordinates: {FRAME}.", ""]
    for number, picture in enumerate(session.pictures, start=1):
        lines += [f"Picture {number}: {picture.size[0]} x {picture.size[1]} pixels", ""]
        if with_pictures:
            lines += [f"![Picture {number}]({picture.sight(None, None).uri})", ""]
    for number, one in enumerate(session.exchanges, start=1):
        where = "" if one.picture is None else f" (picture {one.picture + 1})"
        lines += [f"## Question {number}{where}", "", _quoted(one.asked), ""]
        if one.region is not None:
            kind = "point" if one.region.point else "freehand" if one.region.path else "box"
            lines += [f"Region ({kind}): `{format_box(one.region.box)}`", ""]
        lines += [f"Answer{f' of {_plain(one.model)}' if one.model else ''}:", "", _quoted(one.answer or "-"), ""]
        lines += [f"- {_plain(place.label)}: `{format_box(place.box)}`" for place in one.places()]
        lines += [""] * bool(one.places())
        if one.note or one.state != "done":
            lines += [_plain(one.note or one.state), ""]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """As a quotation, in which nothing is a picture, a link, HTML or a heading."""
    return "\n".join(f"> {_plain(line)}".rstrip() for line in text.splitlines()) or ">"


def _plain(text: str) -> str:
    escaped = "".join(f"\\{sign}" if sign in "\\`*_{}<>#|!~" else sign for sign in text)
    # Brackets stay, so that boxes can be read; only what makes a link is taken apart.
    return escaped.replace("](", "]\\(").replace("]:", "]\\:").replace("://", ":\\//")


# -- regions


def as_geojson(session: Session, number: int) -> str:
    """The regions of picture ``number`` (from 0) as a QuPath FeatureCollection: what was asked about, and the boxes of
    the answers; polygons and points in pixels of the original image."""
    width, height = session.pictures[number].size
    features = []
    for asked, one in enumerate(session.exchanges, start=1):
        if one.picture != number:
            continue
        if one.region is not None:
            features.append(
                _feature(_geometry(one.region, width, height), "Asked about", f"Question {asked}", QUESTION_COLOUR)
            )
        for place in one.places():
            outline = _geometry(Region(place.box), width, height)
            features.append(_feature(outline, place.label, f"Answer {asked}", place.colour))
    return json.dumps({"type": "FeatureCollection", "features": features}, ensure_ascii=False, indent=1) + "\n"


def _geometry(region: Region, width: int, height: int) -> dict[str, Any]:
    if region.point is not None:
        return {"type": "Point", "coordinates": [round(region.point.x * width, 2), round(region.point.y * height, 2)]}
    corners = region.path if len(region.path) > 2 else None
    if corners is None:
        x1, y1, x2, y2 = region.box.as_tuple()
        corners = ((x1, y1), (x2, y1), (x2, y2), (x1, y2))
    ring = [[round(x * width, 2), round(y * height, 2)] for x, y in corners]
    return {"type": "Polygon", "coordinates": [[*ring, ring[0]] if ring[0] != ring[-1] else ring]}


def _feature(geometry: dict[str, Any], label: str, name: str, colour: str) -> dict[str, Any]:
    rgb = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return {
        "type": "Feature", "geometry": geometry,
        "properties": {"objectType": "annotation", "name": name, "classification": {"name": label, "color": rgb}},
    }


def read_geojson(text: str, size: tuple[int, int]) -> list[NamedRegion]:
    """The regions of a QuPath export on an image of ``size`` pixels, at most :data:`MOST_REGIONS`. A polygon becomes
    its outer ring, cut to the image; holes are left out. Raises DataError."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a GeoJSON file: {str(error)[:120]}") from error
    features = whole if isinstance(whole, list) else None
    if isinstance(whole, dict):
        features = whole.get("features") if whole.get("type") == "FeatureCollection" else [whole]
    if not isinstance(features, list) or not all(isinstance(one, dict) for one in features):
        raise DataError("not GeoJSON: expected a FeatureCollection or a list of features, as QuPath exports")
    regions: list[NamedRegion] = []
    shapes = 0
    for number, feature in enumerate(features, start=1):
        name, colour = _class_of(feature, number, len(regions))
        try:
            for ring in _rings(feature.get("geometry") or feature):
                shapes += 1
                region = _region(ring, size)
                if region is not None and len(regions) < MOST_REGIONS:
                    regions.append(NamedRegion(region, name, colour))
        except (TypeError, ValueError, OverflowError, IndexError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(f"feature {number}: its geometry cannot be read ({str(error)[:80]})") from error
    if not shapes:
        raise DataError("no regions in this file: QuPath's File > Export objects as GeoJSON writes them")
    if not regions:
        raise DataError(
            f"all {shapes} regions lie outside this image of {size[0]} x {size[1]} pixels: were they drawn on another?"
        )
    return regions


def _class_of(feature: dict[str, Any], number: int, colours: int) -> tuple[str, str]:
    """Name and colour of a feature: of its classification, of the object, or of our own."""
    properties = feature.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    kind = properties.get("classification")
    kind = kind if isinstance(kind, dict) else {}
    names = [text for text in (properties.get("name"), kind.get("name")) if isinstance(text, str) and text.strip()]
    rgb = kind.get("color") or properties.get("color")
    if isinstance(kind.get("colorRGB"), int):  # QuPath before 0.4: a signed integer ARGB
        packed = kind["colorRGB"] & 0xFFFFFF
        rgb = [packed >> 16, packed >> 8 & 255, packed & 255]
    known = isinstance(rgb, list) and len(rgb) == 3 and all(isinstance(one, int) and 0 <= one < 256 for one in rgb)
    colour = "#" + bytes(rgb).hex() if known else colour_of(colours)  # type: ignore[arg-type]
    name = " - ".join(dict.fromkeys(text.strip()[:60] for text in names)) or f"Region {number}"
    return name.encode(errors="replace").decode(), colour  # half a character could not be sent to the browser


def _rings(geometry: dict[str, Any]) -> Iterator[Sequence[Sequence[float]]]:
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    if kind == "GeometryCollection":
        for one in geometry["geometries"]:
            yield from _rings(one)
    elif coordinates is None:
        raise ValueError(f"type {str(kind)[:40]!r} without coordinates")
    elif kind == "Polygon":
        yield coordinates[0]
    elif kind == "MultiPolygon":
        yield from (polygon[0] for polygon in coordinates)
    elif kind == "Point":
        yield [coordinates]
    elif kind == "MultiPoint":
        yield from ([one] for one in coordinates)
    elif kind == "LineString":
        yield coordinates
    elif kind == "MultiLineString":
        yield from coordinates
    else:
        raise ValueError(f"type {str(kind)[:40]!r}")


def _region(ring: Sequence[Sequence[float]], size: tuple[int, int]) -> Region | None:
    """A ring of pixels as a region; None if nothing of it lies on the image."""
    places = [(float(x) / size[0], float(y) / size[1]) for x, y, *_ in ring]
    if any(value != value or abs(value) == float("inf") for place in places for value in place):
        raise ValueError("a coordinate that is no number")
    if len(places) > 1 and places[0] == places[-1]:
        places.pop()
    xs, ys = [x for x, _ in places], [y for _, y in places]
    if max(xs) < 0 or max(ys) < 0 or min(xs) > 1 or min(ys) > 1:
        return None
    inside = tuple((min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)) for x, y in places)
    if len(inside) == 1:
        return Region.of_point(*inside[0])
    box = clipped_box(min(xs), min(ys), max(xs), max(ys))
    if box is None:
        return Region.of_point(*inside[0])
    corners = set(inside) <= {(x, y) for x in (box.x1, box.x2) for y in (box.y1, box.y2)}
    return Region(box, path=() if corners else inside)
