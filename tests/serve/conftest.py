"""A scripted model behind the real HTTP worker: what it answers is known, so what the clients show can be asserted."""

from __future__ import annotations

import os
import random
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from httpx._config import DEFAULT_TIMEOUT_CONFIG
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, Page, expect, sync_playwright
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from medllava.conversation import Turn
from medllava.errors import DataError, PromptTooLong
from medllava.geometry import format_box, parse_boxes
from medllava.model.decoding import Completion, TokenLogprob
from medllava.model.looking import Looking
from medllava.model.tiny import tiny_checkpoint
from medllava.phantom.tissue import Finding, render_tissue, sample_stain
from medllava.serve.app import create_app
from medllava.serve.client import Worker
from medllava.serve.intake import Limits
from medllava.serve.worker import listen

PAUSE_S = 0.02
PATIENCE_S = 60.0
"""How long a test waits for what must come. Nothing that passes takes as long; a busy machine may."""
expect.set_options(timeout=1000 * PATIENCE_S)


@pytest.fixture(autouse=True)
def patient_httpx(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that names no limit waits for longer than httpx's 5 s."""
    for phase in ("connect", "read", "write", "pool"):
        monkeypatch.setattr(DEFAULT_TIMEOUT_CONFIG, phase, PATIENCE_S)


class OutOfMemoryError(RuntimeError):
    """Stands for torch's error of that name."""


@dataclass(eq=False)
class ScriptedRow:
    """One answer of the scripted model: the words of a stream, one per step."""

    question: ScriptedQuestion
    stream: Generator[str, None, Completion]
    said: str = ""
    end: Completion | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.end is not None

    def step(self) -> None:
        try:
            word = next(self.stream)
        except StopIteration as end:
            self.end = end.value
            return
        self.said += word
        if self.question.options.get("top_logprobs") is not None:
            self.logprobs.append(TokenLogprob(word, word.encode(), -0.5, ((word, word.encode(), -0.5),)))

    def ready(self) -> str:
        return self.said

    def completion(self) -> Completion:
        assert self.end is not None
        return self.end


@dataclass(frozen=True)
class ScriptedQuestion:
    images: list[Image.Image]
    turns: list[Turn]
    ids: list[int]
    options: dict[str, Any]
    seed: int | None


class ScriptedBatch:
    """The scripted model's rows; see :class:`medllava.model.decoding.Batch`."""

    def __init__(self, answerer: ScriptedAnswerer) -> None:
        self.answerer = answerer
        self.rows: list[ScriptedRow] = []

    def join(self, questions: Sequence[ScriptedQuestion]) -> list[ScriptedRow]:
        rows = [
            ScriptedRow(question, self.answerer.stream(question.images, question.turns, **question.options))
            for question in questions
        ]
        for row in rows:
            row.step()
        self.rows += [row for row in rows if not row.finished]
        return rows

    def step(self) -> None:
        if self.answerer.no_memory_for and len(self.rows) > self.answerer.no_memory_for:
            raise OutOfMemoryError("CUDA out of memory")
        for row in self.rows:
            row.step()
        self.rows = [row for row in self.rows if not row.finished]

    def remove(self, rows: Sequence[ScriptedRow]) -> None:
        for row in rows:
            row.stream.close()
        self.rows = [row for row in self.rows if row not in rows]


@dataclass(eq=False)
class ScriptedAnswerer:
    """Answers by rule: says which region it was asked about, or names a gland and its box; some words cause faults."""

    model_id: str = "scripted"
    num_image_tokens: int = 16
    think_s: float = 2.0
    pause_s: float = PAUSE_S
    """Before each word. A test that needs an answer under way makes it long, and short again when it has seen enough:
    what takes a second on an idle machine may be over before a busy one has looked."""
    words: int = 0
    """Made so far, of all answers."""
    manifest: Any = field(default_factory=lambda: SimpleNamespace(
        base=None, chat_format="medllava", regions=("text",), training_mpp=0.5, image_size=96, single_exchange=False
    ))
    asked: list[tuple[list[Image.Image], list[Turn], dict[str, Any]]] = field(default_factory=list)
    stopped_at: list[float] = field(default_factory=list)
    """Times at which a generation was closed before its end."""
    no_memory_for: int = 0
    """A step with more rows than that runs out of memory; 0 for none."""

    def prepare(self, images: Sequence[Image.Image], turns: Sequence[Turn], **options: Any) -> ScriptedQuestion:
        if "too many words" in turns[-1].text:
            raise PromptTooLong("the question needs 9000 tokens; the model holds 4096: shorten it")
        words = sum(len(turn.text.split()) for turn in turns)
        length = words + len(images) * self.num_image_tokens
        return ScriptedQuestion(list(images), list(turns), [0] * length, options, options.get("seed"))

    def batch(self) -> ScriptedBatch:
        return ScriptedBatch(self)

    def reply(self, question: str) -> str:
        boxes = parse_boxes(question)
        if boxes:
            return f"The region {format_box(boxes[0])} holds a vessel."
        if "long story" in question:
            return "and then " * 2000
        return "A gland. [0.10, 0.20, 0.40, 0.60]"

    def stream(
        self, images: Sequence[Image.Image], turns: Sequence[Turn], *, max_new_tokens: int = 256, **options: Any
    ) -> Generator[str, None, Completion]:
        question = turns[-1].text
        self.asked.append((list(images), list(turns), {"max_new_tokens": max_new_tokens, **options}))
        if "think first" in question:
            time.sleep(self.think_s)
        if "too much memory" in question:
            raise OutOfMemoryError("CUDA out of memory")
        if "too many words" in question:
            raise PromptTooLong("the question needs 9000 tokens; the model holds 4096: shorten it")
        if "divide by zero" in question:
            raise ZeroDivisionError(question)
        words = re.findall(r"\S+\s*", self.reply(question))
        prompt_tokens = sum(len(turn.text.split()) for turn in turns) + len(images) * self.num_image_tokens
        said = words[:max_new_tokens]
        try:
            for word in said:
                time.sleep(self.pause_s)
                self.words += 1
                yield word
        except GeneratorExit:
            self.stopped_at.append(time.monotonic())
            raise
        text = "".join(said)
        return Completion(text, "length" if len(said) < len(words) else "stop", prompt_tokens, len(said))

    @cached_property
    def looker(self) -> ScriptedLooker:
        return ScriptedLooker()

    def answer(self, images: Sequence[Image.Image], turns: Sequence[Turn], **options: Any) -> Completion:
        stream = self.stream(images, turns, **options)
        while True:
            try:
                next(stream)
            except StopIteration as end:
                return end.value


@dataclass(eq=False)
class ScriptedLooker:
    """Says that each answer came from the upper right cell; takes ``steps`` steps of ``pause_s``."""

    asked: list[tuple[list[Image.Image], list[Turn], str, dict[str, Any]]] = field(default_factory=list)
    steps: int = 3
    pause_s: float = PAUSE_S

    def prepare(
        self, images: Sequence[Image.Image], turns: Sequence[Turn], answer: str, **options: Any
    ) -> SimpleNamespace:
        if not images:
            raise DataError("no picture")
        self.asked.append((list(images), list(turns), answer, options))
        return SimpleNamespace(ids=[0] * 9, answer=answer, cells=options.get("cells", 7))

    def look(self, question: SimpleNamespace) -> Looking:
        return ScriptedLookingRow(question, 0).result()

    def batch(self) -> ScriptedLookingBatch:
        return ScriptedLookingBatch(self)


@dataclass(eq=False)
class ScriptedLookingRow:
    question: SimpleNamespace
    left: int
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.left == 0

    def ready(self) -> str:
        return ""

    def completion(self) -> Completion:
        return Completion("", "stop", len(self.question.ids), 0)

    def result(self) -> Looking:
        cells = self.question.cells
        drops = [[0.0] * cells for _ in range(cells)]
        drops[0][-1] = 2.5
        return Looking(self.question.answer, 3, -0.5, -4.0, tuple(tuple(row) for row in drops), None)


class ScriptedLookingBatch:
    def __init__(self, looker: ScriptedLooker) -> None:
        self.looker = looker
        self.rows: list[ScriptedLookingRow] = []

    def join(self, questions: Sequence[SimpleNamespace]) -> list[ScriptedLookingRow]:
        rows = [ScriptedLookingRow(question, self.looker.steps) for question in questions]
        self.rows += rows
        return rows

    def step(self) -> None:
        time.sleep(self.looker.pause_s)
        if any("too much memory" in row.question.answer for row in self.rows):
            raise OutOfMemoryError("CUDA out of memory")
        for row in self.rows:
            row.left -= 1
        self.rows = [row for row in self.rows if not row.finished]

    def remove(self, rows: Sequence[ScriptedLookingRow]) -> None:
        self.rows = [row for row in self.rows if row not in rows]


@dataclass
class RunningWorker:
    """A worker that serves on ``url`` in a thread of the test."""

    url: str
    answerer: ScriptedAnswerer
    stop: Callable[[], None]


StartWorker = Callable[..., RunningWorker]


@pytest.fixture
def start_worker() -> Iterator[StartWorker]:
    """Start workers with a scripted model. The loading waits for the event ``until``, ``load`` brings another model,
    the other arguments go to ``create_app``."""
    stops: list[Callable[[], None]] = []

    def start(
        *, load: Callable[[], Any] | None = None, until: threading.Event | None = None, **options: Any
    ) -> RunningWorker:
        model = ScriptedAnswerer()

        def load_scripted() -> list[Any]:
            if until:
                until.wait(PATIENCE_S)
            return [load()] if load else [model]

        url, stop = serve_in_thread(create_app(load_scripted, **options))
        stops.append(stop)
        if not until:
            wait_until(lambda: httpx.get(f"{url}/health").status_code == 200)
        return RunningWorker(url, model, stop)

    yield start
    for stop in stops:
        stop()


@pytest.fixture
def worker(start_worker: StartWorker) -> RunningWorker:
    return start_worker(limits=Limits(max_image_mb=1, max_request_mb=15, max_batch=2, max_waiting=1))


@pytest.fixture
def proxy() -> Iterator[Callable[[str], str]]:
    """A reverse proxy that serves another address under /chat, cutting that prefix off, as nginx is often set up."""
    stops: list[Callable[[], None]] = []

    def start(target: str) -> str:
        client = httpx.AsyncClient(base_url=target, timeout=None)

        async def forward(request: Request) -> StreamingResponse:
            path = request.url.path.removeprefix("/chat") or "/"
            url = f"{path}?{request.url.query}" if request.url.query else path
            sent = client.build_request(
                request.method, url, headers=list(request.headers.items()), content=await request.body()
            )
            reply = await client.send(sent, stream=True)
            headers = {name: value for name, value in reply.headers.items() if name != "transfer-encoding"}
            return StreamingResponse(reply.aiter_raw(), reply.status_code, headers)

        url, stop = serve_in_thread(Starlette(routes=[Route("/chat{rest:path}", forward, methods=["GET", "POST"])]))
        stops.append(stop)
        return url

    yield start
    for stop in stops:
        stop()


@pytest.fixture
def serve() -> Iterator[Callable[[Any], str]]:
    """Serve an ASGI application; returns its address."""
    stops: list[Callable[[], None]] = []

    def start(app: Any) -> str:
        url, stop = serve_in_thread(app)
        stops.append(stop)
        return url

    yield start
    for stop in stops:
        stop()


def serve_in_thread(app: Any, port: int = 0) -> tuple[str, Callable[[], None]]:
    """Serve an ASGI application on ``port``, 0 for any free one; returns its address and how to stop it."""
    listener = listen("127.0.0.1", port)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()

    def stop() -> None:
        server.should_exit = True
        thread.join(PATIENCE_S)
        listener.close()

    return f"http://127.0.0.1:{listener.getsockname()[1]}", stop


@pytest.fixture
def at_port() -> Iterator[Callable[..., Callable[[], None]]]:
    """Serve a scripted worker on a chosen port; returns how to stop it."""
    stops: list[Callable[[], None]] = []

    def start(port: int, model: str = "scripted") -> Callable[[], None]:
        answerer = ScriptedAnswerer(model_id=model)
        _, stop = serve_in_thread(create_app(lambda: [answerer]), port)  # type: ignore[list-item,return-value]
        stops.append(stop)
        return stop

    yield start
    for stop in stops:
        stop()


@pytest.fixture
def scripted() -> ScriptedAnswerer:
    return ScriptedAnswerer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a very small model with random weights."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    tiny_checkpoint(folder)
    return folder


@pytest.fixture
def wait() -> Callable[..., None]:
    return wait_until


def wait_until(true: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    """Wait until a condition holds; an HTTP error counts as not yet."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if true():
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s")


@pytest.fixture
def within() -> Callable[..., None]:
    """Check that a condition holds within some seconds of the end of what begins it. On a busy machine the scheduler
    may take these seconds, not the program: each of three tries must come to its end, and one of them in time."""

    def check(seconds: float, begin: Callable[[], object], true: Callable[[], bool]) -> None:
        took: list[float] = []
        while not took or took[-1] >= seconds:
            assert len(took) < 3, f"took {took} s, not {seconds}"
            begin()
            began = time.monotonic()
            wait_until(true)
            took.append(time.monotonic() - began)

    return check


@pytest.fixture
def holding() -> Callable[[Iterable[bytes], Iterable[Path], float], set[Path]]:
    """Find the files below some folders that were written since a time and hold one of some texts."""
    return files_that_hold


def files_that_hold(signs: Iterable[bytes], roots: Iterable[Path], since: float) -> set[Path]:
    signs, found = list(signs), set()
    for root in roots:
        for folder, inner, names in os.walk(root):
            inner[:] = [each for each in inner if each not in {".git", "site-packages", "node_modules"}]
            for name in names:
                path = Path(folder) / name
                try:
                    facts = path.stat()
                    if facts.st_ctime < since or facts.st_size > 50_000_000 or not stat.S_ISREG(facts.st_mode):
                        continue
                    content = path.read_bytes()
                except OSError:
                    continue  # gone again, or not ours
                if any(sign in content for sign in signs):
                    found.add(path)
    return found


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    """A PNG of 900 x 300 pixels, pink with purple spots; a unique text in its metadata."""
    from PIL.PngImagePlugin import PngInfo

    dice = random.Random(0)
    image = Image.new("RGB", (900, 300), (232, 190, 210))
    pen = ImageDraw.Draw(image)
    for _ in range(400):
        x, y = dice.randrange(900), dice.randrange(300)
        pen.ellipse((x, y, x + 9, y + 7), fill=(110, 60, 140))
    pen.rectangle((90, 60, 360, 180), outline=(60, 20, 90), width=3)
    notes = PngInfo()
    notes.add_text("Comment", "PATIENT-4711")
    path = tmp_path / "patient-4711.png"
    image.save(path, pnginfo=notes)
    return path


# -- the web chat in a real browser

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=1000 * PATIENCE_S)
        yield started
        started.close()


@pytest.fixture
def tab(browser: Browser) -> Iterator[Page]:
    """A tab that notes every request that would leave this machine, and every script error."""
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    outside: list[str] = []
    errors: list[str] = []

    def real(said: Any) -> bool:
        # A browser looks for the icon at the root, which a proxy of the tests does not serve. Gradio's script complains
        # where a page is left in the middle of what it reads.
        return not (str(said.location.get("url")).endswith("/favicon.ico") or "Connection errored out" in said.text)

    local = re.compile(r"(https?://127\.0\.0\.1[:/]|data:|blob:)")
    page.on("request", lambda request: None if local.match(request.url) else outside.append(request.url))
    page.on("pageerror", lambda error: None if str(error).startswith("AbortError") else errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" and real(said) else None)
    page.set_default_timeout(1000 * PATIENCE_S)
    yield page
    page.close()
    assert outside == []
    assert errors == []


@pytest.fixture
def serve_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Serve the web chat for workers at some URLs; returns its address."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    from medllava.serve.page import build, launch
    from medllava.serve.web import QUESTIONS, free_port

    pages: list[Any] = []

    def start(*workers: str, examples: tuple[Path, ...] = (), root_path: str = "", **options: Any) -> str:
        page = build([Worker(url) for url in workers], examples, QUESTIONS, **options)
        pages.append(page)
        port = free_port("127.0.0.1", 0)
        launch(page, "127.0.0.1", port, root_path=root_path, slides=options.get("slides", ()))
        return f"http://127.0.0.1:{port}"

    yield start
    for page in pages:
        page.close(verbose=False)


@pytest.fixture
def tissue(tmp_path: Path) -> Path:
    """An H&E-like PNG of 1200 x 600 pixels, with a text in its metadata."""
    from PIL.PngImagePlugin import PngInfo

    rng = np.random.default_rng(13)
    # The scripted model says "gland" and "vessel" of these two places.
    field = [Finding("gland", (120, 120, 480, 360)), Finding("blood vessel", (690, 140, 1050, 400))]
    notes = PngInfo()
    notes.add_text("Comment", "PATIENT-4711")
    path = tmp_path / "patient-4711.png"
    Image.fromarray(render_tissue(rng, 1200, 600, field, sample_stain(rng), scale=1.4)).save(path, pnginfo=notes)
    return path
