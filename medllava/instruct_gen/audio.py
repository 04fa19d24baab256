"""The sound of a video: how loud it is over time, and speech that lies where nothing can be heard.

Speech recognisers invent words in silence ("Thank you for watching"), and a transcript may belong to another take. An
utterance that lies in silence was not said in this video.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from medllava.instruct_gen.records import Utterance
from medllava.instruct_gen.video import only

STEP_S = 0.05
"""Loudness is measured over spans of this length."""

FLOOR_DB = -60.0
"""Below this (dB of full scale) nothing is heard, whatever the rest of the recording is like."""

BELOW_SPEECH_DB = 25.0
"""Silence is this much below the file's own speech; rooms are some 30 to 50 dB below it."""

SPEECH_QUANTILE = 0.95
"""The level that all but the loudest part of the sound stays under is taken for that of speech."""

SILENT_SHARE = 0.8
"""An utterance is dropped if this part of its time is silent."""

STRETCH_S = 2.0
"""Sound is measured in stretches of about this length."""

Levels = npt.NDArray[np.float32]
Samples = npt.NDArray[np.float32]

Piece = tuple[float, int, Samples]
"""Start in seconds, samples a second, samples [channels, n]."""


def heard(video: Path, utterances: Sequence[Utterance]) -> tuple[tuple[Utterance, ...], tuple[str, ...]]:
    """The utterances that do not lie in silence, and warnings. All of them where the video has no audio track."""
    levels, fault = measure_levels(video)
    if levels is None:
        return tuple(utterances), (f"{video}: {fault}; speech is not checked against it",) if fault else ()
    quiet = levels < silence_below(levels)
    kept = tuple(utterance for utterance in utterances if _quiet_share(quiet, utterance) < SILENT_SHARE)
    dropped = [utterance for utterance in utterances if utterance not in set(kept)]
    if not dropped:
        return kept, ()
    first = f"{dropped[0].start_s:.1f} s: {dropped[0].text[:40]!r}"
    return kept, (f"{video}: dropped {len(dropped)} of {len(utterances)} utterances that lie in silence ({first})",)


def measure_levels(video: Path) -> tuple[Levels | None, str | None]:
    """Loudness in dB of full scale per :data:`STEP_S` from the video's start; None without an audio track, and with the
    reason where the track cannot be decoded. Memory grows by some twelve bytes per step only."""
    sums, counts = array("d"), array("i")
    try:
        for start_s, rate, samples in _stretches(decoded(video)):
            length = samples.shape[1]
            first, last = (int((start_s + number / rate) // STEP_S) for number in (0, length - 1))
            if last < 0:
                continue
            missing = last + 1 - len(sums)
            sums.extend(repeat(0.0, missing))
            counts.extend(repeat(0, missing))
            # The numbers of the samples with which the steps first, first + 1, ... and the one after the last begin.
            bounds = np.ceil((np.arange(first, last + 2) * STEP_S - start_s) * rate).astype(int).clip(0, length)
            energy = np.append(np.square(samples).mean(0), np.float32(0))
            totals = np.add.reduceat(energy, bounds[:-1], dtype=np.float64)
            within = np.diff(bounds).tolist()
            for step, total, count in zip(range(first, last + 1), totals.tolist(), within, strict=True):
                if step >= 0 and count:
                    sums[step] += total
                    counts[step] += count
    except (av.error.FFmpegError, ValueError) as error:
        return None, f"the audio track cannot be decoded ({getattr(error, 'strerror', None) or error})"
    if not sums:
        return None, None
    power = np.array(sums) / np.maximum(counts, 1)
    return (10 * np.log10(np.maximum(power, 1e-12))).astype(np.float32), None


def _stretches(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Pieces that follow one another without a gap as one, some seconds long: arithmetic on short ones costs more than
    their decoding."""
    held: list[Samples] = []
    begin_s, held_rate, count = 0.0, 0, 0
    for start_s, rate, samples in pieces:
        follows = held and rate == held_rate and len(samples) == len(held[0])
        if held and (not follows or count >= rate * STRETCH_S or abs(begin_s + count / rate - start_s) > 0.1 * STEP_S):
            yield begin_s, held_rate, np.concatenate(held, axis=1)
            held.clear()
        if not held:
            begin_s, held_rate, count = start_s, rate, 0
        held.append(samples)
        count += samples.shape[1]
    if held:
        yield begin_s, held_rate, np.concatenate(held, axis=1)


def silence_below(levels: Levels) -> float:
    """The level (dB) under which a recording is silent: well below its own speech, at least :data:`FLOOR_DB`."""
    audible = levels[levels >= FLOOR_DB]
    if not len(audible):
        return FLOOR_DB
    return max(FLOOR_DB, float(np.quantile(audible, SPEECH_QUANTILE)) - BELOW_SPEECH_DB)


def decoded(video: Path, rate: int | None = None) -> Iterator[Piece]:
    """(start in seconds from the video's start, samples a second, samples [channels, n] in -1..1), piece by piece;
    mono at ``rate`` if one is asked for. Nothing without an audio track. Raises FFmpegError where decoding fails."""
    with av.open(str(video), metadata_errors="ignore") as container:
        if not container.streams.audio or container.streams.audio[0].codec_context is None:
            return
        stream = container.streams.audio[0]
        begin_s = (container.start_time or 0) / av.time_base
        only(container, stream)
        resampler = av.AudioResampler(format="fltp", layout="mono" if rate else None, rate=rate)
        next_s = 0.0
        for frame in container.decode(stream):
            start_s = frame.time - begin_s if frame.time is not None else next_s
            next_s = start_s + frame.samples / frame.sample_rate
            if rate is None and frame.format.name == "fltp":
                channels = [np.frombuffer(plane, np.float32, frame.samples) for plane in frame.planes]
                yield start_s, frame.sample_rate, np.stack(channels) if len(channels) > 1 else channels[0][None]
                continue
            frame.pts = None
            for piece in _resampled(resampler, frame):
                yield start_s, piece.sample_rate, piece.to_ndarray()


def _resampled(resampler: Any, frame: av.AudioFrame) -> list[Any]:
    return [piece for piece in resampler.resample(frame) if piece.samples]


def _quiet_share(quiet: npt.NDArray[np.bool_], utterance: Utterance) -> float:
    """The part of an utterance's time in which nothing is heard; sound that has ended is not heard."""
    first = int(utterance.start_s / STEP_S)
    count = max(1, round((utterance.end_s - utterance.start_s) / STEP_S))
    within = quiet[first : first + count]
    return float((within.sum() + count - len(within)) / count)
