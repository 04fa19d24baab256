"""Transcripts beside a video, as utterances with times: WhisperX or whisper JSON, SubRip, WebVTT.

An utterance is one sentence where the transcript tells sentences apart. What a transcript cannot mean (negative times,
a cue that ends before it starts, speech after the video's end) is refused with the place named; cues out of order or
overlapping are common and harmless, and are put in order.
"""

from __future__ import annotations

import html
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

from medllava.errors import DataError
from medllava.instruct_gen.records import Utterance

log = logging.getLogger(__name__)

ENDINGS = (".words.json", ".json", ".srt", ".vtt")
"""Transcripts looked for beside a video, best first: word times before cue times."""

LATE_S = 2.0
"""Speech this much after the video's end means that the transcript belongs to another video."""

JOIN_GAP_S = 0.3
LONGEST_JOINED_S = 12.0
"""Subtitles that break a sentence over cues are joined again across gaps up to the first, up to the second in all."""

_TIME = re.compile(r"(-?)(?:(\d+):)?(\d{1,2}):(\d{1,2})[.,](\d{1,3})")
_ARROW = re.compile(r"^\s*(\S+)\s+-->\s+(\S+)")
_TAG = re.compile(r"<[^>]*>|\{\\[^}]*\}")
_SENTENCE_END = re.compile(r"[.?!…][\"'”’)]*$")


def find_transcript(video: Path, folder: Path | None = None) -> Path:
    """The best transcript with the video's stem in ``folder`` (default: beside the video). Raises DataError if none."""
    where = folder or video.parent
    for ending in ENDINGS:
        path = where / (video.stem + ending)
        if path.is_file():
            return path
    raise DataError(
        f"{video}: no transcript; expected {video.stem} with one of {', '.join(ENDINGS)} in {where}"
        " (WhisperX writes both .json and .srt)"
    )


def read_transcript(path: Path, duration_s: float = math.inf) -> list[Utterance]:
    """Utterances in order of time. Raises DataError naming the file, the place and what was expected."""
    text = _read_text(path)
    found = _from_json(path, text) if path.suffix == ".json" else _from_cues(path, text)
    if not found:
        raise DataError(f"{path}: the transcript is empty; expected at least one utterance with its times")
    last = max(found, key=lambda utterance: utterance.end_s)
    if last.end_s > duration_s + LATE_S:
        raise DataError(
            f"{path}: an utterance ends at {last.end_s:.1f} s, but the video is {duration_s:.1f} s long:"
            f" the transcript of another video? ({last.text[:40]!r})"
        )
    ordered = sorted(found, key=lambda utterance: (utterance.start_s, utterance.end_s))
    if ordered != found:
        log.warning("%s: utterances were not in order of time; sorted", path)
    return ordered


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it, for example with iconv"
        ) from error


def _utterance(path: Path, place: str, start_s: float, end_s: float, text: str) -> Utterance:
    if not (math.isfinite(start_s) and math.isfinite(end_s)) or start_s < 0:
        raise DataError(f"{path}{place}: times {start_s} to {end_s} s; expected seconds from the video's start")
    if end_s <= start_s:
        raise DataError(f"{path}{place}: ends at {end_s:g} s, not after its start at {start_s:g} s")
    return Utterance(start_s=round(start_s, 3), end_s=round(end_s, 3), text=text)


# -- JSON ------------------------------------------------------------------------------------------------------------


def _from_json(path: Path, text: str) -> list[Utterance]:
    if not text.strip():
        return []
    try:
        document: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
    segments = document.get("segments") if isinstance(document, dict) else document
    if not isinstance(segments, list):
        raise DataError(f"{path}: expected whisper's {{'segments': [{{'start', 'end', 'text', 'words'}}, ...]}}")
    found: list[Utterance] = []
    for number, segment in enumerate(segments):
        place = f": segment {number}"
        try:
            start_s, end_s = float(segment["start"]), float(segment["end"])
            said = " ".join(str(segment["text"]).split())
            words = segment.get("words") or []
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise DataError(f"{path}{place}: expected 'start', 'end' (seconds) and 'text'") from error
        if said:
            whole = _utterance(path, place, start_s, end_s, said)
            found.extend(_sentences_by_word(path, place, whole, words))
    return found


