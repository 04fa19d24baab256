"""Transcripts that are JSON: what whisper and WhisperX write, and YouTube's ``.json3`` captions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from medllava.errors import DataError
from medllava.instruct_gen.cues import without_overlaps
from medllava.instruct_gen.records import Word
from medllava.instruct_gen.spoken import Faults, Spoken

EXPECTED = "expected whisper's {'segments': [{'start', 'end', 'text', 'words'}, ...]}"


def read_whisper(path: Path, text: str, faults: Faults) -> list[Spoken]:
    """The segments of whisper's or WhisperX's JSON. Raises DataError where there is no list of segments."""
    document = _parsed(path, text)
    segments = document.get("segments") if isinstance(document, dict) else document
    if not isinstance(segments, list):
        raise DataError(f"{path}: {EXPECTED}")
    found: list[Spoken] = []
    for number in range(len(segments)):
        # Each is let go of once it is read: all of them beside all that is made of them would take twice the memory.
        segment, segments[number] = segments[number], None
        place = f": segment {number}"
        try:
            start_s, end_s = float(segment["start"]), float(segment["end"])
            said = " ".join(str(segment["text"]).split())
            words = segment.get("words") or []
        except (TypeError, KeyError, ValueError, AttributeError):
            faults.add("missing keys", f"{place}: expected 'start', 'end' (seconds) and 'text'")
            continue
        if said:
            found.append(Spoken(place, start_s, end_s, said, _timed(words)))
    return found


def read_json3(path: Path, text: str, faults: Faults) -> list[Spoken]:
    """The events of YouTube's timed text. Automatic captions time each word; their events stay on the screen while the
    next ones are shown, and events with ``aAppend`` only begin a new line."""
    document = _parsed(path, text)
    events = document.get("events") if isinstance(document, dict) else None
    if not isinstance(events, list):
        raise DataError(f"{path}: expected YouTube's {{'events': [{{'tStartMs', 'dDurationMs', 'segs'}}, ...]}}")
    found: list[Spoken] = []
    automatic = False
    for number, event in enumerate(events):
        place = f": event {number}"
        try:
            segments = event.get("segs") or []
            said = " ".join("".join(str(segment.get("utf8", "")) for segment in segments).split())
            if not said:
                continue
            start_s = float(event["tStartMs"]) / 1000
            end_s = start_s + float(event.get("dDurationMs", 0)) / 1000
            offsets = [float(segment.get("tOffsetMs", 0)) / 1000 for segment in segments]
        except (TypeError, KeyError, ValueError, AttributeError):
            faults.add("missing keys", f"{place}: expected 'tStartMs', 'dDurationMs' and 'segs'")
            continue
        automatic = automatic or any(offsets)
        texts = [str(segment.get("utf8", "")) for segment in segments]
        words = _words_at(start_s, end_s, offsets, texts) if any(offsets) or len(said.split()) == 1 else ()
        found.append(Spoken(place, start_s, end_s, said, words))
    return without_overlaps(found) if automatic else found


def _parsed(path: Path, text: str) -> Any:
    if not text.strip():
        return []
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise DataError(f"{path}: {EXPECTED}") from error


def _timed(words: Any) -> tuple[Word, ...]:
    """Words as records; none if one of them lacks its times (WhisperX leaves those of numbers out)."""
    try:
        return tuple(
            Word(
                start_s=round(float(word["start"]), 3), end_s=round(max(float(word["end"]), float(word["start"])), 3),
                text=str(word["word"]).strip(), confidence=_confidence(word.get("score", word.get("probability"))),
            )
            for word in words
        )
    except (TypeError, KeyError, ValueError, AttributeError, ValidationError):
        return ()


def _confidence(score: Any) -> float | None:
    if not isinstance(score, int | float) or not math.isfinite(score):
        return None
    return round(min(max(float(score), 0.0), 1.0), 3)


def _words_at(start_s: float, end_s: float, offsets: list[float], texts: list[str]) -> tuple[Word, ...]:
    pieces = [(start_s + offset, text.strip()) for offset, text in zip(offsets, texts, strict=True) if text.strip()]
    ends = [*(at_s for at_s, _ in pieces[1:]), max(end_s, pieces[-1][0])]
    if start_s < 0 or any(len(text.split()) != 1 for _, text in pieces):
        return ()
    if any(end < at_s for (at_s, _), end in zip(pieces, ends, strict=True)):
        return ()
    return tuple(
        Word(start_s=round(at_s, 3), end_s=round(end, 3), text=text)
        for (at_s, text), end in zip(pieces, ends, strict=True)
    )
