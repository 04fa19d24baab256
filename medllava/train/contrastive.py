"""Stage 0a: the demo's image encoder, trained on pictures with captions and on boxes with what was said about them.

It exists only because the demo has no pretrained encoder; real runs start from one. The loss is CLIP's (Radford et al.
2021): each picture against all captions of the batch and each caption against all pictures; equal captions count as
equally right. The region term contrasts the mean of the patches under a box with all distinct texts about boxes in the
batch, which teaches the encoder where things are, not only that they are there.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from medllava.conversation import InstructionSample
from medllava.errors import DataError
from medllava.geometry import Box, parse_boxes, strip_boxes
from medllava.images import load_image
from medllava.jsonl import read_rows
from medllava.model.pixels import pixel_values
from medllava.train.augment import choose_variant, flip_box, flip_pixels, flip_text
from medllava.train.config import Contrastive


@dataclass(frozen=True)
class Pair:
    """A picture, the captions about it as a whole, and its boxes with a text each."""

    image: str
    captions: tuple[str, ...]
    regions: tuple[tuple[Box, str], ...]


@dataclass(frozen=True)
class ContrastiveBatch:
    """pixels (images, 3, side, side). tokens (texts, length): captions first, then the distinct region texts, then the
    distinct placed texts (``upper left`` + region text; none unless the recipe asks for places).

    caption_rows: picture of each caption. region_rows, region_weights (regions, patches; each row sums to 1),
    region_targets, placed_targets: index of each region's text among the region texts, among the placed texts.
    """

    ids: tuple[str, ...]
    pixels: torch.Tensor
    tokens: torch.Tensor
    caption_rows: torch.Tensor
    caption_classes: torch.Tensor
    region_rows: torch.Tensor
    region_weights: torch.Tensor
    region_targets: torch.Tensor
    placed_targets: torch.Tensor
    weight: int = 1

    def to(self, device: torch.device | str) -> ContrastiveBatch:
        if str(device) == "cpu":
            return self
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in tensors.items()}
        return replace(self, **moved)


def read_pairs(
    samples: Sequence[InstructionSample], recipe: Contrastive, captions_file: Path | None
) -> list[Pair]:
    """Captions from samples of ``recipe.kinds``; regions from samples of ``recipe.region_kinds`` (a question with one
    box and an answer without) and from the phrases with boxes in ``captions.jsonl``.

    Raises DataError if there is nothing to learn from."""
    captions: dict[str, list[str]] = {}
    regions: dict[str, list[tuple[Box, str]]] = {}
    for sample in samples:
        if len(sample.images) != 1:
            continue
        image = sample.images[0]
        if sample.kind in recipe.kinds:
            captions.setdefault(image, []).extend(
                strip_boxes(turn.text) for turn in sample.turns if turn.role == "assistant" and strip_boxes(turn.text)
            )
        if sample.kind in recipe.region_kinds:
            for asked, told in zip(sample.turns, sample.turns[1:], strict=False):
                boxes = parse_boxes(asked.text)
                if asked.role == "user" and told.role == "assistant" and len(boxes) == 1 and not parse_boxes(told.text):
                    regions.setdefault(image, []).append((boxes[0], told.text.strip()))
    if captions_file is not None:
        for number, row in read_rows(captions_file):
            try:
                boxed = [
                    (Box.model_validate(phrase["box"]), str(phrase["text"]).strip())
                    for phrase in row["phrases"] if phrase.get("box")
                ]
                regions.setdefault(str(row["image"]), []).extend(boxed)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{captions_file}:{number}: not a caption with phrases and boxes ({error})") from error
    names = sorted(captions.keys() | (regions.keys() if recipe.region_weight else set()))
    if not names:
        raise DataError(
            f"nothing for contrastive training: no sample of kind {', '.join(recipe.kinds)}, and no boxes"
        )
    return [Pair(name, tuple(captions.get(name, ())), tuple(regions.get(name, ()))) for name in names]


class ContrastiveData:
    """Pixels of all pictures in memory, and batches of them for any step."""

    def __init__(
        self, pairs: Sequence[Pair], recipe: Contrastive, *, images: Path, processor: Any, patches: int, seed: int
    ) -> None:
        self._pairs = pairs
        self._recipe = recipe
        self._tokenizer = processor.tokenizer
        self._grid = round(patches**0.5)
        self._seed = seed
        self._tokens: dict[str, torch.Tensor] = {}
        self._pixels: list[torch.Tensor] = []
        self._sizes: list[tuple[int, int]] = []
        for pair in tqdm(pairs, desc="read images", unit="image", mininterval=0.5):
            image = load_image(images / pair.image)
            self._sizes.append(image.size)
            # Half precision halves the memory; the pictures have 8 bits.
            self._pixels.append(pixel_values(processor.image_processor, [image])[0].half())

    def make(self, epoch: int, indices: list[int]) -> list[ContrastiveBatch]:
        """A step's only batch, for :class:`medllava.train.dataset.Steps`; all draws go by seed, epoch and picture."""
        recipe = self._recipe
        pixels, texts, caption_rows = [], [], []
        regions: list[tuple[int, torch.Tensor, str, str]] = []
        for row, index in enumerate(indices):
            pair = self._pairs[index]
            rng = random.Random(f"pair/{self._seed}/{epoch}/{index}")
            variant = choose_variant(self._seed, epoch, index) if recipe.flip else 0
            pixels.append(flip_pixels(self._pixels[index].float(), variant))
            if pair.captions:
                texts.append(flip_text(rng.choice(pair.captions), variant))
                caption_rows.append(row)
            if recipe.region_weight:
                chosen = rng.sample(pair.regions, min(len(pair.regions), recipe.regions_per_image))
                for box, text in chosen:
                    flipped, said = flip_box(box, variant), flip_text(text, variant)
                    weights = patch_weights(flipped, self._sizes[index], self._grid)
                    regions.append((row, weights, said, f"{flipped.centre.quadrant()} {said}"))
        classes = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        region_texts = _numbered(text for _, _, text, _ in regions)
        placed_texts = _numbered(text for _, _, _, text in regions) if recipe.region_places else {}
        return [ContrastiveBatch(
            ids=tuple(self._pairs[index].image for index in indices),
            pixels=torch.stack(pixels),
            tokens=self._encode([*texts, *region_texts, *placed_texts]),
            caption_rows=torch.tensor(caption_rows, dtype=torch.long),
            caption_classes=torch.tensor([classes[text] for text in texts], dtype=torch.long),
            region_rows=torch.tensor([row for row, _, _, _ in regions], dtype=torch.long),
            region_weights=torch.stack([weights for _, weights, _, _ in regions] or [torch.zeros(self._grid**2)]),
            region_targets=torch.tensor([region_texts[text] for _, _, text, _ in regions], dtype=torch.long),
            placed_targets=torch.tensor(
                [placed_texts[text] for _, _, _, text in regions] if placed_texts else [], dtype=torch.long
            ),
        )]

    def _encode(self, texts: Sequence[str]) -> torch.Tensor:
        """(texts, longest) ids with the end token, padded on the right."""
        for text in texts:
            if text not in self._tokens:
                ids = self._tokenizer(text, add_special_tokens=False)["input_ids"][: self._recipe.text_positions - 1]
                self._tokens[text] = torch.tensor([*ids, self._tokenizer.eos_token_id])
        rows = [self._tokens[text] for text in texts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._tokenizer.pad_token_id)


