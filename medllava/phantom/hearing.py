"""What the phantom's teacher writes about misheard words: terms of its grammar that sound like what stands there."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from difflib import SequenceMatcher
from typing import Any

from medllava.phantom import grammar

_LINE = re.compile(r'^(\d+)\. ("(?:[^"\\]|\\.)*")[ \t]*$', re.MULTILINE)
_WORD = re.compile(r"[^\W\d_]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

LIKE = 0.8
"""Least likeness of letters for a term to be taken for misheard."""

_NAMES = [name for names in grammar.FINDINGS.values() for name in names] + list(grammar.DIAGNOSES)


def _correct(text: str, rng: random.Random) -> dict[str, Any]:
    corrections: list[dict[str, Any]] = []
    medical: list[str] = []
    regions: list[str] = []
    for number, quoted in _LINE.findall(text):
        said = str(json.loads(quoted))
        for wrong, right in _misheard(said):
            corrections.append({"line": int(number), "from": wrong, "to": right})
            said = said.replace(wrong, right)
        for sentence in _SENTENCE_END.split(said):
            plain = sentence.lower()
            named = [name for name in _NAMES if re.search(rf"\b{re.escape(name)}s?\b", plain)]
            if named:
                medical.append(sentence)
                regions += [name for name in named if grammar.find_kinds(name)]
    return {"corrections": corrections, "medical_text": " ".join(medical), "roi_text": list(dict.fromkeys(regions))}


def _misheard(said: str) -> list[tuple[str, str]]:
    """(what stands there, the term that it sounds like), the likest first, none overlapping another."""
    words = [match.span() for match in _WORD.finditer(said)]
    windows = [(first, last) for first in range(len(words)) for last in range(first, min(first + 4, len(words)))]
    found: list[tuple[float, int, int, str]] = []
    for first, last in windows:
        wrong = said[words[first][0] : words[last][1]]
        if not any(re.search(rf"\b{re.escape(name)}s?\b", wrong.lower()) for name in _NAMES):
            found += [(_likeness(wrong, name), first, last, name) for name in _NAMES]
    pairs: list[tuple[str, str]] = []
    taken: set[int] = set()
    for like, first, last, name in sorted(found, key=lambda row: (-row[0], row)):
        if like >= LIKE and taken.isdisjoint(range(first, last + 1)):
            taken.update(range(first, last + 1))
            pairs.append((said[words[first][0] : words[last][1]], name))
    return pairs


def _likeness(wrong: str, name: str) -> float:
    return SequenceMatcher(None, _letters(wrong), _letters(name)).ratio()


def _letters(text: str) -> str:
    return "".join(_WORD.findall(text.lower()))


WRITERS: dict[str, Callable[[str, random.Random], dict[str, Any]]] = {"correct": _correct}
"""Task of a prompt -> what writes the reply."""
