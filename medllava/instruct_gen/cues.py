"""SubRip and WebVTT, also as made by automatic captioning, whose window of two lines repeats what it showed before."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from medllava.errors import DataError
from medllava.instruct_gen.records import Word
from medllava.instruct_gen.spoken import Faults, Spoken, too_long

JOIN_GAP_S = 0.3
LONGEST_JOINED_S = 12.0
"""Subtitles that break a sentence over cues are joined again across gaps up to the first, up to the second in all."""

ROLLING = 0.3
"""Captions roll if this part of the cues begins with the line on which the one before ended."""

MOST_MARKED_UP = 100_000
"""Characters of a cue with its tags; more is not looked into."""

_LINE_END = re.compile(r"\r\n|\n|\r")
_TIME = re.compile(r"(-?)(?:(\d+):)?(\d{1,2}):(\d{1,2})[.,](\d{1,3})")
_ARROW = re.compile(r"^\s*(\S+)\s+-->\s+(\S+)")
_TAG = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")
_WORD_TIME = re.compile(r"<((?:\d+:)?\d{1,2}:\d{2}\.\d{1,3})>")
_SENTENCE_END = re.compile(r"[.?!…][\"'”’)]*$")


@dataclass(frozen=True)
class _Cue:
    place: str
    start_s: float
    end_s: float
    lines: tuple[str, ...]
    """The lines with words in them, tags included."""

    def plain(self) -> list[str]:
        return [_plain(line) for line in self.lines]


def read_cues(path: Path, text: str, faults: Faults) -> list[Spoken]:
    """The cues of a subtitle file, in the file's order. Raises DataError where it holds no cue time at all."""
    cues = list(_cues(text, faults))
    if text.strip() and not cues and not faults.total and not text.lstrip().startswith("WEBVTT"):
        raise DataError(f"{path}: no cue found; expected lines like 00:00:01,000 --> 00:00:02,500")
    rolls = sum(
        after.plain()[:1] == before.plain()[-1:] and after.start_s - before.end_s <= 0.1
        for before, after in pairwise(cues)
    )
    if len(cues) > 2 and rolls >= ROLLING * (len(cues) - 1):
        return list(_unrolled(cues))
    return _joined([Spoken(cue.place, cue.start_s, cue.end_s, " ".join(cue.plain())) for cue in cues])


def _cues(text: str, faults: Faults) -> Iterator[_Cue]:
    lines = _LINE_END.split(text)
    starts = [number for number, line in enumerate(lines) if "-->" in line]
    for start, following in zip(starts, [*starts[1:], len(lines)], strict=False):
        place = f":{start + 1}"
        arrow = _ARROW.match(lines[start])
        if arrow is None:
            faults.add("unreadable times", f"{place}: not a cue time: {lines[start].strip()[:60]!r}")
            continue
        times = [_seconds(part) for part in arrow.groups()]
        if None in times:
            wrong = arrow.group(1 + times.index(None))
            faults.add("unreadable times", f"{place}: not a time: {wrong[:40]!r}; expected HH:MM:SS,mmm")
            continue
        start_s, end_s = (time for time in times if time is not None)
        said = _said(lines[start + 1 : following], last=following == len(lines))
        if sum(map(len, said)) > MOST_MARKED_UP:
            faults.add("too much text", f"{place}: {sum(map(len, said)):,} characters; not speech")
        elif any(map(_plain, said)):
            yield _Cue(place, start_s, end_s, tuple(line for line in said if _plain(line)))


def _said(lines: list[str], *, last: bool) -> list[str]:
    """The cue's own lines of those up to the next cue time. A line of blanks alone is part of automatic captions; it
    ends a cue only where a number or name of the next one follows."""
    if "" in lines:
        return lines[: lines.index("")]
    if not last and lines and (lines[-1].strip().isdigit() or (len(lines) > 1 and not lines[-2].strip())):
        return lines[:-1]
    return lines


def _seconds(text: str) -> float | None:
    found = _TIME.fullmatch(text)
    if found is None:
        return None
    sign, hours, minutes, seconds, fraction = found.groups()
    value = int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + int(fraction.ljust(3, "0")) / 1000
    return -value if sign else value


def _plain(line: str) -> str:
    return " ".join(html.unescape(_TAG.sub("", line)).split())


def _unrolled(cues: list[_Cue]) -> Iterator[Spoken]:
    """Rolling captions with each line said once, none reaching into the next."""
    shown: list[str] = []
    new: list[Spoken] = []
    for cue in sorted(cues, key=lambda cue: (cue.start_s, cue.end_s)):
        plain = cue.plain()
        most = min(len(shown), len(plain))
        known = next(count for count in range(most, -1, -1) if plain[:count] == shown[len(shown) - count :])
        shown = plain
        if known < len(plain):
            words = _words(" ".join(cue.lines[known:]), cue.start_s, cue.end_s)
            new.append(Spoken(cue.place, cue.start_s, cue.end_s, " ".join(plain[known:]), words))
    yield from without_overlaps(new)


def without_overlaps(pieces: list[Spoken]) -> list[Spoken]:
    """Pieces in order of time, each ended where the next begins: automatic captions stay on the screen longer than
    they are said."""
    ordered = sorted(pieces, key=lambda piece: (piece.start_s, piece.end_s))
    cut: list[Spoken] = []
    for piece, after in zip(ordered, [*ordered[1:], None], strict=True):
        end_s = piece.end_s if after is None else min(piece.end_s, after.start_s)
        # Two that begin at once cannot be told apart in time: the first keeps its length.
        end_s = end_s if end_s > piece.start_s else piece.end_s
        words = tuple(word.model_copy(update={"end_s": min(word.end_s, end_s)}) for word in piece.words)
        ends_well = all(word.end_s >= word.start_s for word in words)
        cut.append(replace(piece, end_s=end_s, words=words if ends_well else ()))
    return cut


def _words(line: str, start_s: float, end_s: float) -> tuple[Word, ...]:
    """The words between time tags (``one<00:01.500><c> two</c>``); none if some word has no time of its own."""
    first, *pieces = _WORD_TIME.split(line)
    starts = [start_s, *(_seconds(time) or 0.0 for time in pieces[::2])]
    texts = [_plain(text) for text in (first, *pieces[1::2])]
    if len(texts) < 2 or any(len(text.split()) != 1 for text in texts) or starts != sorted(starts) or starts[0] < 0:
        return ()
    ends = [*starts[1:], max(end_s, starts[-1])]
    return tuple(
        Word(start_s=round(start, 3), end_s=round(end, 3), text=text)
        for start, end, text in zip(starts, ends, texts, strict=True)
    )


def _joined(cues: list[Spoken]) -> list[Spoken]:
    """Cues that break a sentence put together; left alone in transcripts without punctuation."""
    ended = sum(bool(_SENTENCE_END.search(cue.text)) for cue in cues)
    if ended < 0.3 * len(cues):
        return cues
    joined: list[Spoken] = []
    for cue in cues:
        before = joined[-1] if joined else None
        if (
            before is not None
            and not _SENTENCE_END.search(before.text)
            and before.start_s < before.end_s < cue.end_s
            and not too_long(cue.text, cue.end_s - cue.start_s)
            and -0.05 <= cue.start_s - before.end_s <= JOIN_GAP_S
            and cue.end_s - before.start_s <= LONGEST_JOINED_S
        ):
            joined[-1] = replace(before, end_s=cue.end_s, text=f"{before.text} {cue.text}")
        else:
            joined.append(cue)
    return joined
