"""The numbers of a data card, from the files that ``generate`` and ``narrate`` wrote. Nothing here draws or writes."""

from __future__ import annotations

import hashlib
import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from medllava.conversation import IMAGE_TAG, InstructionSample, sample_from_llava
from medllava.errors import DataError
from medllava.geometry import Box, parse_boxes
from medllava.instruct_gen.image_index import ImageFacts, look_at
from medllava.instruct_gen.leaks import Leak, Member, find_leaks, member
from medllava.instruct_gen.records import CaseFacts, Dropped, GroundedCaption, Narrative
from medllava.jsonl import describe, read_json, read_records, read_rows

PARTS = ("train", "val")

_LABELS = (
    ("videos.jsonl", "domain", "videos by domain"), ("concepts.jsonl", "sub_pathology", "chunks by sub-pathology"),
    ("narratives.jsonl", "magnification", "chunks by magnification"),
)
"""(file, key, heading): what is counted where the records say it."""

HEAT_CELLS = 32
_MOST_BINS = 20
_AREA_BIN = 0.05
_NICE = (1, 2, 5)


@dataclass(frozen=True)
class Spread:
    """How a quantity is spread. ``edges`` and ``counts``: its histogram; the last bin holds all that is larger."""

    n: int
    mean: float = 0.0
    median: float = 0.0
    p90: float = 0.0
    most: float = 0.0
    edges: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()


@dataclass
class KindCount:
    """Samples of one kind, and how long its questions and answers are."""

    samples: int = 0
    train: int = 0
    val: int = 0
    exchanges: int = 0
    images: set[str] = field(default_factory=set)
    question_words: list[int] = field(default_factory=list)
    answer_words: list[int] = field(default_factory=list)


@dataclass
class VideoCount:
    """What one video gave."""

    samples: int = 0
    images: set[str] = field(default_factory=set)
    part: str = ""


@dataclass(frozen=True)
class Boxes:
    """Boxes of the captions or of the samples: ``heat`` (rows, columns) is the part of them that covers each cell."""

    n: int
    area: Spread
    heat: tuple[tuple[float, ...], ...]
    of: int | None = None
    """Phrases, with a box or without, where the boxes are those of phrases."""


@dataclass(frozen=True)
class Example:
    """A sample drawn at random, with what is known of its picture."""

    sample: InstructionSample
    part: str
    caption: GroundedCaption | None
    narrative: Narrative | None


@dataclass(frozen=True)
class Split:
    """Rows, pictures and videos of train and val, and what val shares with train."""

    rows: dict[str, int]
    images: dict[str, int]
    videos: dict[str, int]
    leaks: tuple[Leak, ...]
    unreadable_images: int


@dataclass
class Figures:
    """Everything a card shows."""

    samples: int
    exchanges: int
    images: int
    kinds: dict[str, KindCount]
    videos: dict[str, VideoCount]
    labels: dict[str, Counter[str]]
    """Heading -> how often each value occurs."""
    question_words: Spread
    answer_words: Spread
    caption_boxes: Boxes | None
    sample_boxes: Boxes
    dropped: dict[str, tuple[int, str]]
    no_box: dict[str, int]
    left_out: dict[str, int]
    """Why phrases have no box, and why chunks of video were not used, as narrate counted."""
    answers: dict[str, Counter[str]]
    """Of samples that say so: open or closed, needing the image or general."""
    facts: Counter[str]
    """Of the videos' case facts: all, those with a diagnosis, those of a single case, and their clues."""
    summary: dict[str, Any]
    teachers: Counter[str]
    split: Split | None
    examples: list[Example]
    unredacted: bool
    """The captions that were read hold words that generate was told to redact; they must not be shown."""


