"""The line before the models, and the one thread in which they answer: requests join and leave between two tokens.

A request takes its place in line when it arrives and is let into a batch in that order, as soon as its pictures are
read and there is room. Whatever goes wrong with one request goes to that request alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from medllava.errors import is_out_of_memory
from medllava.serve.faults import Refused, refusal

if TYPE_CHECKING:
    from medllava.model.decoding import Completion, TokenLogprob

logger = logging.getLogger(__name__)

PATIENCE_S = 10.0
"""How long a request whose pictures are being read holds up those that came later."""


class Row(Protocol):
    """One answer that is being made."""

    @property
    def finished(self) -> bool: ...
    @property
    def logprobs(self) -> Sequence[TokenLogprob]: ...
    def ready(self) -> str: ...
    def completion(self) -> Completion: ...


class Rows(Protocol):
    """Answers that are made together, see :class:`medllava.model.decoding.Batch`."""

    @property
    def rows(self) -> Sequence[Row]: ...
    def join(self, questions: Sequence[Any]) -> Sequence[Row]: ...
    def step(self) -> None: ...
    def remove(self, rows: Sequence[Any]) -> None: ...


class Model(Protocol):
    """What makes answers: an Answerer, or a Looker, whose answers are not text."""

    def batch(self) -> Rows: ...


@dataclass(frozen=True)
class Piece:
    """News of one answer of a request: further text and its tokens' log-probabilities; ``whole`` with the last one."""

    index: int
    text: str
    logprobs: Sequence[TokenLogprob]
    whole: Completion | None


@dataclass(eq=False)
class Ticket:
    """A request in line or in a batch. ``size``: answers that it asks for, each a row of the batch. ``streamed``:
    whether it is told of each token, or only of whole answers."""

    answerer: Model
    size: int
    streamed: bool
    arrived: float = field(default_factory=time.monotonic)
    called: float | None = None
    """When it left the line, in seconds of the monotonic clock."""
    joined: float | None = None
    """When its first tokens were there."""
    questions: Sequence[Any] | None = None
    rows: list[Row] = field(default_factory=list)
    shown: list[tuple[int, int]] = field(default_factory=list)
    """Per row: characters and log-probabilities that were sent."""
    cancelled: bool = False
    news: asyncio.Queue[Piece | Refused] = field(default_factory=asyncio.Queue)

    def done(self) -> bool:
        return bool(self.rows) and all(row.finished for row in self.rows)

    def pieces(self) -> list[Piece]:
        """What is new since the last call."""
        found = []
        for index, (row, (text_sent, noted)) in enumerate(zip(self.rows, self.shown, strict=True)):
            if text_sent < 0:  # this row's last piece is out
                continue
            if not (row.finished or self.streamed):
                continue
            text, logprobs = row.ready(), row.logprobs[noted:]
            if len(text) > text_sent or row.finished:
                whole = row.completion() if row.finished else None
                found.append(Piece(index, text[text_sent:], logprobs, whole))
                self.shown[index] = (-1 if whole else len(text), len(row.logprobs))
        return found


