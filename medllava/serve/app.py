"""The worker's HTTP application: an Answerer behind the OpenAI chat-completions API.

One answer is made at a time; others wait in a short line. Nothing of a question is logged or written: no prompt, no
picture, no name. See :mod:`medllava.serve.worker` for the command.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import threading
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from pydantic import ValidationError

from medllava.errors import DataError, ImageTooLarge
from medllava.images import load_image
from medllava.jsonl import describe
from medllava.serve.faults import Refused, refusal
from medllava.serve.schema import ChatRequest, Usage, chunk, completion, model_list

if TYPE_CHECKING:
    from medllava.model.answerer import Answerer, Completion

logger = logging.getLogger(__name__)

POLL_S = 0.5
"""How often a request that waits looks whether its client is still there."""
FIRST_PIECE_S = 5.0
"""How long a streamed answer may show its first piece or its fault before the response starts with status 200."""
HEARTBEAT_S = 10.0
"""How often a silent stream sends a comment, so that no proxy takes it for dead."""
MAX_IMAGES = 8
"""Pictures per request; with the limit per picture it bounds the size of a request."""


@dataclass
class Limits:
    """What the worker takes in. ``max_waiting`` requests may wait, each for ``max_wait_s`` seconds."""

    max_image_mb: float = 20.0
    max_new_tokens: int = 256
    max_waiting: int = 16
    max_wait_s: float = 300.0

    @property
    def max_image_bytes(self) -> int:
        return int(self.max_image_mb * 1_000_000)


class Line:
    """Lets one question at a time reach the model; few may wait, none for ever."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = asyncio.Lock()
        self.waiting = 0

    @property
    def busy(self) -> bool:
        return self._lock.locked()

    async def enter(self) -> None:
        """Wait for the model. Raises Refused if too many wait already or the wait gets too long."""
        if self.busy and self.waiting >= self._limits.max_waiting:
            raise Refused(
                503, "queue_full", f"{self.waiting} questions are waiting already; try again soon", retry_after_s=10
            )
        self.waiting += 1
        try:
            async with asyncio.timeout(self._limits.max_wait_s):
                await self._lock.acquire()
        except TimeoutError:
            message = f"the model was busy with other questions for {self._limits.max_wait_s:.0f} s; try again"
            raise Refused(503, "queue_timeout", message, retry_after_s=30) from None
        finally:
            self.waiting -= 1

    def leave(self) -> None:
        self._lock.release()


class Generation:
    """One answer being made in a thread of its own; ``leave`` is called when the thread is done with the model."""

    def __init__(self, stream: Callable[[], Generator[str, None, Completion]], leave: Callable[[], None]) -> None:
        self._make_stream = stream
        self._leave = leave
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | Completion | Exception] = asyncio.Queue()
        self._stopped = threading.Event()
        # A daemon: a forward pass that hangs must not keep the process alive after Ctrl-C.
        threading.Thread(target=self._run, name="generation", daemon=True).start()

    def stop(self) -> None:
        """End the generation before its next token."""
        self._stopped.set()

    async def next(self, timeout_s: float) -> str | Completion | None:
        """The next piece, the Completion at the end, or None after ``timeout_s`` of silence. Raises Refused."""
        try:
            async with asyncio.timeout(timeout_s):
                piece = await self._pieces.get()
        except TimeoutError:
            return None
        if isinstance(piece, Exception):
            raise refusal(piece)
        return piece

    def _run(self) -> None:
        try:
            stream = self._make_stream()
            try:
                while not self._stopped.is_set():
                    self._post(next(stream))
            except StopIteration as end:
                self._post(end.value)
            finally:
                stream.close()
        except Exception as error:  # noqa: BLE001 - whatever the model raises is reported to the one who asked
            if refusal(error).code == "internal_error":
                # Only where, not what: an exception's text may quote the question.
                where = "".join(traceback.format_tb(error.__traceback__))
                logger.error("generation failed with %s\n%s", type(error).__name__, where)
            self._post(error)
        finally:
            # After an interrupted start or stop the loop may be gone; then nobody waits in line either.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._leave)

    def _post(self, piece: str | Completion | Exception) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


@dataclass
class Model:
    """The model of this worker: loading, ready or failed."""

    answerer: Answerer | None = None
    failed: bool = False
    started: float = field(default_factory=time.time)

    def ready(self) -> Answerer:
        """The loaded Answerer. Raises Refused while there is none."""
        if self.answerer is None:
            seconds = time.time() - self.started
            raise Refused(
                503, "model_loading", f"the model is still loading ({seconds:.0f} s so far); try again soon",
                retry_after_s=5,
            )
        return self.answerer


