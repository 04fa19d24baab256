"""LLaVA JSON to examples and batches, in an order that depends only on the seed."""

from __future__ import annotations

import hashlib
import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from medllava.conversation import IMAGE_TAG, InstructionSample, Turn, read_llava, sample_from_llava
from medllava.errors import DataError
from medllava.geometry import parse_boxes
from medllava.images import load_image
from medllava.model.pixels import image_side, pixel_values
from medllava.model.prompt import IGNORE, Prompt, PromptBuilder
from medllava.regions import Way, as_mark, draw_mark, marked_name, named_mark
from medllava.train.augment import choose_variant, flip_pixels, flip_text
from medllava.train.batch import Batch, Example, collate, lay_out, pictures_within, share
from medllava.train.config import Optim
from medllava.train.features import FeatureStore

log = logging.getLogger(__name__)

INDEPENDENT_KINDS = ("conversation", "grounding", "vqa")
"""Kinds in which every question can be answered without the ones before it."""


def read_samples(path: Path, kinds: Sequence[str] | None = None) -> list[InstructionSample]:
    """The samples of a LLaVA JSON file, of the given kinds. Raises DataError naming the row, or if none is left."""
    samples = [sample_from_llava(row, f"{path}: row {number}") for number, row in enumerate(read_llava(path))]
    kept = [sample for sample in samples if kinds is None or sample.kind in kinds]
    if not kept:
        found = ", ".join(sorted({sample.kind for sample in samples})) or "none at all"
        raise DataError(f"{path}: no sample of kind {', '.join(kinds or ['any'])}; the file has: {found}")
    return kept


def split_exchanges(samples: Sequence[InstructionSample]) -> list[InstructionSample]:
    """Each question with its answer as a sample of its own, for the kinds whose questions do not build on one another.

    A model too small to read a history learns from the picture alone this way.
    """
    made: list[InstructionSample] = []
    for sample in samples:
        pairs = list(zip(sample.turns[::2], sample.turns[1::2], strict=False))
        apart = all(asked.role == "user" and told.role == "assistant" for asked, told in pairs)
        if sample.kind not in INDEPENDENT_KINDS or len(sample.images) != 1 or not apart:
            made.append(sample)
            continue
        for number, (asked, told) in enumerate(pairs, start=1):
            tagged = Turn(role="user", text=f"{IMAGE_TAG}\n" + asked.text.replace(IMAGE_TAG, "").strip())
            made.append(sample.model_copy(update={"id": f"{sample.id}-{number}", "turns": (tagged, told)}))
    return made


def names_region(samples: Sequence[InstructionSample]) -> bool:
    """Whether a question of the samples names a box."""
    return any(parse_boxes(turn.text) for sample in samples for turn in sample.turns if turn.role == "user")


def show_regions(samples: Sequence[InstructionSample], ways: Sequence[Way]) -> list[InstructionSample]:
    """The samples with the regions of their questions shown in ``ways``; with both, every other sample is marked, as
    its id decides. A sample is marked if its first question names a region, no other question names another, and no
    answer tells a box: to a question such as "where is the gland?", the mark would give the answer away."""
    shown = []
    for sample in samples:
        marked = None
        if "mark" in ways and ("text" not in ways or hashlib.sha256(sample.id.encode()).digest()[0] % 2):
            marked = _marked(sample)
        shown.append(marked or sample)
    return shown


def _marked(sample: InstructionSample) -> InstructionSample | None:
    asked = [turn.text for turn in sample.turns if turn.role == "user"]
    told = [turn.text for turn in sample.turns if turn.role == "assistant"]
    found = as_mark(" ".join(asked))
    if found is None or len(sample.images) != 1 or not parse_boxes(asked[0]) or any(map(parse_boxes, told)):
        return None
    turns = [
        Turn(role="user", text=text[0]) if turn.role == "user" and (text := as_mark(turn.text)) else turn
        for turn in sample.turns
    ]
    return sample.model_copy(update={"images": (marked_name(sample.images[0], found[1]),), "turns": tuple(turns)})


def open_picture(folder: Path, name: str) -> Image.Image:
    """A sample's picture, with its mark if it has one. Raises DataError."""
    file, region = named_mark(name)
    image = load_image(folder / file)
    return draw_mark(image, region) if region else image