def read_figures(
    data: Path, narrated: Path | None, *, examples: int, seed: int, spoken: Path | None = None, cache: bool = True
) -> Figures:
    """Count everything in the folder ``data``; ``narrated`` is the folder of the pictures, if there. ``spoken``: the
    captions that generate read, if not those of ``narrated``; a concepts.jsonl beside them is read too.

    The examples are those whose id has the smallest seeded hash: the same ones however the file is sorted. Raises
    DataError naming the file that is missing or at fault.
    """
    summary, narrate = _optional(data, "summary.json"), _optional(narrated, "narrate.json")
    unredacted = spoken is None and bool(summary.get("redacted"))
    if spoken is None and narrated is not None and (narrated / "captions.jsonl").is_file():
        spoken = narrated / "captions.jsonl"
    part_of, split = _read_split(data, narrated, cache=cache)
    kinds: dict[str, KindCount] = defaultdict(KindCount)
    videos: dict[str, VideoCount] = defaultdict(VideoCount)
    teachers: Counter[str] = Counter()
    answers: dict[str, Counter[str]] = {"answers": Counter(), "image": Counter()}
    boxes = _BoxCounter()
    chosen: list[tuple[int, str, InstructionSample]] = []
    total = 0
    for sample in _samples(data):
        total += 1
        part = part_of.get(sample.id, "")
        _count(sample, part, kinds[sample.kind], videos)
        boxes.add(box for turn in sample.turns for box in parse_boxes(turn.text))
        if sample.answer_type is not None:
            answers["answers"][sample.answer_type] += 1
        if sample.image_dependent is not None:
            answers["image"]["needed" if sample.image_dependent else "not needed"] += 1
        if sample.provenance.teacher:
            teachers[sample.provenance.teacher] += 1
        place = int.from_bytes(hashlib.sha256(f"{seed}/{sample.id}".encode()).digest()[:8], "big")
        # The heap's first is the largest hash, so that it is the one to go.
        entry = (-place, sample.id, sample)
        if len(chosen) < examples:
            heapq.heappush(chosen, entry)
        elif examples and entry[:2] > chosen[0][:2]:
            heapq.heapreplace(chosen, entry)
    if not total:
        raise DataError(f"{data}: no samples in it; make some with: python -m medllava.instruct_gen generate")
    drawn = [sample for *_, sample in sorted(chosen, key=lambda entry: -entry[0])]
    shown = {sample.provenance.chunk for sample in drawn}
    captions: dict[str, GroundedCaption] = {}
    phrases = 0
    pictured = _BoxCounter()
    for caption in read_records(spoken, GroundedCaption) if spoken else ():
        phrases += len(caption.phrases)
        pictured.add(phrase.box for phrase in caption.phrases)
        if caption.id in shown:
            captions[caption.id] = caption
    order = sorted(kinds, key=lambda kind: (-kinds[kind].samples, kind))
    return Figures(
        samples=total,
        exchanges=sum(count.exchanges for count in kinds.values()),
        images=len(set().union(*(count.images for count in kinds.values()))),
        kinds={kind: kinds[kind] for kind in order},
        videos=dict(sorted(videos.items())),
        labels=_labels([folder for folder in (narrated, spoken.parent if spoken else None, data) if folder]),
        question_words=spread([words for count in kinds.values() for words in count.question_words]),
        answer_words=spread([words for count in kinds.values() for words in count.answer_words]),
        caption_boxes=pictured.result(of=phrases) if phrases else None,
        sample_boxes=boxes.result(),
        dropped=_dropped(data),
        no_box=narrate.get("no_box", {}),
        left_out=narrate.get("left_out", {}),
        answers=answers,
        facts=_facts(data),
        summary=summary,
        teachers=teachers,
        split=split,
        examples=_with_pictures(drawn, part_of, captions, narrated),
        unredacted=unredacted,
    )


def spread(values: Sequence[float], width: float | None = None) -> Spread:
    """Mean, median, 90th percentile, maximum and histogram with bins of ``width``, by default a round number that gives
    about twenty; without a width, what is beyond the 99th percentile is in the last bin."""
    if not values:
        return Spread(0)
    known = np.asarray(values, np.float64)
    end = float(known.max() if width else np.percentile(known, 99))
    width = width or _round_up(max(end, 1.0) / _MOST_BINS)
    edges = np.arange(max(int(end / width), 1) + 1 + (end > width and end % width > 0)) * width
    counts, _ = np.histogram(np.minimum(known, edges[-1]), edges)
    return Spread(
        len(known), mean=round(float(known.mean()), 4), median=round(float(np.median(known)), 4),
        p90=round(float(np.percentile(known, 90)), 4), most=round(float(known.max()), 4),
        edges=tuple(round(float(edge), 4) for edge in edges), counts=tuple(int(count) for count in counts),
    )


def words(text: str) -> int:
    """Words of a turn; the picture's tag is none."""
    return len(text.replace(IMAGE_TAG, " ").split())


