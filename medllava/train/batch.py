"""Example: one tokenized sample. Batch: what one forward pass takes."""

from __future__ import annotations

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
    """Samples padded on the right.

    input_ids, labels: (samples, length) int64; ``labels[i, t]`` is ``input_ids[i, t]`` or IGNORE.
    image_positions: places of image tokens in the flattened ids, in the order of the pictures' features.
    predict_positions: flattened places t whose next token t + 1 is supervised; ``targets`` are those next tokens. This
        is the one place that shifts labels; the model is not given ``labels``.
    pixels: (pictures, 3, side, side), or features: (pictures, tokens, width) from the encoder, or neither.
    """

    ids: tuple[str, ...]
    input_ids: torch.Tensor
    labels: torch.Tensor
    image_positions: torch.Tensor
    predict_positions: torch.Tensor
    targets: torch.Tensor
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
    examples: Sequence[Example], *, pad_id: int, image_token_id: int, pixels: torch.Tensor | None = None,
    features: torch.Tensor | None = None,
) -> Batch:
    """Join examples. Padding on the right needs no attention mask: under causal attention no real token sees it."""
    length = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), length), pad_id)
    labels = torch.full((len(examples), length), IGNORE)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.input_ids)] = example.input_ids
        labels[row, : len(example.labels)] = example.labels
    following = torch.full_like(labels, IGNORE)
    following[:, :-1] = labels[:, 1:]
    following = following.flatten()
    predict = (following != IGNORE).nonzero()[:, 0]
    return Batch(
        ids=tuple(example.id for example in examples), input_ids=input_ids, labels=labels,
        image_positions=(input_ids.flatten() == image_token_id).nonzero()[:, 0],
        predict_positions=predict, targets=following[predict], pixels=pixels, features=features,
    )
