"""Transcripts for videos that have none: speech recognition with word times, by faster-whisper or a Whisper folder.

A transcript is written once, as OUT/transcripts/STEM.words.json in the form of whisper's JSON; edit it freely, it is
not made again unless another recogniser is asked for. Sound is read in windows, so memory does not grow with a lecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from medllava.errors import ConfigError, DataError, MissingExtraError
from medllava.instruct_gen.audio import decoded
from medllava.instruct_gen.speech import find_transcript
from medllava.instruct_gen.video import VideoReader
from medllava.jsonl import read_json, write_json

RATE = 16_000
"""Samples a second that Whisper hears."""

QUIET_S = 0.2
"""Windows are cut in the quietest moment of this length in their last third."""

LONGEST_GAP_S = 1.0
LONGEST_SEGMENT_S = 15.0
"""Words without punctuation are parted where the speaker pauses so long, and after so long at the latest."""

Samples = npt.NDArray[np.float32]


class Recogniser(Protocol):
    """Turns sound into whisper's segments (``start``, ``end``, ``text``, ``words``), times from the sound's start."""

    window_s: float
    """Sound that it likes to get at once."""

    def segments(self, samples: Samples) -> Sequence[dict[str, Any]]:
        """``samples``: mono, 16 kHz, -1..1."""
        ...


class FasterWhisper:
    """faster-whisper (CTranslate2), with its own detection of voice."""

    window_s = 600.0

    def __init__(self, model: str) -> None:
        try:
            from faster_whisper import WhisperModel
        except ImportError as error:
            raise MissingExtraError("faster-whisper", "asr", error) from error
        try:
            self._model = WhisperModel(model)
        except (ValueError, RuntimeError, OSError) as error:
            raise ConfigError(
                f"--asr faster-whisper:{model}: cannot be loaded ({_one_line(error)}); give a size (small, large-v3),"
                " which is downloaded, or a folder in CTranslate2 format"
            ) from error

    def segments(self, samples: Samples) -> list[dict[str, Any]]:
        found, _ = self._model.transcribe(
            samples, word_timestamps=True, vad_filter=True, condition_on_previous_text=False
        )
        return [
            {
                "start": segment.start, "end": segment.end, "text": segment.text.strip(),
                "words": [
                    {"word": word.word.strip(), "start": word.start, "end": word.end, "score": word.probability}
                    for word in segment.words or ()
                ],
            }
            for segment in found
        ]


class LocalWhisper:
    """A Whisper folder in Hugging Face format."""

    window_s = 28.0

    def __init__(self, folder: str) -> None:
        from medllava.model.speech_recognition import WordRecogniser

        self._words = WordRecogniser(Path(folder))

    def segments(self, samples: Samples) -> list[dict[str, Any]]:
        words = [{"word": text, "start": start, "end": end} for text, start, end in self._words.words(samples)]
        return [_segment(group) for group in _sentences(words)]


_BACKENDS: dict[str, Callable[[str], Recogniser]] = {"faster-whisper": FasterWhisper, "transformers": LocalWhisper}


def load_recogniser(choice: str) -> Recogniser:
    """``faster-whisper:MODEL_OR_DIR`` or ``transformers:DIR``, ready to use. Raises ConfigError, MissingExtraError."""
    backend, _, model = choice.partition(":")
    if backend not in _BACKENDS or not model:
        raise ConfigError(f"--asr {choice}: expected faster-whisper:MODEL_OR_DIR or transformers:DIR")
    return _BACKENDS[backend](model)


def transcribe_missing(
    videos: Sequence[Path], transcripts: Path | None, out: Path, choice: str
) -> dict[str, str]:
    """Write a transcript into ``out`` for each video that has none. Returns the reason for each that gave none."""
    missing = [video for video in videos if not _has_transcript(video, transcripts or video.parent)]
    missing = [video for video in missing if not _is_done(_path(video, out), choice)]
    failures: dict[str, str] = {}
    if not missing:
        return failures
    recogniser = load_recogniser(choice)
    for video in tqdm(missing, desc="speech recognition", unit="video"):
        try:
            VideoReader(video)  # Of a damaged video the damage is what to hear of.
            segments = [segment for segment in transcribe(video, recogniser) if segment["text"]]
        except DataError as error:
            failures[video.name] = str(error)
            continue
        write_json(_path(video, out), {"asr": choice, "segments": segments})
    return failures


def transcribe(video: Path, recogniser: Recogniser) -> Iterator[dict[str, Any]]:
    """The segments of a whole video. Raises DataError where it has no sound that can be decoded."""
    silent = True
    try:
        for start_s, samples in windows(video, recogniser.window_s):
            silent = False
            for segment in recogniser.segments(samples):
                yield _moved(segment, start_s)
    except (av.error.FFmpegError, ValueError) as error:
        raise DataError(f"{video}: the audio track cannot be decoded ({_one_line(error)})") from error
    if silent:
        raise DataError(f"{video}: no transcript, and no audio track to make one from")


def windows(video: Path, longest_s: float) -> Iterator[tuple[float, Samples]]:
    """(start in seconds, samples at 16 kHz) of a video's sound, each window cut where it is quiet."""
    pieces: list[Samples] = []
    held = 0
    start_s: float | None = None
    longest = round(longest_s * RATE)
    for piece_s, _, piece in decoded(video, RATE):
        start_s = max(0.0, piece_s) if start_s is None else start_s
        gap = round((piece_s - start_s) * RATE) - held
        if gap > RATE // 10:
            # Sound is missing in the file: without filling, all that follows would come too early.
            pieces.append(np.zeros(gap, np.float32))
            held += gap
        pieces.append(piece[0])
        held += piece.shape[1]
        while held >= longest:
            samples = np.concatenate(pieces)
            cut = _quietest(samples[:longest])
            yield start_s, samples[:cut]
            pieces, held, start_s = [samples[cut:]], len(samples) - cut, start_s + cut / RATE
    if held and start_s is not None:
        yield start_s, np.concatenate(pieces)


