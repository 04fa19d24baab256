"""The picture behind the cursor: the median over frames, in constant memory.

Order statistics are taken with a sorting network of element-wise minima and maxima over whole frames, which is many
times faster than sorting the pixels' values and never holds more than the frames themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Generic, TypeVar

import cv2
import numpy as np

from medllava.instruct_gen.video import Plane

Item = TypeVar("Item")


def pixel_ranks(stack: Sequence[Plane], ranks: Sequence[int]) -> list[Plane]:
    """For each rank (0 = smallest) the image of the pixels' values of that rank within ``stack``."""
    if len(stack) == 1:
        return [stack[0] for _ in ranks]
    # Worked on in place: room asked from the system for each step would take longer to get than to fill.
    lanes = list(np.stack(stack))
    spare = np.empty_like(lanes[0])
    for low, high, keep_low, keep_high in _network(len(stack), tuple(sorted(set(ranks)))):
        a, b = lanes[low], lanes[high]
        if keep_low and keep_high:
            cv2.min(a, b, dst=spare)
            cv2.max(a, b, dst=b)
            lanes[low], spare = spare, a
        elif keep_low:
            cv2.min(a, b, dst=a)
        else:
            cv2.max(a, b, dst=b)
    return [lanes[rank].copy() for rank in ranks]


def median(stack: Sequence[Plane]) -> Plane:
    """Median image; of an even number of images the lower of the two middle ones."""
    return pixel_ranks(stack, [(len(stack) - 1) // 2])[0]


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most ``most`` items, evenly spread from the first to the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


class Thinned(Generic[Item]):
    """Keeps ``most // 2`` to ``most`` items, evenly spread over a stream of unknown length."""

    def __init__(self, most: int) -> None:
        self.items: list[Item] = []
        self._most, self._every, self._seen = most, 1, 0

    def add(self, item: Item) -> None:
        if self._seen % self._every == 0:
            if len(self.items) == self._most:
                self.items = self.items[::2]
                self._every *= 2
            if self._seen % self._every == 0:
                self.items.append(item)
        self._seen += 1


@lru_cache(maxsize=64)
def _network(lanes: int, ranks: tuple[int, ...]) -> tuple[tuple[int, int, bool, bool], ...]:
    """Batcher's merge-exchange network for ``lanes`` inputs without the parts that the wanted ranks do not need."""
    pairs: list[tuple[int, int]] = []
    top = 1 << ((lanes - 1).bit_length() - 1)
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            pairs.extend((i, i + d) for i in range(lanes - d) if i & p == r)
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    needed = set(ranks)
    kept = []
    for low, high in reversed(pairs):
        if low in needed or high in needed:
            kept.append((low, high, low in needed, high in needed))
            needed |= {low, high}
    return tuple(reversed(kept))
