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
    lanes = list(stack)
    # Room that is free again is used first: it is in the cache, and to ask the system for more would take longer than
    # to fill it. Only the given images are left as they are.
    free: list[Plane] = []
    for low, high, keep_low, keep_high in _network(len(stack), tuple(sorted(set(ranks)))):
        a, b = lanes[low], lanes[high]
        ours = [plane for lane, plane in ((low, a), (high, b)) if plane is not stack[lane]]
        if keep_low and keep_high:
            lanes[low] = free.pop() if free else np.empty_like(a)
            cv2.min(a, b, dst=lanes[low])
        room = ours.pop() if ours else free.pop() if free else np.empty_like(a)
        if keep_high:
            lanes[high] = room
            cv2.max(a, b, dst=room)
        else:
            lanes[low] = room
            cv2.min(a, b, dst=room)
        free += ours
    return [lanes[rank] for rank in ranks]


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
    """Parberry's pairwise sorting network for ``lanes`` inputs without the parts that the wanted ranks do not need, of
    which it has fewer than Batcher's. (low, high, is the minimum needed, is the maximum needed) for each comparison.
    """
    needed = set(ranks)
    kept = []
    for low, high in reversed(_pairwise(range(1 << (lanes - 1).bit_length()))):
        # Lanes up to the next power of two would hold infinity, which stays where it is.
        if high < lanes and (low in needed or high in needed):
            kept.append((low, high, low in needed, high in needed))
            needed |= {low, high}
    return tuple(reversed(kept))


def _pairwise(lanes: Sequence[int]) -> list[tuple[int, int]]:
    """The comparisons that sort 1, 2, 4, 8, ... lanes; those of a few lanes follow one another."""
    if len(lanes) == 1:
        return []
    pairs = [*zip(lanes[::2], lanes[1::2], strict=True), *_pairwise(lanes[::2]), *_pairwise(lanes[1::2])]
    step = len(lanes) // 2 - 1
    while step:
        pairs += zip(lanes[1:-step:2], lanes[1 + step :: 2], strict=True)
        step //= 2
    return pairs
