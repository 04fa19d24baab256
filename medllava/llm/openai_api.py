"""Asking any OpenAI-compatible endpoint (OpenAI, Azure, vLLM, SGLang, llama.cpp, Ollama, our own worker).

Retries are made here and not by the ``openai`` client, which lets each call wait by itself, counts "too many requests"
as a fault of the call, and gives up at once where it is asked to wait for more than two minutes. Here a 429 slows down
all calls (:mod:`medllava.llm.pace`) and is borne for as long as the endpoint answers anything at all; other passing
faults (408, 409, 5xx, timeouts, dropped connections, bodies cut short) are asked again a limited number of times.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import random
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai

from medllava.errors import ConfigError, ServiceError
from medllava.llm.base import (
    RefusedError,
    Reply,
    Request,
    UnansweredError,
    estimate_prompt_tokens,
    estimate_tokens,
)
from medllava.llm.budget import Budget
from medllava.llm.pace import Pace, retry_after_s

DEFAULT_BASE_URL = "https://api.openai.com/v1"

PATIENCE_S = 300.0
"""How long calls that are turned away (429) wait while the endpoint answers none, and the longest wait that it may ask
for."""

_FORMATS = ("json_schema", "json_object", "plain")

_NEVER_SENT = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout"})
"""The HTTP library's names of faults before anything of a request went out: such a call costs nothing."""


class _BrokenBodyError(Exception):
    """An answer with HTTP 200 whose body is no chat completion."""


_Passing = (openai.APIStatusError, openai.APIConnectionError, _BrokenBodyError)


def is_loopback(base_url: str) -> bool:
    """Whether calls to ``base_url`` stay on this machine."""
    host = urlsplit(base_url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def resolve_base_url(base_url: str | None) -> str:
    """The endpoint to ask: the argument, else the environment's OPENAI_BASE_URL, else OpenAI's own."""
    url = base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(f"--base-url {url}: expected something like http://127.0.0.1:8000/v1")
    return url.rstrip("/")


def resolve_api_key(base_url: str, api_key_file: Path | None = None) -> str:
    """The key to send: from the file, else from OPENAI_API_KEY, else ``none`` for an endpoint on this machine."""
    if api_key_file is not None:
        try:
            key = api_key_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(f"--api-key-file {api_key_file}: cannot be read ({error.strerror})") from error
        if not key:
            raise ConfigError(f"--api-key-file {api_key_file}: the file is empty")
        return key
    key = os.environ.get("OPENAI_API_KEY", "")
    if key or is_loopback(base_url):
        return key or "none"
    raise ConfigError(f"{base_url} needs a key: set OPENAI_API_KEY or give --api-key-file")


class OpenAIModel:
    """A :class:`~medllava.llm.base.TextModel` behind HTTP. At most ``concurrency`` calls are in flight, fewer where the
    endpoint does not bear so many; ``pace`` tells how many. ``budget`` is asked before each call, repeats included.

    Structured output is asked for as ``json_schema``; if the endpoint refuses that (HTTP 400 or 422), as
    ``json_object`` with the schema in the prompt, then in the prompt alone. What worked is kept for the next calls.
    """

    def __init__(
        self, base_url: str, api_key: str = "none", *, concurrency: int = 16, max_retries: int = 6,
        timeout_s: float = 180.0, patience_s: float = PATIENCE_S, budget: Budget | None = None,
    ) -> None:
        self.base_url = base_url
        self.max_retries = max_retries
        self.patience_s = patience_s
        self.pace = Pace(concurrency)
        self.budget = budget
        self._format = 0
        self._limit_name = "max_tokens"
        # A proxy from the environment must not stand between this machine and itself.
        http = openai.DefaultAsyncHttpxClient(trust_env=not is_loopback(base_url))
        self._client = openai.AsyncOpenAI(
            base_url=base_url, api_key=api_key, max_retries=0, timeout=timeout_s, http_client=http
        )

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, request: Request) -> Reply:
        """The endpoint's reply.

        Raises RefusedError for a request that it will not take, UnansweredError when retries ran out, ServiceError
        where no request can succeed (key, address, model name, quota).
        """
        try:
            return await self._ask_in_some_format(request)
        except openai.BadRequestError as error:
            raise RefusedError(f"{self.base_url}: HTTP 400: {_message(error)}") from error
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise ServiceError(
                f"{self.base_url}: HTTP {error.status_code} for model {request.model!r}: {_message(error)};"
                " check --base-url, --model and the API key"
            ) from error
        except openai.RateLimitError as error:
            if error.code == "insufficient_quota":
                raise ServiceError(f"{self.base_url}: the account's quota is used up: {_message(error)}") from error
            asked_s = retry_after_s(error.response.headers)
            wait = f"; it asks to wait for {asked_s:.0f} s" if asked_s else ""
            raise UnansweredError(
                f"{self.base_url}: HTTP 429 (too many requests) and no answer for {self.patience_s:.0f} s{wait}"
            ) from error
        except openai.APIStatusError as error:
            kind = UnansweredError if _is_passing(error) else RefusedError
            raise kind(f"{self.base_url}: HTTP {error.status_code}: {_message(error)}") from error
        except openai.APIConnectionError as error:
            raise UnansweredError(
                f"{self.base_url}: no answer after {self.max_retries} retries ({error.__cause__ or error})"
            ) from error
        except _BrokenBodyError as error:
            raise UnansweredError(
                f"{self.base_url}: the body of the answer is not a chat completion ({error})"
            ) from error
        except openai.APIError as error:
            raise UnansweredError(f"{self.base_url}: {_message(error)}") from error

    async def _ask_in_some_format(self, request: Request) -> Reply:
        form = self._format if request.schema else len(_FORMATS) - 1
        while True:
            limit_name = self._limit_name
            try:
                reply = await self._ask_patiently(request, chat_body(request, _FORMATS[form], limit_name))
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if limit_name == "max_tokens" and "max_completion_tokens" in _message(error):
                    self._limit_name = "max_completion_tokens"
                elif form + 1 < len(_FORMATS):
                    form += 1
                else:
                    raise
                continue
            if request.schema:
                self._format = max(self._format, form)
            return reply

    async def _ask_patiently(self, request: Request, body: dict[str, Any]) -> Reply:
        """Ask until an answer comes; raises the last fault when it does not pass or patience is at its end."""
        began = time.monotonic()
        faults = 0
        while True:
            try:
                return await self._ask_once(request, body)
            except _Passing as error:
                if isinstance(error, openai.APIStatusError) and not _is_passing(error):
                    raise
                if isinstance(error, openai.RateLimitError):
                    since = max(began, self.pace.answered_at)
                    if time.monotonic() + max(0.0, self.pace.pause_s()) - since > self.patience_s:
                        raise
                    continue  # Not a fault of this call: it waits with all others until the pace lets it go.
                faults += 1
                if faults > self.max_retries:
                    raise
            # Calls that failed together should not come back together.
            await asyncio.sleep(min(0.5 * 2 ** (faults - 1), 8.0) * random.uniform(0.75, 1.0))

    async def _ask_once(self, request: Request, body: dict[str, Any]) -> Reply:
        async with self.pace.slot() as began:
            if self.budget is None:
                return await self._call(request, body, began)
            async with self.budget.call(request) as bill:
                try:
                    reply = await self._call(request, body, began)
                except openai.APIStatusError:
                    bill.usd = 0.0
                    raise
                except openai.APIConnectionError as error:
                    if type(error.__cause__).__name__ in _NEVER_SENT:
                        bill.usd = 0.0
                    raise
                bill.usd = self.budget.price.of(reply)
                bill.answered = True
                return reply

    async def _call(self, request: Request, body: dict[str, Any], began: float) -> Reply:
        try:
            raw = await self._client.chat.completions.with_raw_response.create(**body)
        except openai.APIStatusError as error:
            asked_s = retry_after_s(error.response.headers)
            if error.status_code in {429, 503} and error.code != "insufficient_quota":
                self.pace.was_turned_away(began, asked_s)
            elif asked_s and _is_passing(error):
                self.pace.wait(asked_s)
            raise
        self.pace.answer_came()
        try:
            return to_reply(raw.http_response.json(), request)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            # A body cut off by a proxy, or none of ours: it may pass.
            raise _BrokenBodyError(f"{type(error).__name__}: {error}") from error


