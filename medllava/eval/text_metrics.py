"""Overlap of an open answer with its reference: token precision, recall, F1, exact match, BLEU and ROUGE-L.

All work on the same tokens (:func:`tokens`), so that the numbers of one report can be compared with each other. None of
them knows what a word means: read them beside the answer's length and a judge's grade.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_MOST_WORDS_BLEU = 4


@dataclass(frozen=True)
class Overlap:
    """Each 0..1. ``exact`` is 1 where the tokens are the same in the same order."""

    f1: float
    recall: float
    precision: float
    exact: float
    bleu: float
    rouge_l: float


def tokens(text: str) -> list[str]:
    """Words for comparing open answers: lower case, without punctuation (decimal points stay) and articles."""
    words = re.findall(r"\d+\.\d+|\w+", unicodedata.normalize("NFKC", text).lower())
    return [word for word in words if word not in {"a", "an", "the"}]


def overlap(answer: str, expected: str) -> Overlap:
    """How much of ``expected`` is in ``answer`` and the other way round."""
    given, wanted = tokens(answer), tokens(expected)
    shared = sum((Counter(given) & Counter(wanted)).values())
    if not shared:
        return Overlap(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    precision, recall = shared / len(given), shared / len(wanted)
    common = longest_common(given, wanted)
    return Overlap(
        f1=2 * precision * recall / (precision + recall), recall=recall, precision=precision,
        exact=float(given == wanted), bleu=bleu(given, wanted), rouge_l=2 * common / (len(given) + len(wanted)),
    )


def bleu(given: Sequence[str], wanted: Sequence[str]) -> float:
    """Sentence BLEU of up to 4 words in a row with one added to the counts of 2 and more (Papineni et al. 2002; the
    smoothing of Lin and Och 2004), 0..1."""
    if not given or not wanted:
        return 0.0
    log_sum = 0.0
    for size in range(1, _MOST_WORDS_BLEU + 1):
        own, other = _runs(given, size), _runs(wanted, size)
        extra = size > 1
        hits, total = (own & other).total() + extra, own.total() + extra
        if not hits:
            return 0.0
        log_sum += math.log(hits / total)
    brevity = min(0.0, 1 - len(wanted) / len(given))
    return math.exp(brevity + log_sum / _MOST_WORDS_BLEU)


def _runs(words: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))


def longest_common(given: Sequence[str], wanted: Sequence[str]) -> int:
    """Length of the longest common subsequence, by rows of bits (Hyyrö 2004): ROUGE-L counts it (Lin 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(wanted):
        places[word] = places.get(word, 0) | 1 << place
    every = (1 << len(wanted)) - 1
    row = every
    for word in given:
        match = row & places.get(word, 0)
        row = ((row + match) | (row - match)) & every
    return len(wanted) - row.bit_count()
