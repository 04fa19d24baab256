from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from email.utils import formatdate
from types import SimpleNamespace

import pytest

from medllava.llm.base import Request, UnansweredError, for_each
from medllava.llm.openai_api import OpenAIModel
from medllava.llm.pace import Pace, retry_after_s

BUSY = {"error": {"message": "too many requests"}}


def ask_many(endpoint, count, concurrency, **options):
    """Ask ``count`` different things; returns replies, the pace and the seconds it took."""

    async def go():
        model, replies = OpenAIModel(endpoint.url, concurrency=concurrency, **options), []

        async def one(n):
            replies.append(await model.ask(Request("m", ({"role": "user", "content": str(n)},))))

        try:
            await for_each(range(count), one, concurrency)
        finally:
            await model.close()
        return replies, model.pace

    start = time.monotonic()
    replies, pace = asyncio.run(go())
    return replies, pace, time.monotonic() - start


def test_starts_slowly_doubles_halves_and_grows_by_one_a_round():
    pace = Pace(64)
    assert pace.limit == 4
    for _ in range(4):
        pace.answer_came()
    assert pace.limit == 8
    for _ in range(100):
        pace.answer_came()
    assert pace.limit == 64, "never above the recipe's"
    pace.was_turned_away(time.monotonic(), 0.01)
    assert pace.limit == 32
    for _ in range(20):
        pace.was_turned_away(time.monotonic() - 1, 0.01)
    assert pace.limit == 32 and pace.throttled == 21, "those sent before the cut say nothing new"
    for _ in range(33 * 4):
        pace.answer_came()
    assert 32.9 < pace.limit < 33.1
    for _ in range(20):
        pace.was_turned_away(time.monotonic(), None)
    assert pace.limit == 1


def test_waits_double_while_no_wait_is_asked_for(monkeypatch):
    monkeypatch.setattr("medllava.llm.pace.time", SimpleNamespace(monotonic=lambda: 7.0))
    pace, waits = Pace(4), []
    for _ in range(8):
        pace.was_turned_away(7.0, None)
        waits.append(pace.pause_s())
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize(("headers", "seconds"), [
    ({}, None), ({"retry-after": "2.5"}, 2.5), ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
    ({"retry-after": "soon"}, None), ({"retry-after": "inf"}, None), ({"retry-after": "-3"}, 0.0),
    ({"retry-after": formatdate(time.time() - 60, usegmt=True)}, 0.0),
])  # fmt: skip
def test_reads_the_wait(headers, seconds):
    assert retry_after_s(headers) == seconds


def test_reads_a_date():
    assert 30 < retry_after_s({"retry-after": formatdate(time.time() + 60, usegmt=True)}) <= 60


def test_the_wait_holds_for_all_calls(endpoint, answer, monkeypatch):
    told, began, wait, slot = [], [], Pace.wait, Pace.slot

    def noted_wait(pace, seconds):
        told.append((time.monotonic(), seconds))
        wait(pace, seconds)

    @asynccontextmanager
    async def noted_slot(pace):
        async with slot(pace) as at:
            began.append(at)
            yield at

    monkeypatch.setattr(Pace, "wait", noted_wait)
    monkeypatch.setattr(Pace, "slot", noted_slot)
    endpoint.script = lambda number, body: (429, {"Retry-After": "0.6"}, BUSY) if number == 4 else (
        200, {}, answer("fine")
    )  # fmt: skip
    replies, pace, _ = ask_many(endpoint, 40, 8)
    assert len(replies) == 40 and len(began) == 41 and pace.throttled == 1
    ((when, seconds),) = told
    assert seconds == 0.6
    # The clock may have moved on a little between being looked at here and there.
    assert not [at for at in began if when < at < when + 0.599], "no call, not only the one that was told"
    assert [at for at in began if at > when], "and all go on afterwards"


def test_a_date_of_http_is_honoured(endpoint, answer):
    def script(number, body):
        return (429, {"Retry-After": formatdate(time.time() + 2, usegmt=True)}, BUSY) if number == 1 else (
            200, {}, answer("fine")
        )  # fmt: skip

    endpoint.script = script
    _, _, seconds = ask_many(endpoint, 1, 1)
    assert 0.9 < seconds < 60


@pytest.mark.parametrize("told", [True, False])
def test_few_calls_are_wasted_on_an_endpoint_with_a_rate_limit(endpoint, answer, told, monkeypatch):
    """A fixed number of answers per window, the rest turned away, with and without being told how long to wait."""
    window_s, per_window = 0.25, 20
    monkeypatch.setattr("medllava.llm.pace.LEAST_WAIT_S", 0.1)
    used: dict[int, int] = {}

    def script(number, body):
        now = time.monotonic()
        window = int(now / window_s)
        with endpoint.lock:
            used[window] = used.get(window, 0) + 1
            over = used[window] > per_window
        if over:
            left_s = (window + 1) * window_s - now
            return 429, {"Retry-After": f"{left_s + 0.01:.3f}"} if told else {}, BUSY
        time.sleep(0.01)
        return 200, {}, answer("fine")

    endpoint.script = script
    replies, pace, seconds = ask_many(endpoint, 300, 64)
    assert len(replies) == 300
    assert len(endpoint.requests) == pace.calls == 300 + pace.throttled
    assert pace.calls < 1.3 * 300, f"{pace.calls / 300:.2f} calls per reply"
    assert seconds < 60, "nor is time wasted: the endpoint allows 4 s"


def test_an_endpoint_that_turns_all_away_is_given_up(endpoint):
    endpoint.script = lambda number, body: (429, {"Retry-After": "0.1"}, BUSY)
    with pytest.raises(UnansweredError, match="HTTP 429"):
        ask_many(endpoint, 1, 1, patience_s=0.5)
    assert len(endpoint.requests) <= 7
    endpoint.script = lambda number, body: (429, {"Retry-After": "3600"}, BUSY)
    with pytest.raises(UnansweredError, match="asks to wait for 3600 s"):
        ask_many(endpoint, 1, 1)


def test_faults_that_pass_are_not_the_calls_own_business_for_ever(endpoint, answer):
    endpoint.script = lambda number, body: (429, {"Retry-After": "0.01"}, BUSY) if number < 30 else (
        200, {}, answer("fine")
    )  # fmt: skip
    replies, _, _ = ask_many(endpoint, 1, 1)
    assert len(replies) == 1, "being turned away 29 times is no reason to lose a sample"


def test_what_waits_is_not_sent_after_the_end(endpoint, answer):
    async def go():
        pace = Pace(1)
        async with pace.slot():
            waiting = asyncio.create_task(pace.slot().__aenter__())
            pace.wait(300)
            await asyncio.sleep(0.01)
            pace.close()
            with pytest.raises(UnansweredError, match="not sent"):
                await waiting

    start = time.monotonic()
    asyncio.run(go())
    assert time.monotonic() - start < 60
