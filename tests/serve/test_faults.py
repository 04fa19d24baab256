"""What goes wrong in a worker: each fault has a message of its own, goes to the one it concerns, and passes."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

import medllava.serve
from medllava.conversation import Turn
from medllava.errors import ServiceError
from medllava.model.answerer import Answerer
from medllava.serve import app
from medllava.serve.client import Worker
from medllava.serve.intake import Limits

Wait = Callable[..., None]
HELLO = [{"role": "user", "content": "hello"}]
STORY = [{"role": "user", "content": "tell a long story"}]


def client(url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, **options)


def ask(worker: Any, messages: Any, model: str = "scripted", **options: Any) -> Any:
    return client(worker.url).chat.completions.create(model=model, messages=messages, **options)


def said(url: str, turns: str = "hello") -> str:
    """The answer, or the fault's text, as the web chat gets it."""

    async def whole() -> str:
        try:
            pieces = [piece async for piece in Worker(url).ask([Turn(role="user", text=turns)])]
            return "".join(piece for piece in pieces if isinstance(piece, str))
        except ServiceError as error:
            return str(error)

    return asyncio.run(whole())


def test_each_fault_names_its_cause_and_the_next_step(start_worker: Any, worker: Any, wait: Wait) -> None:
    told = [said(worker.url, text) for text in ("too much memory", "too many words", "divide by zero")]
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(worker, HELLO, model="other")
    with pytest.raises(openai.BadRequestError) as broken:
        uri = "data:image/png;base64,AAAA"
        ask(worker, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri}}]}])
    told += [str(error.value.body["message"]) for error in (unknown, broken)]  # type: ignore[index]
    worker.answerer.pause_s = 0.25
    with ThreadPoolExecutor(3) as pool:
        busy = [pool.submit(ask, worker, STORY, max_tokens=60) for _ in range(3)]
        wait(lambda: httpx.get(f"{worker.url}/health").json()["waiting"] == 1)
        told.append(said(worker.url))
        worker.answerer.pause_s = 0.0
        assert all(answer.result().choices for answer in busy)
    locked = start_worker(api_keys=("sesame",))
    told.append(said(locked.url))
    loaded = threading.Event()
    loading = start_worker(until=loaded)
    wait(lambda: httpx.get(f"{loading.url}/health").status_code == 503)
    told.append(said(loading.url))
    loaded.set()
    worker.stop()
    told.append(said(worker.url))
    for text, cause, step in zip(
        told,
        ["memory", "9000 tokens", "ZeroDivisionError", "no model 'other'", "picture 1", "questions are waiting",
         "API key", "loading", "reached"],
        ["--load-4bit", "shorten", "log", "'scripted'", "known format", "ask again in", "--api-key-file", "try again",
         "medllava.serve.worker --model-path"],
        strict=True,
    ):
        assert cause in text and step in text, text
    assert len(set(told)) == len(told)


def test_no_message_speaks_of_traffic() -> None:
    folder = Path(medllava.serve.__file__).parent
    sources = [path for path in folder.iterdir() if path.suffix in {".py", ".js", ".html"}]
    assert len(sources) > 10
    for path in sources:
        assert not re.search("traffic", path.read_text(encoding="utf-8"), re.IGNORECASE), path


# -- out of memory, in a real model


@pytest.fixture(scope="module")
def model(tiny: Path) -> Answerer:
    answerer = Answerer.load(tiny, device="cpu")
    answerer._ends = []
    return answerer


def without_memory_for(rows: int, monkeypatch: pytest.MonkeyPatch, model: Answerer) -> list[weakref.ref[Any]]:
    """Passes of more rows run out of memory in the middle of the model. Returns what these passes held."""
    held: list[weakref.ref[Any]] = []
    layer = model._model.model.language_model.layers[-1]
    forward = layer.forward

    class Activations:
        pass

    def failing(hidden: torch.Tensor, *rest: Any, **more: Any) -> Any:
        if len(hidden) > rows:
            large = Activations()
            held.append(weakref.ref(large))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return forward(hidden, *rest, **more)

    monkeypatch.setattr(layer, "forward", failing)
    return held


def test_without_memory_the_other_rows_are_answered_to_the_last_token(
    start_worker: Any, model: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start_worker(load=lambda: model)

    def answer(number: int) -> str:
        question = [{"role": "user", "content": f"What is finding {number}?"}]
        try:
            return str(ask(worker, question, "tiny", max_tokens=60).choices[0].message.content)
        except openai.APIStatusError as error:
            assert (error.status_code, error.code) == (507, "out_of_memory")
            assert "--load-4bit" in str(error)
            return "no memory"

    alone = [answer(number) for number in range(6)]
    held = without_memory_for(3, monkeypatch, model)
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(answer, range(6)))
    assert held, "no pass ran out of memory"
    refused = [number for number, text in enumerate(together) if text == "no memory"]
    assert 1 <= len(refused) <= 3
    assert [text for text in together if text != "no memory"] == [
        text for number, text in enumerate(alone) if number not in refused
    ]
    gc.collect()
    assert [reference() for reference in held if reference() is not None] == []  # the failed passes' memory is free
    assert [answer(number) for number in range(6)] == alone
    assert httpx.get(f"{worker.url}/health").json()["answering"] == 0


