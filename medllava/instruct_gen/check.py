"""Find every fault of a training file, by row, before a GPU is touched.

DATA is LLaVA JSON (a list of rows; `image` a text or a list of texts) or the same rows as JSON Lines; the published
QUILT-LLaVA-Instruct files are in this form. Rows are counted from 0. Every picture is opened once; what was found is
kept, so that a second check opens only files that changed. Exit code 1 if there is a fault. Notes are no faults.

  malformed            no conversations, unknown roles, wrong types
  turn order           question and answer do not alternate, or the last turn is no answer
  <image> count        not as many <image> tags as images, or one in an answer
  empty question, empty answer
  box out of range     four numbers in brackets that are no box in 0..1 with x1 < x2, y1 < y2
  missing image, empty image, bad image
  duplicate row        same images and turns as an earlier row
  duplicate id         id of an earlier row with other images; with the same images, as in the published files, a note
  with --tokenizer     too long, nothing supervised, chat format: what training would cut, ignore or refuse
  with --against       leak: video, leak: image: shared with that file; near-duplicate image is a note

examples:
  python -m medllava.instruct_gen check out/train.json --images out
  python -m medllava.instruct_gen check out/val.json --images out --against out/train.json
  python -m medllava.instruct_gen check out/train.json --images out --tokenizer BASE --max-length 2048 \\
      --write-clean out/train_clean.json
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medllava.conversation import InstructionSample, Turn
    from medllava.instruct_gen.image_index import ImageFacts
    from medllava.model.prompt import PromptBuilder

HELP = "every fault of a training file, by row"

NOTES = frozenset({"duplicate id, same image", "near-duplicate image"})
"""Kinds that are told but are no faults."""

SHOWN_ROWS = 8
"""Row numbers in a line of the table."""


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="LLaVA JSON, or the same rows as .jsonl")
    add("--images", type=Path, required=True, metavar="DIR", help="folder that image names start from")
    add(
        "--write-clean", type=Path, metavar="FILE",
        help="write the rows without fault; a repeated id gets a number, a long row loses its last exchanges",
    )
    add("--against", type=Path, metavar="FILE", help="another file (training rows): no video or image may be in both")
    add("--against-images", type=Path, metavar="DIR", help="its image folder (default: --images)")
    add("--tokenizer", type=Path, metavar="DIR", help="checkpoint or tokenizer folder: count tokens, find the labels")
    add("--max-length", type=int, metavar="N", help="most tokens a row may have (default: the model's context)")
    add("--chat-format", metavar="NAME", help="plain, vicuna_v1, medllava or template (default: the folder's own)")
    add("--tokens-per-image", type=int, metavar="N", help="where --tokenizer is a tokenizer alone (default: 1)")
    add("--faults", type=Path, metavar="FILE", help="write every fault and note as a line of JSON")
    add("--show", type=int, default=20, metavar="N", help="rows printed in full per kind (default: 20)")
    add("--no-cache", action="store_true", help="open every image again, keep nothing")


@dataclass(frozen=True)
class Fault:
    """One thing to say of one row (counted from 0)."""

    row: int
    id: str
    kind: str
    detail: str


@dataclass
class Findings:
    """Everything found in a file; ``clean`` are its faultless and mended rows, ids made unique."""

    rows: int = 0
    text_only: int = 0
    images: int = 0
    faults: list[Fault] = field(default_factory=list)
    notes: list[Fault] = field(default_factory=list)
    clean: list[dict[str, Any]] = field(default_factory=list)
    mended: int = 0


def run(args: argparse.Namespace) -> int:
    from medllava.errors import ConfigError, DataError
    from medllava.jsonl import write_json, write_records

    for flag in ("images", "against_images"):
        folder = getattr(args, flag)
        if folder is not None and not folder.is_dir():
            raise DataError(f"--{flag.replace('_', '-')} {folder}: no such folder")
    if args.tokenizer is None and (args.max_length or args.chat_format or args.tokens_per_image):
        raise ConfigError("--max-length, --chat-format and --tokens-per-image need --tokenizer DIR")
    rows = read_data(args.data)
    prompts, limit = _prompts(args)
    other = (read_data(args.against), args.against_images or args.images) if args.against else None
    found = check_rows(
        rows, args.images, prompts=prompts, max_length=limit, against=other, cache=not args.no_cache
    )
    _print(found, args)
    if args.faults:
        write_records(args.faults, (asdict(fault) for fault in sorted(found.faults + found.notes, key=_place)))
        print(f"{args.faults}: {len(found.faults) + len(found.notes):,} lines")
    if args.write_clean:
        write_json(args.write_clean, found.clean)
        left_out = f"{found.rows - len(found.clean):,} left out, {found.mended:,} mended"
        print(f"{args.write_clean}: {len(found.clean):,} rows ({left_out})")
    return 1 if found.faults else 0


def check_rows(
    rows: Sequence[Any],
    images: Path,
    *,
    prompts: PromptBuilder | None = None,
    max_length: int | None = None,
    against: tuple[Sequence[Any], Path] | None = None,
    cache: bool = True,
) -> Findings:
    """Check all rows of a file whose image names start from the folder ``images``.

    With ``prompts``, rows are tokenized as training would; ``against``: rows and image folder of another file, with
    which nothing may be shared.
    """
    from medllava.conversation import sample_from_llava
    from medllava.errors import DataError
    from medllava.instruct_gen.image_index import look_at

    said = _Said(rows)
    samples: dict[int, InstructionSample] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            said.add(number, "malformed", f"expected a JSON object, got {type(row).__name__}")
            continue
        try:
            samples[number] = sample_from_llava(row, "row")
        except DataError as error:
            detail = str(error).removeprefix("row: ")
            said.add(number, "<image> count" if "tags for" in detail else "malformed", detail)
            continue
        for kind, detail in turn_faults(samples[number].turns):
            said.add(number, kind, detail)
    facts = look_at((name for sample in samples.values() for name in sample.images), images, cache=cache)
    for number, sample in samples.items():
        for name in dict.fromkeys(sample.images):
            if facts[name].fault:
                said.add(number, facts[name].fault, facts[name].detail + _hint(name))
    _say_duplicates(rows, samples, said)
    fitting = _say_lengths(samples, said, prompts, max_length) if prompts else {}
    if against:
        _say_leaks(rows, samples, facts, against, said, cache=cache)
    found = Findings(rows=len(rows), text_only=sum(not sample.images for sample in samples.values()), images=len(facts))
    for fault in said.faults:
        (found.notes if fault.kind in NOTES else found.faults).append(fault)
    found.clean, found.mended = _clean(rows, said, fitting)
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


def read_data(path: Path) -> list[Any]:
    """The rows of a LLaVA JSON or JSON Lines file. Raises DataError naming it."""
    from medllava.errors import DataError
    from medllava.jsonl import read_json, read_rows

    if path.suffix == ".jsonl":
        return [row for _, row in read_rows(path)]
    rows = read_json(path)
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON list of rows, got {type(rows).__name__}")
    return rows


class _Said:
    """What is said of each row, in the order in which it was found."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows
        self._by_row: dict[int, list[tuple[str, str]]] = defaultdict(list)

    def add(self, row: int, kind: str, detail: str) -> None:
        self._by_row[row].append((kind, detail))

    def kinds(self, row: int) -> set[str]:
        return {kind for kind, _ in self._by_row.get(row, ())}

    @property
    def faults(self) -> list[Fault]:
        return [
            Fault(row, _id(self._rows[row]), kind, detail)
            for row in sorted(self._by_row)
            for kind, detail in self._by_row[row]
        ]


