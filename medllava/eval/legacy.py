"""The numbers of the original evaluation scripts, faults included, so that published tables can be compared with.

Written from their behaviour, for comparison only; what to read into a score is in :mod:`medllava.eval.vqa`. The known
faults that are kept on purpose:

- ``quilt_eval``: an answer without the words no or not is "yes", so silence and refusals are; "not uncommon" is "no".
  "Exact match" is the number of distinct reference words in the answer over all words of the answer. Only the first 32
  full stops of a text are removed in each of two passes. A set without closed questions has a yes/no accuracy of 0.
- ``pmc_eval``: a lone capital anywhere is taken for the option, so "The answer is B" is option T.
- both: an anchor file of another model's answers cuts each answer to that answer's length. ``quilt_eval`` looks at the
  place of an anchor's row only, never at its question, and ends where the anchors end.
- ``quilt_gpt_summarize``: failed judgements (-1) are averaged in; it ends where the shorter of its two files ends.

One fault is not kept: where the originals stop at a division by zero (a set without open questions; for ``pmc_eval``,
without pictures; for ``quilt_gpt_summarize``, a first mean of 0) there is None.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medllava.errors import ConfigError, DataError
from medllava.eval.tables import tell_half_line
from medllava.jsonl import read_json, read_rows

log = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result of ``score --legacy``, and the lines that the original prints of it. Raises ConfigError for a missing
    flag, DataError for files that do not fit."""
    answers = _rows(arguments.answers)
    if arguments.legacy == "quilt_gpt_summarize":
        if arguments.context is None:
            raise ConfigError("--legacy quilt_gpt_summarize needs the captions file: --context FILE")
        with _of_files(arguments.answers, arguments.context):
            means = mean_points(answers, _rows(arguments.context))
        title = arguments.answers.name.replace("gpt4_text_", "").replace(".jsonl", "")
        return relative_scores(means), _summary_lines(title, means)
    if arguments.questions is None:
        raise ConfigError(f"--legacy {arguments.legacy} needs the question file: --gt FILE")
    truth = read_json(arguments.questions)
    if not isinstance(truth, list) or not all(isinstance(row, dict) for row in truth):
        raise DataError(f"{arguments.questions}: the original scripts read one JSON list of objects")
    expected = _ids(truth, arguments.questions)
    _check_ids(expected, answers, arguments.answers)
    anchor = _rows(arguments.anchor) if arguments.anchor else None
    with _of_files(arguments.questions, arguments.answers):
        if arguments.legacy == "pmc_eval":
            if anchor is not None:
                _check_ids(expected, anchor, arguments.anchor)
            result = pmc_eval(truth, answers, anchor)
            return result, _pmc_line(result)
        if anchor and [row.get("question_id") for row in anchor] != expected:
            log.warning(
                "%s: its questions are not those of the answers, which the original does not look at; %d of %d rows are"
                " scored", arguments.anchor, min(len(anchor), len(truth)), len(truth),
            )
        result = quilt_eval(truth, answers, anchor, quilt=arguments.quilt)
        return result, _quilt_table(result)


def _rows(path: Path) -> list[dict[str, Any]]:
    tell_half_line(path)
    return [row for _, row in read_rows(path)]


def _ids(rows: Sequence[dict[str, Any]], path: Path) -> list[Any]:
    """Raises DataError where a row has none: without ids on both sides nothing would be compared."""
    missing = next((number for number, row in enumerate(rows) if "id" not in row), None)
    if missing is not None:
        raise DataError(f"{path}: row {missing} has no 'id'")
    return [row["id"] for row in rows]


