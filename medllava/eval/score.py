"""Score saved answers: every metric with its 95 % interval, the same without the picture, and the visual gain.

Reads our own question files and answers, and those of Quilt-VQA, PathVQA and PMC-VQA (``*_test_w_ans.json``, answers
with question_id and text). With --out, writes the report there and verdicts.jsonl beside it; without, prints the
report as JSON. --legacy gives the numbers of the original evaluation scripts instead, their faults included.

example:
  medllava eval score --answers answers/answers.jsonl --out answers/report.json
  medllava eval score --gt quiltvqa_test_w_ans.json --answers quilt_answers.jsonl
  medllava eval score --gt quiltvqa_test_w_ans.json --answers quilt_answers.jsonl --legacy quilt_eval --quilt
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from medllava.errors import ConfigError, DataError
from medllava.eval.records import Answer, Failure, Metric, Report
from medllava.jsonl import describe

if TYPE_CHECKING:
    from medllava.eval.metrics import Row

HELP = "score saved answers, with intervals and visual gain"
LEGACY = ("quilt_eval", "pmc_eval", "quilt_gpt_summarize")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--questions", "--gt", dest="questions", type=Path,
        help="question file with reference answers (default: questions.jsonl beside the answers)",
    )
    parser.add_argument("--answers", type=Path, required=True, help="answers.jsonl; for a judge's summary, the reviews")
    parser.add_argument("--out", type=Path, help="report.json to write; verdicts.jsonl goes beside it")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap; default 0")
    configure_bertscore(parser)
    parser.add_argument("--legacy", choices=LEGACY, help="the numbers of an original script")
    parser.add_argument("--quilt", action="store_true", help="with --legacy quilt_eval: yes_no_answer is the truth")
    parser.add_argument("--anchor", type=Path, help="with --legacy: answers whose lengths cut these")
    parser.add_argument("--context", type=Path, help="with --legacy quilt_gpt_summarize: the captions file")
    parser.add_argument("--as-printed", action="store_true", help="with --legacy: the lines that the original prints")


def configure_bertscore(parser: argparse.ArgumentParser) -> None:
    """The flags of the one metric that needs a model."""
    parser.add_argument("--bertscore-model", type=Path, help="folder of a text encoder (BERT, RoBERTa): BERTScore, too")
    parser.add_argument("--bertscore-layer", type=int, default=-1, help="its layer that is compared; default the last")


def run(arguments: argparse.Namespace) -> int:
    from medllava.jsonl import write_json, write_records

    if arguments.legacy:
        from medllava.eval import legacy

        result, lines = legacy.run(arguments)
        if arguments.out:
            write_json(arguments.out, result)
        print(lines if arguments.as_printed else json.dumps(result, indent=1, ensure_ascii=False))
        return 0
    if arguments.quilt or arguments.anchor or arguments.context or arguments.as_printed:
        raise ConfigError("--quilt, --anchor, --context and --as-printed belong to --legacy")
    bert = (arguments.bertscore_model, arguments.bertscore_layer) if arguments.bertscore_model else None
    report, rows = score_files(arguments.answers, arguments.questions, seed=arguments.seed, bert=bert)
    if not arguments.out:
        print(json.dumps(report.model_dump(mode="json"), indent=1, ensure_ascii=False))
        return 0
    from medllava.eval.metrics import verdicts

    write_records(arguments.out.parent / "verdicts.jsonl", verdicts(rows))
    write_json(arguments.out, report.model_dump(mode="json"))
    print(as_text(report))
    print(f"\n{arguments.out}")
    return 0


def score_files(
    answers: Path, questions: Path | None = None, *, seed: int = 0, bert: tuple[Path, int] | None = None
) -> tuple[Report, list[Row]]:
    """Score an answers file. Needs no model; the same files give the same report. ``bert``: the folder and the layer of
    a text encoder, for BERTScore on open questions.

    Raises DataError if a file is missing or does not fit the other.
    """
    from medllava.eval import provenance
    from medllava.eval.benchmarks import questions_hash, read_question_file
    from medllava.eval.metrics import RESAMPLES, grade_all, summarise
    from medllava.jsonl import read_records
    from medllava.model.manifest import current_versions

    if not answers.is_file():
        raise DataError(f"{answers}: no such answers file; `medllava eval answer` writes answers.jsonl")
    source = questions or answers.parent / "questions.jsonl"
    if not source.exists():
        raise DataError(f"{source}: no such file; give the question file with --questions")
    asked, skipped = read_question_file(source)
    known = {question.id for question in asked} | skipped
    given = [answer for answer in read_answers(answers, known) if answer.question_id not in skipped]
    failed = answers.parent / "failed.jsonl"
    failures = list(read_records(failed, Failure)) if failed.exists() else []
    rows = grade_all(asked, given, failures)
    scoring: dict[str, Any] = {"resamples": RESAMPLES, "seed": seed, "unit": "group"}
    if bert:
        rows = _with_bertscore(rows, *bert)
        scoring["bertscore"] = {"model_sha256": provenance.folder_hash(bert[0]), "layer": bert[1]}
    made = provenance.read_run(answers)
    origin: dict[str, Any] = {
        # The date stays in run.json: the same answers give the same report, byte for byte.
        **{key: value for key, value in made.items() if key != "date"},
        "questions_sha256": questions_hash(asked),
        "answers_sha256": _answers_hash(given),
        "scoring": scoring,
        "versions": made.get("versions") or current_versions(),
        "command": made.get("command") or provenance.command("score", without=("--out", "--answers")),
    }
    origin.setdefault("model", ", ".join(sorted({answer.model for answer in given})))
    report = summarise(rows, origin, seed=seed)
    told = str(made.get("data", ""))
    if "published set" in told or "left out" in told:
        report = report.model_copy(update={"notes": (*report.notes, f"Data: {told}.")})
    if made.get("questions_sha256", origin["questions_sha256"]) != origin["questions_sha256"]:
        note = "The answers were given to another version of the question file than the one they are scored with."
        report = report.model_copy(update={"notes": (*report.notes, note)})
    return report, rows


def _with_bertscore(rows: list[Row], folder: Path, layer: int) -> list[Row]:
    from dataclasses import replace

    from medllava.model.bert_score import BertScorer

    places = [place for place, row in enumerate(rows) if row.question.kind == "open" and row.scores is not None]
    said = [rows[place].text for place in places]
    found = BertScorer(folder, layer).f1(said, [rows[place].question.answer for place in places])
    done = list(rows)
    for place, value in zip(places, found, strict=True):
        done[place] = replace(rows[place], scores={**(rows[place].scores or {}), "open_bertscore": value})
    return done


def read_answers(path: Path, known: Container[str] | None = None) -> list[Answer]:
    """Our answers, or any JSON Lines with ``question_id`` and ``text``. Raises DataError naming file and line for what
    is no answer, for a second answer to a question under one condition, and, with ``known``, for one to no question."""
    from medllava.eval.tables import tell_half_line
    from medllava.jsonl import read_rows

    found: list[Answer] = []
    lines: dict[tuple[str, str], int] = {}
    for number, row in read_rows(path):
        if "question_id" not in row or not isinstance(row.get("text"), str):
            raise DataError(f"{path}:{number}: an answer needs 'question_id' and a 'text'")
        if row.get("condition", "real") not in Answer.model_fields["condition"].annotation.__args__:  # type: ignore[union-attr]
            raise DataError(f"{path}:{number}: unknown condition {row['condition']!r}")
        found.append(
            Answer(
                question_id=str(row["question_id"]),
                condition=row.get("condition", "real"),
                text=row["text"],
                finish_reason=str(row.get("finish_reason") or "stop"),
                model=str(row.get("model") or row.get("model_id") or "unknown"),
                **_told(row, f"{path}:{number}"),
            )
        )
        answer = found[-1]
        if known is not None and answer.question_id not in known:
            raise DataError(
                f"{path}:{number}: an answer is to question {answer.question_id!r}, which the question file does not"
                " have; give the file it was answered from with --questions"
            )
        before = lines.setdefault((answer.question_id, answer.condition), number)
        if before != number:
            raise DataError(
                f"{path}:{number}: question {answer.question_id!r} is answered twice under condition"
                f" {answer.condition!r}, first in line {before}"
            )
    if not found:
        raise DataError(f"{path}: holds no answers")
    tell_half_line(path)
    return found


def _told(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The probabilities of an answer, where it has them."""
    told = {name: row[name] for name in ("logprob", "tokens", "options") if row.get(name) is not None}
    try:
        return Answer.model_validate({"question_id": "", "text": "", "model": "", **told}).model_dump(include=set(told))
    except ValidationError as error:
        raise DataError(f"{where}: {describe(error)}") from error