def _id(row: Any) -> str:
    return str(row.get("id", "")) if isinstance(row, dict) else ""


def _hint(name: str) -> str:
    if name[1:3] == ":/":
        return " (an absolute Windows path; names should start from --images)"
    if "://" in name:
        return " (an address; pictures must be files)"
    return ""


def _say_duplicates(rows: Sequence[Any], samples: Mapping[int, InstructionSample], said: _Said) -> None:
    first_with_id: dict[str, int] = {}
    first_with_content: dict[tuple[Any, ...], int] = {}
    for number, sample in samples.items():
        same = first_with_content.setdefault((sample.images, sample.turns), number)
        if same != number:
            said.add(number, "duplicate row", f"says the same as row {same}")
        if "id" not in rows[number]:
            continue
        first = first_with_id.setdefault(sample.id, number)
        if first in (number, same):
            continue
        kind = "duplicate id, same image" if sample.images == samples[first].images else "duplicate id"
        said.add(number, kind, f"also the id of row {first}")


def _say_lengths(
    samples: Mapping[int, InstructionSample], said: _Said, prompts: PromptBuilder, max_length: int | None
) -> dict[int, int]:
    """Tokenize the rows whose turns are in order. Returns how many turns fit, for rows that are too long."""
    from tqdm import tqdm

    from medllava.model.lengths import row_fault

    fitting: dict[int, int] = {}
    spoilt = {"turn order", "empty answer", "<image> count"}
    for number, sample in tqdm(samples.items(), desc="tokens", unit=" rows", mininterval=0.5):
        if said.kinds(number) & spoilt:
            continue
        fault = row_fault(prompts, sample.turns, max_length)
        if fault:
            kind, detail, fit = fault
            said.add(number, kind, detail)
            if fit:
                fitting[number] = fit
    return fitting


