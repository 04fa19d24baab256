"""Asks a loaded model: streamed, single and batched answers. The terminal, the worker and the evaluation use this file.

    answerer = Answerer.load("demo-out/stage2")
    for piece in answerer.stream([image], [Turn(role="user", text="Where is the gland?")]):
        ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from medllava.conversation import Turn

if TYPE_CHECKING:
    from medllava.model.manifest import Manifest

Question = tuple[Sequence[Image.Image], Sequence[Turn]]
"""The pictures and the turns so far, ending in a user turn."""


@dataclass(frozen=True)
class Completion:
    """An answer. ``finish_reason`` is "length" if ``max_new_tokens`` cut it off, else "stop"."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


class Answerer:
    """A checkpoint ready to answer. Not safe for two threads at once: the caller queues."""

    manifest: Manifest
    model_id: str
    num_image_tokens: int

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | None = None,
        dtype: str | None = None,
        load_4bit: bool = False,
        load_8bit: bool = False,
    ) -> Answerer:
        raise NotImplementedError

    def stream(
        self,
        images: Sequence[Image.Image],
        turns: Sequence[Turn],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> Iterator[str]:
        raise NotImplementedError

    def answer(
        self,
        images: Sequence[Image.Image],
        turns: Sequence[Turn],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> Completion:
        raise NotImplementedError

    def answer_batch(
        self,
        questions: Sequence[Question],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> list[Completion]:
        raise NotImplementedError
