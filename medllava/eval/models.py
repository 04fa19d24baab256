"""The model that is asked: a checkpoint folder opened here, or an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from medllava.errors import MedllavaError, MissingExtraError, ServiceError, is_out_of_memory
from medllava.eval.vqa import is_yes_no, split_option

if TYPE_CHECKING:
    from PIL import Image

    from medllava.eval.records import Question

ALTERNATIVES = 10
"""Tokens whose probabilities are asked for beside the chosen one, for questions with legal answers."""


class Asked(NamedTuple):
    """One question as a model gets it. ``picture``: what :attr:`Model.picture` made, or None; ``options``: the words
    that a legal answer can begin with -> the answer; empty for an open question."""

    picture: Any
    prompt: str
    options: Mapping[str, str]


@dataclass(frozen=True)
class Reply:
    """What a model said; ``finish_reason`` is "length" if it was cut off. The rest as in
    :class:`~medllava.eval.records.Answer`."""

    text: str
    finish_reason: str
    logprob: float | None = None
    tokens: int | None = None
    options: dict[str, float] | None = None


@dataclass(frozen=True)
class Model:
    """``ask`` answers a batch: for each question a reply, or why there is none; it may also raise DataError or
    ConfigError for the whole batch, which is then asked one by one. ``picture`` makes what ``ask`` is given of a
    picture; another thread calls it. ``made`` is what a report must know of the model."""

    name: str
    ask: Callable[[Sequence[Asked]], Sequence[Reply | MedllavaError]]
    picture: Callable[[Image.Image], Any] = lambda image: image
    made: Mapping[str, Any] = field(default_factory=dict)


def beginnings(question: Question) -> dict[str, str]:
    """The first words of the legal answers of a closed question, in small letters -> the answer: its letter, or yes or
    no. Empty where two answers begin alike, or there are none."""
    if is_yes_no(question):
        return {"yes": "yes", "no": "no"}
    lettered = [split_option(choice) for choice in question.choices]
    if not lettered or not all(lettered):
        return {}
    return {option[0].lower(): option[0] for option in lettered if option}


def option_chances(options: Mapping[str, str], likeliest: Iterable[tuple[str, float]]) -> dict[str, float] | None:
    """The probability of each legal answer by the (token, log-probability) pairs of a reply's first token."""
    found: dict[str, float] = dict.fromkeys(options.values(), 0.0)
    for token, logprob in likeliest:
        answer = options.get(token.strip(" \u2581\u0120(*\"'").lower())
        if answer is not None:
            found[answer] += math.exp(logprob)
    return {answer: round(chance, 6) for answer, chance in found.items()} if any(found.values()) else None


# ------------------------------------------------------------------------------------------------------- opened here


def open_local(name: str | Path, device: str | None, max_new_tokens: int) -> Model:
    """A checkpoint folder, or a model of the hub by its id. Raises CheckpointError."""
    from medllava.conversation import IMAGE_TAG, Turn
    from medllava.eval.provenance import folder_hash
    from medllava.model.answerer import Answerer
    from medllava.model.hub import local_folder

    folder = local_folder(name)
    answerer = Answerer.load(name, device=device)

    def replies(batch: Sequence[Asked]) -> list[Reply]:
        prepared = []
        for asked in batch:
            text = asked.prompt if asked.picture is None else f"{IMAGE_TAG}\n{asked.prompt}"
            question = answerer.prepare(
                (), [Turn(role="user", text=text)], pixels=asked.picture, max_new_tokens=max_new_tokens,
                temperature=0.0, top_logprobs=ALTERNATIVES if asked.options else 0,
            )
            prepared.append(replace(question, first_only=True))
        running = answerer.batch()
        rows = running.join(prepared)
        while running.rows:
            running.step()
        found = []
        for asked, row in zip(batch, rows, strict=True):
            done = row.completion()
            first = [(text, value) for text, _, value in row.logprobs[0].top] if row.logprobs else []
            found.append(Reply(
                done.text, done.finish_reason, round(sum(token.logprob for token in row.logprobs), 4),
                len(row.logprobs), option_chances(asked.options, first),
            ))
        return found

    def ask(batch: Sequence[Asked]) -> list[Reply]:
        try:
            return replies(batch)
        except RuntimeError as error:  # torch's OutOfMemoryError is one
            if not is_out_of_memory(error) or len(batch) == 1:
                raise
        half = len(batch) // 2
        return [*ask(batch[:half]), *ask(batch[half:])]

    manifest = answerer.manifest.model_dump(mode="json")
    made = {"model_sha256": folder_hash(folder), "manifest": manifest}
    return Model(answerer.model_id, ask, lambda image: answerer.pixels([image]), made)


# ---------------------------------------------------------------------------------------------------------- a server


def open_server(arguments: argparse.Namespace, max_new_tokens: int) -> Model:
    """An OpenAI-compatible server. Faults of key, address or model stop the run; a refused question does not."""
    try:
        import openai
    except ImportError as error:
        raise MissingExtraError("openai", "eval", error) from error
    import asyncio

    from medllava.images import to_data_uri
    from medllava.llm.base import RefusedError, Request, Sampling, UnansweredError
    from medllava.llm.openai_api import OpenAIModel, is_loopback, resolve_api_key, resolve_base_url

    url = resolve_base_url(arguments.base_url)
    key = resolve_api_key(url, arguments.api_key_file)
    server = OpenAIModel(url, key, concurrency=arguments.batch, timeout_s=600)
    loop = asyncio.Runner()
    name = arguments.model
    if name is None:
        http = openai.DefaultHttpxClient(trust_env=not is_loopback(url))
        try:
            name = openai.OpenAI(base_url=url, api_key=key, http_client=http).models.list().data[0].id
        except (openai.APIError, IndexError) as error:
            raise ServiceError(f"{url}: no list of models ({error}); check that it runs, or give --model") from error
    told = {"logprobs": True, "top_logprobs": ALTERNATIVES} if arguments.logprobs else {}
    sampling = Sampling(temperature=0.0, max_tokens=max_new_tokens, extra_body=told)

    async def ask_one(asked: Asked) -> Reply | MedllavaError:
        request = Request(model=name, messages=(_message(asked),), sampling=sampling)
        try:
            reply = await server.ask(request)
        except (RefusedError, UnansweredError) as error:
            return error
        if not reply.logprobs:
            return Reply(reply.text, reply.finish_reason)
        return Reply(
            reply.text, reply.finish_reason, round(sum(value for value, _ in reply.logprobs), 4), len(reply.logprobs),
            option_chances(asked.options, reply.logprobs[0][1].items()),
        )

    async def ask_all(batch: Sequence[Asked]) -> list[Reply | MedllavaError]:
        return await asyncio.gather(*map(ask_one, batch))

    def ask(batch: Sequence[Asked]) -> list[Reply | MedllavaError]:
        replies = loop.run(ask_all(batch))
        lost = [reply for reply in replies if isinstance(reply, UnansweredError)]
        if len(lost) == len(replies):
            raise ServiceError(f"{lost[0]}; run the same command again to go on")
        return replies

    return Model(name, ask, to_data_uri, {"model_sha256": None, "base_url": url})


def _message(asked: Asked) -> dict[str, Any]:
    """One user message in OpenAI form; the picture comes first, as in training."""
    if asked.picture is None:
        return {"role": "user", "content": asked.prompt}
    picture = {"type": "image_url", "image_url": {"url": asked.picture}}
    return {"role": "user", "content": [picture, {"type": "text", "text": asked.prompt}]}
