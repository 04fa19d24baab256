"""Samples that say nearly the same again: within an image, and, if they are long, anywhere in the data set.

Short samples recur rightly across images ("Where is the gland?" "In the upper left."): it is the picture that differs.
Long ones do not: they are boilerplate, or a lecture that was uploaded twice. What is kept depends on the order of the
samples alone, which is that of the captions, never on the order in which replies came.
"""

from __future__ import annotations

import operator
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha1

import numpy as np
import numpy.typing as npt
from datasketch import MinHash, MinHashLSH

from medllava.conversation import Turn

NEAR = 0.9
"""Jaccard overlap of three-word shingles from which two samples are near-duplicates."""

LONG_WORDS = 40
"""Samples of so many words or more are compared across images."""

_PERMUTATIONS = 128
_WORD = re.compile(r"[a-z0-9.]+")
_Hashes = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Fingerprint:
    """What two samples are compared by: the hashes of their shingles (every three words in a row within a question with
    its answer, boxes kept), in order and each once; of long samples also their MinHash, for comparisons with many."""

    shingles: _Hashes
    minhash: _Hashes | None


def fingerprint(turns: Sequence[Turn], *, across_images: bool = True) -> Fingerprint:
    """``across_images``: whether long samples get a MinHash."""
    shingles, words = _shingles(turns)
    # Four bytes a shingle: a hundred thousand samples take some tens of megabytes.
    packed = np.fromiter(map(zlib.crc32, shingles), np.uint32, len(shingles))
    packed.sort()
    if (packed[1:] == packed[:-1]).any():  # Two shingles of one hash, once in a million samples.
        packed = np.unique(packed)
    if words < LONG_WORDS or not across_images:
        return Fingerprint(packed, None)
    hashed = _minhash()
    hashed.clear()
    # What the library's own sha1_hash32 makes of them, without three Python calls for each.
    hashed.update_batch(np.frombuffer(b"".join([sha1(one).digest()[:4] for one in shingles]), "<u4").tolist())
    return Fingerprint(packed, hashed.hashvalues)


class NearDuplicates:
    """Remembers what was kept, and finds samples that say the same again."""

    def __init__(self) -> None:
        self._kept: dict[str, list[_Hashes]] = {}
        self._across = MinHashLSH(threshold=NEAR, num_perm=_PERMUTATIONS)
        self._hashes: dict[str, _Hashes] = {}

    def fault(self, id: str, image: str, found: Fingerprint) -> str | None:
        """The reason to drop the sample ``id``, or None: then it is remembered."""
        own = found.shingles
        for number, other in enumerate(self._kept.get(image, ())):
            if min(len(own), len(other)) / max(len(own), len(other)) < NEAR:
                continue  # The shorter does not have as many as would have to be shared.
            shared = len(np.intersect1d(own, other, assume_unique=True))
            overlap = shared / (len(own) + len(other) - shared)
            if overlap >= NEAR:
                return f"near-duplicate: {overlap:.2f} like sample {number + 1} of this image"
        reason = None if found.minhash is None else self._fault_elsewhere(id, found.minhash)
        if reason is None:
            self._kept.setdefault(image, []).append(own)
        return reason

    def _fault_elsewhere(self, id: str, hashes: _Hashes) -> str | None:
        hashed = _minhash()
        hashed.hashvalues = hashes
        alike = {
            other: np.count_nonzero(hashes == self._hashes[other]) / _PERMUTATIONS
            for other in self._across.query(hashed)
        }
        near = sorted((-overlap, other) for other, overlap in alike.items() if overlap >= NEAR)
        if near:
            return f"near-duplicate: {-near[0][0]:.2f} like {near[0][1]} of another image"
        self._across.insert(id, hashed)
        self._hashes[id] = hashes
        return None


@cache
def _minhash() -> MinHash:
    """One for all samples, whose permutations are drawn once. It is given hashes, not what is hashed."""
    return MinHash(num_perm=_PERMUTATIONS, seed=1, hashfunc=operator.index)


def _shingles(turns: Sequence[Turn]) -> tuple[set[bytes], int]:
    """The shingles of all pairs of turns, and how many words there are."""
    found: set[bytes] = set()
    count = 0
    for number in range(0, len(turns), 2):
        words = _WORD.findall(" ".join(turn.text for turn in turns[number : number + 2]).lower())
        count += len(words)
        if len(words) < 3:
            found.add(" ".join(words).encode())
        threes = zip(words, words[1:], words[2:], strict=False)
        found.update([f"{one} {two} {three}".encode() for one, two, three in threes])
    return found, count