def test_a_defect_between_two_tokens_ends_these_answers_and_not_the_worker(
    start_worker: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = start_worker()
    real = worker.answerer.batch

    def broken() -> Any:
        batch = real()
        step = batch.step

        def failing() -> None:
            step()
            for row in batch.rows:
                row.ready = lambda text=row.question.turns[-1].text: {}[text]

        batch.step = failing
        return batch

    monkeypatch.setattr(worker.answerer, "batch", broken)
    with pytest.raises(openai.InternalServerError, match="KeyError.*log") as caught:
        ask(worker, [{"role": "user", "content": "a long story of Mrs Miller"}])
    assert "Miller" not in str(caught.value) + caplog.text
    monkeypatch.undo()
    assert ask(worker, HELLO).choices[0].message.content.startswith("A gland")


def test_no_request_is_kept_once_it_is_over(start_worker: Any, wait: Wait) -> None:
    from medllava.serve.engine import Ticket

    def tickets() -> int:
        gc.collect()
        return sum(type(thing) is Ticket for thing in gc.get_objects())

    def leave(worker: Any) -> None:
        body = {"model": "scripted", "messages": STORY, "max_tokens": 3000, "stream": True}
        with httpx.stream("POST", f"{worker.url}/v1/chat/completions", json=body) as reply:
            next(reply.iter_lines())

    before, threads = tickets(), threading.active_count()
    worker = start_worker(limits=Limits(max_batch=4))
    with ThreadPoolExecutor(12) as pool:
        for number in range(12):
            if number % 3:
                pool.submit(ask, worker, [HELLO, [{"role": "user", "content": "too much memory"}]][number % 2])
            else:
                pool.submit(leave, worker)
    wait(lambda: httpx.get(f"{worker.url}/health").json()["answering"] == 0)
    wait(lambda: tickets() <= before)  # those of the tests before may go only now
    worker.stop()
    wait(lambda: threading.active_count() <= threads + 8)  # the pool for reading pictures stays


# -- a worker that dies


class HalfAnswer:
    """A server that begins a stream and hangs up, or hangs up at once."""

    def __init__(self, body: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._body = body
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                head = connection.recv(65536)
                if b"/v1/models" in head:
                    listed = b'{"object": "list", "data": [{"id": "m", "object": "model"}]}'
                    size = b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(listed)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + size + listed)
                elif self._body:
                    connection.sendall(
                        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                        + b"%x\r\n%s\r\n" % (len(self._body), self._body)
                    )


@pytest.mark.parametrize(
    "body",
    [b"", b": still at work\n\n",
     b'data: {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [{"index": 0,'
     b' "delta": {"content": "A gl"}, "finish_reason": null}]}\n\n'],
    ids=["before", "while waiting", "in the middle"],
)
def test_a_worker_that_dies_is_told_from_one_that_answers(body: bytes) -> None:
    text = said(HalfAnswer(body).url)
    assert "again" in text or "running" in text
    assert "worker" in text and "traffic" not in text


def test_a_killed_worker_process_breaks_the_stream_off(tiny: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "medllava.serve.worker", "--port", "0", "--model-path", str(tiny)],
        stdout=subprocess.PIPE, text=True,
    )
    assert process.stdout is not None
    url = process.stdout.readline().removeprefix("listening on ").strip()
    assert process.stdout.readline().startswith("ready")
    many: Any = {"max_tokens": 400, "temperature": 2.0, "n": 16, "stream": True}
    with pytest.raises((openai.APIConnectionError, httpx.RemoteProtocolError, httpx.ReadError)):
        for number, _ in enumerate(ask(type("Url", (), {"url": url}), HELLO, "tiny", **many)):
            if number == 20:
                os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    with pytest.raises(openai.APIConnectionError):
        client(url).models.list()


# -- slow workers


def test_a_client_of_five_seconds_patience_gets_its_slow_answer(worker: Any, wait: Wait) -> None:
    """httpx gives up after 5 s of silence unless told otherwise."""
    assert max(app.FIRST_PIECE_S, app.HEARTBEAT_S) <= 3
    worker.answerer.think_s = 7.5
    body = {"model": "scripted", "stream": True, "messages": [{"role": "user", "content": "think first"}]}
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(httpx.post, f"{worker.url}/v1/chat/completions", json=body, timeout=5.0)
        wait(lambda: bool(worker.answerer.asked))
        behind = list(client(worker.url, timeout=5.0).chat.completions.create(
            model="scripted", messages=HELLO, stream=True  # type: ignore[arg-type]
        ))
        assert "still at work" in slow.result().text and slow.result().text.rstrip().endswith("[DONE]")
    places = [chunk.model_extra["medllava"]["position"] for chunk in behind if "medllava" in (chunk.model_extra or {})]
    assert places[0] == 1 and set(places) <= {0, 1}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in behind).startswith("A gland")


@pytest.mark.skipif("MEDLLAVA_SLOW_TESTS" not in os.environ, reason="takes a minute: MEDLLAVA_SLOW_TESTS=1 runs it")
def test_a_minute_to_the_first_token(start_worker: Any) -> None:
    worker = start_worker()
    worker.answerer.think_s = 60.0
    question: Any = [{"role": "user", "content": "think first"}]
    started = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        body = {"model": "scripted", "stream": True, "messages": question}
        answers: list[Any] = [pool.submit(httpx.post, f"{worker.url}/v1/chat/completions", json=body)]
        time.sleep(0.3)
        answers.append(pool.submit(lambda: "".join(
            chunk.choices[0].delta.content or "" for chunk in ask(worker, HELLO, stream=True)
        )))
        answers.append(pool.submit(lambda: ask(worker, HELLO).choices[0].message.content))
        answers.append(pool.submit(said, worker.url))
        first = answers[0].result().text
        assert first.count(": still at work") >= 15 and first.rstrip().endswith("[DONE]")
        assert [answer.result()[:7] for answer in answers[1:]] == ["A gland"] * 3
    assert 60 < time.monotonic() - started < 75
