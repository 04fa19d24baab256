"""One narrated video to narratives and grounded captions, in one pass and constant memory.

Frames stream through the test for stillness; a stable run is worked on in windows of at most 20 s, which leave behind a
few numbers per frame (the spots that may be the cursor). What the cursor looks like is known only at the end of the
video, so paths, boxes and records are made then, one chunk's at a time.
"""

from __future__ import annotations

import gc
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import numpy.typing as npt

from medllava.errors import DataError
from medllava.instruct_gen.audio import heard
from medllava.instruct_gen.background import Thinned
from medllava.instruct_gen.cursor import LAG, Background, Floats, SpotFinder, Spots, joined, steadied
from medllava.instruct_gen.frame_filter import (
    LEAST,
    FrameFilter,
    StainFilter,
    ZeroShotFilter,
    load_filter,
    stain_probability,
)
from medllava.instruct_gen.grounding import Mode, grounded_phrases
from medllava.instruct_gen.magnification import Scale, estimate_scale, magnification
from medllava.instruct_gen.picture import KEPT, Crop, encode_png, find_crop, full_median
from medllava.instruct_gen.records import GroundedCaption, Narrative, TracePoint, Utterance, Video
from medllava.instruct_gen.same_view import Views
from medllava.instruct_gen.speech import read_transcript
from medllava.instruct_gen.stable import SHORTEST_S, stable_runs
from medllava.instruct_gen.track import Appearance, doubtful_rests, hot_spot, learn_appearance, likeliest, melted_rests
from medllava.instruct_gen.video import Frame, VideoReader
from medllava.jsonl import atomic_write

WINDOW = 160
"""Most frames worked on at once (20 s at eight a second)."""

LONG_TALK = 400
"""Utterances (some 20 minutes' talk) from which on it is worth 20 ms to give back what reading them took."""

RESTING = 0.5
"""Confidence of places that are inferred from where the cursor came to rest."""


@dataclass(frozen=True)
class Options:
    """What a person may choose about narrating; part of the fingerprint of finished work.

    ``grounding``: rule that gives phrases their boxes, ``seed`` is for the published one.
    ``frame_filter``: folder of an image-text encoder that tells histology, by the sentences of the YAML file
    ``frame_prompts``; None: the stain decides.
    """

    grounding: Mode = "pointing"
    seed: int = 0
    frame_filter: str | None = None
    frame_prompts: str = ""


DEFAULTS = Options()


@dataclass(frozen=True)
class Result:
    """What one video gives.

    ``records`` makes each chunk's narrative, with its caption if anything was said, as it is asked for: records of a
    whole lecture at once would take memory that grows with it. ``no_box`` is complete when ``records`` has ended.
    """

    video: Video
    records: Iterator[tuple[Narrative, GroundedCaption | None]]
    no_box: Counter[str]
    left_out: Counter[str]
    warnings: tuple[str, ...]


class _Speech:
    """A video's utterances, packed until its end: as records, an hour's timed words would take twenty times the memory,
    scattered over more."""

    def __init__(self, utterances: Sequence[Utterance]) -> None:
        lines = [zlib.compress(utterance.model_dump_json().encode(), 1) for utterance in utterances]
        self._lines = b"".join(lines)
        self._bounds = np.cumsum([0, *map(len, lines)])
        self._start_s = np.array([utterance.start_s for utterance in utterances])
        self._end_s = np.array([utterance.end_s for utterance in utterances])

    def during(self, chunk: _Chunk) -> list[Utterance]:
        """The utterances of which at least a half was said during ``chunk``."""
        overlap = np.minimum(self._end_s, chunk.end_s) - np.maximum(self._start_s, chunk.start_s)
        said = np.flatnonzero(np.maximum(0.0, overlap) >= 0.5 * (self._end_s - self._start_s))
        return [self._read(number) for number in said.tolist()]

    def _read(self, number: int) -> Utterance:
        line = self._lines[self._bounds[number] : self._bounds[number + 1]]
        return Utterance.model_validate(json.loads(zlib.decompress(line)))


@dataclass
class _Chunk:
    """A stable run that shows tissue, as measured: its picture is on disk, its cursor not yet decided."""

    start_s: float
    end_s: float
    crop: Crop
    image: str
    spots: Spots
    scale: Scale | None
    same_view_as: str | None


