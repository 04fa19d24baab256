"""The part of the OpenAI chat-completions API that the worker speaks, as types.

What changes an answer is either honoured or refused with a reason, never ignored: a client that asks for tools or for
JSON should not believe that it got them. ``user``, ``store``, ``metadata``, an image's ``detail`` and their like change
no answer here: they are accepted and nothing is kept of them. A field that the API does not know is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from medllava.conversation import IMAGE_TAG, Role, Turn, as_text

if TYPE_CHECKING:
    from medllava.model.decoding import TokenLogprob
    from medllava.model.looking import Looking
    from medllava.model.manifest import Manifest

MOST_ANSWERS = 16
"""Largest ``n`` of a request."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "low", "high", "original"] = "auto"


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(_Strict):
    """One message; a plain text is read as one text part. The fields after ``name`` are what clients send back when
    they append an answer to the messages; they must be empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts)]
    name: str | None = None
    refusal: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @model_validator(mode="after")
    def _pictures_come_from_the_user(self) -> Message:
        if self.role != "user" and self.image_uris():
            raise ValueError(f"pictures belong in user messages, not in a {self.role} message")
        return self

    def _texts(self) -> list[str]:
        return [as_text(part.text) for part in self.content if isinstance(part, TextPart)]

    def image_uris(self) -> list[str]:
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]

    def turn(self) -> Turn:
        """The message as the model's turn. One picture stands before the text, as in the training data, wherever the
        client put it; several keep their places among the texts."""
        role: Role = "system" if self.role == "developer" else self.role
        if len(self.image_uris()) == 1:
            return Turn(role=role, text="\n".join([IMAGE_TAG, *self._texts()]))
        parts = (as_text(part.text) if isinstance(part, TextPart) else IMAGE_TAG for part in self.content)
        return Turn(role=role, text="\n".join(parts))


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class Conversation(_Strict):
    """What a model is asked: its name, and the messages up to the question."""

    model: str
    messages: list[Message] = Field(min_length=1)

    @model_validator(mode="after")
    def _ends_in_a_question(self) -> Self:
        if self.messages[-1].role != "user":
            raise ValueError("messages: the last message must be the user's")
        return self

    def answers(self) -> int:
        """How many are asked for."""
        return 1

    def streamed(self) -> bool:
        return False

    def image_uris(self) -> list[str]:
        return [uri for message in self.messages for uri in message.image_uris()]

    def turns(self) -> list[Turn]:
        return [message.turn() for message in self.messages]


class LookingRequest(Conversation):
    """``POST /v1/medllava/looking``: what an answer to the conversation depends on, in one of its pictures.

    answer: of the model, as it gave it. picture: which one is covered, counted from 0, or from the last with negative
    numbers. cells: of the grid, on each side. fill: what covers: the picture's mean colour, or the picture blurred.
    attention: also tell the attention, which is weak evidence.
    """

    answer: str = Field(min_length=1)
    picture: int = Field(default=-1, ge=-100, lt=100)
    cells: int = Field(default=7, ge=2, le=16)
    fill: Literal["mean", "blur"] = "mean"
    attention: bool = True


class ChatRequest(Conversation):
    """``POST /v1/chat/completions``."""

    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=1, ge=1, le=MOST_ANSWERS)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    # They change no answer here.
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    # Accepted only with the value that changes nothing; see _refuse_what_is_not_served.
    modalities: list[str] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: None = None
    moderation: None = None
    function_call: Any = None
    logit_bias: dict[str, float] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None

    @model_validator(mode="after")
    def _refuse_what_is_not_served(self) -> ChatRequest:
        if self.response_format not in (None, {"type": "text"}):
            raise ValueError("response_format: only {'type': 'text'} is served")
        if self.modalities not in (None, ["text"]):
            raise ValueError("modalities: only ['text'] is served")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs=true")
        for name in (
            "logit_bias", "frequency_penalty", "presence_penalty", "tools", "functions", "reasoning_effort", "verbosity"
        ):
            if getattr(self, name) and getattr(self, name) != "none":
                raise ValueError(f"{name}: not served by this model; leave it out")
        for name in ("tool_choice", "function_call"):
            if getattr(self, name) not in (None, "none", "auto"):
                raise ValueError(f"{name}: not served by this model; leave it out")
        if any(not text for text in self.stops()) or len(self.stops()) > 4:
            raise ValueError("stop: one to four texts, none of them empty")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options: only with stream=true")
        return self

    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def streamed(self) -> bool:
        return bool(self.stream)

    def answers(self) -> int:
        return self.n or 1

    def alternatives(self) -> int | None:
        """How many alternatives to each token are wanted; None if not even its own log-probability is."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def max_new_tokens(self, default: int) -> int:
        return self.max_completion_tokens or self.max_tokens or default


