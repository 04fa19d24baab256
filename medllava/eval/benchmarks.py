"""Benchmark definitions (YAML in the top-level folder ``eval/benchmarks``) and the questions of the data they point to.

How rows become questions is in :mod:`medllava.eval.questions`, how files and folders become rows in
:mod:`medllava.eval.tables`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import Field

from medllava.config import Recipe, load_recipe
from medllava.errors import ConfigError, DataError
from medllava.eval.questions import BOX_FORM, Reading, to_questions
from medllava.eval.records import Condition, Question, QuestionKind
from medllava.eval.tables import Row, read_table
from medllava.jsonl import read_rows

log = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parents[2] / "eval"
"""Where a checkout keeps benchmark definitions and judge prompts."""

MOST_TOLD = 5
"""Faults told one by one, of rows as of answers."""

CONDITIONS: tuple[Condition, ...] = get_args(Condition)
"""All of them; a rotation is asked only where a question has so many lettered options."""


class DataFile(Recipe):
    """What ``eval fetch`` gets: one file by ``url``, or those of a Hugging Face data set (``hub``) whose paths match
    ``path``, which may hold ``*``. The hub tells sizes and checksums itself; ``sha256`` is for a ``url``. ``unzip``:
    unpacked beside itself."""

    path: str
    url: str | None = None
    hub: str | None = None
    sha256: str | None = None
    unzip: bool = False


class Join(Recipe):
    """Columns of a second file beside the question file, by question id: ``columns`` is their name -> ours."""

    file: str
    columns: dict[str, str]


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
    split: str | None = None
    """Which split of data that holds several."""
    keep: dict[str, tuple[str, ...]] = {}
    """Column -> values: only these rows belong to the benchmark."""
    columns: dict[str, str] = {}
    """Our name -> the data's, where it is not one of the known ones."""
    categories: dict[str, str] = {}
    """Name of a category -> the data's column; each value gets scores of its own."""
    group_pattern: str | None = None
    """Regular expression whose first group is the video or case in a picture's name."""
    box_question: str = BOX_FORM
    """The question asked about a phrase of a grounded caption."""
    join: tuple[Join, ...] = ()
    rows: dict[int, str] = {}
    """Known numbers of questions and what has so many: the report says which was used."""
    files: tuple[DataFile, ...] = ()
    request: str | None = None
    """Where the data must be asked for, if it is not free to fetch."""
    harness: dict[str, str] = {}
    """``dataset_path``, ``dataset_name``, ``test_split`` of the Hugging Face data set, for other harnesses."""

    def prompt(self, question: Question) -> str:
        """The question as the model is asked it."""
        return question.question + self.suffix.get(question.kind, "")

    def reading(self, pictures: Path | None = None) -> Reading:
        """How this benchmark's rows are read; pictures that lie within rows are written to ``pictures``."""
        return Reading(
            columns=self.columns, categories=self.categories, keep=self.keep, box_question=self.box_question,
            group_pattern=self.group_pattern, pictures=pictures,
        )


@dataclass(frozen=True)
class QuestionSet:
    """The questions of a benchmark's data. ``skipped``: ids of rows of unknown ``answer_type``, which the original
    evaluation skips too; ``layout`` and ``told`` say what was read, and what of it was no question; ``folder`` is where
    picture names start from."""

    questions: list[Question]
    skipped: set[str]
    layout: str
    told: str
    folder: Path


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


def known_files(kind: str, suffix: str) -> dict[str, Path]:
    """Files by bare name in ``eval/<kind>`` of the checkout and of the current directory, whose own come first."""
    folders = [FOLDER / kind, Path("eval") / kind]
    return {path.stem: path for folder in folders if folder.is_dir() for path in sorted(folder.glob(f"*{suffix}"))}


def find_file(name: str, kind: str, suffix: str) -> Path:
    """A file given by path, or by bare name in ``eval/<kind>`` of the current directory or of the checkout."""
    if Path(name).is_file():
        return Path(name)
    known = known_files(kind, suffix)
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.removesuffix(suffix).replace("-", "_"), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"{name}: no such file, and no such name in eval/{kind}{hint} (there: {', '.join(sorted(known)) or 'none'})"
    )


