from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from medllava.images import load_image, to_data_uri
from medllava.serve.intake import Limits
from medllava.serve.worker import listen

Wait = Callable[..., None]


def client(worker: Any, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{worker.url}/v1", api_key=key, max_retries=0)


def about(image: Path | str, text: str) -> list[dict[str, Any]]:
    uri = to_data_uri(load_image(image)) if isinstance(image, Path) else image
    return [
        {"role": "user", "content": [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": uri}}]}
    ]


def ask(worker: Any, messages: Any, **options: Any) -> Any:
    return client(worker).chat.completions.create(model="scripted", messages=messages, **options)


# -- what is served


def test_a_whole_answer_with_usage(worker: Any, photograph: Path) -> None:
    reply = ask(worker, about(photograph, "Where is the gland?"), max_tokens=50, temperature=0.3, top_p=0.9, seed=3)
    assert reply.choices[0].message.content == "A gland. [0.10, 0.20, 0.40, 0.60]"
    assert reply.choices[0].finish_reason == "stop"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (21, 6, 27)
    images, turns, options = worker.answerer.asked[0]
    assert images[0].size == (900, 300)
    assert images[0].tobytes() == load_image(photograph).tobytes()
    assert [(turn.role, turn.text) for turn in turns] == [("user", "<image>\nWhere is the gland?")]
    assert options == {
        "max_new_tokens": 50, "temperature": 0.3, "top_p": 0.9, "stop": (), "seed": 3, "top_logprobs": None
    }


def test_a_streamed_answer_with_usage(worker: Any, photograph: Path) -> None:
    worker.answerer.pause_s = 0.5  # what comes while the server is busy is one piece
    question = about(photograph, "What is here?")
    chunks = list(ask(worker, question, stream=True, stream_options={"include_usage": True}, max_tokens=3))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece or "" for piece in pieces) == "A gland. [0.10, "
    assert len([piece for piece in pieces if piece]) == 3
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 3
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_async_client(worker: Any) -> None:
    async def both() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{worker.url}/v1", api_key="none", max_retries=0) as asker:
            question: Any = {"model": "scripted", "messages": [{"role": "user", "content": "Where is the gland?"}]}
            whole = await asker.chat.completions.create(**question)
            stream = await asker.chat.completions.create(**question, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return whole.choices[0].message.content or "", "".join(pieces)

    assert asyncio.run(both()) == ("A gland. [0.10, 0.20, 0.40, 0.60]",) * 2


def test_pieces_arrive_while_the_answer_is_made(worker: Any) -> None:
    worker.answerer.pause_s = 0.5
    stream = ask(worker, [{"role": "user", "content": "tell a long story"}], stream=True, max_tokens=60)
    texts, made = [], []
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            texts.append(chunk.choices[0].delta.content)
            made.append(worker.answerer.words)
            worker.answerer.pause_s = 0.0
    assert "".join(texts).split() == ["and", "then"] * 30
    assert made[0] < 30


def test_models_and_health(worker: Any) -> None:
    assert [model.id for model in client(worker).models.list()] == ["scripted"]
    health = httpx.get(f"{worker.url}/health")
    assert health.status_code == 200
    assert (health.json()["status"], health.json()["model"], health.json()["busy"]) == ("ready", "scripted", False)


def test_a_conversation_that_appends_the_reply_as_it_came(worker: Any, photograph: Path) -> None:
    messages: list[Any] = about(photograph, "What is here?")
    messages.insert(0, {"role": "system", "content": "You help a pathologist."})
    messages.append(ask(worker, messages).choices[0].message)
    messages.append({"role": "user", "content": "What is in the region [0.10, 0.10, 0.30, 0.30]?"})
    assert ask(worker, messages).choices[0].message.content == "The region [0.10, 0.10, 0.30, 0.30] holds a vessel."
    roles = [turn.role for turn in worker.answerer.asked[-1][1]]
    assert roles == ["system", "user", "assistant", "user"]


def test_one_picture_goes_first_and_several_keep_their_places(worker: Any) -> None:
    picture = {"type": "image_url", "image_url": {"url": to_data_uri(Image.new("RGB", (8, 4)))}}
    text = [{"type": "text", "text": name} for name in ("before", "between", "after")]
    ask(worker, [{"role": "user", "content": [text[0], picture, text[2]]}])
    assert worker.answerer.asked[-1][1][0].text == "<image>\nbefore\nafter"
    ask(worker, [{"role": "user", "content": [text[0], picture, text[1], picture]}])
    assert worker.answerer.asked[-1][1][0].text == "before\n<image>\nbetween\n<image>"


# -- what is refused, each with its own code


def test_a_file_and_a_web_address_are_refused(worker: Any, photograph: Path) -> None:
    for url in ("https://example.org/tissue.png", "file:///etc/passwd", str(photograph)):
        with pytest.raises(openai.BadRequestError, match="only data URIs.*fetches nothing"):
            ask(worker, about(url, "What is here?"))
    assert worker.answerer.asked == []


@pytest.mark.parametrize(
    ("payload", "why"),
    [(b"no image at all", "not an image"), (b"", "0 bytes"), (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not an image|damage")],
)
def test_a_bad_image(worker: Any, payload: bytes, why: str) -> None:
    uri = "data:image/png;base64," + base64.b64encode(payload).decode()
    with pytest.raises(openai.BadRequestError, match=why) as caught:
        ask(worker, about(uri, "What is here?"))
    assert caught.value.code == "invalid_image"
    truncated = to_data_uri(Image.effect_noise((64, 64), 50))
    with pytest.raises(openai.BadRequestError, match="damaged"):
        ask(worker, about(truncated[: len(truncated) // 2 // 4 * 4 + 2], "What is here?"))


def test_too_large_an_image(worker: Any) -> None:
    noise = Image.frombytes("RGB", (700, 700), os.urandom(700 * 700 * 3))
    with pytest.raises(openai.APIStatusError, match="1.5 MB; the limit is 1 MB") as caught:
        ask(worker, about(to_data_uri(noise), "What is here?"))
    assert (caught.value.status_code, caught.value.code) == (413, "image_too_large")
    buffer = io.BytesIO()
    Image.new("1", (20_000, 6_000)).save(buffer, "PNG")  # few bytes, 120 million pixels
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    with pytest.raises(openai.APIStatusError, match="pixels") as caught:
        ask(worker, about(uri, "What is here?"))
    assert caught.value.status_code == 413


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"n": 3}, "at most 2 answers"),
        ({"n": 0}, "n: "),
        ({"top_logprobs": 2}, "only with logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: not served"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: not served"),
        ({"temperature": 3}, "temperature"),
        ({"stop": ["", "b"]}, "stop"),
        ({"extra_body": {"top_k": 5}}, "top_k"),
        ({"stream_options": {"include_usage": True}}, "only with stream"),
    ],
)
def test_what_would_change_the_answer_is_refused(worker: Any, options: dict[str, Any], why: str) -> None:
    with pytest.raises(openai.BadRequestError, match=why):
        ask(worker, [{"role": "user", "content": "hello"}], **options)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "assistant", "content": "I speak first"}],
        [{"role": "tool", "content": "x", "tool_call_id": "1"}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}],
    ],
)
def test_messages_that_make_no_question(worker: Any, messages: Any) -> None:
    with pytest.raises(openai.BadRequestError):
        ask(worker, messages)