class _Judge:
    """What is asked of a video's pictures besides the cursor: kept or left out, seen before, of which domain."""

    def __init__(self, frame_filter: FrameFilter) -> None:
        self.filter = frame_filter
        self.views = Views()
        self.left_out: Counter[str] = Counter()
        self._domains: dict[str, float] = {}

    def refuses_background(self, background: Background) -> bool:
        """The stain filter's word, known before a run's frames are worked on; other filters see pictures."""
        return isinstance(self.filter, StainFilter) and self._refused(
            stain_probability(background.y, background.u, background.v)
        )

    def refuses_picture(self, picture: npt.NDArray[np.uint8]) -> bool:
        if isinstance(self.filter, StainFilter):
            return False
        if self._refused(self.filter.score([picture])[0]):
            return True
        if isinstance(self.filter, ZeroShotFilter):
            for name, score in self.filter.domain_scores(picture).items():
                self._domains[name] = self._domains.get(name, 0.0) + score
        return False

    def domain(self) -> tuple[str | None, float | None]:
        """The likeliest domain over the pictures that were kept, and its mean score."""
        if not self._domains:
            return None, None
        name = max(self._domains, key=self._domains.__getitem__)
        return name, round(self._domains[name] / sum(self._domains.values()), 4)

    def _refused(self, probability: float) -> bool:
        self.left_out[self.filter.reason] += probability < LEAST
        return probability < LEAST


def narrate(video: Path, transcript: Path, out: Path, options: Options = DEFAULTS) -> Result:
    """Work through one video; its frames go to ``out/frames``. Raises DataError naming the file that is at fault."""
    cv2.setNumThreads(1)
    reader = VideoReader(video)
    if reader.video.duration_s < SHORTEST_S:
        raise DataError(
            f"{video}: lasts {reader.video.duration_s:.1f} s; expected {SHORTEST_S:g} s or more, the least for which a"
            " view must hold still"
        )
    spoken = read_transcript(transcript, reader.video.duration_s)
    utterances, silent = heard(video, spoken.utterances)
    remarks = [*spoken.warnings, *silent]
    speech = _Speech(utterances)
    talk = len(utterances)
    del spoken, utterances
    if talk >= LONG_TALK:
        # The interpreter's own lists of free objects pin the memory of all those words until a full collection.
        gc.collect()
    finder = SpotFinder()
    judge = _Judge(load_filter(options.frame_filter, options.frame_prompts))
    chunks: list[_Chunk] = []
    try:
        for _, run in groupby(stable_runs(reader.frames()), key=lambda pair: pair[0]):
            identity = f"{video.stem}-{len(chunks):03d}"
            chunk = _measure((frame for _, frame in run), reader, finder, judge, identity, out)
            if chunk is not None:
                chunks.append(chunk)
    except BaseException:
        # A video that fails half-way (damaged, disk full, Ctrl-C) leaves no pictures behind.
        for chunk in chunks:
            (out / chunk.image).unlink(missing_ok=True)
        raise
    domain, domain_score = judge.domain()
    probed = reader.video.model_copy(update={"domain": domain, "domain_score": domain_score})
    if not chunks:
        remarks.append(f"{video}: nothing in it holds still for {SHORTEST_S:g} s and shows histology")
    no_box: Counter[str] = Counter()
    records = _records(chunks, speech, finder, reader, options, no_box)
    return Result(probed, records, no_box, +judge.left_out, tuple(remarks))


def fingerprint(options: Options, *files: Path) -> str:
    """Changes when the options, a file or the code of this step does: then the work is done again."""
    digest = hashlib.sha256((repr(options) + code_digest()).encode())
    for path in files:
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
        with path.open("rb") as file:
            digest.update(file.read(65536))
    return digest.hexdigest()


@cache
def code_digest() -> str:
    """SHA-256 of the code of this step, as it was when it was first asked for."""
    digest = hashlib.sha256()
    for code in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(code.read_bytes())
    return digest.hexdigest()