def read_questions(path: Path) -> list[Question]:
    """All questions of a file or folder in any known layout. Raises DataError naming file and row."""
    return read_question_set(path).questions


def read_question_file(path: Path) -> tuple[list[Question], set[str]]:
    """The questions, and the ids of rows of unknown ``answer_type``, which the original evaluation skips too."""
    found = read_question_set(path)
    return found.questions, found.skipped


def read_question_set(
    path: Path, benchmark: Benchmark | None = None, *, split: str | None = None, pictures: Path | None = None
) -> QuestionSet:
    """The questions that ``path`` holds, read as ``benchmark`` says.

    A row that is no question is told, counted and left out. Raises DataError naming file and row where the file cannot
    be read, for a repeated id, or where nothing is left.
    """
    reading = benchmark.reading(pictures) if benchmark else Reading(pictures=pictures)
    table = read_table(path, split or (benchmark.split if benchmark else None))
    joined = _joined(path, benchmark.join if benchmark else ())
    questions: list[Question] = []
    skipped: set[str] = set()
    faults: list[str] = []
    places: dict[str, str] = {}
    for number, (where, row) in enumerate(table.rows):
        if not reading.keeps(row):
            continue
        more = joined.get(str(row.get("question_id", row.get("id"))), {})
        try:
            found = to_questions({**row, **more}, where, number, reading)
        except DataError as error:
            faults.append(str(error))
            continue
        if found is None:
            skipped.add(str(row.get("id", number)))
            continue
        for question in found:
            if question.id in places:
                raise DataError(
                    f"{where}: question id {question.id!r} occurs a second time, after {places[question.id]};"
                    " give every question its own id"
                )
            places[question.id] = where
        questions += found
    if skipped:
        log.warning("%s: %d rows of unknown answer_type were skipped", path, len(skipped))
    if not questions:
        raise DataError(faults[0] if faults else f"{path}: holds no questions")
    for fault in faults[:MOST_TOLD]:
        log.warning("left out: %s", fault)
    told = _told(len(questions), table.layout, benchmark)
    if faults:
        rows = "1 row is no question and was" if len(faults) == 1 else f"{len(faults):,} rows are no questions and were"
        told += f"; {rows} left out (the first: {faults[0]})"
    return QuestionSet(questions, skipped, table.layout, told, table.folder)


def _joined(path: Path, joins: tuple[Join, ...]) -> dict[str, Row]:
    found: dict[str, Row] = {}
    folder = path if path.is_dir() else path.parent
    for join in joins:
        file = folder / join.file
        if not file.is_file():
            raise DataError(f"{file}: no such file; the benchmark reads {', '.join(join.columns)} from it")
        for number, row in read_rows(file):
            if "question_id" not in row:
                raise DataError(f"{file}:{number}: has no 'question_id'")
            values = {ours: row[theirs] for theirs, ours in join.columns.items() if theirs in row}
            found.setdefault(str(row["question_id"]), {}).update(values)
    return found


def _told(count: int, layout: str, benchmark: Benchmark | None) -> str:
    """Which of the known sets this is, in words."""
    told = f"{count:,} questions read from {layout}"
    if benchmark is None or not benchmark.rows:
        return told
    if count in benchmark.rows:
        others = [f"{number:,} ({what})" for number, what in benchmark.rows.items() if number != count]
        more = f"; other published sets have {', '.join(others)}, whose scores are not comparable" if others else ""
        return f"{told}: {benchmark.rows[count]}{more}"
    known = ", ".join(f"{number:,} ({what})" for number, what in benchmark.rows.items())
    return f"{told}, which is none of the published sets of {benchmark.name}: {known}"


def kinds_told(questions: list[Question]) -> str:
    """How many of each kind, as ``940 open, 343 closed``."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(q.kind for q in questions).most_common())


def questions_hash(questions: list[Question]) -> str:
    """SHA-256 of the questions in the order asked, whatever file layout they came from."""
    digest = hashlib.sha256()
    for question in questions:
        row: dict[str, Any] = question.model_dump(mode="json")
        if not row["categories"]:
            del row["categories"]
        digest.update((json.dumps(row, ensure_ascii=False) + "\n").encode())
    return digest.hexdigest()
