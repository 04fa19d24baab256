"""Many requests at once: who is told what, in which order, and what a fault of one does to the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from medllava.images import to_data_uri
from medllava.model.answerer import Answerer
from medllava.serve.intake import Limits

Wait = Callable[..., None]
STORY = [{"role": "user", "content": "tell a long story"}]


def client(worker: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{worker.url}/v1", api_key="none", max_retries=0)


def health(worker: Any) -> Any:
    return httpx.get(f"{worker.url}/health").json()


def ask(worker: Any, messages: Any, **options: Any) -> Any:
    return client(worker).chat.completions.create(
        model=health(worker)["model"], messages=messages, **options
    )


def noise(number: int) -> Image.Image:
    """A picture of its own for each number, the same in every run."""
    values = np.random.default_rng(number).normal(128, 30 + 3 * number, (80, 60 + number))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")


@cache
def about(number: int) -> list[dict[str, Any]]:
    uri = to_data_uri(noise(number))
    return [{"role": "user", "content": [
        {"type": "text", "text": "Where?"}, {"type": "image_url", "image_url": {"url": uri}}
    ]}]


# -- with a real model


@pytest.fixture(scope="module")
def model(tiny: Path) -> Answerer:
    answerer = Answerer.load(tiny, device="cpu")
    answerer._ends = []
    return answerer


@pytest.fixture
def real(start_worker: Any, model: Answerer) -> Any:
    return start_worker(load=lambda: model, limits=Limits(max_batch=8))


def test_each_gets_the_answer_to_its_own_picture(real: Any) -> None:
    alone = [ask(real, about(number), max_tokens=20).choices[0].message.content for number in range(12)]
    assert len(set(alone)) > 8

    def streamed(number: int) -> str:
        chunks = ask(real, about(number), max_tokens=20, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(streamed, range(12))) == alone
    assert (health(real)["answering"], health(real)["waiting"]) == (0, 0)


def test_a_seed_repeats_a_sample_in_any_company(real: Any) -> None:
    def sample(number: int) -> str:
        return str(ask(real, about(3), max_tokens=15, temperature=1.0, seed=number).choices[0].message.content)

    alone = [sample(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(sample, range(8))) == alone
    assert len(set(alone)) > 5


def test_several_answers_with_log_probabilities(real: Any) -> None:
    options: dict[str, Any] = {
        "max_tokens": 6, "temperature": 1.0, "seed": 5, "n": 3, "logprobs": True, "top_logprobs": 2
    }
    whole = ask(real, about(1), **options)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) > 1
    assert whole.usage.completion_tokens == 18
    for choice in whole.choices:
        assert len(choice.logprobs.content) == 6
        for token in choice.logprobs.content:
            assert token.logprob <= token.top_logprobs[0].logprob <= 0
            assert len(token.top_logprobs) == 2
            assert bytes(token.bytes).decode() == token.token
    texts, tokens = ["", "", ""], [0, 0, 0]
    chunks = list(ask(real, about(1), stream=True, stream_options={"include_usage": True}, **options))
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        tokens[chunk.choices[0].index] += len(chunk.choices[0].logprobs.content) if chunk.choices[0].logprobs else 0
    assert texts == [choice.message.content for choice in whole.choices]
    assert tokens == [6, 6, 6]
    assert chunks[-1].usage.completion_tokens == 18


def test_several_pictures_in_their_order(real: Any) -> None:
    first, second = about(1)[0]["content"][1], about(9)[0]["content"][1]
    text = {"type": "text", "text": "Compare."}

    def answer(*turns: Any) -> float:
        said = {"role": "assistant", "content": "Yes."}
        messages = [{"role": "user", "content": turns[0]}]
        for turn in turns[1:]:
            messages += [said, {"role": "user", "content": turn}]
        return float(ask(real, messages, max_tokens=1, logprobs=True).choices[0].logprobs.content[0].logprob)

    asked = [
        [[first, second, text]], [[second, first, text]],
        [[first, text], [second, text]], [[second, text], [first, text]],
    ]
    assert len({answer(*turns) for turns in asked}) == 4


def test_stop_texts_in_a_stream(real: Any) -> None:
    whole = ask(real, about(2), max_tokens=20).choices[0].message.content
    stop = whole[5:8]
    chunks = list(ask(real, about(2), max_tokens=20, stop=[stop], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole[: whole.index(stop)].rstrip()
    assert chunks[-1].choices[0].finish_reason == "stop"


# -- with the scripted one


def test_first_come_first_served(start_worker: Any, wait: Wait) -> None:
    worker = start_worker(limits=Limits(max_batch=1))
    worker.answerer.pause_s = 0.5  # the first is answered until all are in line
    texts = [f"tell a long story, number {number}" for number in range(5)]
    with ThreadPoolExecutor(5) as pool:
        answers = []
        for number, text in enumerate(texts, start=1):
            answers.append(pool.submit(ask, worker, [{"role": "user", "content": text}], max_tokens=100))
            wait(lambda number=number: sum(health(worker)[key] for key in ("answering", "waiting")) == number)
        worker.answerer.pause_s = 0.0
        assert [answer.result().usage.completion_tokens for answer in answers] == [100] * 5
    assert [turns[-1].text for _, turns, _ in worker.answerer.asked] == texts


def test_without_memory_for_all_the_latest_has_to_go(start_worker: Any, wait: Wait) -> None:
    worker = start_worker()
    worker.answerer.no_memory_for, worker.answerer.pause_s = 2, 0.25
    with ThreadPoolExecutor(2) as pool:
        first = [pool.submit(ask, worker, STORY, max_tokens=40) for _ in range(2)]
        wait(lambda: health(worker)["answering"] == 2)
        with pytest.raises(openai.APIStatusError, match="memory") as caught:
            ask(worker, STORY, max_tokens=40)
        worker.answerer.pause_s = 0.0
        assert caught.value.code == "out_of_memory"
        assert [answer.result().usage.completion_tokens for answer in first] == [40, 40]


def test_one_that_cannot_be_read_spoils_no_other(start_worker: Any) -> None:
    worker = start_worker()
    with ThreadPoolExecutor(6) as pool:
        texts = ["too much memory", "hello", "divide by zero", "hello", "too many words", "hello"]
        answers = [pool.submit(ask, worker, [{"role": "user", "content": text}]) for text in texts]
        codes = [getattr(answer.exception(), "code", None) for answer in answers]
    assert codes == ["out_of_memory", None, "internal_error", None, "context_length_exceeded", None]
    assert health(worker)["answering"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_the_line_is_forgotten(
    start_worker: Any, wait: Wait, within: Wait, stream: bool
) -> None:
    worker = start_worker(limits=Limits(max_batch=1))
    worker.answerer.pause_s = 0.2
    body = {"model": "scripted", "messages": STORY, "max_tokens": 300, "stream": stream}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, worker, STORY, max_tokens=140)
        wait(lambda: health(worker)["answering"] == 1)

        def leave() -> None:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{worker.url}/v1/chat/completions", json=body, timeout=0.3)

        within(2, leave, lambda: health(worker)["waiting"] == 0)
        assert health(worker)["answering"] == 1
        worker.answerer.pause_s = 0.0
        assert first.result().choices
    assert len(worker.answerer.asked) == 1


def test_a_place_in_line_is_told(start_worker: Any, wait: Wait, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medllava.serve.app.FIRST_PIECE_S", 0.1)
    monkeypatch.setattr("medllava.serve.app.HEARTBEAT_S", 0.2)
    worker = start_worker(limits=Limits(max_batch=1))
    body = {"model": "scripted", "messages": STORY, "max_tokens": 3, "stream": True}
    worker.answerer.pause_s = 0.5
    with ThreadPoolExecutor(1) as pool:
        pool.submit(ask, worker, STORY, max_tokens=100)
        wait(lambda: health(worker)["answering"] == 1)
        lines = []
        with httpx.stream("POST", f"{worker.url}/v1/chat/completions", json=body) as reply:
            for line in reply.iter_lines():
                lines.append(line)
                if ": waiting, 1 in line" in line:
                    worker.answerer.pause_s = 0.0
    assert ": waiting, 1 in line" in lines and "".join(lines).endswith("[DONE]")


def test_metrics_and_log_count_without_content(start_worker: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="medllava.serve.requests")
    worker = start_worker()
    ask(worker, [{"role": "user", "content": "Where is Mrs Miller?"}], max_tokens=3)
    with pytest.raises(openai.APIStatusError):
        ask(worker, [{"role": "user", "content": "too much memory"}])
    text = httpx.get(f"{worker.url}/metrics").text
    assert 'medllava_requests_total{code="",model="scripted",status="200"} 1.0' in text
    assert 'medllava_requests_total{code="out_of_memory",model="scripted",status="507"} 1.0' in text
    assert "medllava_generated_tokens_total 3.0" in text
    assert "medllava_requests_waiting 0.0" in text
    facts = caplog.records[0].facts  # type: ignore[attr-defined]
    assert (facts["status"], facts["prompt_tokens"], facts["completion_tokens"]) == (200, 4, 3)
    assert facts["first_token_s"] <= facts["total_s"]
    assert "Miller" not in text + caplog.text + str(facts)


# -- the command


def start_command(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "medllava.serve.worker", "--port", "0", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    assert process.stdout is not None
    url = process.stdout.readline().removeprefix("listening on ").strip()
    assert process.stdout.readline().startswith("ready: ")
    return process, url


def test_a_stopped_worker_finishes_its_streams(tiny: Path) -> None:
    process, url = start_command("--model-path", str(tiny), "--log-json", "--drain-s", "120")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Mrs Miller?"}], "stream": True, "n": 8,
            "max_tokens": 400, "temperature": 2.0, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(process.pid, signal.SIGTERM)
        rest = list(lines)
    assert rest[-2:-1] == ["data: [DONE]"] or rest[-1] == "data: [DONE]"
    _, log = process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGTERM)
    entry = next(json.loads(line) for line in log.splitlines() if line.startswith("{") and "chatcmpl" in line)
    assert (entry["status"], entry["model"], entry["answers"]) == (200, "tiny", 8)
    assert "Miller" not in log
