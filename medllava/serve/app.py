"""The worker's HTTP application: models behind the OpenAI chat-completions API.

Requests are read within limits (:mod:`medllava.serve.intake`) and answered together as far as there is room
(:mod:`medllava.serve.engine`); others wait in a short line.
Nothing of a question is logged or written: no prompt, no picture, no name. The command is
:mod:`medllava.serve.worker`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import secrets
import threading
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from medllava.errors import MedllavaError
from medllava.serve.engine import Engine, Model, Piece, Ticket
from medllava.serve.faults import Refused, refusal
from medllava.serve.intake import Asked, Intake, Limits, Pictures, parse, read_body
from medllava.serve.metrics import Call, Metrics
from medllava.serve.schema import (
    ChatRequest,
    Conversation,
    LookingRequest,
    Usage,
    choice,
    chunk,
    completion,
    logprobs_of,
    looked,
    model_entry,
    model_list,
)

if TYPE_CHECKING:
    from medllava.model.answerer import Answerer
    from medllava.model.decoding import Prepared, TokenLogprob
    from medllava.model.looking import Looker, LookingQuestion, LookingRow

logger = logging.getLogger(__name__)

POLL_S = 0.5
"""How often a request that waits looks whether its client is still there."""
FIRST_PIECE_S = 3.0
"""How long a streamed answer may show its first piece or its fault before the response starts with status 200."""
REQUEST_ID = "x-request-id"
"""Header with the id that the log's line of this request has; the openai client shows it as ``_request_id``."""
HEARTBEAT_S = 3.0
"""How often a silent stream sends a comment, so that nobody takes it for dead. Some clients wait no more than 5 s."""


