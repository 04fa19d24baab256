"""Stage 0 of a real run: a CLIP or SigLIP folder, trained on on image-text pairs (Quilt-1M, GenMedCLIP).

Every picture is contrasted with the captions of the whole step: those of all processes are gathered, with gradients,
and a step that is taken in pieces (``accumulate``) keeps no activations of a piece but computes them again on the way
back, so that the pieces, too, see the captions of all others (the result is that of Gao et al. 2021, "Scaling deep
contrastive learning batch size under memory limited setup"). Neither changes what is learned.

Losses: CLIP's symmetric InfoNCE (Radford et al. 2021) and SigLIP's sigmoid loss (Zhai et al. 2023). Equal captions
count as equally right.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from medllava.errors import CheckpointError, ConfigError
from medllava.jsonl import write_json
from medllava.model.embeddings import ImageTextEncoder, Tokens, load_encoder, unit
from medllava.model.folders import write_folder
from medllava.model.image_text import ImageText
from medllava.model.pixels import pixel_values
from medllava.train.augment import choose_variant, flip_pixels, flip_text
from medllava.train.contrastive import info_nce
from medllava.train.dataset import Order
from medllava.train.loop import Group

PROVENANCE_FILE = "medllava_encoder.json"
"""What an encoder's folder was made from; written last."""
MAX_SCALE = 100.0
"""Most that similarities are multiplied by (1 / temperature), as in CLIP."""