def _sentences_by_word(path: Path, place: str, whole: Utterance, words: list[Any]) -> list[Utterance]:
    """A segment cut into its sentences at the times of their words; whole if its words do not say more."""
    timed = [w for w in words if isinstance(w, dict) and {"word", "start", "end"} <= w.keys()]
    texts = [part for part in re.split(r"(?<=[.?!…])\s+", whole.text) if part]
    # WhisperX leaves the times of numbers out; then a count of words no longer tells where a sentence ends.
    if len(texts) < 2 or len(timed) != len(words) or len(words) != len(whole.text.split()):
        return _sentences_by_length(whole)
    found, first = [], 0
    for sentence in texts:
        last = first + len(sentence.split()) - 1
        found.append(_utterance(path, place, float(timed[first]["start"]), float(timed[last]["end"]), sentence))
        first = last + 1
    return found


def _sentences_by_length(whole: Utterance) -> list[Utterance]:
    """Sentences of a cue, its time shared out by their lengths."""
    texts = [part for part in re.split(r"(?<=[.?!…])\s+", whole.text) if part]
    total = sum(map(len, texts))
    found, at_s = [], whole.start_s
    for number, text in enumerate(texts):
        end_s = at_s + (whole.end_s - whole.start_s) * len(text) / total
        end_s = whole.end_s if number == len(texts) - 1 else round(end_s, 3)
        found.append(Utterance(start_s=at_s, end_s=end_s, text=text))
        at_s = end_s
    return found


# -- SubRip and WebVTT -----------------------------------------------------------------------------------------------


def _from_cues(path: Path, text: str) -> list[Utterance]:
    cues: list[Utterance] = []
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        arrow = _ARROW.match(lines[number])
        number += 1
        if arrow is None:
            if "-->" in lines[number - 1]:
                raise DataError(f"{path}:{number}: not a cue time: {lines[number - 1].strip()[:60]!r}")
            continue
        place = f":{number}"
        start_s, end_s = (_seconds(path, place, part) for part in arrow.groups())
        said: list[str] = []
        while number < len(lines) and lines[number].strip():
            said.append(lines[number])
            number += 1
        spoken = " ".join(html.unescape(_TAG.sub("", " ".join(said))).split())
        if spoken:
            cues.append(_utterance(path, place, start_s, end_s, spoken))
    if text.strip() and not cues and not text.lstrip().startswith("WEBVTT"):
        raise DataError(f"{path}: no cue found; expected lines like 00:00:01,000 --> 00:00:02,500")
    if any(after.start_s < before.end_s - 0.05 for before, after in zip(cues, cues[1:], strict=False)):
        log.warning("%s: cues overlap or are out of order; they are kept with their own times", path)
    whole = _joined(sorted(cues, key=lambda cue: cue.start_s))
    return [sentence for cue in whole for sentence in _sentences_by_length(cue)]


def _seconds(path: Path, place: str, text: str) -> float:
    found = _TIME.fullmatch(text)
    if found is None:
        raise DataError(f"{path}{place}: not a time: {text!r}; expected HH:MM:SS,mmm")
    sign, hours, minutes, seconds, fraction = found.groups()
    value = int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + int(fraction.ljust(3, "0")) / 1000
    return -value if sign else value


def _joined(cues: list[Utterance]) -> list[Utterance]:
    """Cues that break a sentence put together; left alone in transcripts without punctuation."""
    ended = sum(bool(_SENTENCE_END.search(cue.text)) for cue in cues)
    if ended < 0.3 * len(cues):
        return cues
    joined: list[Utterance] = []
    for cue in cues:
        before = joined[-1] if joined else None
        if (
            before is not None
            and not _SENTENCE_END.search(before.text)
            and -0.05 <= cue.start_s - before.end_s <= JOIN_GAP_S
            and cue.end_s - before.start_s <= LONGEST_JOINED_S
        ):
            joined[-1] = Utterance(start_s=before.start_s, end_s=cue.end_s, text=f"{before.text} {cue.text}")
        else:
            joined.append(cue)
    return joined