def request_body(kind: type[Conversation]) -> dict[str, Any]:
    """How the OpenAPI schema tells a route's body."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@dataclass
class Models:
    """The models of this worker: loading, ready or failed."""

    answerers: Sequence[Answerer] = ()
    failed: bool = False
    started: float = field(default_factory=time.time)

    @property
    def status(self) -> str:
        if self.failed:
            return "failed"
        return "ready" if self.answerers else "loading"

    def ready(self) -> Sequence[Answerer]:
        """The loaded models. Raises Refused while there is none."""
        if not self.answerers:
            seconds = time.time() - self.started
            raise Refused(
                503, "model_loading", f"the model is still loading ({seconds:.0f} s so far); try again soon",
                retry_after_s=5,
            )
        return self.answerers

    def find(self, name: str) -> Answerer:
        """Raises Refused that names the models there are."""
        for answerer in self.ready():
            if answerer.model_id == name:
                return answerer
        known = ", ".join(repr(answerer.model_id) for answerer in self.answerers)
        raise Refused(404, "model_not_found", f"no model {name[:80]!r} here; this worker serves {known}", param="model")


class EventStream(StreamingResponse):
    """Server-sent events; ``at_end`` is called however they end, also if the client left before the first."""

    def __init__(self, events: AsyncIterator[str], at_end: Callable[[], None]) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()


def create_app(
    load: Callable[[], Sequence[Answerer]],
    *,
    limits: Limits | None = None,
    api_keys: Sequence[str] = (),
    root_path: str = "",
    image_hosts: Mapping[str, str | None] | None = None,
    on_load: Callable[[Sequence[Answerer] | Exception], None] = lambda outcome: None,
) -> FastAPI:
    """The application. ``load`` runs in a thread from the start of the server, which answers 503 until it is done;
    ``on_load`` is then called, in that thread, with the models or with what went wrong.
    ``image_hosts``: see :mod:`medllava.serve.fetch`."""
    limits = limits or Limits()
    models = Models()
    engine = Engine(max_rows=limits.max_batch, max_waiting=limits.max_waiting)
    metrics = Metrics(engine)
    intake = Intake(limits)
    # Few at a time: an opened picture takes up to 300 MB.
    readers = asyncio.Semaphore(2)

    def load_models() -> None:
        try:
            models.answerers = load()
        except Exception as error:  # noqa: BLE001 - the command that started the server decides what to say
            models.failed = True
            on_load(error)
        else:
            on_load(models.answerers)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        threading.Thread(target=load_models, name="load", daemon=True).start()
        yield

    app = FastAPI(title="medllava worker", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.root_path = root_path

    schema = app.openapi

    def openapi() -> dict[str, Any]:
        """The schema with the requests' types, which FastAPI does not see: the body is read by :func:`read_body`."""
        whole = schema()
        types = whole.setdefault("components", {}).setdefault("schemas", {})
        for kind in (ChatRequest, LookingRequest):
            request = kind.model_json_schema(ref_template="#/components/schemas/{model}")
            types |= request.pop("$defs") | {kind.__name__: request}
        return whole

    app.openapi = openapi  # type: ignore[method-assign]

    @app.exception_handler(Refused)
    async def say_why(_: Request, fault: Refused) -> JSONResponse:
        headers = {"Retry-After": str(fault.retry_after_s)} if fault.retry_after_s else {}
        if fault.request_id:
            headers[REQUEST_ID] = fault.request_id
        return JSONResponse(fault.body(), fault.status, headers)

    @app.exception_handler(HTTPException)
    async def say_what_is_here(_: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        here = "/v1/chat/completions, /v1/medllava/looking, /v1/models, /health and /metrics"
        message = f"{error.detail}; this worker has {here}"
        return JSONResponse(Refused(error.status_code, code, message).body(), error.status_code, error.headers)

    @app.get("/health")
    async def health() -> JSONResponse:
        names = [answerer.model_id for answerer in models.answerers]
        state = {
            "status": models.status,
            "model": names[0] if names else None,
            "models": names,
            "seconds": round(time.time() - models.started, 1),
            "busy": engine.answering > 0,
            "answering": engine.answering,
            "waiting": engine.waiting,
        }
        return JSONResponse(state, 200 if models.status == "ready" else 503)

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        check_key(request.headers, api_keys)
        known = {answerer.model_id: answerer.manifest for answerer in models.ready()}
        return model_list(known, int(models.started))

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str, request: Request) -> dict[str, Any]:
        check_key(request.headers, api_keys)
        return model_entry(name, models.find(name).manifest, int(models.started))

    @app.post("/v1/chat/completions", openapi_extra=request_body(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        return await watched(request, Call(f"chatcmpl-{uuid.uuid4().hex}"), answer)

    @app.post("/v1/medllava/looking", openapi_extra=request_body(LookingRequest))
    async def looking(request: Request) -> Response:
        return await watched(request, Call(f"looking-{uuid.uuid4().hex}"), look)

    async def watched(
        request: Request, call: Call, answer: Callable[[Request, Call, list[Ticket]], Awaitable[Response]]
    ) -> Response:
        """Count the call, and let its place in line and in the batch go however it ends."""
        tickets: list[Ticket] = []

        def over() -> None:
            for ticket in tickets:
                engine.leave(ticket)
            metrics.end(call)

        try:
            response = await answer(request, call, tickets)
        except Refused as fault:
            call.status, call.code, fault.request_id = fault.status, fault.code, call.id
            over()
            raise
        except asyncio.CancelledError:
            call.status, call.code = 499, "client_left"
            over()
            raise
        except Exception as error:  # noqa: BLE001 - the server would log its text, which may quote the question
            defect = refusal(error)
            call.status, call.code, defect.request_id = defect.status, defect.code, call.id
            over()
            where = "".join(traceback.format_tb(error.__traceback__))
            logger.error("a request failed with %s\n%s", type(error).__name__, where)
            raise defect from None
        response.headers[REQUEST_ID] = call.id
        if isinstance(response, EventStream):
            response._at_end = over
        else:
            over()
        return response

    async def admit(
        request: Request, call: Call, tickets: list[Ticket], kind: type[Asked], asks: Callable[[Answerer], Model],
        prepare: Callable[[Any, Asked, Pictures], Sequence[Any]],
    ) -> tuple[Asked, News]:
        """Take a request in: it has its place in line once it is understood, and may have its turn once its pictures
        are read. Returns it without its messages, which are not kept in memory while its answer is made."""
        check_key(request.headers, api_keys)
        models.ready()
        engine.check_room()
        with intake.share() as take:
            question = parse(await read_body(request, limits, take), kind)
            model = asks(models.find(question.model))
            call.model, call.stream, call.answers = question.model, question.streamed(), question.answers()
            call.images = len(question.image_uris())
            pictures = Pictures(question.image_uris(), limits, image_hosts or {})
            ticket = engine.enter(model, question.answers(), streamed=question.streamed())
            tickets.append(ticket)
            call.received_s = ticket.arrived - call.started
            async with readers:
                prepared = await asyncio.to_thread(prepare, model, question, pictures)
            question.messages.clear()
            del pictures
        call.prompt_tokens = len(prepared[0].ids)
        engine.begin(ticket, prepared)
        return question, News(engine, ticket, request, call, limits.max_wait_s)

    async def answer(request: Request, call: Call, tickets: list[Ticket]) -> Response:
        question, news = await admit(
            request, call, tickets, ChatRequest, lambda answerer: answerer,
            lambda answerer, question, pictures: prepare(answerer, question, pictures, limits),
        )
        created = int(time.time())
        if question.streamed():
            with_usage = bool(question.stream_options and question.stream_options.include_usage)
            first = await news.next(FIRST_PIECE_S)
            return EventStream(server_sent_events(news, first, created, with_usage), lambda: None)
        choices = await whole_answers(news)
        return JSONResponse(completion(call.id, created, question.model, choices, usage_of(call)))

    async def look(request: Request, call: Call, tickets: list[Ticket]) -> Response:
        question, news = await admit(
            request, call, tickets, LookingRequest, lambda answerer: answerer.looker, prepare_looking
        )
        while news.unfinished:
            await news.next(HEARTBEAT_S)
        row = cast("LookingRow", tickets[0].rows[0])
        return JSONResponse(looked(question.model, row.result()))

    return app


class News:
    """What comes of one request: waits for it, watches the client and the clock, and keeps the call's counts."""

    def __init__(self, engine: Engine, ticket: Ticket, request: Request, call: Call, max_wait_s: float) -> None:
        self.call, self.size = call, ticket.size
        self._engine, self._ticket, self._request, self._max_wait_s = engine, ticket, request, max_wait_s
        self._look_at = time.monotonic() + POLL_S
        self.unfinished = ticket.size

    def position(self) -> int:
        """Place in line; 0 once its answers have begun."""
        return self._engine.position(self._ticket)

    async def next(self, timeout_s: float) -> Piece | None:
        """The next piece, or None after ``timeout_s`` of silence. Raises Refused: the model failed, the wait in line
        got too long, or the client left."""
        deadline = time.monotonic() + timeout_s
        piece: Piece | Refused | None = None
        while piece is None:
            now = time.monotonic()
            if now >= self._look_at:
                await self._look_around()
                self._look_at = now + POLL_S
            if now >= deadline and self._ticket.news.empty():
                return None
            try:
                async with asyncio.timeout(max(min(POLL_S, deadline - now), 0.001)):
                    piece = await self._ticket.news.get()
            except TimeoutError:
                continue
        if isinstance(piece, Refused):
            raise piece
        # What came in the meantime goes along: a busy server sends fewer, longer pieces.
        while self.size == 1 and not piece.whole and not self._ticket.news.empty():
            further = self._ticket.news.get_nowait()
            if isinstance(further, Refused):
                raise further
            piece = replace(
                further, text=piece.text + further.text, logprobs=[*piece.logprobs, *further.logprobs]
            )
        self._count(piece)
        return piece

    async def _look_around(self) -> None:
        if await self._request.is_disconnected():
            raise Refused(499, "client_left", "the client left")
        waited = time.monotonic() - self._ticket.arrived
        if waited > self._max_wait_s and self.position():
            message = f"the model was busy with other questions for {self._max_wait_s:.0f} s; try again"
            raise Refused(503, "queue_timeout", message, retry_after_s=30)

    def _count(self, piece: Piece) -> None:
        if self._ticket.called is not None and self._ticket.joined is not None:
            self.call.queue_s = self._ticket.called - self._ticket.arrived
            self.call.first_token_s = self._ticket.joined - self.call.started
        if piece.whole:
            self.unfinished -= 1
            self.call.completion_tokens += piece.whole.completion_tokens


def check_key(headers: Mapping[str, str], api_keys: Sequence[str]) -> None:
    """Raises Refused unless the request carries one of the keys, or none is asked for."""
    if not api_keys:
        return
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":  # in capitals or not, as HTTP has it
        given = ""
    # All keys, as digests: neither the length of a key nor which one it is shows in the time that this takes.
    if sum(secrets.compare_digest(_digest(given), _digest(key)) for key in api_keys) == 0:
        raise Refused(401, "invalid_api_key", "this worker needs an API key: send 'Authorization: Bearer KEY'")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def prepare(
    answerer: Answerer, question: ChatRequest, images: Sequence[Image.Image], limits: Limits
) -> list[Prepared]:
    """One row for each answer that is asked for; answers of one request differ by their seeds. Raises Refused."""
    try:
        first = answerer.prepare(
            images, question.turns(), max_new_tokens=question.max_new_tokens(limits.max_new_tokens),
            temperature=question.temperature or 0.0,
            top_p=1.0 if question.top_p is None else question.top_p, stop=question.stops(), seed=question.seed,
            top_logprobs=question.alternatives(),
        )
    except MedllavaError as error:
        raise refusal(error) from None
    seeds = [None if question.seed is None else question.seed + number for number in range(question.answers())]
    return [replace(first, seed=seed) for seed in seeds]


def prepare_looking(
    looker: Looker, question: LookingRequest, images: Sequence[Image.Image]
) -> list[LookingQuestion]:
    """Its one row. Raises Refused."""
    try:
        return [looker.prepare(
            images, question.turns(), question.answer, picture=question.picture, cells=question.cells,
            fill=question.fill, attention=question.attention,
        )]
    except MedllavaError as error:
        raise refusal(error) from None


async def whole_answers(news: News) -> list[dict[str, Any]]:
    """The finished answers as choices of a completion. Raises Refused."""
    texts = [""] * news.size
    reasons = [""] * news.size
    noted: list[list[TokenLogprob]] = [[] for _ in range(news.size)]
    while news.unfinished:
        piece = await news.next(HEARTBEAT_S)
        if piece is None:
            continue
        noted[piece.index] += piece.logprobs
        if piece.whole:
            texts[piece.index], reasons[piece.index] = piece.whole.text, piece.whole.finish_reason
    return [
        choice(index, text, reason, logprobs_of(tokens) if tokens else None)
        for index, (text, reason, tokens) in enumerate(zip(texts, reasons, noted, strict=True))
    ]


async def server_sent_events(news: News, piece: Piece | None, created: int, with_usage: bool) -> AsyncIterator[str]:
    """The answers as server-sent events, from ``piece`` on. Closed by the server when the client leaves."""

    def event(**fields: Any) -> str:
        return f"data: {json.dumps(chunk(news.call.id, created, news.call.model or '', **fields))}\n\n"

    in_line = False
    try:
        for index in range(news.size):
            yield event(index=index, delta={"role": "assistant", "content": ""})
        while True:
            if piece is None:
                position = news.position()
                if position:
                    # As a comment for people, as a field for programs; a client that knows neither sees no text.
                    yield f": waiting, {position} in line\n\n{event(delta={'content': ''}, position=position)}"
                else:
                    yield ": still at work\n\n"
                    if in_line:
                        yield event(delta={"content": ""}, position=0)
                in_line = bool(position)
            else:
                if piece.text or piece.logprobs:
                    noted = logprobs_of(piece.logprobs) if piece.logprobs else None
                    yield event(index=piece.index, delta={"content": piece.text}, logprobs=noted)
                if piece.whole:
                    yield event(index=piece.index, finish_reason=piece.whole.finish_reason)
                if not news.unfinished:
                    break
            piece = await news.next(HEARTBEAT_S)
        if with_usage:
            yield event(usage=usage_of(news.call))
        yield "data: [DONE]\n\n"
    except Refused as fault:
        news.call.status, news.call.code = fault.status, fault.code
        yield f"data: {json.dumps(fault.body())}\n\n"
    except (asyncio.CancelledError, GeneratorExit):
        news.call.status, news.call.code = 499, "client_left"
        raise


def usage_of(call: Call) -> Usage:
    return Usage(
        prompt_tokens=call.prompt_tokens, completion_tokens=call.completion_tokens,
        total_tokens=call.prompt_tokens + call.completion_tokens,
    )
