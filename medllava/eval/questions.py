"""From a published row to a :class:`~medllava.eval.records.Question`. The schema is told by the row's own keys:

- ours: ``kind`` and ``group`` among the keys of a Question, read strictly;
- ``conversations``: multiple choice in LLaVA's layout, options lettered in the question (PMC-VQA of Quilt-LLaVA);
- ``options`` (PathMMU) or ``Choice A`` .. (PMC-VQA): multiple choice;
- ``phrases``: a grounded caption, one question for each phrase that has a box;
- ``answer_type``: OPEN, OTHER or CLOSED (Quilt-VQA, PathVQA of Quilt-LLaVA, SLAKE, VQA-RAD);
- ``question`` and ``answer`` alone (PathVQA, VQA-RAD, Kvasir-VQA of the Hugging Face hub, and your own): closed where
  the answer is yes or no, multiple choice where ``choices`` are given, a box where ``box`` is.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from medllava.errors import DataError
from medllava.eval.records import Question
from medllava.eval.tables import Row, picture_name
from medllava.eval.vqa import read_yes_no
from medllava.geometry import Box, format_box
from medllava.jsonl import describe

SCHEMAS = (
    "'question' and 'answer' (bring your own, PathVQA, Kvasir-VQA), 'answer_type' (Quilt-VQA, SLAKE, VQA-RAD),"
    " 'options' (PathMMU), 'Choice A' (PMC-VQA), 'conversations' (LLaVA), 'phrases' (grounded captions)"
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BOX_FORM = "Where is what these words describe: {text}\nAnswer with one box [x1, y1, x2, y2], each number from 0 to 1."

_IDS = ("id", "question_id", "qid", "No", "index")
_IMAGES = ("image", "image_name", "img_name", "img", "Figure_path", "img_id", "image_path")
_TYPES = {"open": "open", "other": "open", "closed": "closed"}
_SHORT = 4


@dataclass(frozen=True)
class Reading:
    """How rows are read, from a benchmark's definition. ``columns``: our key -> the file's; ``categories``: name ->
    the file's column; ``keep``: column -> the values that stay; ``group_pattern``: its first group in the picture's
    name is the case or video."""

    columns: Mapping[str, str] = field(default_factory=dict)
    categories: Mapping[str, str] = field(default_factory=dict)
    keep: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    box_question: str = BOX_FORM
    group_pattern: str | None = None
    pictures: Path | None = None

    def keeps(self, row: Row) -> bool:
        """Whether the row belongs to the benchmark; a column that a file does not have keeps all."""
        return all(str(row[name]) in values for name, values in self.keep.items() if name in row)


def to_questions(row: Row, where: str, number: int, reading: Reading) -> list[Question] | None:
    """The questions of a row (several for a grounded caption); None for an ``answer_type`` that the original
    evaluation skips too. Raises DataError naming the place."""
    try:
        if "kind" in row and "group" in row:
            return [_ours(row)]
        row = _renamed(row, reading)
        if "phrases" in row:
            return _grounded(row, number, reading)
        found = _question(row, where, number, reading)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, ValidationError) as error:
        fault = describe(error) if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{where}: not a question ({fault})") from error
    return None if found is None else [found]


def _ours(row: Row) -> Question:
    """A row of ours; in a CSV file the lists and the box are text."""
    values = {key: value for key, value in row.items() if value != "" or key == "answer"}
    if isinstance(values.get("choices"), str):
        values["choices"] = _list(values["choices"])
    if isinstance(values.get("box"), str):
        values["box"] = json.loads(values["box"])
    return Question.model_validate({"image": None, **values})


def _renamed(row: Row, reading: Reading) -> Row:
    return {**row, **{ours: row[theirs] for ours, theirs in reading.columns.items() if theirs in row}}


def _question(row: Row, where: str, number: int, reading: Reading) -> Question | None:
    image = picture_name(_first(row, _IMAGES), reading.pictures, where)
    common: dict[str, Any] = {
        "id": _id(row, number), "image": image, "group": _group(row, image, number, reading),
        "categories": _categories(row, reading),
    }
    if "conversations" in row:
        turns = row["conversations"]
        text = _without_tag(turns[0]["value"])
        given = tuple(match.group(0).strip() for match in re.finditer(r"^[A-Z]\s*[:.)].*$", text, re.MULTILINE))
        letter = str(turns[1]["value"]).strip()[:1].upper()
        return Question(
            question=text, kind="closed", answer=_option(letter, given) or "", choices=given, **common
        )
    options = _options(row)
    if options and {option.lower() for option in options} != {"yes", "no"}:
        lettered = _lettered(options)
        text = _without_tag(str(row.get("question", row.get("Question", "")))) + "\n" + "\n".join(lettered)
        return Question(question=text, kind="closed", answer=_right(row, lettered), choices=lettered, **common)
    if "answer_type" in row:
        kind = _TYPES.get(str(row["answer_type"]).strip().lower())
        if kind is None:
            return None
        # Quilt-VQA's closed answers are sentences; the yes or no they stand for is in a field of its own.
        answer = str(row.get("yes_no_answer") or row["answer"] if kind == "closed" else row["answer"])
        if kind == "closed" and read_yes_no(answer) is None and len(answer.split()) <= _SHORT:
            # SLAKE and VQA-RAD call "axial" or "left" closed, too: no yes or no, and no list to choose from.
            kind = "open"
        choices = ("yes", "no") if kind == "closed" else ()
        return Question(
            question=_without_tag(row["question"]), kind="closed" if choices else "open", answer=answer,
            choices=choices, **common,
        )
    if "question" not in row or "answer" not in row:
        if "question_id" in row and "text" in row:
            raise DataError(f"{where}: a question without its answer (a *_wo_ans file?); give the file with answers")
        raise DataError(f"{where}: unknown schema (keys: {', '.join(sorted(row)) or 'none'}); expected {SCHEMAS}")
    return _plain(row, common)


def _plain(row: Row, common: dict[str, Any]) -> Question:
    """A question and an answer, and nothing that tells of what kind."""
    text, answer = _without_tag(str(row["question"])), str(row["answer"])
    box = row.get("box") or None
    if box is not None:
        box = Box.model_validate(json.loads(box) if isinstance(box, str) else box)
        return Question(question=text, kind="box", answer=format_box(box), box=box, **common)
    closed = answer.strip().lower().rstrip(".") in {"yes", "no"}
    return Question(
        question=text, kind="closed" if closed else "open", answer=answer, choices=("yes", "no") if closed else (),
        **common,
    )


def _grounded(row: Row, number: int, reading: Reading) -> list[Question]:
    image = picture_name(_first(row, _IMAGES), reading.pictures, "")
    found = []
    for place, phrase in enumerate(row["phrases"]):
        if phrase.get("box") is None:
            continue
        box = Box.model_validate(phrase["box"])
        found.append(
            Question(
                id=f"{_id(row, number)}-{place}", image=image, kind="box", answer=format_box(box), box=box,
                question=reading.box_question.replace("{text}", str(phrase["text"]).strip()),
                group=str(row.get("video") or _group(row, image, number, reading)),
                categories=_categories(row, reading),
            )
        )
    return found


# ------------------------------------------------------------------------------------------------------------- columns


def _first(row: Row, names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def _id(row: Row, number: int) -> str:
    own = _first(row, _IDS)
    name = str(number) if own is None else str(own)
    return f"{row['subset']}-{name}" if row.get("subset") and own is not None else name


def _group(row: Row, image: str | None, number: int, reading: Reading) -> str:
    if row.get("group"):
        return str(row["group"])
    if image and reading.group_pattern:
        match = re.search(reading.group_pattern, image)
        if match:
            return match.group(1)
    return str(image or _id(row, number))


def _categories(row: Row, reading: Reading) -> dict[str, str]:
    wanted = {**reading.categories, **({"subset": "subset"} if row.get("subset") else {})}
    if "category" in row and "category" not in wanted.values():
        wanted["category"] = "category"
    return {name: str(row[column]).strip() for name, column in wanted.items() if row.get(column) not in (None, "")}


def _without_tag(text: str) -> str:
    return text.replace("<image>", "").strip()


# ------------------------------------------------------------------------------------------------------------- options


def _options(row: Row) -> list[str]:
    given = row.get("options", row.get("choices"))
    if given:
        return _list(given)
    return [str(row[name]) for name in (f"Choice {letter}" for letter in LETTERS) if row.get(name) not in (None, "")]


def _list(value: Any) -> list[str]:
    """Options as a list, as letter -> text, or as text: a JSON or Python list, or separated by ``|``."""
    if isinstance(value, str):
        text = value.strip()
        if text.startswith(("[", "{")):
            try:
                value = json.loads(text)
            except json.JSONDecodeError:
                value = ast.literal_eval(text)
        else:
            value = text.split("|")
    if isinstance(value, dict):
        return [f"{letter}: {option}" for letter, option in value.items()]
    return [str(option).strip() for option in value]


def _lettered(options: list[str]) -> tuple[str, ...]:
    bare = [re.sub(r"^\s*\(?[A-Z]\s*[:.)]\s*", "", option).strip() for option in options]
    return tuple(f"{letter}: {text}" for letter, text in zip(LETTERS, bare, strict=False))


def _right(row: Row, options: tuple[str, ...]) -> str:
    """The right option, told by letter, by its whole text, or by its number. Raises ValueError if it is none."""
    told = [str(row[name]).strip() for name in ("Answer_label", "Answer", "answer") if row.get(name) not in (None, "")]
    for answer in told:
        found = _option(answer, options)
        if found:
            return found
    raise ValueError(f"the answer {told[0] if told else None!r} is none of the {len(options)} options")


def _option(answer: str, options: tuple[str, ...]) -> str | None:
    if re.fullmatch(r"[A-Z]", answer):
        return next((option for option in options if option.startswith(answer)), None)
    bare = re.sub(r"^\s*\(?[A-Z]\s*[:.)]\s*", "", answer).strip().lower()
    same = [option for option in options if option.split(":", 1)[-1].strip().lower() == bare]
    if same:
        lettered = [option for option in same if answer.lstrip("( ").startswith(option[:1])]
        return (lettered or same)[0]
    return None
