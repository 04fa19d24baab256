"""What calls cost, and a limit that is never exceeded however many calls are in flight."""

from __future__ import annotations

import asyncio

from pydantic import Field

from medllava.config import Recipe
from medllava.errors import ServiceError
from medllava.llm.base import Reply, Request, TextModel, most_prompt_tokens


class BudgetError(ServiceError):
    """The next call could cost more than is left."""


class Price(Recipe):
    """US dollars per million tokens, as the provider's price list gives them."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)

    def usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6


class BudgetedModel:
    """A text model that stops before more than ``max_usd`` is spent.

    Each call first reserves the most it can cost (every byte of the prompt a token, the reply at ``max_tokens``) and
    gives back what it did not use. Calls wait while those in flight hold the rest of the money; only when none is in
    flight and the money does not do is :class:`BudgetError` raised.
    """

    def __init__(self, inner: TextModel, price: Price, max_usd: float, already_usd: float = 0.0) -> None:
        self.inner = inner
        self.price = price
        self.max_usd = max_usd
        self.spent_usd = already_usd
        self._reserved_usd = 0.0
        self._in_flight = 0
        self._changed = asyncio.Condition()

    async def ask(self, request: Request) -> Reply:
        most_usd = self.price.usd(most_prompt_tokens(request), request.sampling.max_tokens)
        async with self._changed:
            while self.spent_usd + self._reserved_usd + most_usd > self.max_usd:
                if not self._in_flight:
                    raise BudgetError(
                        f"${self.spent_usd:.4f} is spent and the next call may cost ${most_usd:.4f}:"
                        f" more than the limit of ${self.max_usd:.2f}"
                    )
                await self._changed.wait()
            self._reserved_usd += most_usd
            self._in_flight += 1
        cost_usd = 0.0
        try:
            reply = await self.inner.ask(request)
            cost_usd = self.price.usd(reply.prompt_tokens, reply.completion_tokens)
            return reply
        finally:
            async with self._changed:
                self._in_flight -= 1
                self._reserved_usd = self._reserved_usd - most_usd if self._in_flight else 0.0
                self.spent_usd += cost_usd
                self._changed.notify_all()
