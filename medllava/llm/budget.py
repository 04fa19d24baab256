"""What calls cost, and a limit that is never exceeded however many calls are in flight."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Container
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from medllava.config import Recipe
from medllava.errors import ServiceError
from medllava.jsonl import Appender, read_rows, write_records
from medllava.llm.base import Reply, Request, most_prompt_tokens


class BudgetError(ServiceError):
    """The next call could cost more than is left."""


class Price(Recipe):
    """US dollars per million tokens, as the provider's price list gives them."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    cached_input: float | None = Field(default=None, ge=0)
    """Price of prompt tokens that the provider had in its cache; the full price where it is not given."""
    batch_factor: float = Field(default=0.5, ge=0, le=1)
    """What a token costs through the provider's batch interface, as part of its usual price."""

    def usd(
        self, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0, *, batch: bool = False
    ) -> float:
        """``cached_tokens`` are those of the prompt tokens that have the price of the cache."""
        cached_price = self.input if self.cached_input is None else self.cached_input
        full = (prompt_tokens - cached_tokens) * self.input + cached_tokens * cached_price
        return (full + completion_tokens * self.output) * (self.batch_factor if batch else 1.0) / 1e6

    def of(self, reply: Reply) -> float:
        """What a reply cost."""
        return self.usd(reply.prompt_tokens, reply.completion_tokens, reply.cached_tokens, batch=reply.batch)

    def most(self, request: Request, *, batch: bool = False) -> float:
        """The most that one call can cost: every byte of the prompt a token, the reply at ``max_tokens``."""
        return self.usd(most_prompt_tokens(request), request.sampling.max_tokens, batch=batch)


@dataclass
class Bill:
    """What one call cost, set by whoever made it. Until then it is the most that the call can cost, so a call whose
    answer was lost on the way counts with that: it may have been paid."""

    usd: float
    answered: bool = False


class Budget:
    """Stops before more than ``max_usd`` is spent.

    Each call first reserves the most it can cost and gives back what it did not use. Calls wait while those in flight
    hold the rest of the money; only when none is in flight and the money does not do is :class:`BudgetError` raised.

    ``ledger`` is an append-only file of the calls sent, so that those whose answer never came, also because the process
    was killed, count in later runs. Use as a context manager.
    """

    def __init__(
        self, price: Price, max_usd: float | None = None, *, replies_usd: float = 0.0, ledger: Path | None = None,
        answered: Container[str] | None = None,
    ) -> None:
        """``replies_usd`` is what the kept replies cost; ``answered`` is a container of their keys."""
        self.price = price
        self.max_usd = max_usd
        self.spent_usd = replies_usd
        self.lost_usd = 0.0
        self._reserved_usd = 0.0
        self._in_flight = 0
        self._changed = asyncio.Condition()
        self._ledger = Appender(ledger) if ledger else None
        if ledger and ledger.exists():
            self.lost_usd = _lost_usd(ledger, answered if answered is not None else ())
            self.spent_usd += self.lost_usd
            write_records(ledger, [{"lost_usd": self.lost_usd}])

    def __enter__(self) -> Budget:
        if self._ledger:
            self._ledger.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._ledger:
            self._ledger.__exit__()

    @asynccontextmanager
    async def call(self, request: Request) -> AsyncIterator[Bill]:
        """Hold the money for one call while it is made."""
        most_usd = self.price.most(request)
        async with self._changed:
            while self._beyond(most_usd):
                if not self._in_flight:
                    raise BudgetError(
                        f"${self.spent_usd:.4f} is spent and the next call may cost ${most_usd:.4f}:"
                        f" more than the limit of ${self.max_usd:.2f}"
                    )
                await self._changed.wait()
            self._reserved_usd += most_usd
            self._in_flight += 1
        bill = Bill(most_usd)
        ledger = self._ledger if most_usd else None
        key = request.key() if ledger else ""
        if ledger:
            ledger.write({"key": key, "usd": most_usd})
        try:
            yield bill
        finally:
            # An answered call stays open in the ledger: its reply, which is kept a moment later, closes it.
            if ledger and not bill.answered and bill.usd < most_usd:
                ledger.write({"key": key, "usd": bill.usd - most_usd})
            async with self._changed:
                self._in_flight -= 1
                self._reserved_usd = self._reserved_usd - most_usd if self._in_flight else 0.0
                self.spent_usd += bill.usd
                if not bill.answered:
                    self.lost_usd += bill.usd
                self._changed.notify_all()

    def _beyond(self, most_usd: float) -> bool:
        return self.max_usd is not None and self.spent_usd + self._reserved_usd + most_usd > self.max_usd


def _lost_usd(ledger: Path, answered: Container[str]) -> float:
    """What the calls of earlier runs may have cost that are in no kept reply."""
    lost_usd = 0.0
    open_usd: Counter[str] = Counter()
    most_usd: dict[str, float] = {}
    for _, row in read_rows(ledger):
        lost_usd += row.get("lost_usd", 0.0)
        if key := row.get("key"):
            open_usd[key] += row["usd"]
            most_usd[key] = max(most_usd.get(key, 0.0), row["usd"])
    for key, usd in open_usd.items():
        lost_usd += max(0.0, usd - (most_usd[key] if key in answered else 0.0))
    return lost_usd if lost_usd > 1e-12 else 0.0
