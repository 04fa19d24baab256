"""How many calls may be in flight: fewer when the endpoint says it is too many, more again while it answers.

The rule is that of congestion control in TCP (additive increase, multiplicative decrease): a start with few calls that
doubles with each round of answers, half as many when the endpoint says 429 or 503, from then on slow growth.
A wait that the endpoint asks for holds for every call, not only for the one that was told.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

from medllava.llm.base import UnansweredError

FIRST_CALLS = 4
"""Calls in flight at the start, before the endpoint has answered any."""

GROWTH = 0.25
"""Calls in flight gained per round of answers after the endpoint first said "too many". With 1, as in TCP, a third more
calls than answers were made to an endpoint that takes 20 in a quarter second; with this 15 %, and none took longer."""

LEAST_WAIT_S, MOST_WAIT_S = 0.5, 30.0
"""Range of the wait where the endpoint says "too many" but not for how long."""


class Pace:
    """At most ``most`` calls in flight, fewer where the endpoint does not bear so many.

    ``calls`` counts the calls begun, ``throttled`` those that were turned away.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = float(min(most, FIRST_CALLS))
        self.in_flight = 0
        self.calls = 0
        self.throttled = 0
        self.answered_at = time.monotonic()
        self._met_its_limit = False
        self._cut_at = -math.inf
        self._resume_at = -math.inf
        self._next_wait_s = LEAST_WAIT_S
        self._closed = False
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[float]:
        """Wait for one of the calls that may be in flight and hold it; gives the time at which it was had.

        Raises UnansweredError after :meth:`close`.
        """
        while not self._closed:
            wait_s = self.pause_s()
            if wait_s <= 0 and self.in_flight < int(self.limit):
                break
            with suppress(TimeoutError):
                await asyncio.wait_for(self._freed.wait(), wait_s if wait_s > 0 else None)
        else:
            raise UnansweredError("not sent: the run was ended")
        self.in_flight += 1
        self.calls += 1
        try:
            yield time.monotonic()
        finally:
            self.in_flight -= 1
            self._wake()

    def close(self) -> None:
        """No further call begins; those that wait for a slot raise UnansweredError."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        """Let whoever waits look again, in the order of coming."""
        self._freed.set()
        self._freed.clear()

    def pause_s(self) -> float:
        """For how many seconds no call may begin; 0 or less if one may."""
        return self._resume_at - time.monotonic()

    def answer_came(self) -> None:
        """The endpoint took a call: room for more."""
        self.answered_at = time.monotonic()
        self._next_wait_s = max(LEAST_WAIT_S, 0.8 * self._next_wait_s)
        self.limit = min(float(self.most), self.limit + (GROWTH / self.limit if self._met_its_limit else 1))

    def was_turned_away(self, began: float, retry_after_s: float | None) -> None:
        """The endpoint turned away (429, 503) a call begun at ``began``, asking for a wait or not.

        Calls that were in flight together count as one sign of too many, not each by itself.
        """
        self.throttled += 1
        now = time.monotonic()
        if began >= self._cut_at:
            self.limit = max(1.0, self.limit / 2)
            self._met_its_limit = True
            self._cut_at = now
            if not retry_after_s:
                self._resume_at = max(self._resume_at, now + self._next_wait_s)
                self._next_wait_s = min(MOST_WAIT_S, 2 * self._next_wait_s)
        if retry_after_s:
            self.wait(retry_after_s)

    def wait(self, seconds: float) -> None:
        """No call begins for so long."""
        self._resume_at = max(self._resume_at, time.monotonic() + seconds)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The wait that a response asks for (RFC 9110: seconds or a date; or ``retry-after-ms``), None if none is read."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name)
        if text is None:
            continue
        try:
            seconds = float(text) * unit_s
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
            except ValueError:
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None