def _answers_hash(answers: list[Answer]) -> str:
    """SHA-256 of the answers whatever the order they were written in."""
    from medllava.jsonl import to_line

    return hashlib.sha256("".join(sorted(to_line(answer) for answer in answers)).encode()).hexdigest()


def as_text(report: Report) -> str:
    """The report as a table for the terminal."""
    wide = max(17, *(len(name) + 1 for name in report.metrics))
    lines = [f"{'metric':<{wide}}{'real':>7}  {'95 % interval':<16}{'n':>5}{'unscored':>10}{'blank':>8}{'gain':>8}"]
    for name, found in report.metrics.items():
        blank = report.ablations.get("blank", {}).get(name)
        gained = report.visual_gain.get(name)
        interval = "" if found.low is None else f"{found.low:.3f} to {found.high:.3f}"
        lines.append(
            f"{name:<{wide}}{_figure(found):>7}  {interval:<16}{found.n:>5}{found.unscored:>10}"
            f"{_figure(blank):>8}{_figure(gained, '+.3f'):>8}"
        )
    words = [words_told(report)] if report.answer_words else []
    return "\n".join([*lines, *words, *(f"- {note}" for note in report.notes)])


def words_told(report: Report) -> str:
    """How long the answers are, which recall and judges reward."""
    references = {kind: f" (references {count:g})" for kind, count in report.reference_words.items()}
    told = [f"{kind} {count:g}{references.get(kind, '')}" for kind, count in report.answer_words.items()]
    return f"Mean words per answer: {', '.join(told)}."


def _figure(found: Metric | None, form: str = ".3f") -> str:
    return "-" if found is None or found.value is None else format(found.value, form)
