"""What is asked of a text model and what comes back, whoever answers."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from medllava.config import Recipe
from medllava.errors import ServiceError

Item = TypeVar("Item")

_encode_sorted = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode
_PIECE = re.compile(r"[^\W\d_]+|\d+|[^\w\s]|_")


class RefusedError(ServiceError):
    """The endpoint refused this one request (HTTP 400, 413, 422, a content filter); others may be answered."""


class UnansweredError(ServiceError):
    """No answer came after all retries (timeouts, dropped connections, 429, 5xx); asking again later may help."""


class Sampling(Recipe):
    """How the model chooses words. A value of None is left to the endpoint; some models refuse a temperature."""

    temperature: float | None = Field(default=0.0, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int = Field(default=1024, gt=0)
    seed: int | None = None
    extra_body: dict[str, Any] = {}
    """Further keys of the request body that one server understands, for example ``chat_template_kwargs`` of vLLM."""


@dataclass(frozen=True)
class Request:
    """One chat completion. ``messages`` are in OpenAI form (``role``, ``content``: text or a list of parts);
    ``schema`` is the JSON schema that the reply must match, or None for free text."""

    model: str
    messages: tuple[dict[str, Any], ...]
    schema: dict[str, Any] | None = None
    schema_name: str = "reply"
    sampling: Sampling = field(default_factory=Sampling)

    def key(self) -> str:
        """SHA-256 of everything that changes the reply: the name under which the reply is kept."""
        own, sampling = _encode_sorted({"messages": self.messages, "model": self.model}), _encoded(self.sampling)
        text = f'{own[:-1]}, "sampling": {sampling}, "schema": {_encoded(self.schema)}}}'  # One object, keys in order.
        return hashlib.sha256(text.encode()).hexdigest()


class Reply(BaseModel):
    """What came back. ``finish_reason`` is the endpoint's (``stop``, ``length``, ``content_filter``) or ``refusal``
    when the model declined in a separate field, whose text is then in ``text``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    text: str
    model: str
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Those of the prompt tokens that the provider had in its cache, which are cheaper at most."""
    batch: bool = False
    """Whether the reply came through the provider's batch interface, at its own price."""
    logprobs: tuple[tuple[float, dict[str, float]], ...] | None = Field(
        default=None, exclude_if=lambda told: told is None
    )
    """Per token its log-probability and those of its likeliest alternatives by their text, where the endpoint tells."""


_shared: dict[int, tuple[Any, str]] = {}


def _encoded(value: dict[str, Any] | Sampling | None) -> str:
    """``value`` as JSON. Hundreds of thousands of requests share a few, the same objects: those are kept."""
    kept, text = _shared.get(id(value), (None, "null"))
    if kept is not value:
        if len(_shared) >= 64:
            _shared.clear()
        text = _encode_sorted(
            value.model_dump(mode="json", exclude_none=True) if isinstance(value, Sampling) else value
        )
        _shared[id(value)] = (value, text)  # While it is held, no other object has its id.
    return text


class TextModel(Protocol):
    """Anything that answers requests: an endpoint, a cache before it, a budget before it, canned replies in a test."""

    async def ask(self, request: Request) -> Reply: ...


async def for_each(items: Iterable[Item], work: Callable[[Item], Awaitable[None]], concurrency: int) -> None:
    """Do ``work`` on every item, at most ``concurrency`` at once; items are drawn as they are needed.

    The first exception cancels the work in flight and is raised.
    """
    source = iter(items)

    async def worker() -> None:
        for item in source:
            await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from None


def estimate_tokens(text: str) -> int:
    """About how many tokens a byte-pair vocabulary of 100k entries makes of ``text`` (English, within some 10 %).

    Words cost one token per 7 letters begun, numbers one per 3 digits, each other sign one. The endpoint's own count
    is used wherever a reply has come; this is for prices told before the first call.
    """
    total = 0
    for piece in _PIECE.findall(text):
        if piece.isascii():
            total += -(-len(piece) // (3 if piece.isdigit() else 7))
        else:
            total += max(1, len(piece.encode()) // 3)
    return total


def estimate_prompt_tokens(request: Request, count: Callable[[str], int] = estimate_tokens) -> int:
    """About how many prompt tokens a request costs: its texts, four per message, and its schema. ``count`` is the
    tokenizer."""
    total = sum(4 + count(text) for text in _texts(request.messages))
    return total + (count(json.dumps(request.schema)) if request.schema else 0)


def most_prompt_tokens(request: Request) -> int:
    """More prompt tokens than any byte-level vocabulary makes of a text request: its bytes, and room for roles and for
    the words that introduce a schema."""
    total = sum(16 + len(text.encode()) for text in _texts(request.messages))
    return total + (128 + len(json.dumps(request.schema).encode()) if request.schema else 0)


def _texts(messages: Iterable[dict[str, Any]]) -> Iterable[str]:
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            yield content
        else:
            yield " ".join(part["text"] for part in content if part.get("type") == "text")