class Usage(_Strict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


def choice(index: int, text: str, finish_reason: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    """One of the answers of a :func:`completion`."""
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": index, "message": message, "finish_reason": finish_reason, "logprobs": logprobs}


def completion(
    request_id: str, created: int, model: str, choices: Sequence[dict[str, Any]], usage: Usage
) -> dict[str, Any]:
    """Whole answers."""
    return {
        "id": request_id, "object": "chat.completion", "created": created, "model": model, "choices": list(choices),
        "usage": usage.model_dump(),
    }


def chunk(
    request_id: str, created: int, model: str, *, index: int = 0, delta: dict[str, str] | None = None,
    finish_reason: str | None = None, logprobs: dict[str, Any] | None = None, usage: Usage | None = None,
    position: int | None = None,
) -> dict[str, Any]:
    """One server-sent event of a streamed answer; a chunk with ``usage`` has no choices and comes last. ``position``:
    the request's place in line, 0 when it has left the line, in a field of its own that other clients pass over."""
    piece = {"index": index, "delta": delta or {}, "finish_reason": finish_reason, "logprobs": logprobs}
    return {
        "id": request_id, "object": "chat.completion.chunk", "created": created, "model": model,
        "choices": [] if usage else [piece], "usage": usage.model_dump() if usage else None,
    } | ({"medllava": {"position": position}} if position is not None else {})


def logprobs_of(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The log-probabilities of tokens as the API writes them."""
    return {
        "content": [
            {
                "token": token.text, "logprob": token.logprob, "bytes": list(token.data),
                "top_logprobs": [
                    {"token": text, "logprob": value, "bytes": list(data)} for text, data, value in token.top
                ],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def looked(model: str, looking: Looking) -> dict[str, Any]:
    """What :class:`LookingRequest` gets. ``drops`` and ``attention`` are rows from the top of the picture, each from
    left to right; numbers are in nats."""
    return {
        "object": "medllava.looking", "model": model, "answer": looking.answer, "tokens": looking.tokens,
        "log_likelihood": looking.log_likelihood, "blank": looking.blank, "fill": looking.fill,
        "drops": looking.drops, "peak": list(looking.peak().as_tuple()), "attention": looking.attention,
        "note": "drops: where covering the picture makes this answer less likely; attention is weak evidence",
    }


def model_list(models: Mapping[str, Manifest], created: int) -> dict[str, Any]:
    """``GET /v1/models``: what this worker serves, by name. ``medllava`` is our own addition: what a client should know
    of a checkpoint to ask it well."""
    return {"object": "list", "data": [model_entry(name, manifest, created) for name, manifest in models.items()]}


def model_entry(name: str, manifest: Manifest, created: int) -> dict[str, Any]:
    """``GET /v1/models/NAME``, and each entry of :func:`model_list`."""
    return {"id": name, "object": "model", "created": created, "owned_by": "medllava", "medllava": facts(manifest)}


def facts(manifest: Manifest) -> dict[str, Any]:
    """mpp: micrometres per pixel of the training pictures or None. regions: how it takes regions, see
    :mod:`medllava.regions`. image_size: side in pixels of what its encoder sees. single_exchange: it answers each
    question by itself, with that question's picture."""
    return {
        "mpp": manifest.training_mpp, "regions": list(manifest.regions), "image_size": manifest.image_size,
        "single_exchange": manifest.single_exchange,
    }
