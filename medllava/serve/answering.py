"""The workers behind a web chat: which there are, which one is asked, and what happens when one is lost. No Gradio."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from medllava.errors import ServiceError
from medllava.geometry import format_box
from medllava.images import draw_heat, load_image, to_data_uri
from medllava.serve.client import InLine, Looked, Model, Worker, WorkerLost, WorkerState
from medllava.serve.session import Exchange, Looking, Session

HEAT_SIDE = 640
"""Longest side in pixels of the pictures that show where a model looked."""


@dataclass(frozen=True)
class Choice:
    """A model of a worker; the name is empty while it is not known."""

    url: str
    model: str = ""

    def __str__(self) -> str:
        return f"{self.url} {self.model}"

    @classmethod
    def parse(cls, text: str) -> Choice:
        url, _, model = text.partition(" ")
        return cls(url, model)


class Workers:
    """All workers of the page, in the operator's order, and what was last heard of each."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._by_url = {worker.url: worker for worker in workers}
        self._states: dict[str, WorkerState] = {}

    def first(self) -> Choice:
        return Choice(next(iter(self._by_url)))

    async def refresh(self) -> list[WorkerState]:
        """Ask all how they are, at once."""
        states = list(await asyncio.gather(*(worker.state() for worker in self._by_url.values())))
        self._states = {state.url: state for state in states}
        return states

    def choices(self) -> list[tuple[Choice, str]]:
        """The models to choose from, each with a line for people; workers that cannot be reached are left out, unless
        there are no others."""
        states = list(self._states.values())
        alive = [state for state in states if state.status != "unreachable"] or states
        found: list[tuple[Choice, str]] = []
        for state in alive:
            found += [(Choice(state.url, model.name), f"{model.name} ({state.url})") for model in state.models]
            if not state.models:
                found.append((Choice(state.url), f"{state.detail} ({state.url})"))
        return found

    def kept(self, chosen: Choice) -> Choice:
        """``chosen`` while it is there; else one that is ready, if possible with the same model."""
        there = [choice for choice, _ in self.choices()]
        if chosen in there or not there:
            return chosen
        # First the same worker, which has become ready or has other models now; a loading one stays chosen.
        return next((choice for choice in there if choice.url == chosen.url), None) or (
            self._other(chosen, set()) or there[0]
        )

    def state(self, chosen: Choice) -> WorkerState | None:
        return self._states.get(chosen.url)

    def model(self, chosen: Choice) -> Model | None:
        """What is known of the chosen model."""
        state = self.state(chosen)
        models = state.models if state else ()
        return next((model for model in models if model.name == chosen.model), models[0] if models else None)

    def _other(self, lost: Choice, tried: set[str]) -> Choice | None:
        """Another ready worker, with the same model if there is one."""
        ready = [choice for choice, _ in self.choices() if choice.model and choice.url not in tried | {lost.url}]
        return next((choice for choice in ready if choice.model == lost.model), ready[0] if ready else None)

    async def reply(self, session: Session, exchange: Exchange, chosen: Choice) -> AsyncIterator[None]:
        """Answer the exchange, which must be the session's; yields after each change of it. A worker that is lost
        before it said anything is replaced by another that is ready; what a lost one has said is kept. All faults end
        in the exchange's ``state`` and ``note``; nothing is raised. Closing the iterator ends the request."""
        tried: set[str] = set()
        if chosen.url not in self._by_url:
            exchange.state, exchange.note = "failed", f"{chosen.url}: no worker of this page; choose another model."
            return
        while exchange.waits():
            if self.model(chosen) is None:
                await self.refresh()
            model = self.model(chosen)
            chosen = Choice(chosen.url, model.name if model else "")
            exchange.worker, exchange.model = chosen.url, chosen.model
            try:
                # In a thread: where a region is drawn on a large picture, the other pages would stand still.
                await asyncio.to_thread(exchange.address, model.regions if model else ("text",))
                if not exchange.waits():
                    return
                turns, pictures = session.prompt(exchange)
                pieces = self._by_url[chosen.url].ask(turns, pictures, model=chosen.model or None)
                async with contextlib.aclosing(pieces):  # type: ignore[type-var]
                    async for piece in pieces:
                        if not exchange.waits():
                            return  # stopped meanwhile: a late piece must not write over it
                        if isinstance(piece, InLine):
                            exchange.position = piece.position
                        else:
                            exchange.answer += piece
                            exchange.position = 0
                        yield
                if not exchange.model:  # its worker got ready after it was asked how it is
                    await self.refresh()
                    model = self.model(chosen)
                    exchange.model = model.name if model else ""
                exchange.state = "done"
            except WorkerLost as error:
                exchange.position = 0
                tried.add(chosen.url)
                await self.refresh()
                other = self._other(chosen, tried)
                if exchange.answer:
                    exchange.state = "failed"
                    exchange.note = f"The worker at {chosen.url} was lost in the middle of this answer. " + (
                        f"Retry asks {other.model} at {other.url}."
                        if other else "Press Retry when the line on top shows a worker again."
                    )
                elif other is None:
                    exchange.state, exchange.note = "failed", str(error)
                else:
                    exchange.note = f"{chosen.url} was lost; asked {other.url} instead" + (
                        "." if other.model == chosen.model else f", which runs another model: {other.model}."
                    )
                    chosen = other
                    yield
            except ServiceError as error:
                exchange.state, exchange.note = "failed", str(error)

    async def looking(self, session: Session, exchange: Exchange) -> Looking:
        """What an answer of the session depends on in its picture, asked of the worker that gave it: see
        :mod:`medllava.model.looking`. Raises ServiceError."""
        if exchange.worker not in self._by_url or exchange.uri is None or not exchange.answer:
            raise ServiceError("there is no answer about a picture whose worker could be asked.")
        turns, pictures = session.prompt(exchange)
        looked = await self._by_url[exchange.worker].looking(
            turns, pictures, exchange.answer, model=exchange.model or None
        )
        return await asyncio.to_thread(_shown, looked, exchange.uri)


def _shown(looked: Looked, uri: str) -> Looking:
    image = load_image(uri)
    image.thumbnail((HEAT_SIDE, HEAT_SIDE))
    most = max(value for row in looked.drops for value in row)
    total = looked.log_likelihood - looked.blank
    text = (
        f"Covered, {format_box(looked.peak)} makes this answer {most:.2f} nats less likely; the whole image"
        f" {total:.2f}. Brighter matters more to the answer; that does not make the answer right."
        if most > 0 else f"No part of the image makes this answer likelier (the whole image: {total:+.2f} nats)."
    )
    pictures = [("What the answer depends on", to_data_uri(draw_heat(image, looked.drops), "JPEG"))]
    if looked.attention:
        heat = to_data_uri(draw_heat(image, looked.attention, unit="of the attention"), "JPEG")
        pictures.append(("Attention: weak evidence, what was read and not what mattered", heat))
    return Looking(text, tuple(pictures))
