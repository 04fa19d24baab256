"""Example: one tokenized sample. Batch: what one forward pass takes. lay_out: which samples share a row. share: which
samples of a picture have a beginning in common, which is then computed once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from medllava.model.prompt import IGNORE


@dataclass(frozen=True)
class Example:
    """A sample as ids and labels (int64, equal length; not shifted), and the files of its pictures in order."""

    id: str
    input_ids: torch.Tensor
    labels: torch.Tensor
    images: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """Rows of one or more samples, padded on the right.

    input_ids, labels: (rows, length) int64; ``labels[i, t]`` is ``input_ids[i, t]`` or IGNORE.
    position_ids: (rows, length), from 0 in every sample of a row (padding counts as a sample); None if no row holds
        two. Models of transformers take from them, and only without an attention mask, where one sample ends. A sample
        that begins at n > 0 goes on from the first n tokens of the last one before it that began at 0.
    image_positions: places of image tokens in the flattened ids, in the order of the pictures' features.
    predict_positions: flattened places t whose next token t + 1 is supervised; ``targets`` are those next tokens. This
        is the one place that shifts labels; the model is not given ``labels``. Where samples share a beginning, its
        last place may stand there once for each.
    pixels: (pictures, 3, side, side), or features: (pictures, tokens, width) from the encoder, or neither. A batch
        without image tokens may hold a blank picture, which takes part in the computation and changes nothing.
    tokens: of the samples, each counted in full. computed: places of the rows that are not padding: fewer than
        ``tokens`` where samples share a beginning.
    """

    ids: tuple[str, ...]
    input_ids: torch.Tensor
    labels: torch.Tensor
    image_positions: torch.Tensor
    predict_positions: torch.Tensor
    targets: torch.Tensor
    tokens: int
    computed: int
    position_ids: torch.Tensor | None = None
    pixels: torch.Tensor | None = None
    features: torch.Tensor | None = None

    @property
    def weight(self) -> int:
        """Number of supervised tokens."""
        return int(self.targets.numel())

    def to(self, device: torch.device | str) -> Batch:
        if str(device) == "cpu":
            return self
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def collate(
    rows: Sequence[Sequence[Example]], *, pad_id: int, image_token_id: int, pixels: torch.Tensor | None = None,
    features: torch.Tensor | None = None, known: Sequence[Sequence[int]] | None = None,
) -> Batch:
    """Join the samples of each row, and the rows. Padding on the right needs no attention mask: under causal attention
    no real token sees it. A row without samples is all padding.

    ``known``: how many tokens at a sample's beginning are left out, because they are those of the last sample before it
    of which none is; as :func:`share` finds them. Their pictures are left out too.
    """
    known = known or [[0] * len(row) for row in rows]
    lengths = [sum(len(example.input_ids) for example in row) for row in rows]
    own = [length - sum(left) for length, left in zip(lengths, known, strict=True)]
    length = max([1, *own])
    input_ids = torch.full((len(rows), length), pad_id)
    labels = torch.full((len(rows), length), IGNORE)
    position_ids = torch.zeros((len(rows), length), dtype=torch.long)
    predict, targets = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, dtype=torch.long)]
    for number, row in enumerate(rows):
        start = first = number * length
        for example, left in zip(row, known[number], strict=True):
            first = first if left else start
            end = start + len(example.input_ids) - left
            here = slice(start - number * length, end - number * length)
            input_ids[number, here] = example.input_ids[left:]
            labels[number, here] = example.labels[left:]
            position_ids[number, here] = torch.arange(left, len(example.input_ids))
            places = torch.cat([torch.arange(first, first + left), torch.arange(start, end)])
            supervised = (example.labels[1:] != IGNORE).nonzero()[:, 0]  # a sample's first token follows nothing
            predict.append(places[supervised])
            targets.append(example.labels[supervised + 1])
            start = end
        position_ids[number, own[number] :] = torch.arange(length - own[number])
    return Batch(
        ids=tuple(example.id for row in rows for example in row), input_ids=input_ids, labels=labels,
        image_positions=(input_ids.flatten() == image_token_id).nonzero()[:, 0], predict_positions=torch.cat(predict),
        targets=torch.cat(targets), tokens=sum(lengths), computed=sum(own),
        position_ids=position_ids if any(len(row) > 1 for row in rows) else None, pixels=pixels, features=features,
    )


def share(
    examples: Sequence[Example], variants: Sequence[int], *, image_token_id: int, room: int
) -> list[list[tuple[int, int]]]:
    """The samples (by number) in groups that are to stand together: one whole sample, then those that begin as it does,
    each with the number of tokens they have in common with it (0 for the first).

    Only samples whose first picture is the same, mirrored alike (``variants``), share a beginning, and only one that
    holds this picture. Under causal attention it depends on nothing that follows, so their losses and gradients stay
    what they are apart (but for dropout, which is drawn once for it). No group is longer than ``room`` tokens (but for
    a sample that is longer by itself). The longer beginnings come first: where one sample goes on cannot be mistaken
    for where the one before it ends.
    """
    groups: list[list[tuple[int, int]]] = []
    left: list[int] = []
    of_picture: dict[tuple[str, int], list[int]] = {}
    for number, (example, variant) in enumerate(zip(examples, variants, strict=True)):
        others = of_picture.setdefault((example.images[0], variant), []) if example.images else []
        for other in others:
            known = _common(examples[groups[other][0][0]], example, image_token_id)
            if known and left[other] >= len(example.input_ids) - known:
                groups[other].append((number, known))
                left[other] -= len(example.input_ids) - known
                break
        else:
            others.append(len(groups))
            groups.append([(number, 0)])
            left.append(room - len(example.input_ids))
    return [[group[0], *sorted(group[1:], key=lambda part: -part[1])] for group in groups]


def _common(one: Example, other: Example, image_token_id: int) -> int:
    """How many tokens both samples begin with, pictures included; 0 if there is no whole picture among them. At least
    one token of each is not common."""
    end = min(len(one.input_ids), len(other.input_ids)) - 1
    differ = (one.input_ids[:end] != other.input_ids[:end]).nonzero()[:, 0]
    end = int(differ[0]) if len(differ) else end
    places = (one.input_ids == image_token_id).nonzero()[:, 0]
    pairs = zip(one.images, other.images, strict=False)
    alike = next((number for number, (mine, its) in enumerate(pairs) if mine != its), len(one.images))
    alike = min(alike, len(other.images), pictures_within(one, end, image_token_id))
    size = len(places) // len(one.images)
    if alike and alike * size < len(places):  # the next picture's tokens look alike, whatever it shows
        end = min(end, int(places[alike * size]))
    return end if alike else 0


def pictures_within(example: Example, end: int, image_token_id: int) -> int:
    """Number of the sample's pictures that end before its token ``end``."""
    if not example.images:
        return 0
    image = example.input_ids == image_token_id
    return int(image[:end].sum()) // (int(image.sum()) // len(example.images))