def test_requests_that_are_no_request(worker: Any) -> None:
    url = f"{worker.url}/v1/chat/completions"
    assert httpx.post(url, content=b"{", headers={"Content-Type": "application/json"}).status_code == 400
    assert httpx.post(url, content=b"{}").status_code == 415
    huge = b" " * 20_000_000
    assert httpx.post(url, content=huge, headers={"Content-Type": "application/json"}).status_code == 413
    assert httpx.get(f"{worker.url}/nowhere").status_code == 404


def test_an_unknown_model_is_named(worker: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="'other'.*'scripted'"):
        client(worker).chat.completions.create(model="other", messages=[{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "status", "code", "why"),
    [
        ("too much memory", 507, "out_of_memory", "--load-4bit"),
        ("too many words", 400, "context_length_exceeded", "4096"),
        ("divide by zero", 500, "internal_error", "ZeroDivisionError"),
    ],
)
def test_faults_of_the_model(worker: Any, text: str, status: int, code: str, why: str, stream: bool) -> None:
    with pytest.raises(openai.APIStatusError, match=why) as caught:
        ask(worker, [{"role": "user", "content": text}], stream=stream)
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert "A gland" in ask(worker, [{"role": "user", "content": "and now?"}]).choices[0].message.content


def test_a_late_fault_ends_the_stream_with_its_reason(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medllava.serve.app.FIRST_PIECE_S", 0.1)
    stream = ask(worker, [{"role": "user", "content": "think first, then too much memory"}], stream=True)
    assert stream.response.status_code == 200  # the response has begun; the fault can only come in the stream
    with pytest.raises(openai.APIError, match="--load-4bit"):
        list(stream)


def test_keys(start_worker: Any) -> None:
    worker = start_worker(api_keys=("first", "second"))
    assert list(client(worker, "second").models.list())
    for key in ("third", ""):
        with pytest.raises(openai.AuthenticationError):
            client(worker, key or "firs").models.list()
        with pytest.raises(openai.AuthenticationError):
            client(worker, key or "firs").chat.completions.create(
                model="scripted", messages=[{"role": "user", "content": "hello"}]
            )


# -- loading, waiting, leaving


def test_while_the_model_loads_the_server_says_so(start_worker: Any, wait: Wait) -> None:
    loaded = threading.Event()
    worker = start_worker(until=loaded)
    wait(lambda: httpx.get(f"{worker.url}/health").json()["status"] == "loading")
    with pytest.raises(openai.InternalServerError, match="still loading") as caught:
        ask(worker, [{"role": "user", "content": "hello"}])
    assert (caught.value.status_code, caught.value.code) == (503, "model_loading")
    assert caught.value.response.headers["Retry-After"] == "5"
    loaded.set()
    wait(lambda: httpx.get(f"{worker.url}/health").json()["status"] == "ready")
    assert ask(worker, [{"role": "user", "content": "hello"}]).choices


def test_answers_are_made_together_and_few_wait(worker: Any, wait: Wait) -> None:
    story = [{"role": "user", "content": "tell a long story"}]

    def health() -> Any:
        return httpx.get(f"{worker.url}/health").json()

    worker.answerer.pause_s = 0.25
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(ask, worker, story, max_tokens=60) for _ in range(2)]
        wait(lambda: health()["answering"] == 2)
        answers.append(pool.submit(ask, worker, story, max_tokens=5))
        wait(lambda: health()["waiting"] == 1)
        with pytest.raises(openai.RateLimitError, match="1 questions are waiting") as caught:
            ask(worker, story)
        assert (caught.value.status_code, caught.value.code) == (429, "queue_full")
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        worker.answerer.pause_s = 0.0
        assert [answer.result().usage.completion_tokens for answer in answers] == [60, 60, 5]


def test_a_wait_in_line_ends(start_worker: Any, wait: Wait) -> None:
    worker = start_worker(limits=Limits(max_batch=1, max_wait_s=0.3))
    worker.answerer.pause_s = 0.25
    story = [{"role": "user", "content": "tell a long story"}]
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, worker, story, max_tokens=80)
        wait(lambda: httpx.get(f"{worker.url}/health").json()["busy"])
        with pytest.raises(openai.InternalServerError, match="busy") as caught:
            ask(worker, story)
        assert caught.value.code == "queue_timeout"
        worker.answerer.pause_s = 0.0
        assert first.result().choices


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_generation(worker: Any, wait: Wait, within: Wait, stream: bool) -> None:
    body = {"model": "scripted", "messages": [{"role": "user", "content": "tell a long story"}], "max_tokens": 2000}

    async def leave() -> None:
        worker.answerer.stopped_at.clear()
        before = worker.answerer.words
        async with httpx.AsyncClient() as asker:
            asked = asyncio.create_task(
                asker.post(f"{worker.url}/v1/chat/completions", json={**body, "stream": stream})
            )
            while worker.answerer.words < before + 5 and not asked.done():
                await asyncio.sleep(0.01)
            asked.cancel()

    within(2, lambda: asyncio.run(leave()), lambda: bool(worker.answerer.stopped_at))
    wait(lambda: not httpx.get(f"{worker.url}/health").json()["busy"])


