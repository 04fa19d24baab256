"""What the web chat's page shows of a session: the properties of its components, and the files that it saves.

Each property is named as ``viewer.js``, ``chat.js``, ``tray.js`` and ``head.js`` read it. Nothing is changed here; what
changes a session is in :mod:`medllava.serve.page`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from medllava.errors import DataError
from medllava.geometry import parse_boxes
from medllava.images import draw_boxes, load_image, to_data_uri
from medllava.serve.answering import Choice, Workers
from medllava.serve.export import as_geojson, as_json, as_markdown
from medllava.serve.phrases import colour_of, phrases_of
from medllava.serve.session import Exchange, Picture, Session

THUMBNAIL_HEIGHT = 124
CORNERS_SHOWN = 200
"""Corners of a loaded outline that are drawn; it is asked about with all of them."""


def viewer_of(session: Session, **more: Any) -> Any:
    """The shown picture with the places of the drawn answer, then the regions that were loaded for it."""
    picture = session.picture()
    boxes: list[dict[str, Any]] = []
    if session.drawn is not None and session.drawn.picture == session.shown:
        boxes += [
            {"box": list(place.box.as_tuple()), "label": str(number), "colour": place.colour}
            for number, place in enumerate(session.drawn.places(), start=1)
        ]
    for one in session.loaded.get(session.shown, []) if session.shown is not None else []:
        step = max(1, len(one.region.path) // CORNERS_SHOWN)
        path = [list(corner) for corner in one.region.path[::step]]
        boxes.append(
            {"box": list(one.region.box.as_tuple()), "label": one.name, "colour": one.colour, "path": path or None}
        )
    none: dict[str, Any] = {"src": "", "size": [0, 0], "tiles": None, "mpp": None, "power": None}
    shown = none | (picture.viewer() if picture else {})
    return gr.HTML(**shown, picture=session.shown or 0, boxes=boxes, **more)


def chat_of(session: Session, **more: Any) -> Any:
    """The conversation, as ``chat.js`` draws it."""
    drawn = session.exchanges.index(session.drawn) if session.drawn in session.exchanges else None
    return gr.HTML(
        exchanges=[exchange_of(one, len(session.pictures) > 1) for one in session.exchanges], current=drawn,
        busy=session.answering, pictures=len(session.pictures), **more,
    )


def exchange_of(one: Exchange, many: bool) -> dict[str, Any]:
    return {
        "picture": None if one.picture is None else one.picture + 1, "many": many, "typed": one.typed,
        "asked": one.asked, "answer": one.answer, "parts": parts_of(one), "state": one.state, "note": one.note,
        "position": one.position,
        "model": one.model, "vote": one.vote,
        "looked": {"text": one.looked.text, "pictures": one.looked.pictures} if one.looked else None,
    }


def parts_of(one: Exchange) -> list[dict[str, Any]]:
    """The answer in pieces: plain text, and phrases with the number and colour of their place."""
    parts: list[dict[str, Any]] = []
    behind = 0
    # While it streams, a phrase may still grow.
    for phrase in phrases_of(one.answer) if one.sight and one.state != "answering" else []:
        parts.append({"text": one.answer[behind : phrase.start], "index": None})
        text = one.answer[phrase.start : phrase.end]
        parts.append({"text": text, "index": phrase.index, "colour": colour_of(phrase.index)})
        behind = phrase.end
    parts.append({"text": one.answer[behind:], "index": None})
    return [part for part in parts if part["text"]]


def tray_of(session: Session) -> Any:
    """Pictures of the conversation and loaded regions, as ``tray.js`` draws them."""
    loaded = session.loaded.get(session.shown, []) if session.shown is not None else []
    return gr.HTML(
        pictures=[picture.thumbnail for picture in session.pictures] if len(session.pictures) > 1 else [],
        shown=session.shown, regions=[{"name": one.name, "colour": one.colour} for one in loaded],
    )


def head_of(workers: Workers, chosen: Choice) -> Any:
    """The line on top, as ``head.js`` draws it."""
    state, model = workers.state(chosen), workers.model(chosen)
    return gr.HTML(
        choices=[[str(choice), label] for choice, label in workers.choices()], value=str(chosen),
        status=state.status if state else "", model=model.name if model else "", detail=state.detail if state else "",
        mpp=model.mpp if model else None,
    )


def drawn_picture(session: Session) -> bytes:
    """The shown picture as a JPEG with the places that are drawn on it. Raises DataError."""
    picture, drawn = session.picture(), session.drawn
    if picture is None:
        raise DataError("there is no picture to save.")
    places = drawn.places() if drawn and drawn.picture == session.shown else []
    boxes = [place.box for place in places]
    if isinstance(picture, Picture):
        image = picture.image
    else:
        # Of a slide, the field that was asked about, with the answer's own boxes.
        sight = drawn.sight if drawn and places else picture.sight(None, None)
        assert sight is not None
        image, boxes = load_image(sight.uri), parse_boxes(drawn.answer) if drawn and places else []
    buffer = io.BytesIO()
    labels = [str(number) for number in range(1, len(boxes) + 1)]
    draw_boxes(image, boxes, labels).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def saved_file(session: Session, kind: str, with_pictures: bool) -> dict[str, Any]:
    """What the browser saves: name, type and text, or bytes in base64. Raises DataError."""
    if kind == "image":
        data = base64.b64encode(drawn_picture(session)).decode()
        return {"name": "picture.jpg", "type": "image/jpeg", "base64": data}
    if kind == "geojson":
        if session.shown is None:
            raise DataError("there is no picture whose regions could be saved.")
        text = as_geojson(session, session.shown)
        return {"name": f"regions-picture-{session.shown + 1}.geojson", "type": "application/geo+json", "text": text}
    if kind == "json":
        text = as_json(session, with_pictures=with_pictures)
        return {"name": "conversation.json", "type": "application/json", "text": text}
    return {
        "name": "conversation.md", "type": "text/markdown", "text": as_markdown(session, with_pictures=with_pictures)
    }


def example_strip(pictures: Sequence[Path]) -> str:
    """Small copies of the example pictures as buttons."""
    buttons = []
    for number, path in enumerate(pictures):
        small = load_image(path)
        small.thumbnail((THUMBNAIL_HEIGHT * 2, THUMBNAIL_HEIGHT), Image.Resampling.LANCZOS)
        buttons.append(
            f'<button type="button" data-number="{number}" aria-label="example {number + 1}">'
            f'<img alt="" src="{to_data_uri(small, "JPEG")}"></button>'
        )
    return f'<div class="examples"><span>Examples</span>{"".join(buttons)}</div>' if buttons else ""