def reason_name(reason: str) -> str:
    """The fixed name that a reason to drop something begins with."""
    return reason.partition(":")[0].strip()


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... that is not smaller."""
    size = 1
    while True:
        for digit in _NICE:
            if digit * size >= value:
                return float(digit * size)
        size *= 10


def _count(
    sample: InstructionSample, part: str, count: KindCount, videos: dict[str, VideoCount]
) -> None:
    count.samples += 1
    count.train += part == "train"
    count.val += part == "val"
    count.images.update(sample.images)
    for turn in sample.turns:
        if turn.role == "user":
            count.question_words.append(words(turn.text))
        elif turn.role == "assistant":
            count.answer_words.append(words(turn.text))
            count.exchanges += 1
    video = videos[sample.provenance.video or "unknown"]
    video.samples += 1
    video.images.update(sample.images)
    video.part = part if video.part in ("", part) else "both"


class _BoxCounter:
    """Adds up where boxes lie and how large they are."""

    def __init__(self) -> None:
        self._heat = np.zeros((HEAT_CELLS, HEAT_CELLS))
        self._areas: list[float] = []

    def add(self, boxes: Iterable[Box | None]) -> None:
        for box in boxes:
            if box is None:
                continue
            self._areas.append(box.area)
            # A cell counts as covered if its centre lies in the box.
            x0, x1, y0, y1 = (
                round(value * HEAT_CELLS) for value in (box.x1, box.x2, box.y1, box.y2)
            )
            self._heat[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] += 1

    def result(self, of: int | None = None) -> Boxes:
        n = len(self._areas)
        heat = np.round(self._heat / max(n, 1), 4)
        return Boxes(n, spread(self._areas, _AREA_BIN), tuple(tuple(row) for row in heat.tolist()), of)


def _samples(data: Path) -> Iterator[InstructionSample]:
    if (data / "samples.jsonl").is_file():
        yield from read_records(data / "samples.jsonl", InstructionSample)
        return
    for name in ("llava.json", "train.json"):
        if (data / name).is_file():
            for number, row in enumerate(_rows(data / name)):
                yield sample_from_llava(row, f"{data / name}: row {number}")
            return
    raise DataError(f"{data}: expected samples.jsonl, llava.json or train.json in it; generate writes them")


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a JSON list of rows")
    return rows


def _read_split(data: Path, narrated: Path | None, *, cache: bool) -> tuple[dict[str, str], Split | None]:
    """The part of each sample id, and the comparison of train with val, from the two files that training reads."""
    files = {part: data / f"{part}.json" for part in PARTS}
    if not all(path.is_file() for path in files.values()):
        return {}, None
    part_of: dict[str, str] = {}
    members: dict[str, list[Member]] = {part: [] for part in PARTS}
    for part, path in files.items():
        for number, row in enumerate(_rows(path)):
            sample = sample_from_llava(row, f"{path}: row {number}")
            part_of[sample.id] = part
            members[part].append(member(number, sample.id, row, sample.images))
    names = {part: {name for one in members[part] for name in one.images} for part in PARTS}
    facts: dict[str, ImageFacts] = {}
    if narrated is not None:
        facts = look_at(sorted(names["train"] | names["val"]), narrated, cache=cache)
    leaks = find_leaks(members["val"], members["train"], facts, facts)
    return part_of, Split(
        rows={part: len(members[part]) for part in PARTS},
        images={part: len(names[part]) for part in PARTS},
        videos={part: len({one.video for one in members[part] if one.video}) for part in PARTS},
        leaks=tuple(leaks),
        unreadable_images=sum(bool(fact.fault) for fact in facts.values()) if facts else sum(map(len, names.values())),
    )


def _dropped(data: Path) -> dict[str, tuple[int, str]]:
    """Reason -> how often, and the first one's particulars; the most frequent first."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    path = data / "dropped.jsonl"
    if path.is_file():
        for row in read_records(path, Dropped):
            name = reason_name(row.reason)
            counts[name] += 1
            first.setdefault(name, row.reason.partition(":")[2].strip())
    return {name: (count, first[name]) for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))}


def _facts(data: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    path = data / "case_facts.jsonl"
    if path.is_file():
        for facts in read_records(path, CaseFacts):
            counts["videos"] += 1
            counts["with a diagnosis"] += facts.diagnosis is not None
            counts["of a single case"] += facts.single_case
            counts["clues"] += len(facts.clues)
    return counts


def _labels(folders: Sequence[Path]) -> dict[str, Counter[str]]:
    """Domains, sub-pathologies, magnifications and concepts, where there are records of them; of several files with
    the same name, the last folder's counts."""
    found: dict[str, Counter[str]] = {}
    for file, key, heading in _LABELS:
        for path in (folder / file for folder in folders if (folder / file).is_file()):
            counts = Counter(str(row[key]) for _, row in read_rows(path) if row.get(key) is not None)
            if counts:
                found[heading] = counts
    for path in (folder / "concepts.jsonl" for folder in folders if (folder / "concepts.jsonl").is_file()):
        terms: Counter[str] = Counter()
        for _, row in read_rows(path):
            concepts = [one for one in row.get("concepts") or () if isinstance(one, dict)]
            terms.update({str(one["term"]) for one in concepts if "term" in one})
        if terms:
            found["chunks by concept"] = terms
    return found


def _optional(folder: Path | None, name: str) -> dict[str, Any]:
    if folder is None or not (folder / name).is_file():
        return {}
    values = read_json(folder / name)
    return values if isinstance(values, dict) else {}


def _with_pictures(
    samples: Sequence[InstructionSample], part_of: Mapping[str, str], captions: Mapping[str, GroundedCaption],
    narrated: Path | None,
) -> list[Example]:
    wanted = {sample.provenance.chunk for sample in samples}
    narratives: dict[str, Narrative] = {}
    path = narrated / "narratives.jsonl" if narrated else None
    if path is not None and path.is_file():
        for number, row in read_rows(path):
            if row.get("id") in wanted:
                try:
                    narratives[row["id"]] = Narrative.model_validate(row)
                except ValidationError as error:
                    raise DataError(f"{path}:{number}: not a Narrative: {describe(error)}") from error
    return [
        Example(
            sample, part_of.get(sample.id, ""), captions.get(sample.provenance.chunk or ""),
            narratives.get(sample.provenance.chunk or ""),
        )
        for sample in samples
    ]


def plain_time(seconds: float) -> str:
    """Seconds as the player shows them: ``1:02:03`` or ``2:03``."""
    whole = int(seconds)
    minutes, rest = divmod(whole, 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def name_of(kind: str) -> str:
    """A kind or key as words."""
    return re.sub(r"_+", " ", kind)
