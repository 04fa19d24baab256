"""Mirrored pictures with their words: histology has no upright, so a mirrored field is as real as the original.

A picture may be mirrored left-right, top-bottom or both. Boxes in the text are mirrored, and the words of place are
exchanged (left/right, upper/lower, top/bottom, above/below), as MDETR (Kamath et al. 2021) does with captions. Which
mirror a sample gets depends only on (seed, epoch, sample), so a resumed run repeats it.
"""

from __future__ import annotations

import random
import re

import torch

from medllava.geometry import Box, map_boxes

VARIANTS = 4
"""Mirrors: 0 none, 1 left-right, 2 top-bottom, 3 both (their bits)."""

_SIDEWAYS = {"left": "right", "leftmost": "rightmost", "lefthand": "righthand", "leftward": "rightward"}
_UPRIGHT = {
    "upper": "lower", "top": "bottom", "uppermost": "lowermost", "topmost": "bottommost", "above": "below",
    "upward": "downward",
}


def choose_variant(seed: int, epoch: int, index: int) -> int:
    """The mirror of sample ``index`` in this epoch, each of the four equally often."""
    return random.Random(f"{seed}/{epoch}/{index}").randrange(VARIANTS)


def flip_box(box: Box, variant: int) -> Box:
    """The box in the mirrored picture."""
    x1, y1, x2, y2 = box.as_tuple()
    if variant & 1:
        x1, x2 = 1 - x2, 1 - x1
    if variant & 2:
        y1, y2 = 1 - y2, 1 - y1
    return Box(x1=max(x1, 0.0), y1=max(y1, 0.0), x2=min(x2, 1.0), y2=min(y2, 1.0))


def flip_text(text: str, variant: int) -> str:
    """The text as it would be said of the mirrored picture."""
    if not variant:
        return text
    swaps: dict[str, str] = {}
    if variant & 1:
        swaps |= _SIDEWAYS | {b: a for a, b in _SIDEWAYS.items()}
    if variant & 2:
        swaps |= _UPRIGHT | {b: a for a, b in _UPRIGHT.items()}

    def swap(match: re.Match[str]) -> str:
        word = match.group(0)
        other = swaps[word.lower()]
        if word.isupper():
            return other.upper()
        return other.capitalize() if word[0].isupper() else other

    pattern = r"\b(" + "|".join(sorted(swaps, key=len, reverse=True)) + r")\b"
    return re.sub(pattern, swap, map_boxes(text, lambda box: flip_box(box, variant)), flags=re.IGNORECASE)


def flip_pixels(pixels: torch.Tensor, variant: int) -> torch.Tensor:
    """Mirror (..., height, width). The square padding is mirrored along, which is centred to half a pixel."""
    axes = [axis for bit, axis in ((1, -1), (2, -2)) if variant & bit]
    return pixels.flip(axes) if axes else pixels