def test_a_slow_first_token_gets_a_heartbeat_and_its_answer(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medllava.serve.app.FIRST_PIECE_S", 0.1)
    monkeypatch.setattr("medllava.serve.app.HEARTBEAT_S", 0.1)
    body = {"model": "scripted", "stream": True, "messages": [{"role": "user", "content": "think first"}]}
    text = httpx.post(f"{worker.url}/v1/chat/completions", json=body).text
    assert text.count(": still at work") >= 2
    pieces = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces).startswith("A gland.")
    assert text.rstrip().endswith("data: [DONE]")


# -- privacy


def test_nothing_of_a_question_is_logged(worker: Any, photograph: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="medllava")
    secret = "divide by zero for Mrs Miller"
    with pytest.raises(openai.InternalServerError) as caught:
        ask(worker, about(photograph, secret))
    assert "Miller" not in str(caught.value)
    with pytest.raises(openai.BadRequestError) as refused:
        ask(worker, about("http://example.org/miller.png", secret), temperature=9)
    assert "iller" not in str(refused.value)
    assert "Miller" not in caplog.text
    assert "ZeroDivisionError" in caplog.text


# -- the command


def start_command(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "medllava.serve.worker", *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )


def test_the_command_reports_a_bad_folder_in_one_line(tmp_path: Path) -> None:
    with start_command("--model-path", str(tmp_path / "nowhere"), "--port", "0") as process:
        out, err = process.communicate(timeout=600)
    assert process.returncode == 1
    assert out == ""
    assert err.count("\n") == 1 and "nowhere: no such checkpoint folder" in err


def test_the_command_reports_a_taken_port(tmp_path: Path, worker: Any) -> None:
    port = worker.url.rsplit(":", 1)[1]
    with start_command("--model-path", str(tmp_path), "--port", port) as process:
        _, err = process.communicate(timeout=600)
    assert process.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in err and err.count("\n") == 1


def test_small_pieces_are_sent_at_once() -> None:
    """Else the first text of an answer waits for the client's receipt of the headers: 40 ms on Linux."""

    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def look(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            own: socket.socket = writer.get_extra_info("socket")
            found.set_result(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = listen("127.0.0.1", 0)
        async with await asyncio.start_server(look, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            writer.close()
            return await asyncio.wait_for(found, 60)

    assert asyncio.run(accepted()) == 1


def test_the_command_ends_when_the_model_cannot_be_loaded(tmp_path: Path) -> None:
    with start_command("--model-path", str(tmp_path), "--port", "0") as process:
        out, err = process.communicate(timeout=600)
    assert process.returncode == 1
    assert out.startswith("listening on http://127.0.0.1:")
    assert str(tmp_path) in err and "Traceback" not in err
