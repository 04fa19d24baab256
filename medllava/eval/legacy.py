"""The numbers of the original evaluation scripts, faults included, so that published tables can be compared with.

Written from their behaviour, for comparison only; what to read into a score is in :mod:`medllava.eval.vqa`. The known
faults that are kept on purpose:

- ``quilt_eval``: an answer without the words no or not is "yes", so silence and refusals are; "not uncommon" is "no".
  "Exact match" is the number of distinct reference words in the answer over all words of the answer. Only the first 32
  full stops of a text are removed in each of two passes. A set without closed questions has a yes/no accuracy of 0.
- ``pmc_eval``: a lone capital anywhere is taken for the option, so "The answer is B" is option T.
- both: an anchor file of another model's answers cuts each answer to that answer's length.
- ``quilt_gpt_summarize``: failed judgements (-1) are averaged in.

One fault is not kept: a set without open questions gives None for them instead of stopping.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medllava.errors import ConfigError, DataError
from medllava.jsonl import read_json, read_rows


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The result of ``score --legacy``. Raises ConfigError for a missing flag, DataError for files that do not fit."""
    if arguments.legacy == "quilt_gpt_summarize":
        if arguments.context is None:
            raise ConfigError("--legacy quilt_gpt_summarize needs the captions file: --context FILE")
        return quilt_gpt_summarize(_rows(arguments.answers), _rows(arguments.context))
    if arguments.questions is None:
        raise ConfigError(f"--legacy {arguments.legacy} needs the question file: --gt FILE")
    truth = read_json(arguments.questions)
    answers = _rows(arguments.answers)
    _check_ids([row.get("id") for row in truth], answers, arguments.answers)
    anchor = _rows(arguments.anchor) if arguments.anchor else None
    if anchor is not None:
        _check_ids([row.get("id") for row in truth], anchor, arguments.anchor)
    try:
        if arguments.legacy == "pmc_eval":
            return pmc_eval(truth, answers, anchor)
        return quilt_eval(truth, answers, anchor, quilt=arguments.quilt)
    except KeyError as error:
        raise DataError(f"{arguments.questions} or {arguments.answers}: a row has no {error}") from error


def _rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(path)]


def _check_ids(expected: Sequence[Any], answers: Sequence[dict[str, Any]], path: Path) -> None:
    given = [row.get("question_id") for row in answers]
    if given != list(expected):
        place = next((n for n, pair in enumerate(zip(expected, given, strict=False)) if pair[0] != pair[1]), len(given))
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
    for row, answer, limit in zip(truth, answers, anchor or answers, strict=True):
        expected = normalise(row["answer"].lower())
        given = normalise(answer["text"].lower())[: len(normalise(limit["text"].lower()))]
        if row["answer_type"] in {"OPEN", "other"}:
            open_scores.append(word_scores(given, expected))
        elif row["answer_type"] == "CLOSED":
            wanted = row["yes_no_answer"].lower() if quilt else expected
            if wanted not in {"yes", "no"}:
                raise DataError(f"question {row['id']}: closed, but {wanted!r} is neither yes nor no; try --quilt")
            words = given.replace(",", "").split(" ")
            hits.append(wanted == ("no" if "no" in words or "not" in words else "yes"))
    columns = list(zip(*open_scores, strict=True)) or [()] * 4
    names = ("exact_match", "f1", "precision", "recall")
    return {
        **{name: _percent(column) for name, column in zip(names, columns, strict=True)},
        "yes_no_accuracy": _percent(hits) if hits else 0.0, "n_open": len(open_scores), "n_closed": len(hits),
    }


def _percent(values: Sequence[float]) -> float | None:
    return 100 * (sum(values) / len(values)) if values else None


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
    """``accuracy`` in percent of lettered answers."""
    parsed = [
        read_letter(answer["text"][: len(limit["text"])])
        for answer, limit in zip(answers, anchor or answers, strict=True)
    ]
    hits = [letter == row["conversations"][1]["value"] for letter, row in zip(parsed, truth, strict=True)]
    return {"accuracy": _percent(hits), "correct": sum(hits), "count": len(hits), "failed": parsed.count("FAILED")}


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


def quilt_gpt_summarize(reviews: Sequence[dict[str, Any]], captions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Relative score per category (``conv``, ``detail``), per type of tissue and for ``all``: 100 x the mean of the
    second score over the mean of the first, means rounded to 3 places, result to 1."""
    tissue = {row["question_id"]: row["type"] for row in captions}
    pairs: dict[str, list[tuple[float, float]]] = {}
    for number, review in enumerate(reviews):
        scores = review.get("tuple", review.get("score"))
        if not isinstance(scores, list) or len(scores) != 2:
            raise DataError(f"review {number}: expected two scores in 'tuple'")
        if review["question_id"] not in tissue:
            raise DataError(f"review {number}: question {review['question_id']!r} is not in the captions file")
        for key in (tissue[review["question_id"]], review["category"], "all"):
            pairs.setdefault(key, []).append((float(scores[0]), float(scores[1])))
    result = {}
    for key in sorted(pairs):
        first, second = (round(sum(column) / len(column), 3) for column in zip(*pairs[key], strict=True))
        result[key] = round(second / first * 100, 1) if first else None
    return result