def create_app(
    load: Callable[[], Answerer],
    *,
    limits: Limits | None = None,
    api_keys: Sequence[str] = (),
    root_path: str = "",
    on_load: Callable[[Answerer | Exception], None] = lambda outcome: None,
) -> FastAPI:
    """The application. ``load`` runs in a thread from the start of the server, which answers 503 until it is done;
    ``on_load`` is then called, in that thread, with the Answerer or with what went wrong."""
    limits = limits or Limits()
    model = Model()
    line = Line(limits)

    def load_model() -> None:
        try:
            model.answerer = load()
        except Exception as error:  # noqa: BLE001 - the command that started the server decides what to say
            model.failed = True
            on_load(error)
        else:
            on_load(model.answerer)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        threading.Thread(target=load_model, name="load", daemon=True).start()
        yield

    app = FastAPI(title="medllava worker", lifespan=lifespan, root_path=root_path, docs_url=None, redoc_url=None)

    @app.exception_handler(Refused)
    async def say_why(_: Request, fault: Refused) -> JSONResponse:
        headers = {"Retry-After": str(fault.retry_after_s)} if fault.retry_after_s else None
        return JSONResponse(fault.body(), fault.status, headers)

    @app.get("/health")
    async def health() -> JSONResponse:
        status = "failed" if model.failed else "ready" if model.answerer else "loading"
        state = {
            "status": status,
            "model": model.answerer.model_id if model.answerer else None,
            "seconds": round(time.time() - model.started, 1),
            "busy": line.busy,
            "waiting": line.waiting,
        }
        return JSONResponse(state, 200 if status == "ready" else 503)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        check_key(request.headers, api_keys)
        return model_list(model.ready().model_id, int(model.started))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        check_key(request.headers, api_keys)
        answerer = model.ready()
        question = parse(await read_body(request, limits))
        if question.model != answerer.model_id:
            message = f"no model {question.model!r} here; this worker serves {answerer.model_id!r}"
            raise Refused(404, "model_not_found", message)
        images = await asyncio.to_thread(open_images, question.image_uris(), limits)

        def stream() -> Generator[str, None, Completion]:
            return answerer.stream(
                images, question.turns(), max_new_tokens=question.max_new_tokens(limits.max_new_tokens),
                temperature=question.temperature or 0.0, top_p=question.top_p or 1.0, stop=question.stops(),
                seed=question.seed,
            )

        await line.enter()
        generation = Generation(stream, line.leave)
        request_id, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        if question.stream:
            try:
                first = await generation.next(FIRST_PIECE_S)
            except BaseException:
                generation.stop()
                raise
            with_usage = bool(question.stream_options and question.stream_options.include_usage)
            events = server_sent_events(generation, first, request_id, created, question.model, with_usage)
            return StreamingResponse(
                events, media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            )
        whole = await whole_answer(generation, request)
        if whole is None:
            return Response(status_code=499)  # nobody is left to read it
        return JSONResponse(
            completion(request_id, created, question.model, whole.text, whole.finish_reason, usage_of(whole))
        )

    return app


def check_key(headers: Mapping[str, str], api_keys: Sequence[str]) -> None:
    """Raises Refused unless the request carries one of the keys, or none is asked for."""
    if not api_keys:
        return
    given = headers.get("authorization", "").removeprefix("Bearer ").encode()
    if not any(secrets.compare_digest(given, key.encode()) for key in api_keys):
        raise Refused(401, "invalid_api_key", "this worker needs an API key: send 'Authorization: Bearer KEY'")


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a JSON request. Raises Refused on another content type or more bytes than pictures can explain."""
    # A page of another site can post text/plain without asking first; it cannot post JSON.
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise Refused(415, "unsupported_media_type", "send JSON with 'Content-Type: application/json'")
    most = MAX_IMAGES * limits.max_image_bytes * 4 // 3 + 4_000_000
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise Refused(413, "request_too_large", f"the request has more than {most / 1e6:.0f} MB")
    return bytes(body)


def parse(body: bytes) -> ChatRequest:
    """The request. Raises Refused that names each field at fault."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        unknown = any(fault["type"] == "extra_forbidden" for fault in error.errors())
        code = "unknown_field" if unknown else "invalid_request"
        raise Refused(400, code, describe(error)) from None


def open_images(uris: Sequence[str], limits: Limits) -> list[Image.Image]:
    """The pictures of a request. Raises Refused on the first that is too large or no picture."""
    if len(uris) > MAX_IMAGES:
        raise Refused(413, "too_many_images", f"{len(uris)} pictures in one request; the limit is {MAX_IMAGES}")
    images = []
    for number, uri in enumerate(uris, start=1):
        size = len(uri.partition(",")[2]) * 3 // 4
        if size > limits.max_image_bytes:
            raise Refused(
                413, "image_too_large",
                f"picture {number} has {size / 1e6:.1f} MB; the limit is {limits.max_image_mb:g} MB (--max-image-mb):"
                " send a smaller copy or a region of it",
            )
        try:
            images.append(load_image(uri))
        except ImageTooLarge as error:
            raise Refused(413, "image_too_large", f"picture {number}: {error}") from None
        except DataError as error:
            raise Refused(400, "invalid_image", f"picture {number}: {error}") from None
    return images


async def whole_answer(generation: Generation, request: Request) -> Completion | None:
    """The finished answer, or None if the client left, which also stops the generation."""
    looked = time.monotonic()
    try:
        while True:
            piece = await generation.next(POLL_S)
            if piece is not None and not isinstance(piece, str):
                return piece
            if time.monotonic() - looked >= POLL_S:
                if await request.is_disconnected():
                    return None
                looked = time.monotonic()
    finally:
        generation.stop()


async def server_sent_events(
    generation: Generation, piece: str | Completion | None, request_id: str, created: int, model: str, with_usage: bool
) -> AsyncIterator[str]:
    """The answer as server-sent events, from ``piece`` on. Closed by the server when the client leaves."""

    def event(**fields: Any) -> str:
        return f"data: {json.dumps(chunk(request_id, created, model, **fields), ensure_ascii=False)}\n\n"

    try:
        yield event(delta={"role": "assistant", "content": ""})
        while piece is None or isinstance(piece, str):
            yield event(delta={"content": piece}) if piece is not None else ": still at work\n\n"
            piece = await generation.next(HEARTBEAT_S)
        yield event(finish_reason=piece.finish_reason)
        if with_usage:
            yield event(usage=usage_of(piece))
        yield "data: [DONE]\n\n"
    except Refused as fault:
        yield f"data: {json.dumps(fault.body())}\n\n"
    finally:
        generation.stop()


def usage_of(answer: Completion) -> Usage:
    return Usage(
        prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens,
        total_tokens=answer.prompt_tokens + answer.completion_tokens,
    )
