"""Find every fault of a training file, by row, before a GPU is touched.

DATA is LLaVA JSON (a list of rows; `image` a text or a list of texts) or the same rows as JSON Lines. Rows are counted
from 0. A row is at fault if its turns, roles or <image> tags are wrong, an answer is empty, a box lies outside 0..1, an
image is missing, empty or damaged, or its id or its whole content occurred before. Text-only rows are counted, not
faults. Exit code 1 if there is a fault.

examples:
  python -m medllava.instruct_gen check out/llava.json --images out
  python -m medllava.instruct_gen check out/llava.json --images out --write-clean out/llava_clean.json
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medllava.conversation import InstructionSample, Turn

HELP = "every fault of a training file, by row"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="DATA", help="LLaVA JSON, or the same rows as .jsonl")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder that image names start from")
    parser.add_argument(
        "--write-clean", type=Path, metavar="FILE",
        help="write the rows without fault; a repeated id gets a number, a repeated row is left out",
    )


@dataclass(frozen=True)
class Fault:
    """One thing wrong with one row (counted from 0)."""

    row: int
    id: str
    kind: str
    detail: str


@dataclass
class Findings:
    """Everything found in a file; ``clean`` are its faultless rows, ids made unique."""

    rows: int = 0
    text_only: int = 0
    faults: list[Fault] = field(default_factory=list)
    clean: list[dict[str, Any]] = field(default_factory=list)


def run(args: argparse.Namespace) -> int:
    from medllava.errors import DataError
    from medllava.jsonl import write_json

    if not args.images.is_dir():
        raise DataError(f"--images {args.images}: no such folder")
    found = check_rows(_read(args.data), args.images)
    for fault in found.faults:
        print(f"row {fault.row:<8} {fault.id:<32} {fault.kind:<18} {fault.detail}")
    for kind, count in Counter(fault.kind for fault in found.faults).most_common():
        print(f"{count:>8,} {kind}")
    at_fault = len({fault.row for fault in found.faults})
    print(f"{args.data}: {found.rows:,} rows, {found.text_only:,} of them text only; {at_fault:,} rows with faults")
    if args.write_clean:
        write_json(args.write_clean, found.clean)
        print(f"{args.write_clean}: {len(found.clean):,} rows")
    return 1 if found.faults else 0


def check_rows(rows: Sequence[Any], images: Path) -> Findings:
    """Check all rows of a file whose image names start from the folder ``images``."""
    from medllava.conversation import sample_from_llava
    from medllava.errors import DataError

    found = Findings(rows=len(rows))
    samples: dict[int, InstructionSample] = {}
    faults: dict[int, list[tuple[str, str]]] = {number: [] for number in range(len(rows))}
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            faults[number].append(("malformed", f"expected a JSON object, got {type(row).__name__}"))
            continue
        try:
            samples[number] = sample_from_llava(row, "row")
        except DataError as error:
            detail = str(error).removeprefix("row: ")
            faults[number].append(("<image> count" if "tags for" in detail else "malformed", detail))
            continue
        faults[number] += turn_faults(samples[number].turns)
        found.text_only += not samples[number].images
    names = dict.fromkeys(name for sample in samples.values() for name in sample.images)
    broken = _broken_images(names, images)
    for number, sample in samples.items():
        faults[number] += [broken[name] for name in sample.images if name in broken]
    _add_duplicates(rows, samples, faults)
    for number, row in enumerate(rows):
        id = str(row.get("id", "")) if isinstance(row, dict) else ""
        found.faults += [Fault(number, id, kind, detail) for kind, detail in faults[number]]
    found.clean = _clean(rows, faults)
    return found


def turn_faults(turns: Sequence[Turn]) -> list[tuple[str, str]]:
    """Faults of the turns of one row: order of roles, empty texts, boxes that are none. As (kind, detail)."""
    from medllava.conversation import IMAGE_TAG
    from medllava.geometry import malformed_boxes

    faults: list[tuple[str, str]] = []
    spoken = turns[1:] if turns[0].role == "system" else turns
    for number, turn in enumerate(spoken):
        expected = "assistant" if number % 2 else "user"
        if turn.role != expected:
            faults.append(("turn order", f"turn {number} is by {turn.role}, expected {expected}"))
            break
    else:
        if not spoken or spoken[-1].role != "assistant":
            faults.append(("turn order", "the last turn must be an answer"))
    for number, turn in enumerate(turns):
        if not turn.text.replace(IMAGE_TAG, "").strip() and turn.role != "system":
            faults.append(("empty answer" if turn.role == "assistant" else "empty question", f"turn {number}"))
        if turn.role == "assistant" and IMAGE_TAG in turn.text:
            faults.append(("<image> count", f"turn {number} is an answer and holds {IMAGE_TAG}"))
        faults += [("box out of range", f"turn {number}: {text}") for text in malformed_boxes(turn.text)]
    return faults


def _broken_images(names: Iterable[str], folder: Path) -> dict[str, tuple[str, str]]:
    """Name -> (kind, detail) for each image that cannot be opened whole; several are decoded at once."""
    import os
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    from medllava.errors import DataError
    from medllava.images import load_image

    def fault(name: str) -> tuple[str, str] | None:
        path = folder / name
        try:
            load_image(path)
        except DataError as error:
            kind = "missing image" if not path.exists() else "empty image" if not path.stat().st_size else "bad image"
            return kind, str(error)
        return None

    listed = list(names)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = tqdm(pool.map(fault, listed), total=len(listed), desc="images", unit="", disable=not listed)
        return {name: result for name, result in zip(listed, results, strict=True) if result}


def _add_duplicates(
    rows: Sequence[Any], samples: dict[int, InstructionSample], faults: dict[int, list[tuple[str, str]]]
) -> None:
    first_with_id: dict[str, int] = {}
    first_with_content: dict[tuple[Any, ...], int] = {}
    for number, sample in samples.items():
        content = (sample.images, sample.turns)
        same = first_with_content.setdefault(content, number)
        if same != number:
            faults[number].append(("duplicate row", f"says the same as row {same}"))
        if "id" not in rows[number]:
            continue
        same = first_with_id.setdefault(sample.id, number)
        if same != number:
            faults[number].append(("duplicate id", f"also the id of row {same}"))


def _clean(rows: Sequence[Any], faults: dict[int, list[tuple[str, str]]]) -> list[dict[str, Any]]:
    kept = [row for number, row in enumerate(rows) if all(kind == "duplicate id" for kind, _ in faults[number])]
    used = {str(row.get("id")) for row in kept}
    seen: set[str] = set()
    clean: list[dict[str, Any]] = []
    for number, row in enumerate(kept):
        id = str(row.get("id", f"row-{number}"))
        if id in seen:
            copy = 2
            while f"{id}-{copy}" in used:
                copy += 1
            id = f"{id}-{copy}"
            used.add(id)
        seen.add(id)
        clean.append({**row, "id": id})
    return clean


def _read(path: Path) -> list[Any]:
    from medllava.errors import DataError
    from medllava.jsonl import read_json, read_rows

    if path.suffix == ".jsonl":
        return [row for _, row in read_rows(path)]
    rows = read_json(path)
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON list of rows, got {type(rows).__name__}")
    return rows
