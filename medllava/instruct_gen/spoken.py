"""What the readers of transcripts pass on: pieces of speech as the file gives them, and what was wrong with some."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from medllava.instruct_gen.records import Word

LONGEST_TEXT = 2000
FASTEST = 100
"""A piece of speech has at most the first number of characters, or the second for each of its seconds (talk has some
15): what is longer is a document that slipped into a cue, not speech."""

LATE_S = 2.0
"""Speech this much after the video's end was said in another video."""


@dataclass(frozen=True)
class Spoken:
    """One cue or segment. ``place`` says where in the file it stands (``:12``, ``: segment 3``); ``words`` only where
    every one of them is timed."""

    place: str
    start_s: float
    end_s: float
    text: str
    words: tuple[Word, ...] = ()


@dataclass
class Faults:
    """Pieces of speech that cannot be used: each costs itself, not the lecture. Kinds are told with their first
    example."""

    first: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        self.first.setdefault(kind, example)
        self.counts[kind] = self.counts.get(kind, 0) + 1

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def lines(self, where: str) -> list[str]:
        """One line per kind of fault."""
        return [
            f"{where}: left out {count} with {kind} (the first{self.first[kind]})" if count > 1
            else f"{where}: left out one with {kind} ({self.first[kind].removeprefix(':').strip()})"
            for kind, count in self.counts.items()
        ]


def too_long(text: str, seconds: float) -> bool:
    """Whether a text is no speech of that time."""
    return len(text) > max(LONGEST_TEXT, FASTEST * seconds)


def fault_of(piece: Spoken, duration_s: float) -> tuple[str, str] | None:
    """(kind of fault, place and what is wrong) of a piece that cannot be used in a video of that length."""
    start_s, end_s, place = piece.start_s, piece.end_s, piece.place
    if not (math.isfinite(start_s) and math.isfinite(end_s)) or start_s < 0:
        return "impossible times", f"{place}: times {start_s} to {end_s} s; expected seconds from the video's start"
    if end_s <= start_s:
        return "no length", f"{place}: ends at {end_s:g} s, not after its start at {start_s:g} s"
    if too_long(piece.text, end_s - start_s):
        return "too much text", f"{place}: {len(piece.text):,} characters in {end_s - start_s:.1f} s; not speech"
    if end_s > duration_s + LATE_S:
        return LATE, (
            f": an utterance ends at {end_s:.1f} s, but the video is {duration_s:.1f} s long:"
            f" the transcript of another video? ({piece.text[:40]!r})"
        )
    return None


LATE = "times past the video's end"
