"""Write questions about phantom videos, with answers from their truth, in the form that ``medllava eval`` reads.

example:
  python -m medllava.phantom.questions --videos test/videos --narratives test/narratives.jsonl --out questions.jsonl

Each question is about the image of one narrative, as ``medllava instruct_gen narrate`` cut it out of the video; a
narrative whose video has no truth in --videos, or whose image is not one field of tissue, is left out. Per kind of
question, answers are spread evenly: over quadrants and findings, half yes and half no, one empty quadrant in six.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medllava.errors import ConfigError, DataError, run_cli
from medllava.geometry import QUADRANTS, Box, box_from_pixels, format_box
from medllava.jsonl import read_json, read_rows, write_records
from medllava.phantom import grammar

log = logging.getLogger(__name__)

STROMA = "stroma"
"""Answer to what an empty quadrant shows."""

_LEAST_OVERLAP = 0.5
_LEAST_VISIBLE = 0.8
"""A narrative whose crop leaves less of a finding than this is left out: its truth would be in doubt."""
_NARRATIVE_KEYS = ("id", "video", "start_s", "end_s", "image", "crop_px")


@dataclass(frozen=True)
class View:
    """The image of one narrative and what it holds: finding kind -> box, 0..1 of the image."""

    narrative_id: str
    image: str
    video: str
    boxes: dict[str, Box]

    @property
    def by_quadrant(self) -> dict[str, str]:
        """Quadrant -> finding kind."""
        return {box.centre.quadrant(): kind for kind, box in self.boxes.items()}


@dataclass(frozen=True)
class _Candidate:
    """A question that could be asked; ``stratum`` is what the choice among candidates is spread over."""

    view: View
    stratum: Hashable
    row: dict[str, Any]


def read_views(videos: Path, narratives: Path) -> list[View]:
    """Narratives matched to the truth of their videos. Raises DataError if a file or a row cannot be used."""
    truths: dict[str, dict[str, Any] | None] = {}
    views, left_out = [], Counter[str]()
    for number, row in read_rows(narratives):
        missing = [key for key in _NARRATIVE_KEYS if key not in row]
        if missing:
            raise DataError(f"{narratives}:{number}: a narrative needs {', '.join(missing)}")
        name = Path(row["video"]).stem
        if name not in truths:
            path = videos / f"{name}.truth.json"
            truths[name] = read_json(path) if path.exists() else None
        truth = truths[name]
        if truth is None:
            left_out[f"no truth in {videos}"] += 1
            continue
        boxes = _boxes_in_view(row, truth)
        if boxes is None:
            left_out["the image is not one whole field of tissue"] += 1
            continue
        views.append(View(row["id"], row["image"], row["video"], boxes))
    for reason, count in left_out.items():
        log.info("%d narratives left out: %s", count, reason)
    if not views:
        raise DataError(f"{narratives}: no narrative shows a field of the videos in {videos}; was it made from these?")
    return views


def _boxes_in_view(row: dict[str, Any], truth: dict[str, Any]) -> dict[str, Box] | None:
    """Finding kind -> box in the narrative's image, or None if the image is not safely one field."""

    def shared(field: dict[str, Any]) -> float:
        return float(min(row["end_s"], field["end_s"]) - max(row["start_s"], field["start_s"]))

    field = max(truth["fields"], key=shared)
    if shared(field) < _LEAST_OVERLAP * (row["end_s"] - row["start_s"]):
        return None
    boxes: dict[str, Box] = {}
    for finding in field["findings"]:
        box = _crop(Box.model_validate(finding["box"]), row["crop_px"], truth["width"], truth["height"])
        if box is None:
            return None
        boxes[finding["kind"]] = box
    # A crop can move two findings into one quadrant; then "what is in the upper left" has two answers.
    if len({box.centre.quadrant() for box in boxes.values()}) < len(boxes):
        return None
    return boxes


def _crop(box: Box, crop_px: Sequence[int], width: int, height: int) -> Box | None:
    """A box of the frame as a box of the cropped image; None if too little of it is left."""
    left, top, right, bottom = crop_px
    x0, y0, x1, y1 = box.to_pixels(width, height)
    cropped = box_from_pixels(x0 - left, y0 - top, x1 - left, y1 - top, right - left, bottom - top)
    if cropped is None:
        return None
    whole = (x1 - x0) * (y1 - y0) / ((right - left) * (bottom - top))
    return cropped if cropped.area >= _LEAST_VISIBLE * whole else None


