"""An end to what one request may send to the web page, whose framework sets none."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 210_000_000
"""The largest picture that the viewer takes (MAX_BYTES in viewer.js), in base64, and what is said beside it."""
_TOLD = f"more than {MOST_BYTES // 1_000_000} MB in one request: send a smaller picture"


class BodyLimit:
    """ASGI middleware: a request of more than MOST_BYTES is refused with status 413, as soon as that is known."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > MOST_BYTES:
            await PlainTextResponse(_TOLD, 413)(scope, receive, send)
            return
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MOST_BYTES:
                raise HTTPException(413, _TOLD)
            return message

        await self._app(scope, bounded, send)