@contextmanager
def _of_files(first: Path, second: Path) -> Iterator[None]:
    """Names the files in the fault of a row."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{first} and {second}: {error}") from error


@contextmanager
def _row(number: int) -> Iterator[None]:
    """A row that the original would stop at gives one clear line."""
    try:
        yield
    except KeyError as error:
        raise DataError(f"row {number} has no {error}") from error
    except (AttributeError, TypeError, IndexError) as error:
        raise DataError(f"row {number} holds something else than the original reads ({error})") from error


def _check_ids(expected: Sequence[Any], answers: Sequence[dict[str, Any]], path: Path) -> None:
    given = [row.get("question_id") for row in answers]
    if given != list(expected):
        short = min(len(expected), len(given))
        place = next((n for n, pair in enumerate(zip(expected, given, strict=False)) if pair[0] != pair[1]), short)
        raise DataError(f"{path}: ids and their order must equal the question file's; they differ at row {place}")


# ---------------------------------------------------------------------------------------------------------- quilt_eval


def quilt_eval(
    truth: Sequence[dict[str, Any]],
    answers: Sequence[dict[str, Any]],
    anchor: Sequence[dict[str, Any]] | None = None,
    *,
    quilt: bool = False,
) -> dict[str, Any]:
    """Percentages over open questions (``exact_match``, ``f1``, ``precision``, ``recall``) and closed ones
    (``yes_no_accuracy``). ``quilt``: the truth of a closed question is in ``yes_no_answer``."""
    open_scores: list[tuple[float, float, float, float]] = []
    hits: list[bool] = []
    for number, (row, answer, limit) in enumerate(zip(truth, answers, anchor or answers, strict=False)):
        with _row(number):
            expected = normalise(row["answer"].lower())
            given = normalise(answer["text"].lower())[: len(normalise(limit["text"].lower()))]
            if row["answer_type"] in ("OPEN", "other"):
                open_scores.append(word_scores(given, expected))
            elif row["answer_type"] == "CLOSED":
                wanted = row["yes_no_answer"].lower() if quilt else expected
                if wanted not in {"yes", "no"}:
                    raise DataError(f"row {number} is closed, but {wanted!r} is neither yes nor no; try --quilt")
                words = given.replace(",", "").split(" ")
                hits.append(wanted == ("no" if "no" in words or "not" in words else "yes"))
    columns = list(zip(*open_scores, strict=True)) or [()] * 4
    names = ("exact_match", "f1", "precision", "recall")
    return {
        **{name: _percent(column) for name, column in zip(names, columns, strict=True)},
        "yes_no_accuracy": _percent(hits) if hits else 0.0, "n_open": len(open_scores), "n_closed": len(hits),
    }


def _quilt_table(result: dict[str, Any]) -> str:
    """The original's table: six digits that count, decimal points below each other."""
    names = {"exact_match": "exact match score", "f1": "f1 score", "precision": "precision", "recall": "recall",
             "yes_no_accuracy": "yes/no accuracy"}
    cells = ["" if result[name] is None else f"{result[name]:g}" for name in names]
    behind = [len(cell) - cell.index(".") - 1 if "." in cell else -1 for cell in cells]
    cells = [cell + " " * (max(behind) - digits) for cell, digits in zip(cells, behind, strict=True)]
    wide = max(13, *map(len, cells))
    lines = [f"{title:<17}  {cell:>{wide}}" for title, cell in zip(names.values(), cells, strict=True)]
    head = [f"{'Metric':<17}  {'Performance':>{wide}}", f"{'-' * 17}  {'-' * wide}"]
    return "\n".join(line.rstrip() for line in (*head, *lines))


def _sum(values: Sequence[float]) -> float:
    """One after the other, as the originals add; ``sum`` of Python 3.12 corrects the last digits."""
    total = 0.0
    for value in values:
        total += value
    return total


def _percent(values: Sequence[float]) -> float | None:
    return 100 * (_sum(values) / len(values)) if values else None


def word_scores(given: str, expected: str) -> tuple[float, float, float, float]:
    """("exact match", F1, precision, recall) of two normalised texts, as the original defines them."""
    answer, reference = Counter(_words(given)), Counter(_words(expected))
    if not answer:
        return 0.0, 0.0, 0.0, 0.0
    exact = sum(word in answer for word in reference) / answer.total()
    shared = sum(times for word, times in answer.items() if word in reference)
    if not shared:
        return exact, 0.0, 0.0, 0.0
    missed = sum(times for word, times in reference.items() if word not in answer)
    precision, recall = shared / answer.total(), shared / (shared + missed)
    return exact, 2 * precision * recall / (precision + recall), precision, recall


def _words(text: str) -> list[str]:
    return normalise(text).split()


_DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
           "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The original means "not between digits" but looks for the characters "<=" instead: a full stop before no digit goes.
_FULL_STOP = re.compile(r"\.(?!\d)")
_STOPS_PER_PASS = 32


def normalise(text: str) -> str:
    """The answer normalisation of the VQA benchmark (Antol et al. 2015) with the flaws that its copies share."""
    bare = text
    drop_all = _COMMA_IN_NUMBER.search(text) is not None
    for sign in _PUNCTUATION:
        if drop_all or sign + " " in text or " " + sign in text:
            bare = bare.replace(sign, "")
        else:
            bare = bare.replace(sign, " ")
    bare = _FULL_STOP.sub("", bare, count=_STOPS_PER_PASS)
    words = (_DIGITS.get(word, word) for word in bare.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in {"a", "an", "the"}).replace(",", "")