def write_questions(views: Sequence[View], seed: int, per_kind: int) -> list[dict[str, Any]]:
    """Up to ``per_kind`` questions of each kind, rows with the keys of an eval ``Question``, in a stable order."""
    rng = random.Random(seed)
    half, sixth = per_kind // 2, per_kind // 6
    where, boxes = _about_places(views, rng)
    present, absent = _about_presence(views, rng)
    occupied, empty = _about_quadrants(views, rng)
    half = min(half, len(present), len(absent))
    named = _spread(occupied, per_kind - sixth, rng)
    chosen = (
        _spread(where, per_kind, rng),
        _spread(present, half, rng) + _spread(absent, half, rng),
        named + _spread(empty, min(sixth, len(named) // 5), rng),
        _spread(_about_number(views, rng), per_kind, rng),
        _spread(boxes, per_kind, rng),
    )
    return [candidate.row for group in chosen for candidate in sorted(group, key=lambda c: str(c.row["id"]))]


def _about_places(views: Sequence[View], rng: random.Random) -> tuple[list[_Candidate], list[_Candidate]]:
    where, boxes = [], []
    for view in views:
        for kind, box in view.boxes.items():
            quadrant = box.centre.quadrant()
            stratum = (kind, quadrant)
            text = grammar.ask_where(kind, rng)
            where.append(_Candidate(view, stratum, _row(view, "where", kind, text, quadrant, QUADRANTS)))
            text = grammar.ask_box(kind, rng)
            boxes.append(_Candidate(view, stratum, _row(view, "box", kind, text, format_box(box), (), box)))
    return where, boxes


def _about_presence(views: Sequence[View], rng: random.Random) -> tuple[list[_Candidate], list[_Candidate]]:
    present: list[_Candidate] = []
    absent: list[_Candidate] = []
    for view in views:
        for kind in grammar.FINDINGS:
            answer, group = ("yes", present) if kind in view.boxes else ("no", absent)
            row = _row(view, "yes_no", kind, grammar.ask_yes_no(kind, rng), answer, ("yes", "no"))
            group.append(_Candidate(view, kind, row))
    return present, absent


def _about_quadrants(views: Sequence[View], rng: random.Random) -> tuple[list[_Candidate], list[_Candidate]]:
    occupied: list[_Candidate] = []
    empty: list[_Candidate] = []
    for view in views:
        for quadrant in QUADRANTS:
            kind = view.by_quadrant.get(quadrant)
            text = grammar.ask_what(quadrant, rng)
            row = _row(view, "what", quadrant, text, kind or STROMA, (*grammar.FINDINGS, STROMA))
            (occupied if kind else empty).append(_Candidate(view, (kind, quadrant), row))
    return occupied, empty


def _about_number(views: Sequence[View], rng: random.Random) -> list[_Candidate]:
    choices = tuple(str(number) for number in range(1, len(QUADRANTS) + 1))
    return [
        _Candidate(
            view, len(view.boxes), _row(view, "count", "", grammar.ask_count(rng), str(len(view.boxes)), choices)
        )
        for view in views
    ]


def _row(
    view: View, kind: str, subject: str, question: str, answer: str, choices: tuple[str, ...], box: Box | None = None
) -> dict[str, Any]:
    return {
        "id": "-".join(part.replace(" ", "_") for part in (kind, view.narrative_id, subject) if part),
        "image": view.image,
        "question": question,
        "kind": kind,
        "answer": answer,
        "choices": list(choices),
        "box": box.model_dump() if box else None,
        "group": view.video,
    }


def _spread(candidates: Sequence[_Candidate], limit: int, rng: random.Random) -> list[_Candidate]:
    """At most ``limit`` candidates: one stratum after the other in turn, each time from the least used image."""
    strata: dict[Hashable, list[_Candidate]] = {}
    for candidate in rng.sample(candidates, len(candidates)):
        strata.setdefault(candidate.stratum, []).append(candidate)
    uses: Counter[str] = Counter()
    chosen: list[_Candidate] = []
    while len(chosen) < limit and any(strata.values()):
        for group in strata.values():
            if group and len(chosen) < limit:
                candidate = min(group, key=lambda c: uses[c.view.narrative_id])
                group.remove(candidate)
                uses[candidate.view.narrative_id] += 1
                chosen.append(candidate)
    return chosen


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="medllava phantom.questions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=Path, required=True, help="folder with the videos' .truth.json")
    parser.add_argument("--narratives", type=Path, required=True, help="narratives.jsonl made from these videos")
    parser.add_argument("--out", type=Path, required=True, help="questions.jsonl to write")
    parser.add_argument("--seed", type=int, default=0, help="which questions are chosen (default 0)")
    parser.add_argument("--per-kind", type=int, default=300, metavar="N", help="most of one kind (default 300)")
    arguments = parser.parse_args(argv)
    if arguments.per_kind < 1:
        raise ConfigError(f"--per-kind {arguments.per_kind}: must be at least 1")
    if not arguments.videos.is_dir():
        raise DataError(f"{arguments.videos}: no such folder; --videos is where medllava phantom wrote its files")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    views = read_views(arguments.videos, arguments.narratives)
    rows = write_questions(views, arguments.seed, arguments.per_kind)
    write_records(arguments.out, rows)
    counts = Counter(row["kind"] for row in rows)
    print(f"{arguments.out}: {len(rows)} questions about {len(views)} images (" + ", ".join(
        f"{kind} {count}" for kind, count in counts.items()
    ) + ")")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
