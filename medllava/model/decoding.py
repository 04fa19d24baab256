"""Continuous batching: conversations that are answered together, each of which joins and leaves between two tokens.

Rows of one batch share the forward passes and nothing else: each has its own positions, its own room, its own sampling
and its own end. A new row is padded on the left to the width of the batch; columns that only padding fills are cut off
when a row leaves. Greedy answers are those of the row alone (token for token in float32), and a sampled answer depends
on its seed, not on its company.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import DynamicCache

COLDEST = 1e-4
"""Lowest temperature that is divided by; below it scores would leave the range of numbers. It is greedy already."""


@dataclass(frozen=True)
class Completion:
    """An answer. ``finish_reason`` is "length" if ``max_new_tokens`` or the model's context cut it off, else "stop"."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token: its text, its bytes, its log-probability before temperature and top_p, and the likeliest
    tokens of that step as (text, bytes, log-probability)."""

    text: str
    data: bytes
    logprob: float
    top: tuple[tuple[str, bytes, float], ...]


@dataclass(frozen=True)
class Prepared:
    """A question ready for a batch. ``pixels``: float tensor (pictures, 3, side, side), None without pictures.
    ``room``: most tokens of the answer. ``top_logprobs``: how many alternatives to note per token, or with
    ``first_only`` for the first one; None notes nothing."""

    ids: list[int]
    pixels: torch.Tensor | None
    room: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    top_logprobs: int | None = None
    first_only: bool = False


class Reply:
    """The answer of one row: its tokens so far and the text they make."""

    def __init__(self, tokenizer: Any, question: Prepared) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in question.stop if text]
        self._decoded = ""
        self.question = question
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.ended = False
        """True if the model ended its turn or a stop text was met."""
        self.generator = torch.Generator(device="cpu")
        if question.temperature > 0:
            if question.seed is not None:
                self.generator.manual_seed(question.seed % 2**63)
            else:
                self.generator.seed()

    @property
    def finished(self) -> bool:
        return self.ended or len(self.ids) >= self.question.room

    def add(self, token: int, *, is_end: bool) -> None:
        self.ids.append(token)
        self.ended = is_end
        if not is_end:
            # As a whole each time: a token may be part of a character, and its space may depend on what follows.
            self._decoded = self._tokenizer.decode(self.ids, skip_special_tokens=True).lstrip()
        found = [at for text in self._stop if (at := self._decoded.find(text)) >= 0]
        if found:
            self._decoded = self._decoded[: min(found)]
            self.ended = True

    def note(self, token: int, logprobs: torch.Tensor) -> None:
        """Keep the log-probability of ``token``, and those of the likeliest, from one row of them (vocabulary,)."""
        count = 0 if self.question.first_only and self.logprobs else self.question.top_logprobs or 0
        values, ids = logprobs.topk(min(count, len(logprobs))) if count else (logprobs[:0], logprobs[:0])
        top = tuple(
            (*self._spelled(int(other)), float(value)) for other, value in zip(ids, values, strict=True)
        )
        self.logprobs.append(TokenLogprob(*self._spelled(token), float(logprobs[token]), top))

    def text(self) -> str:
        return self._decoded.rstrip()

    def completion(self) -> Completion:
        return Completion(self.text(), "stop" if self.ended else "length", len(self.question.ids), len(self.ids))

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

    def _spelled(self, token: int) -> tuple[str, bytes]:
        text = self._tokenizer.decode([token])
        return text, text.encode()


class Batch:
    """The rows that are being answered by one model. Not safe for two threads at once.

    ``ends``: ids of the tokens that end an answer. ``pad``: any token id; what it is changes nothing.
    ``activate`` is called before each pass of the model (an adapter of several is switched on there).
    """

    def __init__(
        self, model: Any, tokenizer: Any, ends: Sequence[int], pad: int, activate: Callable[[], None] = lambda: None
    ) -> None:
        self._model, self._tokenizer, self._ends, self._pad = model, tokenizer, set(ends), pad
        self._activate = activate
        self._state: _State | None = None

    @property
    def rows(self) -> list[Reply]:
        """Rows that are not finished."""
        return self._state.rows if self._state else []

    def join(self, questions: Sequence[Prepared]) -> list[Reply]:
        """Read the questions and give each its first token; returns their rows, in order. On an error nothing of them
        stays in the batch, and the other rows are as they were."""
        rows = [Reply(self._tokenizer, question) for question in questions]
        longest = max(len(question.ids) for question in questions)
        padded = [[self._pad] * (longest - len(question.ids)) + question.ids for question in questions]
        marks = [[0] * (longest - len(question.ids)) + [1] * len(question.ids) for question in questions]
        device = self._model.device
        mask = torch.tensor(marks, device=device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        read = self._read(torch.tensor(padded, device=device), questions)
        # Plain layers for every model: those of a sliding window would forget columns, which the mask hides anyway.
        output = self._forward(mask, positions, DynamicCache(), **read)
        new = _State(rows, output.past_key_values, mask, positions[:, -1:] + 1)
        self._extend(rows, output.logits)
        new = new.keep([row for row in rows if not row.finished])
        self._state = new if self._state is None or not self._state.rows else self._state.merge(new)
        return rows

    def step(self) -> None:
        """One more token for every row. On an error the rows are as before the step."""
        if not self.rows:
            return
        state = self._state
        assert state is not None
        ids = torch.tensor([[row.ids[-1]] for row in state.rows], device=self._model.device)
        mask = torch.cat([state.mask, state.mask.new_ones(len(state.rows), 1)], dim=1)
        try:
            output = self._forward(mask, state.positions, state.cache, input_ids=ids)
        except BaseException:
            state.rewind()
            raise
        state.mask, state.cache, state.positions = mask, output.past_key_values, state.positions + 1
        self._extend(state.rows, output.logits)
        if any(row.finished for row in state.rows):
            self._state = state.keep([row for row in state.rows if not row.finished])

    def remove(self, rows: Sequence[Reply]) -> None:
        """Let rows go before they are finished."""
        if self._state and any(row in self._state.rows for row in rows):
            self._state = self._state.keep([row for row in self._state.rows if row not in rows])

    def _read(self, ids: torch.Tensor, questions: Sequence[Prepared]) -> dict[str, torch.Tensor]:
        """What the model is given of the questions: ``ids`` (rows, columns) with their pictures. Questions that hold
        the same tensor of pixels ask about one picture, which then goes through the encoder once."""
        pictures = [question.pixels for question in questions if question.pixels is not None]
        if not pictures:
            return {"input_ids": ids}
        once = list({id(pixels): pixels for pixels in pictures}.values())
        values = torch.cat(once).to(ids.device, self._model.dtype)
        if len(once) == len(pictures):
            return {"input_ids": ids, "pixel_values": values}
        self._activate()
        with torch.inference_mode():
            encoded = self._model.get_image_features(pixel_values=values, return_dict=True).pooler_output
            parts = torch.split(torch.stack(list(encoded)), [len(pixels) for pixels in once])
            features = {id(pixels): part.flatten(0, 1) for pixels, part in zip(once, parts, strict=True)}
            embeddings = self._model.get_input_embeddings()(ids)
            places = (ids == self._model.config.image_token_id).unsqueeze(-1).to(embeddings.device)
            told = torch.cat([features[id(pixels)] for pixels in pictures]).to(embeddings)
            return {"inputs_embeds": embeddings.masked_scatter(places, told)}

    def _forward(self, mask: torch.Tensor, positions: torch.Tensor, cache: Any, **inputs: Any) -> Any:
        self._activate()
        with torch.inference_mode():
            return self._model(
                attention_mask=None if len(mask) == 1 else mask, position_ids=positions,
                past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs,
            )

    def _extend(self, rows: Sequence[Reply], logits: torch.Tensor) -> None:
        scores = logits[:, -1].float().cpu()
        likeliest = scores.argmax(-1).tolist()
        noted = scores.log_softmax(-1) if any(row.question.top_logprobs is not None for row in rows) else scores
        for row, score, best, logprobs in zip(rows, scores, likeliest, noted, strict=True):
            if row.finished:  # room for no token at all
                continue
            question = row.question
            token = best
            if question.temperature > 0:
                token = _drawn(score, question.temperature, question.top_p, row.generator)
            if question.top_logprobs is not None:
                row.note(token, logprobs)
            row.add(token, is_end=token in self._ends)


@dataclass
class _State:
    """What the model has read: keys and values (one tensor (rows, heads, width, size) each per layer), which columns of
    each row count, and the position of each row's next token."""

    rows: list[Reply]
    cache: Any
    mask: torch.Tensor
    positions: torch.Tensor

    def keep(self, rows: list[Reply]) -> _State:
        """These rows only, without the columns that none of them uses."""
        index = torch.tensor([self.rows.index(row) for row in rows], dtype=torch.long, device=self.mask.device)
        mask = self.mask[index]
        unused = int((mask.cumsum(1) == 0).all(0).sum()) if rows else mask.shape[1]
        # Layers may be spread over several cards.
        self._change(lambda values: values[index.to(values.device), :, unused:])
        return _State(rows, self.cache, mask[:, unused:], self.positions[index])

    def merge(self, new: _State) -> _State:
        """These rows, then the new ones, padded on the left to the wider of the two."""
        if not new.rows:
            return self
        width = max(self.mask.shape[1], new.mask.shape[1])
        for ours, theirs in zip(self.cache.layers, new.cache.layers, strict=True):
            ours.keys = torch.cat([_widened(ours.keys, width, 2), _widened(theirs.keys, width, 2)])
            ours.values = torch.cat([_widened(ours.values, width, 2), _widened(theirs.values, width, 2)])
        mask = torch.cat([_widened(self.mask, width, 1), _widened(new.mask, width, 1)])
        return _State([*self.rows, *new.rows], self.cache, mask, torch.cat([self.positions, new.positions]))

    def rewind(self) -> None:
        """Undo what a pass that failed in a later layer has added to the earlier ones."""
        width = self.mask.shape[1]
        self._change(lambda values: values[:, :, :width])

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for layer in self.cache.layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)


def _widened(values: torch.Tensor, width: int, dimension: int) -> torch.Tensor:
    """Padded with zeros at the front of ``dimension``."""
    missing = width - values.shape[dimension]
    if not missing:
        return values
    shape = list(values.shape)
    shape[dimension] = missing
    return torch.cat([values.new_zeros(shape), values], dim=dimension)


def _drawn(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token drawn from the smallest set that holds ``top_p`` of the probability; logits: (vocabulary,)."""
    probabilities, order = torch.softmax(logits / max(temperature, COLDEST), -1).sort(descending=True)
    beyond = probabilities.cumsum(-1) - probabilities >= top_p
    beyond[0] = False
    drawn = torch.multinomial(probabilities.masked_fill(beyond, 0.0), 1, generator=generator)
    return int(order[drawn])