# Contractions that the benchmark restores where an apostrophe was left out: of the first, the only one; of the second,
# any one of them.
_ONE_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_MORE_APOSTROPHES = """
    couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
_CONTRACTIONS |= {
    word[:place] + word[place + 1 :]: word
    for word in _MORE_APOSTROPHES.split()
    for place, sign in enumerate(word)
    if sign == "'"
}
# The published table has this one entry the wrong way round.
_CONTRACTIONS["somebody'd"] = "somebodyd"

# ------------------------------------------------------------------------------------------------------------ pmc_eval

_PMC_OPTIONS = "ABCD"
_PMC_PATTERNS = tuple(
    re.compile(form) for form in (r"([A-Z]).", r"option ([A-Z]).", r" ([A-Z]):", r"'([A-Z])'", r"is ([A-Z]).")
)


def pmc_eval(
    truth: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]], anchor: Sequence[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """``accuracy`` in percent of lettered answers, and ``img_accuracy``, of those whose prompt holds ``<image>``."""
    failed = 0
    hits: list[bool] = []
    with_image: list[bool] = []
    for number, (answer, limit, row) in enumerate(zip(answers, anchor or answers, truth, strict=True)):
        with _row(number):
            letter = read_letter(answer["text"][: len(limit["text"])])
            failed += letter == "FAILED"
            hits.append(letter == row["conversations"][1]["value"])
            if "<image>" in answer.get("prompt", ""):
                with_image.append(hits[-1])
    return {
        "accuracy": _percent(hits), "img_accuracy": _percent(with_image), "correct": sum(hits), "count": len(hits),
        "failed": failed,
    }


def _pmc_line(result: dict[str, Any]) -> str:
    accuracy, with_image = ("-" if value is None else f"{value:.2f}%" for value in (
        result["accuracy"], result["img_accuracy"]
    ))
    return (
        f"Total: {result['count']}, Correct: {result['correct']}, Accuracy: {accuracy}, IMG-Accuracy: {with_image}"
    )


def read_letter(text: str) -> str:
    """The option an answer is taken for, or ``FAILED``: each pattern in turn decides if it matches exactly once."""
    if text in tuple(_PMC_OPTIONS):
        return text
    if len(text) >= 3 and text[0] in _PMC_OPTIONS and text[1] in ":.":
        return text[0]
    for pattern in _PMC_PATTERNS:
        found = pattern.findall(text)
        if len(found) == 1:
            return str(found[0])
    return "FAILED"


# ------------------------------------------------------------------------------------------------- quilt_gpt_summarize


Means = dict[str, tuple[float, float]]


def quilt_gpt_summarize(reviews: Sequence[dict[str, Any]], captions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Relative score per category (``conv``, ``detail``), per type of tissue and for ``all``: 100 x the mean of the
    second score over the mean of the first, means rounded to 3 places, result to 1. Raises DataError where the two
    files are not of the same questions in the same order."""
    return relative_scores(mean_points(reviews, captions))


def relative_scores(means: Means) -> dict[str, float | None]:
    """100 x the second mean over the first; None where that is no number, which JSON cannot hold."""
    found = {key: _ratio(*pair) for key, pair in means.items()}
    return {key: ratio if ratio is not None and math.isfinite(ratio) else None for key, ratio in found.items()}


def _ratio(first: float, second: float) -> float | None:
    return round(second / first * 100, 1) if first else None


def _summary_lines(title: str, means: Means) -> str:
    """Relative score, and both means times ten."""
    lines = [title]
    for key, (first, second) in means.items():
        ratio = _ratio(first, second)
        lines.append(f"{key} {'-' if ratio is None else ratio} {round(first * 10, 1)} {round(second * 10, 1)}")
    return "\n".join([*lines, "=" * 33])


def mean_points(reviews: Sequence[dict[str, Any]], captions: Sequence[dict[str, Any]]) -> Means:
    """Mean of the first and of the second score, rounded to 3 places, per category, type of tissue, and all."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for number, (review, caption) in enumerate(zip(reviews, captions, strict=False)):
        with _row(number):
            if review["question_id"] != caption["question_id"]:
                raise DataError(
                    f"row {number} is question {review['question_id']!r} in the one and {caption['question_id']!r} in"
                    " the other; the original needs both in one order"
                )
            scores = review["tuple"] if "category" in review or "tuple" in review else review["score"]
            if (
                not isinstance(scores, list) or len(scores) < 2
                or not all(isinstance(score, int | float) for score in scores)
            ):
                raise DataError(f"row {number}: expected two scores as numbers, got {scores!r}")
            keys = [review["category"], "all"] if "category" in review else ["all"]
            for key in (*keys, *([caption["type"]] if caption["type"] else [])):
                pairs.setdefault(str(key), []).append((scores[0], scores[1]))
    means: Means = {}
    for key in sorted(pairs):
        first, second = (round(_sum(column) / len(column), 3) for column in zip(*pairs[key], strict=True))
        means[key] = (first, second)
    return means
