"""The part of the OpenAI chat-completions API that the worker speaks, as types.

What changes an answer is either honoured or refused with a reason, never ignored: a client that asks for tools, for
log-probabilities or for two answers should not believe that it got them. ``user``, ``store``, ``metadata`` and an
image's ``detail`` change no answer here: they are accepted and nothing is kept of them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from medllava.conversation import IMAGE_TAG, Role, Turn


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"

    @field_validator("url")
    @classmethod
    def _only_data(cls, url: str) -> str:
        if not url.startswith("data:"):
            raise ValueError(
                "only data URIs (data:image/png;base64,...) are accepted: this server fetches nothing from a network"
                " and opens no file for a client"
            )
        return url


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
        if any(IMAGE_TAG in text for text in self._texts()):
            raise ValueError(f"{IMAGE_TAG} is reserved; send pictures as image_url parts")
        return self

    def _texts(self) -> list[str]:
        return [part.text for part in self.content if isinstance(part, TextPart)]

    def image_uris(self) -> list[str]:
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]

    def turn(self) -> Turn:
        """The message as the model's turn. One picture stands before the text, as in the training data, wherever the
        client put it; several keep their places among the texts."""
        role: Role = "system" if self.role == "developer" else self.role
        if len(self.image_uris()) == 1:
            return Turn(role=role, text="\n".join([IMAGE_TAG, *self._texts()]))
        parts = (part.text if isinstance(part, TextPart) else IMAGE_TAG for part in self.content)
        return Turn(role=role, text="\n".join(parts))


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(_Strict):
    """``POST /v1/chat/completions``."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = 1
    seed: int | None = None
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    # Accepted only with the value that changes nothing; see _refuse_what_is_not_served.
    logprobs: bool | None = None
    top_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None

    @model_validator(mode="after")
    def _refuse_what_is_not_served(self) -> ChatRequest:
        if self.n not in (None, 1):
            raise ValueError(f"n: one answer per request, got n={self.n}; send the request again for another")
        if self.response_format not in (None, {"type": "text"}):
            raise ValueError("response_format: only {'type': 'text'} is served")
        for name in (
            "logprobs", "top_logprobs", "logit_bias", "frequency_penalty", "presence_penalty", "tools", "functions"
        ):
            if getattr(self, name):
                raise ValueError(f"{name}: not served by this model; leave it out")
        if self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice: not served by this model; leave it out")
        if any(not text for text in self.stops()) or len(self.stops()) > 4:
            raise ValueError("stop: one to four texts, none of them empty")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options: only with stream=true")
        if self.messages[-1].role != "user":
            raise ValueError("messages: the last message must be the user's")
        return self

    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def max_new_tokens(self, default: int) -> int:
        return self.max_completion_tokens or self.max_tokens or default

    def image_uris(self) -> list[str]:
        return [uri for message in self.messages for uri in message.image_uris()]

    def turns(self) -> list[Turn]:
        return [message.turn() for message in self.messages]


class Usage(_Strict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


def completion(
    request_id: str, created: int, model: str, text: str, finish_reason: str, usage: Usage
) -> dict[str, Any]:
    """A whole answer."""
    choice = {
        "index": 0, "message": {"role": "assistant", "content": text, "refusal": None}, "finish_reason": finish_reason,
        "logprobs": None,
    }
    return {
        "id": request_id, "object": "chat.completion", "created": created, "model": model, "choices": [choice],
        "usage": usage.model_dump(),
    }


def chunk(
    request_id: str, created: int, model: str, *, delta: dict[str, str] | None = None, finish_reason: str | None = None,
    usage: Usage | None = None,
) -> dict[str, Any]:
    """One server-sent event of a streamed answer; a chunk with ``usage`` has no choices and comes last."""
    choices = [] if usage else [{"index": 0, "delta": delta or {}, "finish_reason": finish_reason, "logprobs": None}]
    return {
        "id": request_id, "object": "chat.completion.chunk", "created": created, "model": model, "choices": choices,
        "usage": usage.model_dump() if usage else None,
    }


def model_list(model: str, created: int) -> dict[str, Any]:
    """``GET /v1/models``: the one model that this worker serves."""
    return {
        "object": "list", "data": [{"id": model, "object": "model", "created": created, "owned_by": "medllava"}]
    }
