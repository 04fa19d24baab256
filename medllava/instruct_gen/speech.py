"""Transcripts beside a video, as utterances with times: WhisperX or whisper JSON, YouTube's json3, SubRip, WebVTT.

An utterance is one sentence where the transcript tells sentences apart, and one caption where it does not (automatic
captions have no punctuation). One bad cue does not lose a lecture:

==============================================  ==================================================================
in single cues                                  left out, with a warning that counts them
in more than half of the cues                   the transcript is refused
negative or unreadable times, no length,
more text than can be said in the time
times past the video's end                      left out too, but refused where they are more than two and more than
                                                one in ten: the transcript of another video
out of order, overlapping                       put in order, kept with their own times, with a warning
lines repeated by rolling captions              said once, no warning
text that is neither UTF-8 nor UTF-16           read in the encoding that it most likely has, with a warning
empty, no cue, not JSON                         refused
==============================================  ==================================================================
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from medllava.errors import DataError
from medllava.instruct_gen.cues import read_cues
from medllava.instruct_gen.records import Utterance, Word
from medllava.instruct_gen.spoken import LATE, Faults, Spoken, fault_of
from medllava.instruct_gen.timed_words import read_json3, read_whisper

ENDINGS = (".words.json", ".json", ".json3", ".srt", ".vtt")
"""Transcripts looked for beside a video, best first: word times before cue times, what people wrote before what comes
from a screen. Downloaders put the language before the ending (``talk.en.json3``): those are looked for last."""

LARGEST_BYTES = 200 * 2**20
"""A larger file is no transcript."""

OVERLAP_S = 0.05
"""Cues that overlap by less do so by rounding."""

_READERS = {".json": read_whisper, ".json3": read_json3, ".srt": read_cues, ".vtt": read_cues}
_LANGUAGE = re.compile(r"\.[a-z]{2,3}(-[A-Za-z0-9]+)*$")
_SOUND = re.compile(r"[\[(♪][^\])]*[\])♪]|♪+")
_SENTENCE_GAP = re.compile(r"(?<=[.?!…])\s+")


@dataclass(frozen=True)
class Transcript:
    """What was said, in order of time, and what a person should know about how it was read."""

    utterances: tuple[Utterance, ...]
    warnings: tuple[str, ...] = ()


def find_transcript(video: Path, *folders: Path) -> Path:
    """The best transcript with the video's stem in one of ``folders`` (default: beside the video). Raises DataError."""
    places = folders or (video.parent,)
    for where in places:
        for ending in ENDINGS:
            path = where / (video.stem + ending)
            if path.is_file():
                return path
        for ending in ENDINGS:
            for path in sorted(where.iterdir()) if where.is_dir() else ():
                language = path.name.removeprefix(video.stem).removesuffix(ending)
                if path.name == f"{video.stem}{language}{ending}" and _LANGUAGE.fullmatch(language):
                    return path
    raise DataError(
        f"{video}: no transcript; expected {video.stem} with one of {', '.join(ENDINGS)} in {places[0]}"
        " (WhisperX writes both .json and .srt; --asr makes one)"
    )


def read_transcript(path: Path, duration_s: float = math.inf) -> Transcript:
    """Read one transcript. Raises DataError naming the file, the place and what was expected."""
    text, warnings = _read_text(path)
    faults = Faults()
    pieces = [piece for piece in _READERS[path.suffix](path, text, faults) if not _SOUND.fullmatch(piece.text)]
    usable: list[Spoken] = []
    for piece in pieces:
        fault = fault_of(piece, duration_s)
        if fault:
            faults.add(*fault)
        else:
            usable.append(piece)
    _refuse_mostly_bad(path, faults, len(usable))
    if not usable:
        raise DataError(f"{path}: the transcript is empty; expected at least one utterance with its times")
    warnings += faults.lines(str(path))
    ordered = sorted(usable, key=lambda piece: (piece.start_s, piece.end_s))
    if ordered != usable:
        warnings.append(f"{path}: not in order of time; sorted")
    overlaps = sum(after.start_s < before.end_s - OVERLAP_S for before, after in pairwise(ordered))
    if overlaps:
        warnings.append(f"{path}: {overlaps} overlap the one before; kept with their own times")
    utterances = [utterance for piece in ordered for utterance in _sentences(piece)]
    return Transcript(tuple(sorted(utterances, key=lambda u: (u.start_s, u.end_s))), tuple(warnings))


def _refuse_mostly_bad(path: Path, faults: Faults, usable: int) -> None:
    late, total = faults.counts.get(LATE, 0), faults.total + usable
    if faults.total * 2 <= total and (late <= 2 or late * 10 <= total):
        return
    kind = LATE if late and late * 2 >= faults.total else max(faults.counts, key=lambda kind: faults.counts[kind])
    raise DataError(f"{path}{faults.first[kind]}" + (f" ({faults.total} of {total} are unusable)" if total > 1 else ""))


def _read_text(path: Path) -> tuple[str, list[str]]:
    """The text, and a warning if its encoding had to be guessed."""
    try:
        size = path.stat().st_size
        if size > LARGEST_BYTES:
            raise DataError(f"{path}: {size / 2**20:.0f} MiB; no transcript is larger than {LARGEST_BYTES >> 20} MiB")
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return raw.decode(encoding), []
    except UnicodeDecodeError as error:
        guess = _guessed_encoding(raw)
        if guess is None:
            raise DataError(
                f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it, for example with iconv"
            ) from error
        return raw.decode(guess), [f"{path}: not UTF-8 text; read as {guess}: check its accents"]


def _guessed_encoding(raw: bytes) -> str | None:
    if b"\0" in raw:
        return None
    foreign = sum(byte > 127 for byte in raw)
    try:
        # A few accents among plain letters: Western, by far the most common, and too few to tell by their statistics.
        if foreign * 10 < len(raw):
            raw.decode("cp1252")
            return "cp1252"
    except UnicodeDecodeError:
        pass
    from charset_normalizer import from_bytes

    best = from_bytes(raw[:1_000_000]).best()
    if best is None:
        return None
    try:
        raw.decode(best.encoding)
    except UnicodeDecodeError:
        return None
    return best.encoding


def _sentences(whole: Spoken) -> list[Utterance]:
    """A piece cut into its sentences at the times of their words, or by their lengths if its words do not say."""
    texts = [part for part in _SENTENCE_GAP.split(whole.text) if part]
    words = whole.words if len(whole.words) == len(whole.text.split()) else ()
    if not words:
        return _sentences_by_length(whole, texts)
    if len(texts) == 1:
        return [_utterance(whole.start_s, whole.end_s, texts[0], words)]
    found, first = [], 0
    for sentence in texts:
        count = len(sentence.split())
        own = words[first : first + count]
        if own[-1].end_s <= own[0].start_s:
            return _sentences_by_length(whole, texts)
        found.append(_utterance(own[0].start_s, own[-1].end_s, sentence, own))
        first += count
    return found


def _sentences_by_length(whole: Spoken, texts: list[str]) -> list[Utterance]:
    """Sentences of a piece, its time shared out by their lengths."""
    total = sum(map(len, texts))
    found, at_s = [], whole.start_s
    for number, text in enumerate(texts):
        end_s = at_s + (whole.end_s - whole.start_s) * len(text) / total
        end_s = whole.end_s if number == len(texts) - 1 else end_s
        found.append(_utterance(at_s, end_s, text, ()))
        at_s = end_s
    return found


def _utterance(start_s: float, end_s: float, text: str, words: tuple[Word, ...]) -> Utterance:
    return Utterance(start_s=round(start_s, 3), end_s=round(end_s, 3), text=text, words=words)
