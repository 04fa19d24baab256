"""Which worker is asked, and what becomes of an answer whose worker is lost; without a page, a browser or a network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from medllava.errors import ServiceError
from medllava.serve.answering import Choice, Workers
from medllava.serve.client import InLine, Model, WorkerLost, WorkerState
from medllava.serve.session import Exchange, Session


@dataclass
class Scripted:
    """Stands for a :class:`medllava.serve.client.Worker`: says ``pieces``, then raises ``fault`` if there is one."""

    url: str
    model: str = "stage2"
    pieces: Sequence[str | InLine] = ("A ", "gland.")
    fault: Exception | None = None
    status: str = "ready"
    asked: list[str] = field(default_factory=list)
    closed: int = 0

    async def state(self) -> WorkerState:
        if self.status != "ready":
            return WorkerState(self.url, "unreachable", None, f"no worker answers at {self.url}")
        return WorkerState(self.url, "ready", self.model, "ready", models=(Model(self.model),))

    async def ask(self, turns: Any, pictures: Any, *, model: str | None) -> AsyncIterator[str | InLine]:
        self.asked.append(turns[-1].text)
        try:
            for piece in self.pieces:
                yield piece
            if self.fault:
                self.status = "unreachable" if isinstance(self.fault, WorkerLost) else self.status
                raise self.fault
        finally:
            self.closed += 1


def lost(url: str) -> WorkerLost:
    return WorkerLost(f"No worker can be reached at {url}.")


def reply(*workers: Scripted, chosen: str = "") -> tuple[Exchange, list[tuple[str, int]]]:
    """The exchange after its answer, and text and place in line after each change of it."""
    session = Session()
    exchange = session.ask("Where is the gland?")
    seen: list[tuple[str, int]] = []

    async def run() -> None:
        crew = Workers(workers)  # type: ignore[arg-type]
        await crew.refresh()
        async for _ in crew.reply(session, exchange, Choice(chosen) if chosen else crew.kept(crew.first())):
            seen.append((exchange.answer, exchange.position))

    asyncio.run(run())
    assert all(worker.closed == len(worker.asked) for worker in workers)
    return exchange, seen


def test_an_answer_comes_piece_by_piece() -> None:
    exchange, seen = reply(Scripted("http://a"))
    assert seen == [("A ", 0), ("A gland.", 0)]
    assert (exchange.state, exchange.note, exchange.model, exchange.worker) == ("done", "", "stage2", "http://a")


def test_the_place_in_line_until_the_first_word() -> None:
    _, seen = reply(Scripted("http://a", pieces=(InLine(2), InLine(1), InLine(0), "A ", InLine(1), "gland.")))
    assert seen == [("", 2), ("", 1), ("", 0), ("A ", 0), ("A ", 1), ("A gland.", 0)]


def test_a_worker_lost_before_its_first_word_is_replaced_by_one_with_the_same_model() -> None:
    first = Scripted("http://a", pieces=(InLine(3),), fault=lost("http://a"))
    second, third = Scripted("http://b", "other"), Scripted("http://c")
    exchange, seen = reply(first, second, third)
    assert (exchange.state, exchange.answer, exchange.worker) == ("done", "A gland.", "http://c")
    assert exchange.note == "http://a was lost; asked http://c instead."
    assert (first.asked, second.asked, third.asked) == (["Where is the gland?"], [], ["Where is the gland?"])
    assert seen[:2] == [("", 3), ("", 0)]  # its place was in the lost worker's line


def test_another_model_is_named() -> None:
    exchange, _ = reply(Scripted("http://a", pieces=(), fault=lost("http://a")), Scripted("http://b", "other"))
    assert (exchange.state, exchange.model) == ("done", "other")
    assert exchange.note == "http://a was lost; asked http://b instead, which runs another model: other."


def test_what_a_lost_worker_said_is_kept_and_no_other_is_asked() -> None:
    second = Scripted("http://b")
    exchange, _ = reply(Scripted("http://a", pieces=("A gl",), fault=lost("http://a")), second)
    assert (exchange.state, exchange.answer, second.asked) == ("failed", "A gl", [])
    assert "lost in the middle" in exchange.note and exchange.note.endswith("Retry asks stage2 at http://b.")
    alone, _ = reply(Scripted("http://a", pieces=("A gl",), fault=lost("http://a")))
    assert alone.note.endswith("Press Retry when the line on top shows a worker again.")


def test_all_workers_gone() -> None:
    workers = [Scripted(url, pieces=(), fault=lost(url)) for url in ("http://a", "http://b", "http://c")]
    exchange, _ = reply(*workers)
    assert [len(worker.asked) for worker in workers] == [1, 1, 1]  # each once, then it ends
    assert (exchange.state, exchange.answer) == ("failed", "")
    assert exchange.note == "No worker can be reached at http://c."


def test_a_fault_of_the_question_is_not_carried_to_another_worker() -> None:
    second = Scripted("http://b")
    exchange, _ = reply(Scripted("http://a", pieces=(), fault=ServiceError("the prompt is too long")), second)
    assert (exchange.state, exchange.note, second.asked) == ("failed", "the prompt is too long", [])


def test_a_choice_that_the_page_never_offered() -> None:
    exchange, _ = reply(Scripted("http://a"), chosen="http://elsewhere")
    assert exchange.state == "failed" and "no worker of this page" in exchange.note


def test_a_stopped_answer_takes_no_late_piece() -> None:
    session = Session()
    exchange = session.ask("Where is the gland?")
    worker = Scripted("http://a")

    async def run() -> None:
        async for _ in Workers([worker]).reply(session, exchange, Choice("http://a")):  # type: ignore[list-item]
            session.stop()

    asyncio.run(run())
    assert (exchange.state, exchange.answer, worker.closed) == ("stopped", "A ", 1)


def test_the_choice_follows_the_workers() -> None:
    a, b, c = Scripted("http://a"), Scripted("http://b", "other"), Scripted("http://c")
    crew = Workers([a, b, c])  # type: ignore[list-item]
    asyncio.run(crew.refresh())
    chosen = Choice("http://a", "stage2")
    assert crew.kept(chosen) == chosen
    a.status = "unreachable"
    asyncio.run(crew.refresh())
    assert crew.kept(chosen) == Choice("http://c", "stage2")
    c.status = "unreachable"
    asyncio.run(crew.refresh())
    assert crew.kept(chosen) == Choice("http://b", "other")
    b.status = "unreachable"
    asyncio.run(crew.refresh())
    assert [choice.url for choice, _ in crew.choices()] == ["http://a", "http://b", "http://c"]
    assert crew.kept(chosen) == Choice("http://a")


@pytest.mark.parametrize("choice", [Choice("http://a"), Choice("http://a", "a model of two words")])
def test_a_choice_is_read_as_it_was_written(choice: Choice) -> None:
    assert Choice.parse(str(choice)) == choice
