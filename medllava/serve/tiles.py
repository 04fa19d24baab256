"""Slides that the operator offers (``--slides``), for the viewer and for the model; and the viewer's own library.

Slides are gigabytes: they stay where they are. The browser asks for tiles by a slide's number, never by a name, and the
model gets the field that is shown, at no more than :data:`~medllava.serve.session.SENT_SIDE` pixels.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Response
from fastapi.responses import FileResponse
from fastapi.routing import APIRoute

from medllava.errors import DataError
from medllava.geometry import Box
from medllava.images import to_data_uri
from medllava.serve.session import SENT_SIDE, THUMBNAIL_SIDE, WHOLE, Sight
from medllava.slides import TILE_OVERLAP, TILE_SIDE, Slide, frame_of

LIBRARY = Path(__file__).parent / "vendor" / "openseadragon.min.js"
PREFIX = "/medllava"
FIELD_QUALITY = 95
"""JPEG quality of the field that is sent. As PNG, each question would keep some 10 MB, for no more than the scanner's
own JPEG holds."""


@dataclass(frozen=True)
class ShownSlide:
    """A slide as a picture of the conversation. ``number``: its place in the operator's list."""

    slide: Slide
    number: int

    @property
    def size(self) -> tuple[int, int]:
        return self.slide.size

    @cached_property
    def thumbnail(self) -> str:
        return to_data_uri(self.slide.thumbnail(THUMBNAIL_SIDE), "JPEG")

    def sight(self, marked: Box | None, view: Box | None) -> Sight:
        """The view, or where the region is not within it, the region and what is around. Raises DataError."""
        field = self.slide.field(frame_of(marked, view or WHOLE), SENT_SIDE)
        return Sight(to_data_uri(field.image, "JPEG", quality=FIELD_QUALITY), field.box)

    def viewer(self) -> dict[str, Any]:
        return {
            "src": f"{PREFIX.strip('/')}/slides/{self.number}", "size": list(self.size),
            "tiles": {"size": TILE_SIDE, "overlap": TILE_OVERLAP}, "mpp": self.slide.mpp, "power": self.slide.power,
        }


def slide_strip(slides: Sequence[ShownSlide]) -> str:
    """Small pictures of the slides as buttons, with the names of their files."""
    buttons = [
        f'<button type="button" data-number="{slide.number}"><img alt="" src="{slide.thumbnail}">'
        f"<small>{html.escape(slide.slide.path.stem)}</small></button>"
        for slide in slides
    ]
    return f'<div class="examples slides"><span>Slides</span>{"".join(buttons)}</div>' if buttons else ""


def add_routes(app: FastAPI, slides: Sequence[ShownSlide]) -> None:
    """Serve the viewer's library and the slides' tiles beside Gradio's own routes, behind the same password."""
    # What guards the page's own configuration guards these: with --auth-file, nothing is shown before the login.
    config = next(route for route in app.routes if isinstance(route, APIRoute) and route.path == "/config")
    guarded: dict[str, Any] = {"dependencies": config.dependencies, "include_in_schema": False}
    # Nothing of a slide is to lie on a disk of the one who looks at it.
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

    @app.get(f"{PREFIX}/vendor/{LIBRARY.name}", **guarded)
    def library() -> FileResponse:
        return FileResponse(LIBRARY, media_type="text/javascript", headers={"Cache-Control": "max-age=3600"})

    @app.get(f"{PREFIX}/slides/{{number}}/{{level}}/{{column}}_{{row}}.jpg", **guarded)
    def tile(number: int, level: int, column: int, row: int) -> Response:
        if not 0 <= number < len(slides):
            raise HTTPException(404, "no such slide")
        try:
            content = slides[number].slide.tile(level, column, row)
        except LookupError as error:
            raise HTTPException(404, str(error)) from error
        except DataError as error:
            # Without the path of the file, which is the operator's.
            raise HTTPException(500, "this part of the slide cannot be read") from error
        return Response(content, media_type="image/jpeg", headers=headers)