def check_images(samples: Sequence[InstructionSample], folder: Path) -> None:
    """Every picture must be there, and not be empty, before training starts. Raises DataError naming the first."""
    names = dict.fromkeys(name for sample in samples for name in sample.images)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{folder / missing[0]}: no such image file ({len(missing)} of {len(names)} images are missing);"
            " --images must be the folder that the data file's image paths start from"
        )
    empty = [name for name in names if not (folder / name).stat().st_size]
    if empty:
        raise DataError(
            f"{folder / empty[0]}: the image is empty (0 bytes; {len(empty)} of {len(names)} images are);"
            " find all faults with: python -m medllava.instruct_gen check"
        )


class Examples:
    """Tokenized samples, each in up to four mirrored variants (made when first asked for).

    Samples of which not even the first exchange fits ``max_length`` are left out; ``too_long`` lists their ids and
    ``dropped_turns`` counts the trailing turns cut from others. ``text_only`` leaves the pictures out.
    """

    def __init__(
        self, samples: Sequence[InstructionSample], prompts: PromptBuilder, *, max_length: int, text_only: bool = False,
        supervise_all: bool = False,
    ) -> None:
        self._prompts = prompts
        self._max_length = max_length
        self._text_only = text_only
        self._supervise_all = supervise_all
        self._made: dict[tuple[int, int], Example] = {}
        self._prompted: dict[tuple[Turn, ...], Prompt | None] = {}
        self.samples: list[InstructionSample] = []
        self.lengths: list[int] = []
        self.supervised = 0
        self.dropped_turns = 0
        self.too_long: list[str] = []
        for sample in tqdm(samples, desc="tokenize", unit="sample", leave=False, mininterval=0.5):
            made = self._make(sample, 0)
            if made is None:
                self.too_long.append(sample.id)
                continue
            example, dropped = made
            self._made[len(self.samples), 0] = example
            self.samples.append(sample)
            self.lengths.append(len(example.input_ids))
            self.supervised += int((example.labels != IGNORE).sum())
            self.dropped_turns += dropped
        if not self.samples:
            raise DataError(f"no sample fits max_length {max_length}; the first is {self.too_long[0]}")
        if self.too_long or self.dropped_turns:
            log.warning(
                "max_length %d: %d samples left out (%s), %d trailing turns dropped from others",
                max_length, len(self.too_long), ", ".join(self.too_long[:5]), self.dropped_turns,
            )

    def __len__(self) -> int:
        return len(self.samples)

    def get(self, index: int, variant: int = 0) -> Example:
        key = (index, variant)
        if key not in self._made:
            made = self._make(self.samples[index], variant)
            # A mirrored text may take a token more than the original; then the original's words cannot be kept.
            self._made[key] = made[0] if made else self._made[index, 0]
        return self._made[key]

    def _make(self, sample: InstructionSample, variant: int) -> tuple[Example, int] | None:
        turns = [Turn(role=turn.role, text=flip_text(turn.text, variant)) for turn in sample.turns]
        if self._text_only:
            turns = [Turn(role=turn.role, text=turn.text.replace("<image>", "").strip()) for turn in turns]
        # Short questions recur word for word with other pictures.
        key = tuple(turns)
        if key not in self._prompted:
            self._prompted[key] = self._prompts.sample(turns, f"sample {sample.id}", max_length=self._max_length)
        prompt = self._prompted[key]
        if prompt is None:
            return None
        ids = torch.tensor(prompt.input_ids)
        labels = ids.clone() if self._supervise_all else torch.tensor(prompt.labels)
        seen = int((ids == self._prompts.image_token_id).sum()) // max(self._prompts.tokens_per_image, 1)
        images = () if self._text_only else sample.images[:seen]
        return Example(sample.id, ids, labels, images), prompt.dropped_turns