def _quietest(samples: Samples) -> int:
    """Where to cut: the middle of the quietest moment in the last third."""
    first, length = len(samples) * 2 // 3, round(QUIET_S * RATE)
    energy = np.cumsum(np.square(samples[first:], dtype=np.float64))
    return first + int(np.argmin(energy[length:] - energy[:-length])) + length // 2


def _moved(segment: dict[str, Any], by_s: float) -> dict[str, Any]:
    def later(piece: dict[str, Any]) -> dict[str, Any]:
        return {**piece, "start": round(float(piece["start"]) + by_s, 3), "end": round(float(piece["end"]) + by_s, 3)}

    return {**later(segment), "words": [later(word) for word in segment["words"]]}


def _sentences(words: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    for word in words:
        if group and (
            group[-1]["word"][-1] in ".?!…"
            or word["start"] - group[-1]["end"] > LONGEST_GAP_S
            or word["end"] - group[0]["start"] > LONGEST_SEGMENT_S
        ):
            yield group
            group = []
        group.append(word)
    if group:
        yield group


def _segment(words: list[dict[str, Any]]) -> dict[str, Any]:
    text = " ".join(word["word"] for word in words)
    return {"start": words[0]["start"], "end": words[-1]["end"], "text": text, "words": words}


def _has_transcript(video: Path, folder: Path) -> bool:
    try:
        find_transcript(video, folder)
    except DataError:
        return False
    return True


def _path(video: Path, out: Path) -> Path:
    return out / f"{video.stem}.words.json"


def _is_done(path: Path, choice: str) -> bool:
    try:
        document = read_json(path) if path.is_file() else None
    except DataError:
        return False
    return isinstance(document, dict) and document.get("asr") == choice


def _one_line(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error)).split())[:200]
