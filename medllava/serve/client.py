"""Asks a worker over HTTP. The web chat uses this file; it needs no torch.

Every way in which a question can fail becomes a ServiceError whose text says what happened and what to do next.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import httpx
import openai

from medllava.conversation import Turn
from medllava.errors import ServiceError
from medllava.geometry import Box
from medllava.regions import WAYS

CONNECT_S = 5.0
STATE_S = 2.5
"""How long a worker may take to say how it is."""
LOST = {502, 503, 504}
"""Answers of a worker that is loading or ending, and of a proxy that has lost it."""
READ_S = 600.0
"""Longest silence of a worker. A question may wait in its line before the first byte comes."""


@dataclass(frozen=True)
class Model:
    """A model of a worker.

    regions: how it takes regions, see :mod:`medllava.regions`. mpp: micrometres per pixel of its training pictures,
    None if unknown. image_size: side in pixels of what its encoder sees, None if unknown. single_exchange: it answers
    each question by itself, with that question's picture. Servers of others (vLLM, SGLang) do not say, and are asked
    with coordinates.
    """

    name: str
    regions: tuple[str, ...] = ("text",)
    mpp: float | None = None
    image_size: int | None = None
    single_exchange: bool = False


@dataclass(frozen=True)
class WorkerState:
    """What a worker says about itself. ``detail`` is for people; ``models`` is all that it serves, ``model`` first."""

    url: str
    status: Literal["ready", "loading", "unreachable"]
    model: str | None
    detail: str
    models: tuple[Model, ...] = ()


@dataclass(frozen=True)
class InLine:
    """News of a question that waits for its answer: ``position`` 1 is next, 0 is no longer in line."""

    position: int


class WorkerLost(ServiceError):
    """The worker is not there, or not yet, or left in the middle of an answer: another one might answer."""


@dataclass(frozen=True)
class Looked:
    """What an answer depended on, as :class:`medllava.model.looking.Looking` has it. ``peak``: the hottest cell."""

    answer: str
    tokens: int
    log_likelihood: float
    blank: float
    drops: list[list[float]]
    peak: Box
    attention: list[list[float]] | None


class Worker:
    """One worker: where it is and the key it asks for."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.AsyncClient(timeout=STATE_S)
        self._models: tuple[Model, ...] = ()
        # max_retries=0: a person sees why at once and asks again; the client would try silently.
        self._client = openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=api_key or "none", max_retries=0,
            timeout=openai.Timeout(READ_S, connect=CONNECT_S),
        )

    async def state(self) -> WorkerState:
        """Ask how the worker is; never raises for a worker that is down."""
        try:
            health = await self._health()
            status, model = health["status"], health["model"]
        except (httpx.HTTPError, ValueError, LookupError, TypeError):
            self._models = ()  # whatever starts there next may be another model of the same name
            return WorkerState(self.url, "unreachable", None, f"no worker answers at {self.url}")
        if status != "ready":
            return WorkerState(self.url, "loading", None, f"loading the model, {health.get('seconds', 0):.0f} s so far")
        waiting = health.get("waiting", 0)
        line = f"answering, {waiting} waiting" if waiting else "answering" if health.get("busy") else "ready"
        names = [str(name) for name in health.get("models") or [model]]
        if [known.name for known in self._models] != names:
            self._models = await self._known(names)
        return WorkerState(self.url, "ready", str(model), line, self._models)

    async def _health(self) -> dict[str, Any]:
        """What ``/health`` says; of vLLM and SGLang, which only say there that they are well, the first model."""
        reply = await self._http.get(f"{self.url}/health")
        if reply.status_code == 200 and not reply.content.startswith(b"{"):
            names = [entry["id"] for entry in await self._listed()]
            return {"status": "ready", "model": names[0], "models": names}
        health: dict[str, Any] = reply.json()
        return health

    async def _known(self, names: Sequence[str]) -> tuple[Model, ...]:
        """The models called ``names``, with what ``/v1/models`` says of them."""
        told: dict[str, Any] = {}
        with contextlib.suppress(httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError):
            told = {entry["id"]: entry.get("medllava") or {} for entry in await self._listed()}
        models = []
        for name in names:
            facts = told.get(name, {})
            ways = tuple(way for way in facts.get("regions", ()) if way in WAYS)
            alone = bool(facts.get("single_exchange"))
            models.append(Model(name, ways or ("text",), facts.get("mpp"), facts.get("image_size"), alone))
        return tuple(models)

    async def _listed(self) -> list[dict[str, Any]]:
        key = {"Authorization": f"Bearer {self._client.api_key}"}
        entries: list[dict[str, Any]] = (await self._http.get(f"{self.url}/v1/models", headers=key)).json()["data"]
        return entries

    async def ask(
        self, turns: Sequence[Turn], pictures: Mapping[int, str] = MappingProxyType({}), *, model: str | None = None,
        max_new_tokens: int = 256,
    ) -> AsyncIterator[str | InLine]:
        """Stream the answer of ``model`` (by default the worker's first) to ``turns``; ``pictures`` are data URIs by
        the number of the user turn they come with. A worker that is busy tells the place in line before the first text.
        Closing the iterator ends the request, on which the worker stops. Raises ServiceError; WorkerLost where another
        worker might answer."""
        try:
            model = model or await self._model()
            stream = await self._client.chat.completions.create(
                model=model, messages=_messages(turns, pictures), stream=True, temperature=0.0,
                max_tokens=max_new_tokens,
            )
            async with stream:
                async for chunk in stream:
                    told = (chunk.model_extra or {}).get("medllava")
                    if isinstance(told, dict) and isinstance(told.get("position"), int):
                        yield InLine(told["position"])
                    if chunk.choices and chunk.choices[0].delta.content:
                        yield chunk.choices[0].delta.content
        except openai.OpenAIError as error:
            raise self._fault(error) from error
        except httpx.HTTPError as error:
            raise WorkerLost(f"{self.url}: the answer broke off; the worker may have stopped. Ask again.") from error

    async def looking(
        self, turns: Sequence[Turn], pictures: Mapping[int, str], answer: str, *, model: str | None = None,
        picture: int = -1, cells: int = 7,
    ) -> Looked:
        """What ``answer`` to ``turns`` depends on, in the last of the pictures or in the one that is named; see
        :meth:`ask`. Raises ServiceError; servers of others cannot tell."""
        try:
            model = model or await self._model()
            body = {
                "model": model, "messages": _messages(turns, pictures), "answer": answer, "picture": picture,
                "cells": cells,
            }
            told: Any = await self._client.post("/medllava/looking", body=body, cast_to=object)
            return Looked(
                told["answer"], told["tokens"], told["log_likelihood"], told["blank"], told["drops"],
                Box.model_validate(told["peak"]), told["attention"],
            )
        except openai.NotFoundError as error:
            if isinstance(error.body, dict) and error.body.get("code") == "model_not_found":
                raise self._fault(error) from error
            why = f"{self.url}: this server cannot tell where its model looked; a medllava worker can"
            raise ServiceError(why) from error
        except openai.OpenAIError as error:
            raise self._fault(error) from error
        except (LookupError, TypeError, ValueError) as error:
            raise ServiceError(f"{self.url}: the worker's reply is not understood; is it of this version?") from error

    async def _model(self) -> str:
        async for model in self._client.models.list():
            return model.id
        raise ServiceError(f"{self.url}: serves no model; is this a medllava worker?")

    def _fault(self, error: openai.OpenAIError) -> ServiceError:
        if isinstance(error, openai.APITimeoutError):
            return WorkerLost(f"{self.url}: the worker sent nothing for {READ_S:.0f} s. Ask again or restart it.")
        if isinstance(error, openai.APIConnectionError):
            return WorkerLost(
                f"No worker can be reached at {self.url}. Is it running? Start it with:"
                " python -m medllava.serve.worker --model-path FOLDER --port PORT"
            )
        if isinstance(error, openai.AuthenticationError):
            return ServiceError(f"{self.url}: the worker asks for an API key; start the web chat with --api-key-file.")
        if isinstance(error, openai.APIError):
            # The worker's own sentence: still loading, prompt too long, bad picture, out of memory, ...
            body = error.body if isinstance(error.body, dict) else {}
            said = str(body.get("message") or error.message)
            return WorkerLost(said) if getattr(error, "status_code", None) in LOST else ServiceError(said)
        return ServiceError(f"{self.url}: {error}")


def _messages(turns: Sequence[Turn], pictures: Mapping[int, str]) -> Any:
    """The turns as API messages, each picture in its turn."""
    messages: list[dict[str, Any]] = [{"role": turn.role, "content": turn.text} for turn in turns]
    for number, uri in pictures.items():
        messages[number]["content"] = [
            {"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": turns[number].text}
        ]
    return messages