class Pictures:
    """Pixels of the pictures in ``folder``, mirrored on request; after :meth:`cache` or :meth:`cache_on_disk`, the
    frozen encoder's features."""

    def __init__(self, folder: Path, image_processor: Any) -> None:
        self._folder = folder
        self._image_processor = image_processor
        self._features: dict[tuple[str, int], torch.Tensor] = {}
        self._store: FeatureStore | None = None

    def pixels(self, name: str, variant: int = 0) -> torch.Tensor:
        """(3, side, side)"""
        values = pixel_values(self._image_processor, [open_picture(self._folder, name)])[0]
        return flip_pixels(values, variant)

    def cache(
        self, names: Sequence[str], variants: Sequence[int], encode: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Run every picture through ``encode`` once. The key is (file, variant); encoder and processor do not change
        while this object lives."""
        step = max(1, 32 // len(variants))
        bar = tqdm(total=len(names), desc="encode images", unit="image", mininterval=0.5)
        for start in range(0, len(names), step):
            part = names[start : start + step]
            upright = [self.pixels(name) for name in part]
            stacked = torch.stack([flip_pixels(pixels, variant) for pixels in upright for variant in variants])
            encoded = encode(stacked)
            for number, key in enumerate((name, variant) for name in part for variant in variants):
                self._features[key] = encoded[number]
            bar.update(len(part))
        bar.close()

    def cache_on_disk(
        self, store: FeatureStore, names: Sequence[str], variants: Sequence[int],
        encode: Callable[[torch.Tensor], torch.Tensor], wait: Callable[[], None] = lambda: None,
    ) -> None:
        """As :meth:`cache`, but into files that other runs find again. ``wait``: for the other processes' shares."""
        store.fill(self._folder, self.pixels, names, variants, encode)
        wait()
        store.open()
        self._store = store if names else None

    def stack(self, wanted: Sequence[tuple[str, int]]) -> dict[str, torch.Tensor]:
        """Keyword arguments of :func:`collate` for these pictures; one blank picture if there are none, so that the
        projector and a tower in training take part in every batch on every process."""
        if not wanted:
            known = self._store.any() if self._store else next(iter(self._features.values()), None)
            if known is not None:
                return {"features": torch.zeros_like(known)[None]}
            side = image_side(self._image_processor)
            return {"pixels": torch.zeros(1, 3, side, side)}
        if self._store:
            return {"features": torch.stack([self._store.get(*key) for key in wanted])}
        if self._features:
            return {"features": torch.stack([self._features[key] for key in wanted])}
        return {"pixels": torch.stack([self.pixels(*key) for key in wanted])}


@dataclass(frozen=True)
class Order:
    """Which samples come at which step. Depends only on its fields, so any step can be asked for at any time.

    lengths: of the samples in tokens, for grouping; None to shuffle freely. weights: how often each comes in an epoch.
    pictures: the first of each sample, or None. At most ``together`` samples of a picture, drawn at random, come one
        after another, and so (but where a batch ends between them) in one batch; where a picture has more, the others
        come elsewhere in the epoch, and so do repetitions of a sample. These groups come in random order: each
        sample still comes as often as before, at any place with the same probability, but the samples of a batch are no
        longer drawn independently: it holds fewer pictures.
    """

    count: int
    batch_size: int
    seed: int
    lengths: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None
    pictures: tuple[str | None, ...] | None = None
    together: int = 1

    def epoch(self, number: int) -> list[list[int]]:
        """The batches of an epoch; the last may be smaller."""
        rng = random.Random(f"order/{self.seed}/{number}")
        chosen: list[int] = []
        for index in range(self.count):
            times = self.weights[index] if self.weights else 1.0
            chosen += [index] * (int(times) + (rng.random() < times - int(times)))
        rng.shuffle(chosen)
        if self.pictures is not None and self.together > 1:
            groups = self._by_picture(chosen)
            rng.shuffle(groups)
            chosen = [index for group in groups for index in group]
        if self.lengths is not None:
            # Sorted by length within stretches of 50 batches: like lengths meet, yet every epoch differs.
            stretch = self.batch_size * 50
            chosen = [
                index for start in range(0, len(chosen), stretch)
                for index in sorted(chosen[start : start + stretch], key=self.lengths.__getitem__, reverse=True)
            ]
        batches = [chosen[start : start + self.batch_size] for start in range(0, len(chosen), self.batch_size)]
        rng.shuffle(batches)
        return batches

    def _by_picture(self, chosen: Sequence[int]) -> list[list[int]]:
        assert self.pictures is not None
        groups: list[list[int]] = []
        filling: dict[tuple[str, int], list[int]] = {}
        times: dict[int, int] = {}
        for index in chosen:
            times[index] = times.get(index, 0) + 1
            picture = self.pictures[index]
            group = filling.get((picture, times[index])) if picture is not None else None
            if group is None or len(group) == self.together:
                group = []
                groups.append(group)
                if picture is not None:
                    filling[picture, times[index]] = group
            group.append(index)
        return groups

    def batches_per_epoch(self) -> int:
        total = sum(self.weights) if self.weights else self.count
        return max(1, math.ceil(total / self.batch_size))

    def steps(self, optim: Optim) -> int:
        """Length of a run, as ``optim`` says it: in steps, or in epochs."""
        return optim.steps or max(1, math.ceil(float(optim.epochs or 0) * self.batches_per_epoch()))


class Steps(Dataset[Any]):
    """Item ``step`` is what the optimizer's step takes: ``make(epoch, indices)`` of its samples."""

    def __init__(self, order: Order, steps: int, make: Callable[[int, list[int]], Any]) -> None:
        self._order = order
        self._steps = steps
        self._make = make
        self._starts = [0]
        self._epochs: dict[int, list[list[int]]] = {}

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Any:
        # Epochs may differ in length by a batch (fractional weights), so their starts are found one after the other.
        number = 0
        while step >= self._start(number + 1):
            number += 1
        return self._make(number, self._batches(number)[step - self._start(number)])

    def _start(self, epoch: int) -> int:
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + len(self._batches(len(self._starts) - 1)))
        return self._starts[epoch]

    def _batches(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            self._epochs = {key: value for key, value in self._epochs.items() if key >= epoch - 1}
            self._epochs[epoch] = self._order.epoch(epoch)
        return self._epochs[epoch]


def micro_batches(
    examples: Examples, pictures: Pictures | None, *, accumulate: int, flip_seed: int | None, pad_id: int,
    image_token_id: int, rank: int = 0, processes: int = 1, row_length: int | None = None, shared: bool = False,
) -> Callable[[int, list[int]], list[Batch]]:
    """A function for :class:`Steps`: the samples of a step as at most ``accumulate`` batches of this process's share.
    ``row_length``: pack several samples into rows of so many tokens; see :func:`medllava.train.batch.lay_out`.
    ``shared``: compute the common beginning of samples of one picture once; see :func:`medllava.train.batch.share`.
    All samples of a picture are then mirrored alike in an epoch."""
    mirrored_as = list(range(len(examples)))
    if shared:
        firsts: dict[str | None, int] = {}
        mirrored_as = [
            firsts.setdefault(name, index) if name else index for index, name in enumerate(first_pictures(examples))
        ]

    def make(epoch: int, indices: list[int]) -> list[Batch]:
        variants = [
            0 if flip_seed is None else choose_variant(flip_seed, epoch, mirrored_as[index]) for index in indices
        ]
        mine = [examples.get(*key) for key in zip(indices, variants, strict=True)]
        groups = [[(place, 0)] for place in range(len(indices))]
        if row_length is None:
            lengths = [examples.lengths[index] for index in indices]
        else:  # a mirrored text may be longer or shorter, and all processes must see the same rows
            if shared:
                groups = share(mine, variants, image_token_id=image_token_id, room=row_length)
            lengths = [sum(len(mine[place].input_ids) - known for place, known in group) for group in groups]
        made = []
        for rows in lay_out(lengths, accumulate=accumulate, rank=rank, processes=processes, row_length=row_length):
            parts = [[part for number in row for part in groups[number]] for row in rows]
            wanted = [
                (name, variants[place]) for row in parts for place, known in row
                for name in mine[place].images[pictures_within(mine[place], known, image_token_id) :]
            ]
            inputs = pictures.stack(wanted) if pictures else {}
            made.append(collate(
                [[mine[place] for place, _ in row] for row in parts], pad_id=pad_id, image_token_id=image_token_id,
                known=[[known for _, known in row] for row in parts], **inputs,
            ))
        return made

    return make


def first_pictures(examples: Examples) -> tuple[str | None, ...]:
    """The first picture of each sample, for :class:`Order`."""
    return tuple(sample.images[0] if sample.images else None for sample in examples.samples)


def useful_share(
    order: Order, lengths: Sequence[int], *, accumulate: int = 1, processes: int = 1, row_length: int | None = None,
    steps: int = 200,
) -> float:
    """Part of the computed tokens that are not padding, over the first steps of an epoch."""
    useful = computed = 0
    for batch in order.epoch(0)[:steps]:
        own = [lengths[index] for index in batch]
        useful += sum(own)
        for rank in range(processes):
            for rows in lay_out(own, accumulate=accumulate, rank=rank, processes=processes, row_length=row_length):
                computed += len(rows) * max(sum(own[place] for place in row) for row in rows)
    return useful / max(computed, 1)


def computed_share(
    order: Order, examples: Examples, *, image_token_id: int, row_length: int, steps: int = 50
) -> float:
    """Part of the samples' tokens that is computed where samples of a picture share a beginning, over the first steps
    of an epoch."""
    computed = whole = 0
    for batch in order.epoch(0)[:steps]:
        mine = [examples.get(index) for index in batch]
        whole += sum(len(example.input_ids) for example in mine)
        groups = share(mine, [0] * len(mine), image_token_id=image_token_id, room=row_length)
        computed += sum(len(mine[place].input_ids) - known for group in groups for place, known in group)
    return computed / max(whole, 1)


def kind_weights(samples: Sequence[InstructionSample], weights: dict[str, float]) -> tuple[float, ...] | None:
    return tuple(weights.get(sample.kind, 1.0) for sample in samples) if weights else None
