"""Concepts in what was said: terms of a vocabulary file found in text, and by their votes the sub-pathology of a video.

The vocabulary is a TSV file with a header and the columns ``term``, ``id``, ``synonyms`` (parted by ``;``), ``type``
and ``sub_pathology`` (empty where a term belongs to none). The project's own is
``instruct_gen/vocabulary/histopathology.tsv``;
whoever has a licence for UMLS may write concept ids and names of theirs into the same columns.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from medllava.errors import DataError

COLUMNS = ("term", "id", "synonyms", "type", "sub_pathology")

_TOKEN = re.compile(r"\w+")
_ABBREVIATION = re.compile(r"[A-Z]{2,4}")
_EPONYM = re.compile(r"\b(?!I\b)[A-ZÀ-Ý][a-zà-ÿ]{2,}\b")


@dataclass(frozen=True)
class Concept:
    """One line of a vocabulary."""

    id: str
    term: str
    synonyms: tuple[str, ...] = ()
    type: str = ""
    sub_pathology: str | None = None


@dataclass(frozen=True)
class Mention:
    """A concept and where in the text it stands (characters, end exclusive)."""

    concept: Concept
    start: int
    end: int


class ConceptLinker(Protocol):
    """Anything that finds concepts in a text: the vocabulary here, or an entity linker of your own."""

    def link(self, text: str) -> Sequence[Mention]:
        """The concepts in ``text`` in order, none overlapping another."""
        ...


class Vocabulary:
    """Links by longest match of whole words, whatever their case and number; hyphens and spaces are the same.

    Abbreviations of up to four capitals (PIN, FNA) must be written as such.
    """

    def __init__(self, concepts: Iterable[Concept]) -> None:
        self.concepts = tuple(concepts)
        self._by_words: dict[tuple[str, ...], tuple[Concept, bool]] = {}
        for concept in self.concepts:
            for name in (concept.term, *concept.synonyms):
                words = tuple(word for word, _, _ in _words(name))
                self._by_words.setdefault(words, (concept, bool(_ABBREVIATION.fullmatch(name))))
        self._longest = max((len(words) for words in self._by_words), default=0)
        names = [name for concept in self.concepts for name in (concept.term, *concept.synonyms)]
        self.eponyms = frozenset(word for name in names for word in _EPONYM.findall(name))
        """Names of people that are part of terms, as Hodgkin and Gleason."""

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """Raises DataError naming the file and line where it is not such a table, or two lines share an id."""
        try:
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise DataError(f"vocabulary {path}: cannot be read ({reason})") from error
        if not rows or tuple(rows[0]) != COLUMNS:
            raise DataError(f"vocabulary {path}:1: expected the columns {', '.join(COLUMNS)}, parted by tabs")
        concepts: dict[str, Concept] = {}
        for number, row in enumerate(rows[1:], start=2):
            if len(row) != len(COLUMNS) or not row[0].strip() or not row[1].strip():
                raise DataError(f"vocabulary {path}:{number}: expected {len(COLUMNS)} columns, the first two not empty")
            term, id, synonyms, kind, sub_pathology = (cell.strip() for cell in row)
            if id in concepts:
                raise DataError(f"vocabulary {path}:{number}: the id {id!r} occurs more than once")
            names = tuple(name.strip() for name in synonyms.split(";") if name.strip())
            concepts[id] = Concept(id, term, names, kind, sub_pathology or None)
        return cls(concepts.values())

    def __contains__(self, name: str) -> bool:
        """Whether the whole of ``name`` is a term or synonym."""
        return tuple(word for word, _, _ in _words(name)) in self._by_words

    def concept(self, name: str) -> Concept | None:
        """The concept that the whole of ``name`` names."""
        found = self._by_words.get(tuple(word for word, _, _ in _words(name)))
        return found[0] if found else None

    def link(self, text: str) -> list[Mention]:
        words = _words(text)
        mentions: list[Mention] = []
        at = 0
        while at < len(words):
            for length in range(min(self._longest, len(words) - at), 0, -1):
                found = self._by_words.get(tuple(word for word, _, _ in words[at : at + length]))
                start, end = words[at][1], words[at + length - 1][2]
                if found and (not found[1] or text[start:end].isupper()):
                    mentions.append(Mention(found[0], start, end))
                    at += length
                    break
            else:
                at += 1
        return mentions


def vote(mentions: Iterable[Mention]) -> str | None:
    """The sub-pathology that most of the mentions belong to (of equal ones the first by name); None without any."""
    votes = Counter(mention.concept.sub_pathology for mention in mentions if mention.concept.sub_pathology)
    return min(votes, key=lambda name: (-votes[name], name)) if votes else None


def singular(word: str) -> str:
    """A word without its regular plural ending; the same for both numbers is all that is needed of it."""
    if len(word) > 3 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith(("sses", "xes", "ches", "shes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def _words(text: str) -> list[tuple[str, int, int]]:
    """(word in lower case and singular, start, end); the s of a possessive is no word."""
    found = []
    for match in _TOKEN.finditer(text):
        start, end = match.span()
        if match.group() == "s" and start and text[start - 1] in "'’":
            continue
        found.append((singular(match.group().lower()), start, end))
    return found