def _measure(
    frames: Iterator[Frame], reader: VideoReader, finder: SpotFinder, judge: _Judge, identity: str, out: Path
) -> _Chunk | None:
    """Work through one run of still frames; None if it is too short or shows no tissue."""
    held: list[Frame] = []
    sources: Thinned[av.VideoFrame] = Thinned(KEPT)
    windows: list[Spots] = []
    start_s = end_s = -1.0
    context = seen = 0
    first: Background | None = None
    for frame in frames:
        start_s = frame.t_s if start_s < 0 else start_s
        end_s = frame.t_s
        if frame.source is not None:
            sources.add(frame.source)
        # A window's frames are worked on reduced: their full-size pictures would take most of the memory.
        held.append(replace(frame, source=None))
        if len(held) == WINDOW:
            held = steadied(held)
            background = Background.of(held)
            if first is None and judge.refuses_background(background):
                return None
            first = first or background
            windows.append(finder.find(held, background, range(context, WINDOW // 2), seen))
            # A few frames stay as the next ones' past.
            gone = WINDOW // 2 - LAG
            del held[:gone]
            context, seen = LAG, seen + gone
    if end_s - start_s < SHORTEST_S:
        return None
    held = steadied(held)
    background = Background.of(held)
    if first is None and judge.refuses_background(background):
        return None
    windows.append(finder.find(held, background, range(context, len(held)), seen))
    width, height = reader.video.width, reader.video.height
    x0, y0, x1, y1 = crop = find_crop(background, width, height)
    picture = np.ascontiguousarray(reader.upright(full_median(sources.items))[y0:y1, x0:x1])
    if judge.refuses_picture(picture):
        return None
    image = f"frames/{identity}.png"
    with atomic_write(out / image, "wb") as file:
        file.write(encode_png(picture))
    same_view_as = judge.views.find_or_add(identity, background.y, crop)
    return _Chunk(start_s, end_s, crop, image, joined(windows), estimate_scale(picture), same_view_as)


def _records(
    chunks: Sequence[_Chunk], speech: _Speech, finder: SpotFinder, reader: VideoReader, options: Options,
    no_box: Counter[str],
) -> Iterator[tuple[Narrative, GroundedCaption | None]]:
    """Each chunk's records; reasons for phrases without a box are counted into ``no_box``."""
    appearance = learn_appearance(finder.outside_zone(chunk.spots) for chunk in chunks)
    offset = hot_spot(finder.patches.items, appearance) if appearance is not None else np.zeros(2, np.float32)
    for number, chunk in enumerate(chunks):
        trace = _trace(chunk, finder, appearance, offset, reader)
        said = speech.during(chunk)
        common: dict[str, Any] = {
            "id": f"{reader.path.stem}-{number:03d}", "video": reader.video.name, "image": chunk.image,
            "crop_px": chunk.crop,
        }
        power = magnification(chunk.scale, (utterance.text for utterance in said))
        narrative = Narrative(
            start_s=round(chunk.start_s, 3), end_s=round(chunk.end_s, 3), trace=tuple(trace), utterances=tuple(said),
            same_view_as=chunk.same_view_as,
            mpp=chunk.scale.mpp if chunk.scale else None,
            mpp_confidence=chunk.scale.confidence if chunk.scale else None,
            magnification=power.objective if power else None, magnification_from=power.source if power else None,
            **common,
        )
        size = (chunk.crop[2] - chunk.crop[0], chunk.crop[3] - chunk.crop[1])
        phrases, reasons = grounded_phrases(said, trace, size, options.grounding, options.seed)
        no_box += reasons
        yield narrative, GroundedCaption(phrases=tuple(phrases), **common) if phrases else None


def _trace(
    chunk: _Chunk, finder: SpotFinder, appearance: Appearance | None, offset: Floats, reader: VideoReader
) -> list[TracePoint]:
    """The cursor's path through a chunk, 0..1 of its picture."""
    if appearance is None:
        return []
    x0, y0, x1, y1 = chunk.crop
    spots = finder.outside_zone(chunk.spots)
    path = likeliest(spots, appearance)
    scores = appearance.score(spots.looks[path]) + 2 * spots.moving[path]
    sure = ~doubtful_rests(spots, path, scores)
    path, scores = path[sure], scores[sure]
    confidence = 1 / (1 + np.exp(-scores))
    points = [*zip(spots.t_s[path].tolist(), *spots.xy[path].T.tolist(), confidence.tolist(), strict=True)]
    points += [(*rest, RESTING) for rest in melted_rests(spots, path, appearance, chunk.start_s, chunk.end_s)]
    trace = []
    for t_s, x, y, certainty in sorted(points):
        across = ((x + offset[0] + 0.5) * reader.reduction - x0) / (x1 - x0)
        down = ((y + offset[1] + 0.5) * reader.reduction - y0) / (y1 - y0)
        if -0.02 <= across <= 1.02 and -0.02 <= down <= 1.02:
            trace.append(
                TracePoint(
                    t_s=round(t_s, 3), x=min(max(float(across), 0.0), 1.0), y=min(max(float(down), 0.0), 1.0),
                    confidence=round(certainty, 3),
                )
            )
    return trace

