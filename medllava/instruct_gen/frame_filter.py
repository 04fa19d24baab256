"""Which pictures show histology: by their stain (no weights needed), or by any zero-shot image encoder.

A filter gives each picture a probability; those below :data:`LEAST` are left out and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from medllava.config import Recipe, load_recipe
from medllava.instruct_gen.video import Plane

Pixels = npt.NDArray[np.uint8]

LEAST = 0.5
"""Pictures that are less likely histology are left out."""

CELL = 8
"""Side, in chroma pixels, of the cells in which tissue is looked for."""

LARGEST_AREA, SLOPE = 0.1, 25.0
"""Share of the picture that one stained, textured area fills where tissue is as likely as not, and how fast the
probability changes there."""

FEW_COLOURS = 0.78
"""Share of the coloured pixels that four colours have where a page (text, charts, windows) is as likely as tissue."""

STAINED = 5
"""Chroma beyond which a place is coloured."""

LINES = 360
"""Pictures are looked at with about this many lines."""


class FrameFilter(Protocol):
    """``reason``: what a picture is counted as that is left out."""

    reason: str

    def score(self, images: Sequence[Pixels]) -> list[float]:
        """For each RGB picture (height x width x 3) the probability 0..1 that it shows histology."""
        ...


class StainFilter:
    """Tissue is coloured and textured over one large area, in many shades. Lines of text, a logo and a talking head are
    small areas on flat colours. Coloured photographs of other things are not told from tissue.
    """

    reason = "no stained tissue"

    def score(self, images: Sequence[Pixels]) -> list[float]:
        return [stain_probability(*_planes(image)) for image in images]


def stain_probability(y: Plane, u: Plane, v: Plane) -> float:
    """0..1 that planes at about 360 lines (``u`` and ``v`` half as large) show stained tissue."""
    rows, columns = (size // CELL for size in u.shape)
    stain = np.hypot(u.astype(np.float32) - 128, v.astype(np.float32) - 128)
    halved = cv2.resize(y, (u.shape[1], u.shape[0]), interpolation=cv2.INTER_AREA)
    luma = halved.astype(np.float32)
    mean = _cell_mean(luma, rows, columns)
    rough = np.sqrt(np.maximum(_cell_mean(luma * luma, rows, columns) - mean**2, 0)) > 1.5
    seen = (rough & (_cell_mean(stain, rows, columns) > STAINED)).astype(np.uint8)
    areas = cv2.connectedComponentsWithStats(seen, connectivity=4)[2][1:, cv2.CC_STAT_AREA]
    if not len(areas):
        return 0.0
    share = float(areas.max()) / seen.size
    few = _share_of_few_colours(halved, u, v, stain > STAINED)
    return float(_logistic(SLOPE * (share - LARGEST_AREA)) * _logistic(SLOPE * (FEW_COLOURS - few)))


def _share_of_few_colours(y: Plane, u: Plane, v: Plane, stained: npt.NDArray[np.bool_]) -> float:
    """The part of the stained pixels that the four commonest of some coarse colours have."""
    colour = (y[stained].astype(np.int32) // 8 << 12) + ((u[stained].astype(np.int32) + 1) // 4 << 6)
    colour += (v[stained].astype(np.int32) + 1) // 4
    counts = np.bincount(colour)
    commonest = np.sort(counts[counts > 0])[-4:]
    return float(commonest.sum() / max(1, len(colour)))


def _logistic(value: float) -> float:
    return float(1 / (1 + np.exp(-value)))


def _planes(image: Pixels) -> tuple[Plane, Plane, Plane]:
    scale = max(1, round(image.shape[0] / LINES))
    height, width = (max(2 * CELL, size // (2 * scale) * 2) for size in image.shape[:2])
    image = np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    y, v, u = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb))
    half = (width // 2, height // 2)
    u, v = (cv2.resize(plane, half, interpolation=cv2.INTER_AREA) for plane in (u, v))
    return y, u, v


def _cell_mean(values: npt.NDArray[np.float32], rows: int, columns: int) -> npt.NDArray[np.float32]:
    cut = values[: rows * CELL, : columns * CELL]
    return np.asarray(cv2.resize(cut, (columns, rows), interpolation=cv2.INTER_AREA), np.float32)


class Prompts(Recipe):
    """What a zero-shot encoder compares pictures with; each list of sentences is averaged."""

    histology: list[str] = Field(min_length=1)
    other: list[str] = Field(min_length=1)
    domains: dict[str, list[str]] = Field(min_length=2)


class Encoder(Protocol):
    """An image-text encoder, as :class:`medllava.model.zero_shot.ZeroShot` is one."""

    def probabilities(self, images: Sequence[Pixels], classes: Sequence[Sequence[str]]) -> list[list[float]]:
        """For each picture the probability of each class, given as sentences; a row sums to 1."""
        ...


class ZeroShotFilter:
    """Histology against everything else by an encoder's zero-shot scores; also tells the medical domain."""

    reason = "not histology by the encoder"

    def __init__(self, encoder: Encoder, prompts: Prompts) -> None:
        self._encoder, self._prompts = encoder, prompts

    def score(self, images: Sequence[Pixels]) -> list[float]:
        # Each sentence is a class of its own: an average over unlike negatives would look like none of them.
        sentences = [*self._prompts.histology, *self._prompts.other]
        rows = self._encoder.probabilities(images, [[sentence] for sentence in sentences])
        return [sum(row[: len(self._prompts.histology)]) for row in rows]

    def domain_scores(self, image: Pixels) -> dict[str, float]:
        """The probability of each domain for one picture."""
        names = list(self._prompts.domains)
        (row,) = self._encoder.probabilities([image], [self._prompts.domains[name] for name in names])
        return dict(zip(names, row, strict=True))


@lru_cache(maxsize=1)
def load_filter(model: str | None, prompts: str) -> FrameFilter:
    """The stain filter, or the zero-shot one of a Hugging Face CLIP or SigLIP folder with a file of prompts.

    Raises ConfigError or CheckpointError, which name what is missing.
    """
    if model is None:
        return StainFilter()
    from medllava.model.zero_shot import ZeroShot

    return ZeroShotFilter(ZeroShot(Path(model)), load_recipe(Path(prompts), Prompts))
