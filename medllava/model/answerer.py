"""Asks a loaded model: streamed, single and batched answers. The terminal, the worker and the evaluation use this file.

    answerer = Answerer.load("demo-out/stage2")
    for piece in answerer.stream([image], [Turn(role="user", text="Where is the gland?")]):
        ...
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from PIL import Image

from medllava.conversation import IMAGE_TAG, Turn, as_text
from medllava.errors import PromptTooLong
from medllava.images import load_image
from medllava.regions import Region, as_region, asked

if TYPE_CHECKING:
    import torch

    from medllava.model.checkpoint import Loaded
    from medllava.model.decoding import Batch, Completion, Prepared
    from medllava.model.looking import Looker, Looking

Question = tuple[Sequence[Image.Image], Sequence[Turn]]
"""The pictures and the turns so far, ending in a user turn."""


class Decoding(TypedDict, total=False):
    """How answers are generated; what is left out is as :meth:`Answerer.prepare` has it.

    temperature: 0 is greedy. stop: texts that end the answer and are not part of it. seed: makes sampling repeatable.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    stop: Sequence[str]
    seed: int | None


class Answerer:
    """A checkpoint ready to answer. Not safe for two threads at once, :meth:`prepare` aside: the caller queues.

    ``manifest``: the checkpoint's description. ``model_id``: its folder's name, for display and the HTTP API.
    ``num_image_tokens``: tokens that one picture takes in the prompt. ``activate`` is called before each pass of a
    model that is shared with others.
    """

    def __init__(self, loaded: Loaded, model_id: str, activate: Callable[[], None] = lambda: None) -> None:
        from medllava.model.pixels import tokens_per_image
        from medllava.model.prompt import PromptBuilder

        self.manifest = loaded.manifest
        self.model_id = model_id
        self.num_image_tokens = tokens_per_image(loaded.processor)
        self._model = loaded.model
        self._activate = activate
        self._tokenizer = loaded.tokenizer
        self._image_processor = loaded.image_processor
        # A tokenizer of its own: a thread prepares the next question while another reads out the answers.
        self._preparing = threading.Lock()
        self._prompts = PromptBuilder(
            copy.deepcopy(loaded.tokenizer), loaded.manifest.chat_format, tokens_per_image=self.num_image_tokens,
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
        base: str | Path | None = None,
    ) -> Answerer:
        """Open a checkpoint folder or a hub id; see :func:`medllava.model.checkpoint.load` for the arguments and
        errors."""
        from medllava.model import checkpoint
        from medllava.model.hub import display_name, local_folder

        folder = local_folder(path)
        loaded = checkpoint.load(
            folder, device=device, dtype=dtype, load_4bit=load_4bit, load_8bit=load_8bit, base=base
        )
        return cls(loaded, display_name(folder))

    @classmethod
    def load_adapters(
        cls, path: Path, adapters: Mapping[str, Path], *, device: str | None = None, load_4bit: bool = False,
        load_8bit: bool = False,
    ) -> list[Answerer]:
        """Open a full checkpoint and LoRA checkpoints that stand on it, by name: the base first, then one Answerer for
        each. They share the language model, so only one of them may be at work at a time. Raises CheckpointError."""
        from medllava.model import checkpoint
        from medllava.model.adapters import Adapters
        from medllava.model.hub import display_name

        base = checkpoint.load(path, device=device, load_4bit=load_4bit, load_8bit=load_8bit)
        switchable = Adapters(base, path)
        answerers = [cls(base, display_name(path), partial(switchable.switch, None))]
        for name, folder in adapters.items():
            answerers.append(cls(switchable.add(name, folder), name, partial(switchable.switch, name)))
        return answerers

    def stream(
        self, images: Sequence[Image.Image], turns: Sequence[Turn], **decoding: Unpack[Decoding]
    ) -> Generator[str, None, Completion]:
        """Yield the answer piece by piece as it is generated; closing the generator ends the generation. Its return
        value (``StopIteration.value``) is the whole answer as a Completion.

        ``decoding`` is checked at the first piece. Raises DataError if the turns do not fit the
        pictures, PromptTooLong if the prompt leaves no room in the model's context.
        """
        question = self.prepare(images, turns, **decoding)
        batch = self.batch()
        reply = batch.join([question])[0]
        shown = 0
        while True:
            ready = reply.ready()
            if len(ready) > shown:
                yield ready[shown:]
                shown = len(ready)
            if reply.finished:
                return reply.completion()
            batch.step()

    def answer(
        self, images: Sequence[Image.Image], turns: Sequence[Turn], **decoding: Unpack[Decoding]
    ) -> Completion:
        """The whole answer; see :meth:`stream`."""
        return self.answer_batch([(images, turns)], **decoding)[0]

    def ask(
        self, text: str, *pictures: str | Path | Image.Image, region: Region | Sequence[float] | None = None,
        max_new_tokens: int = 256,
    ) -> Completion:
        """The greedy answer to one question about pictures (files, data URIs or opened ones). ``region``: of the last
        picture, such as ``(x1, y1, x2, y2)`` or ``(x, y)`` in 0..1, shown as the model was trained to see regions.
        Raises DataError."""
        images, turns = self._question(text, pictures, region)
        return self.answer(images, turns, max_new_tokens=max_new_tokens)

    def answer_batch(
        self, questions: Sequence[Question], **decoding: Unpack[Decoding]
    ) -> list[Completion]:
        """Answers in the order of the questions, computed together (padded on the left): the same as one by one."""
        if not questions:
            return []
        prepared = [self.prepare(images, turns, **decoding) for images, turns in questions]
        batch = self.batch()
        replies = batch.join(prepared)
        while batch.rows:
            batch.step()
        return [reply.completion() for reply in replies]

    def prepare(
        self,
        images: Sequence[Image.Image],
        turns: Sequence[Turn],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
        top_logprobs: int | None = None,
        pixels: torch.Tensor | None = None,
    ) -> Prepared:
        """Tokens and pixels of a question, for :meth:`batch`; any thread may call it. See :class:`Decoding` for the
        arguments and :meth:`stream` for the errors. ``top_logprobs``: note log-probabilities, and that many
        alternatives per token. ``pixels``: what :meth:`pixels` made of the pictures, in their place; questions of one
        batch that share it share its encoding."""
        from medllava.model.decoding import Prepared
        from medllava.model.prompt import check_length, with_image_tag, without_history

        if pixels is None:
            images, turns = self.shown(images, turns)
        elif self.manifest.single_exchange:
            turns = without_history(turns)
        check_length((turn.text for turn in turns), self._context)
        with self._preparing:
            ids = self._prompts.question(with_image_tag(turns, len(images if pixels is None else pixels)))
        room = min(max_new_tokens, self._context - len(ids))
        if room <= 0 < max_new_tokens:
            raise PromptTooLong(
                f"the question takes {len(ids)} tokens, pictures included; the model's context holds {self._context}:"
                " shorten it or start a new conversation"
            )
        # To the encoder only: the text that follows needs no pixels.
        if pixels is None and images:
            pixels = self.pixels(images)
        return Prepared(ids, pixels, max(room, 0), temperature, top_p, tuple(stop), seed, top_logprobs)

    def shown(
        self, images: Sequence[Image.Image], turns: Sequence[Turn]
    ) -> tuple[Sequence[Image.Image], Sequence[Turn]]:
        """What the model gets of a conversation: all of it, or, if it was trained on single exchanges, the last
        question with its own pictures, or with the last picture before it."""
        from medllava.model.prompt import without_history

        if not self.manifest.single_exchange:
            return images, turns
        tags = [turn.text.count(IMAGE_TAG) for turn in turns]
        if sum(tags) == len(images) and tags[-1] < len(images):
            images = images[-max(tags[-1], 1) :]
        return images, without_history(turns)

    @cached_property
    def looker(self) -> Looker:
        """Looks where this model looked, see :mod:`medllava.model.looking`."""
        from medllava.model.looking import Looker
        from medllava.model.prompt import with_image_tag

        def prompt(turns: Sequence[Turn], images: int, answer: str) -> tuple[list[int], list[int]]:
            with self._preparing:
                made = self._prompts.answered(with_image_tag(turns, images), answer)
            return made.input_ids, made.labels

        return Looker(self, self._model, prompt, self._prompts.image_token_id, self._context, self._activate)

    def where_did_it_look(
        self, text: str, *pictures: str | Path | Image.Image, answer: str | None = None,
        region: Region | Sequence[float] | None = None, **options: Any,
    ) -> Looking:
        """What the answer to one question depended on; without ``answer``, the greedy one. See :meth:`ask`, and
        :meth:`medllava.model.looking.Looker.prepare` for the options. Raises DataError.

            looked = model.where_did_it_look("Where is the gland?", "tissue.png")
            draw_heat(load_image("tissue.png"), looked.drops).save("looked.png")
        """
        images, turns = self._question(text, pictures, region)
        if answer is None:
            answer = self.answer(images, turns).text
        return self.looker.look(self.looker.prepare(images, turns, answer, **options))

    def _question(
        self, text: str, pictures: Sequence[str | Path | Image.Image], region: Region | Sequence[float] | None
    ) -> tuple[list[Image.Image], list[Turn]]:
        images = [source if isinstance(source, Image.Image) else load_image(source) for source in pictures]
        last, text = asked(images[-1] if images else None, text, as_region(region), self.manifest.regions)
        if last is not None:
            images[-1] = last
        return images, [Turn(role="user", text=f"{IMAGE_TAG}\n" * len(images) + as_text(text))]

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """What the encoder sees of pictures, float32 (pictures, 3, side, side); any thread may call it."""
        import torch

        from medllava.model.pixels import pixel_values

        # One by one, and none of them held while the next is opened: of large pictures only one is in memory.
        return torch.cat([pixel_values(self._image_processor, [images[number]]) for number in range(len(images))])

    def batch(self) -> Batch:
        """An empty batch: questions that :meth:`prepare` made join it and are answered together."""
        from medllava.model.decoding import Batch

        pad = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else self._ends[0]
        return Batch(self._model, self._tokenizer, self._ends, pad, self._activate)


def _end_ids(generation_config: Any, tokenizer: Any) -> list[int]:
    ids = generation_config.eos_token_id
    ends = list(ids) if isinstance(ids, list | tuple) else [] if ids is None else [ids]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    return ends