def lay_out(
    lengths: Sequence[int], *, accumulate: int = 1, rank: int = 0, processes: int = 1, row_length: int | None = None
) -> list[list[list[int]]]:
    """Micro-batches of rows of samples for one process, from the samples of a step (numbered as in ``lengths``).

    Every process gets as many micro-batches, and each of these as many rows, so that none waits for another for ever;
    where samples are too few, a row stays empty. ``row_length``: pack samples into rows of at most so many tokens,
    which levels the work of processes and pieces, and join a micro-batch's rows into one, so that none is padded to
    the longest; without it, each sample has its own row.
    """
    pieces = min(accumulate, math.ceil(len(lengths) / processes))
    if row_length is None:
        rows = [[number] for number in range(len(lengths))]
        rows += [[] for _ in range(-len(rows) % processes)]
    else:
        # Rows of like length, so that little is padded, and as many in every piece.
        rows = pack(lengths, row_length, multiple=processes * pieces)
        rows.sort(key=lambda row: -sum(lengths[number] for number in row))
    mine = rows[rank::processes]
    size = math.ceil(len(mine) / pieces)
    parts = [mine[start : start + size] for start in range(0, len(mine), size)]
    return parts if row_length is None else [[[number for row in rows for number in row]] for rows in parts]


def pack(lengths: Sequence[int], row_length: int, *, multiple: int = 1) -> list[list[int]]:
    """Samples (by number) in few rows of about equal length, none over ``row_length`` (but for a sample that is longer
    by itself); the number of rows is a multiple of ``multiple``, if need be with empty ones.

    First-fit-decreasing says how many rows are needed; then the rows are shortened as long as that many suffice, which
    balances them (MULTIFIT; Coffman, Garey and Johnson 1978).
    """
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    low = max(lengths)
    high = max(row_length, low)
    rows = _first_fit(lengths, order, high)
    count = math.ceil(len(rows) / multiple) * multiple
    while low < high:
        middle = (low + high) // 2
        tried = _first_fit(lengths, order, middle)
        if len(tried) <= count:
            rows, high = tried, middle
        else:
            low = middle + 1
    return rows + [[] for _ in range(count - len(rows))]


def _first_fit(lengths: Sequence[int], order: Sequence[int], room: int) -> list[list[int]]:
    rows: list[list[int]] = []
    left: list[int] = []
    for number in order:
        place = next((row for row, free in enumerate(left) if free >= lengths[number]), None)
        if place is None:
            rows.append([])
            left.append(room)
            place = -1
        rows[place].append(number)
        left[place] -= lengths[number]
    return rows