@dataclass(frozen=True)
class PairBatch:
    """This process's pairs of a step: pixels (pairs, 3, side, side), tokens, and a number for each caption that equal
    captions share."""

    ids: tuple[str, ...]
    pixels: torch.Tensor
    texts: Tokens
    classes: torch.Tensor

    @property
    def weight(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        return int(self.texts["input_ids"].numel())

    def to(self, device: torch.device | str) -> PairBatch:
        if str(device) == "cpu":
            return self
        return replace(
            self, pixels=self.pixels.to(device, non_blocking=True), classes=self.classes.to(device),
            texts={name: value.to(device) for name, value in self.texts.items()},
        )


class FullBatches(Order):
    """An order without an epoch's last, smaller batch: fewer pairs in a step would be fewer to be told apart from."""

    def epoch(self, number: int) -> list[list[int]]:
        return [batch for batch in super().epoch(number) if len(batch) == self.batch_size]

    def batches_per_epoch(self) -> int:
        return self.count // self.batch_size


def pair_batches(
    pairs: Sequence[ImageText], encoder: ImageTextEncoder, *, seed: int, flip: bool, rank: int = 0, processes: int = 1
) -> Callable[[int, list[int]], list[PairBatch]]:
    """A function for :class:`medllava.train.dataset.Steps`: this process's share of a step. Of several captions of a
    picture one is drawn, by seed, epoch and picture."""

    def make(epoch: int, indices: list[int]) -> list[PairBatch]:
        mine = indices[rank::processes]
        variants = [choose_variant(seed, epoch, index) if flip else 0 for index in mine]
        drawn = [random.Random(f"caption/{seed}/{epoch}/{index}").choice(pairs[index].texts) for index in mine]
        texts = [flip_text(text, variant) for text, variant in zip(drawn, variants, strict=True)]
        pixels = pixel_values(encoder.image_processor, [pairs[index].load() for index in mine])
        return [PairBatch(
            ids=tuple(pairs[index].name for index in mine),
            pixels=torch.stack([flip_pixels(one, variant) for one, variant in zip(pixels, variants, strict=True)]),
            texts=encoder.tokens(texts), classes=torch.tensor([_number(text) for text in texts]),
        )]

    return make


class PairLoss(nn.Module):
    """Sum over a process's pairs of the loss against all pairs of the step. ``pieces``: parts that a step is taken in.

    The temperature is learned, between 1 and 1/100.
    """

    def __init__(self, encoder: ImageTextEncoder, *, pieces: int = 1) -> None:
        super().__init__()
        self.model = encoder.model
        self._sigmoid = encoder.is_siglip
        self._pieces = pieces

    def forward(self, batch: PairBatch) -> torch.Tensor:
        """The sum, a scalar. Every process must call it at once: each needs the others' embeddings."""
        with torch.no_grad():
            self.model.logit_scale.clamp_(0.0, math.log(MAX_SCALE))
        seen, told = self._embed(batch)
        with torch.autocast(seen.device.type, enabled=False):  # similarities times 100 need all their digits
            return self._loss(seen, told, batch.classes)

    def _loss(self, seen: torch.Tensor, told: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        every_seen, every_told, every_class = seen, told, classes
        if dist.is_initialized() and dist.get_world_size() > 1:
            every_seen, every_told = (_Gather.apply(rows) for rows in (seen, told))  # type: ignore[no-untyped-call]
            every_class = _gathered(classes)
        scale = self.model.logit_scale.exp().float()
        logits = scale * seen @ every_told.T
        if self._sigmoid:
            sign = 2.0 * (classes[:, None] == every_class[None, :]).float() - 1.0
            return -functional.logsigmoid(sign * (logits + self.model.logit_bias.float())).sum()
        both = info_nce(logits, classes, every_class, reduction="sum")
        both = both + info_nce(scale * told @ every_seen.T, classes, every_class, reduction="sum")
        return both / 2

    def _embed(self, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors of length 1 of the pictures and of the texts, float32."""
        if self._pieces == 1:
            return self._piece(batch.pixels, *batch.texts.values(), names=tuple(batch.texts))
        parts = zip(
            batch.pixels.chunk(self._pieces), *(value.chunk(self._pieces) for value in batch.texts.values()),
            strict=True,
        )
        piece = partial(self._piece, names=tuple(batch.texts))
        made = [checkpoint(piece, *part, use_reentrant=False) for part in parts]
        return torch.cat([seen for seen, _ in made]), torch.cat([told for _, told in made])

    def _piece(
        self, pixels: torch.Tensor, *texts: torch.Tensor, names: tuple[str, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        told = self.model.get_text_features(**dict(zip(names, texts, strict=True)))
        return unit(self.model.get_image_features(pixel_values=pixels)), unit(told)


def groups_of(module: PairLoss, learning_rate: float) -> list[Group]:
    """All weights; weight decay spares gains, biases and the temperature, as in CLIP."""
    own = {name: value for name, value in module.named_parameters() if value.requires_grad}
    spared = {name: value for name, value in own.items() if value.ndim < 2}
    matrices = {name: value for name, value in own.items() if value.ndim >= 2}
    return [
        Group("encoder", learning_rate, matrices),
        Group("gains, biases, temperature", learning_rate, spared, decays=False),
    ]


def save_encoder(path: Path, encoder: ImageTextEncoder, facts: dict[str, Any]) -> None:
    """Write a stock folder (model, image processor, tokenizer), and ``facts`` beside them."""

    def write(folder: Path) -> None:
        encoder.model.save_pretrained(folder)
        encoder.image_processor.save_pretrained(folder)
        encoder.tokenizer.save_pretrained(folder)
        write_json(folder / PROVENANCE_FILE, {"kind": "image-text encoder", "model_type": encoder.kind} | facts)

    write_folder(path, write, last=("config.json", PROVENANCE_FILE))


def prove_encoder(folder: Path, encoder: ImageTextEncoder) -> None:
    """Open a folder again and compare every weight. Raises CheckpointError naming the first that differs."""
    found = load_encoder(folder, device="cpu").model.state_dict()
    for name, value in encoder.model.state_dict().items():
        if name not in found or not torch.equal(found[name].float(), value.detach().cpu().float()):
            raise CheckpointError(f"{folder}: {name} was written, but is not the same when read back")


def check_batch(batch_size: int, pieces: int, processes: int, pairs: int) -> None:
    """Raises ConfigError if a step cannot be shared out evenly, or there are too few pairs for one."""
    if batch_size % (pieces * processes):
        raise ConfigError(
            f"optim.batch_size {batch_size} must be a multiple of accumulate times processes ({pieces} x {processes})"
        )
    if pairs < batch_size:
        raise ConfigError(f"optim.batch_size is {batch_size}, but there are {pairs} pictures with captions; lower it")


class _Gather(torch.autograd.Function):
    """Rows of all processes, one process after the other; each gets back the gradients of all for its own rows."""

    @staticmethod
    def forward(_: Any, rows: torch.Tensor) -> torch.Tensor:
        return _gathered(rows)

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def _gathered(rows: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def _number(text: str) -> int:
    """The same number for the same caption, on every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