def _say_leaks(
    rows: Sequence[Any],
    samples: Mapping[int, InstructionSample],
    facts: Mapping[str, ImageFacts],
    against: tuple[Sequence[Any], Path],
    said: _Said,
    *,
    cache: bool,
) -> None:
    from medllava.instruct_gen.image_index import look_at
    from medllava.instruct_gen.leaks import find_leaks, member, members

    others = members(against[0])
    other_facts = look_at((name for other in others for name in other.images), against[1], cache=cache)
    mine = [member(number, sample.id, rows[number], sample.images) for number, sample in samples.items()]
    for leak in find_leaks(mine, others, facts, other_facts):
        said.add(leak.row, leak.kind, leak.detail)


def _clean(rows: Sequence[Any], said: _Said, fitting: Mapping[int, int]) -> tuple[list[dict[str, Any]], int]:
    """The rows that are whole or can be mended, and how many were mended."""
    mendable = NOTES | {"duplicate id"}
    kept = [
        (number, row) for number, row in enumerate(rows)
        if said.kinds(number) - mendable - ({"too long"} if number in fitting else set()) == set()
    ]
    used = {str(row.get("id")) for _, row in kept}
    seen: set[str] = set()
    clean: list[dict[str, Any]] = []
    mended = 0
    for number, row in kept:
        id = str(row.get("id", f"row-{number}"))
        if id in seen:
            copy = 2
            while f"{id}-{copy}" in used:
                copy += 1
            id = f"{id}-{copy}"
            used.add(id)
        seen.add(id)
        image = row.get("image")
        changes: dict[str, Any] = {} if row.get("id") == id else {"id": id}
        if isinstance(image, str | list) and "\\" in str(image):
            names = [name.replace("\\", "/") for name in ([image] if isinstance(image, str) else image)]
            changes["image"] = names[0] if isinstance(image, str) else names
        if number in fitting:
            changes["conversations"] = row["conversations"][: fitting[number]]
        clean.append({**row, **changes})
        mended += bool(changes)
    return clean, mended


def _prompts(args: argparse.Namespace) -> tuple[PromptBuilder | None, int | None]:
    if args.tokenizer is None:
        return None, None
    # Rows are counted as training counts them; this is the one part of the command that loads a tokenizer.
    from medllava.model.lengths import context_length, open_prompts

    prompts = open_prompts(args.tokenizer, args.chat_format, args.tokens_per_image)
    limit = args.max_length or context_length(args.tokenizer)
    of = f"at most {limit:,} tokens" if limit else "no limit of tokens known (--max-length sets one)"
    print(f"{args.tokenizer}: chat format {prompts.chat_format}, {prompts.tokens_per_image} tokens per image, {of}")
    return prompts, limit


def _place(fault: Fault) -> tuple[int, str]:
    return fault.row, fault.kind


def _print(found: Findings, args: argparse.Namespace) -> None:
    """First the rows, then one table of all kinds, then the sum in one line."""
    by_kind: dict[str, list[Fault]] = defaultdict(list)
    for fault in found.faults + found.notes:
        by_kind[fault.kind].append(fault)
    printed = [fault for faults in by_kind.values() for fault in faults[: args.show]]
    for fault in sorted(printed, key=_place):
        print(f"row {fault.row:<8} {fault.id:<32} {fault.kind:<20} {fault.detail}")
    if by_kind:
        print(f"\n{'fault':<34}{'rows':>9}  first rows")
    for kind, faults in sorted(by_kind.items(), key=lambda item: (item[0] in NOTES, -len(item[1]), item[0])):
        numbers = list(dict.fromkeys(fault.row for fault in faults))
        first = ", ".join(map(str, numbers[:SHOWN_ROWS])) + (", ..." if len(numbers) > SHOWN_ROWS else "")
        print(f"{kind + (' (note)' if kind in NOTES else ''):<34}{len(numbers):>9,}  {first}")
    if len(printed) < len(found.faults) + len(found.notes):
        print(f"(the first {args.show} rows of each kind are printed above; all of them: --faults FILE)")
    at_fault = len({fault.row for fault in found.faults})
    print(
        f"{args.data}: {found.rows:,} rows, {found.text_only:,} of them text only; {at_fault:,} rows with faults"
    )