def chat_body(request: Request, form: str = "json_schema", limit_name: str = "max_tokens") -> dict[str, Any]:
    """The body of a chat completion request, as keywords of the ``openai`` client."""
    sampling = request.sampling
    body: dict[str, Any] = {"model": request.model, "messages": list(request.messages)}
    body |= {name: value for name in ("temperature", "top_p", "seed")
             if (value := getattr(sampling, name)) is not None}
    body[limit_name] = sampling.max_tokens
    if request.schema and form == "json_schema":
        described = {"name": request.schema_name, "schema": request.schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": described}
    elif request.schema:
        body["messages"] = _with_schema_in_words(request)
        if form == "json_object":
            body["response_format"] = {"type": "json_object"}
    if sampling.extra_body:
        body["extra_body"] = sampling.extra_body
    return body


def _is_passing(error: openai.APIStatusError) -> bool:
    """Whether the same request may be answered a little later."""
    if error.status_code == 429:
        return error.code != "insufficient_quota"
    return error.status_code >= 500 or error.status_code in {408, 409}


def to_reply(body: Any, request: Request) -> Reply:
    """The reply in a chat completion's body. Raises ValueError, KeyError, IndexError or TypeError if it is none."""
    choice = body["choices"][0]
    message = choice["message"]
    text, reason = message.get("content"), choice.get("finish_reason") or "stop"
    if text is None and message.get("refusal"):
        text, reason = message["refusal"], "refusal"
    usage = body.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    return Reply(
        text=text or "", model=body.get("model") or request.model, finish_reason=reason,
        prompt_tokens=usage.get("prompt_tokens") or estimate_prompt_tokens(request),
        completion_tokens=usage.get("completion_tokens") or estimate_tokens(text or ""),
        cached_tokens=details.get("cached_tokens") or 0,
        logprobs=_logprobs(choice.get("logprobs")),
    )


def _logprobs(told: Any) -> tuple[tuple[float, dict[str, float]], ...] | None:
    tokens = told.get("content") if isinstance(told, dict) else None
    if not tokens:
        return None
    return tuple(
        (float(token["logprob"]), {one["token"]: float(one["logprob"]) for one in token.get("top_logprobs") or ()})
        for token in tokens
    )


def _with_schema_in_words(request: Request) -> list[dict[str, Any]]:
    """The messages with the schema at the end of the last one: some chat templates refuse two user turns in a row."""
    *earlier, last = request.messages
    words = (
        "\n\nReply with one JSON object and nothing else. It must match this JSON schema:\n"
        + json.dumps(request.schema, ensure_ascii=False)
    )
    content = last["content"]
    extended = content + words if isinstance(content, str) else [*content, {"type": "text", "text": words}]
    return [*earlier, {**last, "content": extended}]


def _message(error: openai.APIError) -> str:
    return " ".join(str(error.message).split())[:300]
