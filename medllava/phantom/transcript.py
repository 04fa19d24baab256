"""Transcripts of a planned case: SubRip subtitles, and words with their times as WhisperX writes them."""

from __future__ import annotations

from typing import Any

from medllava.phantom.session import Line


def to_srt(lines: tuple[Line, ...]) -> str:
    """The lines as SubRip text."""
    return "\n".join(
        f"{number}\n{_clock(line.start_s)} --> {_clock(line.end_s)}\n{line.text}\n"
        for number, line in enumerate(lines, start=1)
    )


def to_words(lines: tuple[Line, ...]) -> dict[str, Any]:
    """The lines as segments with word times; a word's share of the time grows with its letters."""
    return {
        "segments": [
            {"start": line.start_s, "end": line.end_s, "text": line.text, "words": _words(line)} for line in lines
        ]
    }


def _words(line: Line) -> list[dict[str, Any]]:
    words = [word.strip(".,;:!?") for word in line.text.split()]
    weights = [len(word) + 2 for word in words]
    # The end of a segment is a little after its last word.
    length = (line.end_s - line.start_s) * 0.97 / sum(weights)
    timed, t = [], line.start_s
    for word, weight in zip(words, weights, strict=True):
        end = t + weight * length
        timed.append({"word": word, "start": round(t, 3), "end": round(max(end - 0.02, t + 0.01), 3)})
        t = end
    return timed


def _clock(t_s: float) -> str:
    milliseconds = round(t_s * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d},{rest % 1000:03d}"
