"""Asks a loaded model: streamed, single and batched answers. The terminal, the worker and the evaluation use this file.

    answerer = Answerer.load("demo-out/stage2")
    for piece in answerer.stream([image], [Turn(role="user", text="Where is the gland?")]):
        ...
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from medllava.conversation import Turn
from medllava.errors import PromptTooLong

if TYPE_CHECKING:
    import torch

    from medllava.model.checkpoint import Loaded

Question = tuple[Sequence[Image.Image], Sequence[Turn]]
"""The pictures and the turns so far, ending in a user turn."""


@dataclass(frozen=True)
class Completion:
    """An answer. ``finish_reason`` is "length" if ``max_new_tokens`` or the model's context cut it off, else "stop"."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


class Answerer:
    """A checkpoint ready to answer. Not safe for two threads at once: the caller queues.

    ``manifest``: the checkpoint's description. ``model_id``: its folder's name, for display and the HTTP API.
    ``num_image_tokens``: tokens that one picture takes in the prompt.
    """

    def __init__(self, loaded: Loaded, model_id: str) -> None:
        from medllava.model.pixels import tokens_per_image
        from medllava.model.prompt import PromptBuilder

        self.manifest = loaded.manifest
        self.model_id = model_id
        self.num_image_tokens = tokens_per_image(loaded.processor)
        self._model = loaded.model
        self._tokenizer = loaded.tokenizer
        self._image_processor = loaded.image_processor
        self._prompts = PromptBuilder(
            loaded.tokenizer, loaded.manifest.chat_format, tokens_per_image=self.num_image_tokens,
            image_token=loaded.processor.image_token, template=loaded.processor.chat_template,
        )
        self._ends = _end_ids(loaded.model.generation_config, loaded.tokenizer)
        end = self._prompts.end_token_id  # some bases end a turn with another token than a text
        if end is not None and end not in self._ends:
            self._ends.append(end)
        self._context = int(getattr(loaded.model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)

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
        """Open a checkpoint folder; see :func:`medllava.model.checkpoint.load` for the arguments and errors."""
        from medllava.model import checkpoint

        loaded = checkpoint.load(path, device=device, dtype=dtype, load_4bit=load_4bit, load_8bit=load_8bit)
        return cls(loaded, Path(path).resolve().name)

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
    ) -> Generator[str, None, Completion]:
        """Yield the answer piece by piece as it is generated; closing the generator ends the generation. Its return
        value (``StopIteration.value``) is the whole answer as a Completion.

        temperature 0 is greedy. ``stop``: texts that end the answer and are not part of it. ``seed``: makes sampling
        repeatable. The arguments are checked at the first piece. Raises DataError if the turns do not fit the
        pictures, PromptTooLong if the prompt leaves no room in the model's context.
        """
        reply = _Reply(self._tokenizer, stop)
        steps = self._generate([(images, turns)], [reply], max_new_tokens, temperature, top_p, seed)
        shown = 0
        for _ in steps:
            ready = reply.ready()
            if len(ready) > shown:
                yield ready[shown:]
                shown = len(ready)
        if len(reply.text()) > shown:
            yield reply.text()[shown:]
        return reply.completion()

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
        """The whole answer; see :meth:`stream`."""
        return self.answer_batch(
            [(images, turns)], max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=stop, seed=seed
        )[0]

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
        """Answers in the order of the questions, computed together (padded on the left): the same as one by one."""
        if not questions:
            return []
        replies = [_Reply(self._tokenizer, stop) for _ in questions]
        for _ in self._generate(questions, replies, max_new_tokens, temperature, top_p, seed):
            pass
        return [reply.completion() for reply in replies]

    def _generate(
        self, questions: Sequence[Question], replies: Sequence[_Reply], max_new_tokens: int, temperature: float,
        top_p: float, seed: int | None,
    ) -> Iterator[None]:
        """Fill the replies, one token each per step."""
        import torch

        from medllava.model.pixels import pixel_values
        from medllava.model.prompt import with_image_tag, without_history

        if self.manifest.single_exchange:
            questions = [(images, without_history(turns)) for images, turns in questions]
        prompts = [self._prompts.question(with_image_tag(turns, len(images))) for images, turns in questions]
        longest = max(len(prompt) for prompt in prompts)
        room = min(max_new_tokens, self._context - longest)
        if room <= 0 < max_new_tokens:
            raise PromptTooLong(
                f"the question takes {longest} tokens, pictures included; the model's context holds {self._context}:"
                " shorten it or start a new conversation"
            )
        for reply, prompt in zip(replies, prompts, strict=True):
            reply.prompt_tokens = len(prompt)
        pictures = [image for images, _ in questions for image in images]
        device = self._model.device
        inputs: dict[str, Any] = {}
        if pictures:
            # On the way to the encoder only: the text that follows needs no pixels.
            inputs["pixel_values"] = pixel_values(self._image_processor, pictures).to(device, self._model.dtype)
        pad = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else self._ends[0]
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        generator = torch.Generator(device="cpu")
        generator.manual_seed(seed) if seed is not None else generator.seed()
        cache = None
        for _ in range(room):
            with torch.inference_mode():
                output = self._model(
                    input_ids=ids, attention_mask=mask if len(prompts) > 1 else None, position_ids=positions,
                    past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs,
                )
                chosen = _choose(output.logits[:, -1].float().cpu(), temperature, top_p, generator)
            cache, inputs = output.past_key_values, {}
            for reply, token in zip(replies, chosen.tolist(), strict=True):
                if not reply.finished:
                    reply.add(token, is_end=token in self._ends)
            yield
            if all(reply.finished for reply in replies):
                return
            ids = chosen[:, None].to(device)
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
            positions = positions[:, -1:] + 1


class _Reply:
    """Tokens so far, and the text they make."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._decoded = ""
        self.ids: list[int] = []
        self.prompt_tokens = 0
        self.finished = False

    def add(self, token: int, *, is_end: bool) -> None:
        self.ids.append(token)
        self.finished = is_end
        if not is_end:
            # As a whole each time: a token may be part of a character, and its space may depend on what follows.
            self._decoded = self._tokenizer.decode(self.ids, skip_special_tokens=True).lstrip()
        found = [at for text in self._stop if (at := self._decoded.find(text)) >= 0]
        if found:
            self._decoded = self._decoded[: min(found)]
            self.finished = True

    def text(self) -> str:
        return self._decoded.rstrip()

    def completion(self) -> Completion:
        return Completion(self.text(), "stop" if self.finished else "length", self.prompt_tokens, len(self.ids))

    def ready(self) -> str:
        """The part of the text that no later token can change: without trailing space, a half character at the end, or
        what may be the beginning of a stop text."""
        if self.finished:
            return self.text()
        text = self._decoded.rstrip("\ufffd")
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:length]):
                    text = text[:-length]
                    break
        return text.rstrip()


def _choose(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> torch.Tensor:
    """Next token of each row: the likeliest, or drawn from the smallest set that holds ``top_p`` of the probability."""
    import torch

    if temperature <= 0:
        return logits.argmax(-1)
    probabilities, order = torch.softmax(logits / temperature, -1).sort(descending=True)
    beyond = probabilities.cumsum(-1) - probabilities >= top_p
    beyond[:, 0] = False
    drawn = torch.multinomial(probabilities.masked_fill(beyond, 0.0), 1, generator=generator)
    return order.gather(1, drawn)[:, 0]


def _end_ids(generation_config: Any, tokenizer: Any) -> list[int]:
    ids = generation_config.eos_token_id
    ends = list(ids) if isinstance(ids, list | tuple) else [] if ids is None else [ids]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    return ends