def _numbered(texts: Iterable[str]) -> dict[str, int]:
    """Distinct texts in order of first appearance, each with its number."""
    return {text: number for number, text in enumerate(dict.fromkeys(texts))}


def patch_weights(box: Box, size: tuple[int, int], grid: int) -> torch.Tensor:
    """(grid * grid,): how much of the box lies in each patch of the padded square, summing to 1."""
    x1, y1, x2, y2 = (value * grid for value in box.to_padded(*size))
    edges = torch.arange(grid + 1, dtype=torch.float32)
    wide = (edges[1:].clamp(max=x2) - edges[:-1].clamp(min=x1)).clamp(min=0)
    high = (edges[1:].clamp(max=y2) - edges[:-1].clamp(min=y1)).clamp(min=0)
    shared = (high[:, None] * wide[None, :]).flatten()
    return shared / shared.sum()


def info_nce(
    logits: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, *, reduction: str = "mean"
) -> torch.Tensor:
    """Cross-entropy of each row of ``logits`` (rows, columns) against the columns of its own class (numbers of equal
    captions), which share its probability. With distinct captions: InfoNCE (van den Oord et al. 2018)."""
    equal = (rows[:, None] == columns[None, :]).float()
    return functional.cross_entropy(logits, equal / equal.sum(1, keepdim=True), reduction=reduction)


class ContrastiveLoss(nn.Module):
    """Caption loss and region loss of a batch, weighted as the recipe says. ``clip``: a CLIPModel; the temperature is
    learned, as in CLIP."""

    def __init__(self, clip: Any, recipe: Contrastive) -> None:
        super().__init__()
        self.clip = clip
        self._caption_weight = recipe.caption_weight
        self._region_weight = recipe.region_weight
        self._region_layer = recipe.region_layer
        with torch.no_grad():
            clip.logit_scale.fill_(1 / recipe.temperature).log_()

    def forward(self, batch: ContrastiveBatch) -> torch.Tensor:
        """The weighted mean losses, a scalar."""
        scale = self.clip.logit_scale.clamp(max=4.6052).exp()  # at most 100, as in CLIP
        seen = self.clip.vision_model(pixel_values=batch.pixels, output_hidden_states=True)
        texts = functional.normalize(
            self.clip.text_projection(self.clip.text_model(input_ids=batch.tokens).pooler_output), dim=-1
        )
        loss: torch.Tensor = seen.pooler_output.sum() * 0.0
        captions = len(batch.caption_rows)
        if captions > 1 and self._caption_weight:
            images = self.clip.visual_projection(seen.pooler_output[batch.caption_rows])
            logits = scale * functional.normalize(images, dim=-1) @ texts[:captions].T
            classes = batch.caption_classes
            both = info_nce(logits, classes, classes) + info_nce(logits.T, classes, classes)
            loss = loss + self._caption_weight * both / 2
        if len(batch.region_rows) and self._region_weight:
            patches = self.clip.vision_model.post_layernorm(seen.hidden_states[self._region_layer][:, 1:])
            pooled = (batch.region_weights[:, :, None] * patches[batch.region_rows]).sum(1)
            regions = functional.normalize(self.clip.visual_projection(pooled), dim=-1)
            logits = scale * regions @ texts[captions:].T
            # Two questions to the same patches, each among its own texts: what is it, and what is it and where.
            placed = int(batch.region_targets.max()) + 1
            loss = loss + self._region_weight * functional.cross_entropy(logits[:, :placed], batch.region_targets)
            if len(batch.placed_targets):
                loss = loss + self._region_weight * functional.cross_entropy(logits[:, placed:], batch.placed_targets)
        return loss
