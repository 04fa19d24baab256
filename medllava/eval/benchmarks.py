"""Benchmark definitions (YAML in the top-level folder ``eval/benchmarks``) and the question files they point to.

Three layouts of question files are read, told apart by their content:

- ours: JSON Lines of :class:`~medllava.eval.records.Question`;
- Quilt-VQA and PathVQA (``*_test_w_ans.json``): a JSON list of rows with ``answer_type`` OPEN, OTHER or CLOSED;
- PMC-VQA: a JSON list of rows with ``conversations``, options lettered in the question, the letter as the answer.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from medllava.config import Recipe, load_recipe
from medllava.errors import ConfigError, DataError
from medllava.eval.records import Condition, Question, QuestionKind
from medllava.jsonl import describe, read_json, read_records, to_line

log = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parents[2] / "eval"
"""Where a checkout keeps benchmark definitions and judge prompts."""

CONDITIONS: tuple[Condition, ...] = ("real", "no_image", "blank", "noise", "mismatched")


class Benchmark(Recipe):
    """What is asked and how: the question file, the folder of its pictures (both relative to the YAML file), and per
    kind of question the text put after it."""

    name: str
    about: str = ""
    questions: Path | None = None
    images: Path | None = None
    max_new_tokens: int = Field(default=128, gt=0)
    suffix: dict[QuestionKind, str] = {}
    conditions: tuple[Condition, ...] = CONDITIONS
    seed: int = 0

    def prompt(self, question: Question) -> str:
        """The question as the model is asked it."""
        return question.question + self.suffix.get(question.kind, "")


def load_benchmark(name: str) -> Benchmark:
    """A benchmark by the path of its YAML file, or by its name in ``eval/benchmarks``. Raises ConfigError."""
    path = find_file(name, "benchmarks", ".yaml")
    benchmark = load_recipe(path, Benchmark)
    if "real" not in benchmark.conditions:
        raise ConfigError(f"{path}: conditions: 'real' is missing; every other score is compared with it")
    return benchmark.model_copy(
        update={
            key: (path.parent / value).resolve()
            for key, value in (("questions", benchmark.questions), ("images", benchmark.images))
            if value is not None
        }
    )


def find_file(name: str, kind: str, suffix: str) -> Path:
    """A file given by path, or by bare name in ``eval/<kind>`` of the current directory or of the checkout."""
    if Path(name).is_file():
        return Path(name)
    folders = [Path("eval") / kind, FOLDER / kind]
    for folder in folders:
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    known = sorted({path.stem for folder in folders if folder.is_dir() for path in folder.glob(f"*{suffix}")})
    raise ConfigError(
        f"{name}: no such file, and no such name in eval/{kind} (there: {', '.join(known) or 'none'}); give the path"
    )


def read_questions(path: Path) -> list[Question]:
    """All questions of a file in any of the three layouts. Raises DataError naming file and row."""
    return read_question_file(path)[0]


def read_question_file(path: Path) -> tuple[list[Question], set[str]]:
    """The questions, and the ids of rows of unknown ``answer_type``, which the original evaluation skips too."""
    skipped: set[str] = set()
    try:
        with path.open(encoding="utf-8") as file:
            start = file.read(1000).lstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error})") from error
    if not start.startswith("["):
        questions = list(read_records(path, Question))
    else:
        questions = []
        for number, row in enumerate(read_json(path)):
            question = _from_original(row, path, number)
            if question:
                questions.append(question)
            else:
                skipped.add(str(row["id"]))
        if skipped:
            log.warning("%s: %d rows of unknown answer_type were skipped", path, len(skipped))
    if not questions:
        raise DataError(f"{path}: holds no questions")
    return questions, skipped


def _from_original(row: Any, path: Path, number: int) -> Question | None:
    where = f"{path}: row {number}"
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {type(row).__name__}")
    try:
        if "conversations" in row:
            return _multiple_choice(row)
        if "answer_type" in row:
            return _open_or_closed(row)
    except (KeyError, IndexError, TypeError, AttributeError, ValidationError) as error:
        fault = describe(error) if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{where}: not a question ({fault})") from error
    raise DataError(f"{where}: expected 'answer_type' (Quilt-VQA, PathVQA) or 'conversations' (PMC-VQA)")


def _open_or_closed(row: dict[str, Any]) -> Question | None:
    """A row of Quilt-VQA or PathVQA; None for an answer type that the original evaluation skips too."""
    answer_type = str(row["answer_type"]).lower()
    if answer_type not in {"open", "other", "closed"}:
        return None
    closed = answer_type == "closed"
    # Quilt-VQA's closed answers are sentences; the yes or no they stand for is in a field of its own.
    answer = row.get("yes_no_answer") or row["answer"] if closed else row["answer"]
    return Question(
        id=str(row["id"]), image=row.get("image"), question=_without_tag(row["question"]),
        kind="closed" if closed else "open", answer=str(answer), choices=("yes", "no") if closed else (),
        group=str(row.get("image") or row["id"]),
    )


def _multiple_choice(row: dict[str, Any]) -> Question:
    question = _without_tag(row["conversations"][0]["value"])
    letter = str(row["conversations"][1]["value"]).strip()[:1].upper()
    options = tuple(match.group(0).strip() for match in re.finditer(r"^[A-Z]\s*:.*$", question, re.MULTILINE))
    answer = next((option for option in options if option.startswith(letter)), "") if letter else ""
    return Question(
        id=str(row["id"]), image=row.get("image"), question=question, kind="closed", answer=answer, choices=options,
        group=str(row.get("image") or row["id"]),
    )


def _without_tag(text: str) -> str:
    return text.replace("<image>", "").strip()


def questions_hash(questions: list[Question]) -> str:
    """SHA-256 of the questions in the order asked, whatever file layout they came from."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(to_line(question).encode())
    return digest.hexdigest()
