"""What a request brings, taken in with care: its bytes, its fields and its pictures, each within :class:`Limits`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

from fastapi import Request
from PIL import Image
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from medllava.errors import DataError, ImageTooLarge
from medllava.images import load_image
from medllava.jsonl import describe
from medllava.serve.faults import Refused
from medllava.serve.fetch import fetch_picture
from medllava.serve.schema import Conversation

MOST_TEXT_MB = 4.0
"""Of a request, what is not base64 of its pictures. It is some ten times what a model of 128,000 tokens reads; to parse
much more would hold up the others."""
MOST_FAULTS = 1000
"""Of a request; of one with more only their number is told, since to name them would take minutes."""
FAULTS_TOLD, FAULT_LENGTH = 8, 200
"""How many faults a message names, and at most how many characters of each."""
DRAIN_S = 30.0
"""How long a request that is too large is read on and forgotten, so that its sender comes to read why."""

Asked = TypeVar("Asked", bound=Conversation)


@dataclass
class Limits:
    """What the worker takes in. ``max_batch`` answers are made at once; ``max_waiting`` requests may wait, each for
    ``max_wait_s`` seconds. ``max_held_mb``: all requests together whose pictures are not read yet."""

    max_image_mb: float = 20.0
    max_images: int = 8
    max_request_mb: float = 64.0
    max_held_mb: float = 1000.0
    max_new_tokens: int = 256
    max_batch: int = 16
    max_waiting: int = 64
    max_wait_s: float = 300.0

    @property
    def max_image_bytes(self) -> int:
        return int(self.max_image_mb * 1_000_000)

    @property
    def max_request_bytes(self) -> int:
        return int(self.max_request_mb * 1_000_000)


class Intake:
    """The bytes of the requests that are being received, or whose pictures are not read yet."""

    def __init__(self, limits: Limits) -> None:
        self._limit = int(limits.max_held_mb * 1_000_000)
        self._held = 0

    @contextlib.contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Yields what one request calls for each piece of it; all of it is given back at the end. The call raises
        Refused when it is one piece too many."""
        mine = 0

        def take(size: int) -> None:
            nonlocal mine
            if self._held + size > self._limit:
                raise Refused(
                    429, "queue_full", "the questions that wait hold too much memory already; ask again in 5 s",
                    retry_after_s=5,
                )
            mine += size
            self._held += size

        try:
            yield take
        finally:
            self._held -= mine


async def read_body(request: Request, limits: Limits, take: Callable[[int], None]) -> bytearray:
    """The body of a JSON request; ``take`` is told of each piece of it. Raises Refused on another content type, and on
    too many bytes, of which none are kept."""
    # A page of another site can post text/plain without asking first; it cannot post JSON.
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise Refused(415, "unsupported_media_type", "send JSON with 'Content-Type: application/json'")
    too_large = Refused(
        413, "request_too_large",
        f"the request has more than {limits.max_request_mb:g} MB (--max-request-mb): send fewer or smaller pictures",
    )
    announced = request.headers.get("content-length", "0")
    size = int(announced) if announced.isdecimal() else 0
    body = bytearray()
    if size <= limits.max_request_bytes:
        async for part in request.stream():
            take(len(part))
            body += part
            size = max(size, len(body))
            if size > limits.max_request_bytes:
                break
        else:
            if text_bytes(body) > MOST_TEXT_MB * 1_000_000:
                raise Refused(
                    413, "request_too_large",
                    f"the request has more than {MOST_TEXT_MB:g} MB beside its pictures: shorten its texts",
                )
            return body
        body.clear()
    # Most senders read no answer before they have sent all. Those that ask first (curl) are told at once.
    if "expect" not in request.headers:
        await _forget_the_rest(request, size, 4 * limits.max_request_bytes)
    raise too_large


def text_bytes(body: bytes | bytearray) -> int:
    """How much of a request is not the base64 of its pictures, of which no more than 1000 are looked for."""
    size, at = len(body), 0
    for _ in range(1000):
        start = body.find(b";base64,", at)
        at = body.find(b'"', start)
        if min(start, at) < 0:
            break
        size -= at - start
    return size


async def _forget_the_rest(request: Request, size: int, most: int) -> None:
    """Read on without keeping anything, while ``size`` is not beyond ``most`` bytes."""
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(DRAIN_S):
            seen = 0
            while max(size, seen) <= most:
                message = await request.receive()
                seen += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return


def parse(body: bytes | bytearray, kind: type[Asked]) -> Asked:
    """The request. Raises Refused that names the fields at fault."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        if error.error_count() > MOST_FAULTS:
            message = f"{error.error_count():,} values of the request are not as the API has them; see /openapi.json"
            raise Refused(400, "invalid_request", message) from None
        faults = error.errors(include_input=False, include_context=False)
        unknown = [fault for fault in faults if fault["type"] == "extra_forbidden"]
        where = (unknown or faults)[0]["loc"]
        parts = (str(part) for part in where if part not in ("text", "image_url", "function-before"))
        param = ".".join(parts)[:FAULT_LENGTH] or None
        if unknown:
            names = [repr(".".join(str(part) for part in fault["loc"])) for fault in unknown]
            raise Refused(400, "unknown_parameter", f"Unknown parameter: {_told(names, ', ')}", param=param) from None
        message = _told(describe(error).split("; "), "; ")
        if param is None and message.partition(":")[0] in kind.model_fields:  # what a field may not be beside others
            param = message.partition(":")[0]
        raise Refused(400, "invalid_request", message, param=param) from None


def _told(faults: Sequence[str], between: str) -> str:
    """The first of the faults, each cut where a client wrote a novel."""
    told = [fault if len(fault) <= FAULT_LENGTH else fault[:FAULT_LENGTH] + "..." for fault in faults[:FAULTS_TOLD]]
    return between.join(told) + (f" and {len(faults) - FAULTS_TOLD} more" if len(faults) > FAULTS_TOLD else "")


class Pictures(Sequence[Image.Image]):
    """The pictures of a request. Each is opened when it is looked at, so that one at a time is in memory; what cannot
    be opened raises Refused then."""

    def __init__(self, uris: Sequence[str], limits: Limits, hosts: Mapping[str, str | None]) -> None:
        """Raises Refused if there are too many, or one is of too many bytes."""
        if len(uris) > limits.max_images:
            raise Refused(
                413, "too_many_images", f"{len(uris)} pictures in one request; the limit is {limits.max_images}"
            )
        self._uris, self._limits, self._hosts = uris, limits, hosts
        for number, uri in enumerate(uris, start=1):
            if uri.startswith("data:"):
                self._check_size(len(uri.partition(",")[2]) * 3 // 4, number)

    def __len__(self) -> int:
        return len(self._uris)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Image.Image]: ...

    def __getitem__(self, index: int | slice) -> Image.Image | Sequence[Image.Image]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number, uri = index + 1, self._uris[index]
        try:
            if uri.startswith("data:"):
                return load_image(uri)
            data = fetch_picture(uri, self._hosts, self._limits.max_image_bytes)
            return load_image(data)
        except ImageTooLarge as error:
            raise Refused(413, "image_too_large", f"picture {number}: {error}") from None
        except DataError as error:
            raise Refused(400, "invalid_image", f"picture {number}: {error}") from None

    def _check_size(self, size: int, number: int) -> None:
        if size > self._limits.max_image_bytes:
            raise Refused(
                413, "image_too_large",
                f"picture {number}: it has {size / 1e6:.1f} MB; the limit is {self._limits.max_image_mb:g} MB"
                " (--max-image-mb): send a smaller copy or a region of it",
            )