class Engine:
    """Answers the requests of all models in one thread.

    ``max_rows``: answers made at the same time. ``max_waiting``: requests that may stand in line. Methods are called
    from the event loop.
    """

    def __init__(self, *, max_rows: int, max_waiting: int) -> None:
        self._max_rows, self._max_waiting = max_rows, max_waiting
        self._wake = threading.Condition()
        self._line: list[Ticket] = []
        self._active: list[Ticket] = []
        self._batches: dict[Model, Rows] = {}
        self._mean_s = 1.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self.steps = 0
        self.row_steps = 0

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        # A daemon: a forward pass that hangs must not keep the process alive after Ctrl-C.
        threading.Thread(target=self._run, name="answers", daemon=True).start()

    @property
    def waiting(self) -> int:
        return len(self._line)

    @property
    def answering(self) -> int:
        """Requests whose answers are being made."""
        return len(self._active)

    def position(self, ticket: Ticket) -> int:
        """Place in line: 1 is next, 0 means not in line any more."""
        with self._wake:
            return self._line.index(ticket) + 1 if ticket in self._line else 0

    def check_room(self) -> None:
        """Raises Refused if the line is full."""
        waiting = len(self._line)
        free = self._max_rows - sum(ticket.size for ticket in self._active)
        if waiting < self._max_waiting + max(free, 0):
            return
        wait_s = min(max(round(self._mean_s * waiting / self._max_rows), 1), 60)
        raise Refused(
            429, "queue_full",
            f"{waiting} questions are waiting already, which is the most this worker lets wait; ask again in"
            f" {wait_s} s",
            retry_after_s=wait_s,
        )

    def enter(self, answerer: Model, size: int, *, streamed: bool) -> Ticket:
        """Take a place in line. Raises Refused if it is full or the request has more answers than fit at once."""
        if size > self._max_rows:
            raise Refused(400, "invalid_request", f"n: at most {self._max_rows} answers per request here", param="n")
        with self._wake:
            self.check_room()
            ticket = Ticket(answerer, size, streamed)
            self._line.append(ticket)
        return ticket

    def begin(self, ticket: Ticket, questions: Sequence[Any]) -> None:
        """Its questions are read: it may join a batch when its turn comes."""
        with self._wake:
            ticket.questions = questions
            self._wake.notify()

    def leave(self, ticket: Ticket) -> None:
        """Nobody waits for it any more: it leaves the line at once, a batch before its next token."""
        with self._wake:
            ticket.cancelled = True
            if ticket in self._line:
                self._line.remove(ticket)
            self._wake.notify()

    def _run(self) -> None:
        while True:
            try:
                self._round()
            except Exception as error:  # noqa: BLE001 - a defect must not leave the others waiting for ever
                self._batches.clear()
                for ticket in list(self._active):
                    self._fail(ticket, error)

    def _round(self) -> None:
        """Wait until there is something to do; let requests leave and join; one token for each answer."""
        with self._wake:
            while not (self._active or self._next_in_line()):
                # With a line, look again soon: one whose pictures take long is passed after a while.
                self._wake.wait(1.0 if self._line else None)
            left = [ticket for ticket in self._active if ticket.cancelled]
            joining = self._next_in_line(freed=sum(ticket.size for ticket in left))
            self._line = [ticket for ticket in self._line if ticket not in joining]
            # In this order, so that a request is at each moment in line or active.
            self._active = [ticket for ticket in self._active if not ticket.cancelled] + joining
        for ticket in left:
            self._batches[ticket.answerer].remove(ticket.rows)
        for answerer in {ticket.answerer: None for ticket in joining}:
            self._join([ticket for ticket in joining if ticket.answerer is answerer])
        # Who joins now gets the first token at once and does not wait for the others' next one.
        self._report()
        for answerer in {ticket.answerer: None for ticket in self._active}:
            self._step(answerer)
        self._report()

    def _next_in_line(self, freed: int = 0) -> list[Ticket]:
        """The requests that may join now, by arrival. One whose pictures are not read yet holds up those behind it,
        but not for longer than :data:`PATIENCE_S`."""
        room = self._max_rows - sum(ticket.size for ticket in self._active) + freed
        chosen = []
        for ticket in self._line:
            if ticket.questions is None:
                if time.monotonic() - ticket.arrived < PATIENCE_S:
                    break
                continue
            if ticket.size > room:
                break
            room -= ticket.size
            chosen.append(ticket)
        return chosen

    def _join(self, tickets: Sequence[Ticket]) -> None:
        """Let requests of one model into its batch; if that fails, one by one, so that only the faulty one fails."""
        batch = self._batches.get(tickets[0].answerer) or tickets[0].answerer.batch()
        self._batches[tickets[0].answerer] = batch
        for ticket in tickets:
            ticket.called = time.monotonic()
        try:
            joined = batch.join([question for ticket in tickets for question in ticket.questions or ()])
        except Exception as error:  # noqa: BLE001 - whatever the model raises is reported to the one who asked
            if len(tickets) == 1:
                self._fail(tickets[0], error)
                return
            joined = None
        if joined is None:  # here, where the failed pass and its memory are gone
            for ticket in tickets:
                self._join([ticket])
            return
        rows = iter(joined)
        for ticket in tickets:
            ticket.rows = list(itertools.islice(rows, ticket.size))
            ticket.shown = [(0, 0)] * ticket.size
            ticket.joined = time.monotonic()

    def _step(self, answerer: Model) -> None:
        batch = self._batches[answerer]
        tickets = [ticket for ticket in self._active if ticket.answerer is answerer and not ticket.done()]
        if not tickets:
            return
        self.steps += 1
        self.row_steps += len(batch.rows)
        try:
            batch.step()
        except Exception as error:  # noqa: BLE001 - see _join
            # Without memory for all, the latest has to go; any other fault may be anyone's.
            faulty = tickets[-1:] if is_out_of_memory(error) else tickets
            for ticket in faulty:
                batch.remove(ticket.rows)
                self._fail(ticket, error)

    def _report(self) -> None:
        """Send what is new, and let finished requests go."""
        news: list[tuple[Ticket, Piece | Refused]] = []
        for ticket in list(self._active):
            news += [(ticket, piece) for piece in ticket.pieces()]
            if ticket.done():
                self._active.remove(ticket)
                self._mean_s += 0.2 * (time.monotonic() - (ticket.joined or ticket.arrived) - self._mean_s)
        self._post(news)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        fault = refusal(error)
        if fault.code == "internal_error":
            # Only where, not what: an exception's text may quote the question.
            where = "".join(traceback.format_tb(error.__traceback__))
            logger.error("generation failed with %s\n%s", type(error).__name__, where)
        self._active.remove(ticket)
        # Not the error itself: its traceback holds the tensors of the pass that failed, which the next one needs.
        self._post([(ticket, fault)])

    def _post(self, news: Sequence[tuple[Ticket, Piece | Refused]]) -> None:
        """Hand news over to the event loop: at once for all rows, since each handing over takes time from the model."""

        def deliver() -> None:
            for ticket, item in news:
                ticket.news.put_nowait(item)

        assert self._loop is not None
        # After an interrupted start or stop the loop may be gone; then nobody listens either.
        with contextlib.suppress(RuntimeError):
            if news:
                self._loop.call_soon_threadsafe(deliver)
