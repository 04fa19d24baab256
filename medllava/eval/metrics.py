"""From graded answers to the report: means, intervals, baselines, visual gain. Pure functions of records.

Questions about one video or case are not independent, so intervals resample whole groups (cluster bootstrap), not
questions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from medllava.errors import DataError
from medllava.eval.degenerate import is_empty, loops
from medllava.eval.records import (
    Answer,
    Bin,
    Calibration,
    Condition,
    Failure,
    Metric,
    Question,
    Replies,
    Report,
    Verdict,
)
from medllava.eval.rotation import MOST_ORDERS, applies, as_asked, steps
from medllava.eval.vqa import METRICS, abstains, grade, metrics_of, reference, split_option
from medllava.geometry import QUADRANTS, Box

RESAMPLES = 2000
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
BLIND = "the model's answers do not depend on the picture"
FEW_GROUPS = 10
RIGHT_OR_WRONG = {"where", "yes_no", "what", "count", "box_centre", "closed_accuracy", "closed_balanced", "open_exact"}
BALANCED = {"yes_no", "closed_balanced"}
CENTRE_BOX = Box(x1=0.25, y1=0.25, x2=0.75, y2=0.75)
"""A box that looks at nothing: half as wide and high as the picture, in its middle."""
MOST_VALUES = 60
"""Values of one category that get scores of their own."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval; None where there is nothing to estimate from."""

    value: float | None
    low: float | None
    high: float | None


def estimate(
    scores: Sequence[float],
    groups: Sequence[str],
    strata: Sequence[str] = (),
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean of ``scores`` with a 95 % percentile interval from a bootstrap over ``groups``.

    With ``strata`` (one label per score) the value is the unweighted mean of the strata's means, which for right or
    wrong and the classes yes and no is the balanced accuracy. One group gives no interval.
    """
    if not scores:
        return Estimate(None, None, None)
    group_names, group = np.unique(np.asarray(groups), return_inverse=True)
    labels, stratum = np.unique(np.asarray(strata or [""] * len(scores)), return_inverse=True)
    shape = (len(group_names), len(labels))
    total, count = np.zeros(shape), np.zeros(shape)
    np.add.at(total, (group, stratum), np.asarray(scores, dtype=float))
    np.add.at(count, (group, stratum), 1.0)
    value = float(np.mean(total.sum(axis=0) / count.sum(axis=0)))
    number = len(group_names)
    if number < 2:
        return Estimate(value, None, None)
    draws = group_draws(number, resamples, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.mean((draws @ total) / (draws @ count), axis=1)
    # A resample that misses a whole stratum has no balanced accuracy; it is left out.
    low, high = np.nanpercentile(means, (2.5, 97.5))
    return Estimate(value, float(low), float(high))


@lru_cache(maxsize=3)
def group_draws(number: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """How often each of ``number`` groups is drawn in each resample, ``(resamples, number)``. Kept, because a report
    asks for the same draws for every metric."""
    counts = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=resamples)
    return counts.astype(np.float64)


def bounded(scores: Sequence[float], groups: Sequence[str], found: Estimate) -> Estimate:
    """Where every score is 1 (or 0) a bootstrap cannot vary and would claim certainty: give the exact (Clopper-Pearson)
    bound for that many independent groups instead. It holds for any score from 0 to 1: of those with a mean m, at least
    a share m is not 0."""
    number = len(set(groups))
    if number > 1 and all(score == 1 for score in scores):
        return Estimate(1.0, 0.025 ** (1 / number), 1.0)
    if number > 1 and all(score == 0 for score in scores):
        return Estimate(0.0, 0.0, 1 - 0.025 ** (1 / number))
    return found


@dataclass(frozen=True)
class Row:
    """One question under one condition: its metrics (None if it could not be scored), what was read, and why, and the
    answer's ``text``.
    ``confidence``: the probability that the model gave what it answered, where it told one and right or wrong is all
    that there is."""

    question: Question
    condition: Condition
    scores: dict[str, float] | None
    read: str | None
    reason: str
    words: int = 0
    cut_off: bool = False
    abstained: bool = False
    answered: bool = False
    empty: bool = False
    looping: bool = False
    confidence: float | None = None
    text: str = ""


def grade_all(questions: Sequence[Question], answers: Iterable[Answer], failures: Iterable[Failure] = ()) -> list[Row]:
    """Grade every question under every condition that has answers, in the order of the questions.

    Ablations leave out questions without a picture. Raises DataError for a repeated question or answer, and for an
    answer to no question.
    """
    known = {question.id for question in questions}
    if len(known) < len(questions):
        repeated = next(name for name, times in Counter(question.id for question in questions).items() if times > 1)
        raise DataError(f"question id {repeated!r} occurs more than once; give every question its own id")
    given: dict[tuple[str, str], Answer] = {}
    for answer in answers:
        key = answer.question_id, answer.condition
        if answer.question_id not in known:
            raise DataError(f"an answer is to question {answer.question_id!r}, which the question file does not have")
        if key in given:
            raise DataError(f"question {answer.question_id!r} is answered twice under condition {answer.condition!r}")
        given[key] = answer
    reasons = {(failure.question_id, failure.condition): failure.reason for failure in failures}
    present = {condition for _, condition in (*given, *reasons)} | {"real"}
    return [
        _row(question, condition, given.get((question.id, condition)), reasons.get((question.id, condition)))
        for condition in CONDITIONS
        if condition in present
        for question in questions
        if applies(question, condition)
    ]


def _row(question: Question, condition: Condition, answer: Answer | None, failure: str | None) -> Row:
    if answer is None:
        return Row(question, condition, None, None, failure or "no answer")
    try:
        graded = grade(as_asked(question, condition), answer.text)
    except DataError as error:
        return Row(question, condition, None, None, str(error), text=answer.text)
    return Row(
        question, condition, graded.scores, graded.read, graded.reason,
        words=len(answer.text.split()), cut_off=answer.finish_reason == "length", abstained=abstains(answer.text),
        answered=True, empty=is_empty(answer.text), looping=loops(answer.text),
        confidence=confidence(question, answer, graded.read), text=answer.text,
    )


def confidence(question: Question, answer: Answer, read: str | None) -> float | None:
    """The share that the option named has of the probability of all legal options; without those, the probability of
    the whole text. None for what no legal answer was read from, and for kinds that are not right or wrong."""
    if read is None or metrics_of(question)[0] not in RIGHT_OR_WRONG:
        return None
    option = split_option(read)
    named = option[0] if option else read
    if answer.options and named in answer.options and sum(answer.options.values()) > 0:
        return answer.options[named] / sum(answer.options.values())
    return None if answer.logprob is None else min(1.0, math.exp(answer.logprob))


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """The rows as records: the first metric of a question is its score."""
    return [
        Verdict(
            question_id=row.question.id,
            condition=row.condition,
            score=None if row.scores is None else next(iter(row.scores.values())),
            reason=row.reason,
        )
        for row in rows
    ]


def _names(row: Row) -> tuple[str, ...]:
    """The metrics of a question, and those that were added to its row."""
    names = metrics_of(row.question)
    return names if row.scores is None else (*names, *(name for name in row.scores if name not in names))


def stratum(metric: str, question: Question) -> str:
    """The class that a balanced metric weighs alike, or nothing."""
    return reference(question) if metric in BALANCED else ""


def metric(name: str, rows: Sequence[Row], *, seed: int = 0) -> Metric:
    """One metric over rows of one condition."""
    scored = [(row, row.scores[name]) for row in rows if row.scores is not None]
    scores = [score for _, score in scored]
    groups = [row.question.group for row, _ in scored]
    found = estimate(scores, groups, [stratum(name, row.question) for row, _ in scored], seed=seed)
    found = bounded(scores, groups, found)
    return Metric(value=found.value, low=found.low, high=found.high, n=len(scored), unscored=len(rows) - len(scored))


def gain(name: str, real: Sequence[Row], other: Sequence[Row], *, seed: int = 0) -> Metric:
    """Real minus other on the questions scored under both, each question compared with itself."""
    before = {row.question.id: row.scores[name] for row in other if row.scores is not None}
    paired = [
        (row.question, row.scores[name] - before[row.question.id])
        for row in real
        if row.scores is not None and row.question.id in before
    ]
    found = estimate(
        [difference for _, difference in paired],
        [question.group for question, _ in paired],
        [stratum(name, question) for question, _ in paired],
        seed=seed,
    )
    unscored = len({row.question.id for row in (*real, *other)}) - len(paired)
    return Metric(value=found.value, low=found.low, high=found.high, n=len(paired), unscored=unscored)


def summarise(rows: Sequence[Row], provenance: dict[str, object], *, seed: int = 0) -> Report:
    """The report: every metric under every condition, visual gain, baselines, and notes in words."""
    table: dict[Condition, dict[str, list[Row]]] = {}
    for row in rows:
        for name in _names(row):
            table.setdefault(row.condition, {}).setdefault(name, []).append(row)
    scores = {
        condition: {name: metric(name, by_name[name], seed=seed) for name in METRICS if name in by_name}
        for condition, by_name in table.items()
    }
    rotated = {condition: found for condition in list(scores) if steps(condition) and (found := scores.pop(condition))}
    real, blank = table.get("real", {}), table.get("blank", {})
    gains = {name: gain(name, real[name], blank[name], seed=seed) for name in METRICS if name in real and name in blank}
    firsts = {metrics_of(question)[0] for question in {row.question.id: row.question for row in rows}.values()}
    rotation, letters = _rotation(rows, seed) if rotated else ({}, {})
    return Report(
        metrics=scores.pop("real", {}),
        ablations={str(condition): found for condition, found in scores.items()},
        visual_gain=gains,
        baselines={name: _baselines(name, [row.question for row in real[name]]) for name in METRICS if name in real},
        unclear={
            str(condition): {
                name: sum(row.scores is not None and row.read is None for row in by_name[name])
                for name in METRICS
                if name in by_name and name in firsts
            }
            for condition, by_name in table.items()
        },
        answer_words=_answer_words(rows), reference_words=_reference_words(rows),
        abstention={
            str(condition): metric_of([float(row.abstained) for row in asked], [row.question.group for row in asked])
            for condition in table
            if not steps(condition) and (asked := [row for row in rows if row.condition == condition and row.answered])
        },
        rotation=rotation, letters=letters,
        by_category=_by_category([row for row in rows if row.condition == "real"], seed),
        calibration={
            name: calibrated for name in METRICS if name in real and name in firsts
            if (calibrated := calibrate(name, real[name], seed=seed))
        },
        replies={str(condition): _replies([row for row in rows if row.condition == condition]) for condition in table},
        notes=tuple(_notes(rows, gains, rotation, letters)),
        provenance=dict(provenance),
    )


def calibrate(name: str, rows: Sequence[Row], *, bins: int = 10, seed: int = 0) -> Calibration | None:
    """Probability beside share of right answers in bins of equal width (Guo et al. 2017); None where none was told."""
    told = [(row, row.confidence) for row in rows if row.confidence is not None and row.scores is not None]
    if not told:
        return None
    parts: dict[int, list[tuple[Row, float]]] = {}
    for row, chance in told:
        parts.setdefault(min(int(chance * bins), bins - 1), []).append((row, chance))
    found = []
    for place, some in sorted(parts.items()):
        scores, groups = [(row.scores or {})[name] for row, _ in some], [row.question.group for row, _ in some]
        right = bounded(scores, groups, estimate(scores, groups, seed=seed))
        found.append(Bin(
            low=place / bins, high=(place + 1) / bins, n=len(some),
            confidence=float(np.mean([chance for _, chance in some])),
            right=Metric(value=right.value, low=right.low, high=right.high, n=len(some)),
        ))
    error = sum(each.n * abs(each.confidence - (each.right.value or 0.0)) for each in found) / len(told)
    return Calibration(error=error, n=len(told), bins=tuple(found))


def metric_of(scores: Sequence[float], groups: Sequence[str], unscored: int = 0, seed: int = 0) -> Metric:
    """A mean over scores from 0 to 1, each of a group, as a Metric."""
    found = bounded(scores, groups, estimate(scores, groups, seed=seed))
    return Metric(value=found.value, low=found.low, high=found.high, n=len(scores), unscored=unscored)


def _rotation(rows: Sequence[Row], seed: int) -> tuple[dict[str, Metric], dict[str, float]]:
    """What is said when the options are moved on, over questions scored in every order; and the letters named."""
    by_question: dict[str, list[Row]] = {}
    for row in rows:
        if row.condition == "real" or steps(row.condition):
            by_question.setdefault(row.question.id, []).append(row)
    letters: Counter[str] = Counter()
    means, same, right, moved, groups, missing = [], [], [], [], [], 0
    for orders in by_question.values():
        question = orders[0].question
        if not applies(question, "rotated_1"):
            continue
        scores = [row.scores["closed_accuracy"] for row in orders if row.scores is not None]
        if len(scores) < min(len(question.choices), MOST_ORDERS):
            missing += 1
            continue
        options = [split_option(row.read) if row.read else None for row in orders]
        letters.update(option[0] for option in options if option)
        texts = {option[1] if option else None for option in options}
        means.append(float(np.mean(scores)))
        same.append(float(len(texts) == 1 and None not in texts))
        right.append(float(min(scores) == 1))
        moved.append(float(scores[0] - np.mean(scores[1:])))
        groups.append(question.group)
    found = {
        name: metric_of(values, groups, missing, seed)
        for name, values in (("mean", means), ("same_answer", same), ("all_right", right))
    }
    apart = estimate(moved, groups, seed=seed)
    found["difference"] = Metric(value=apart.value, low=apart.low, high=apart.high, n=len(moved), unscored=missing)
    return found, {letter: count / letters.total() for letter, count in sorted(letters.items())}


def _by_category(rows: Sequence[Row], seed: int) -> dict[str, dict[str, dict[str, Metric]]]:
    """Scores per category and value; a category of too many values (ids, free text) is left out."""
    table: dict[str, dict[str, dict[str, list[Row]]]] = {}
    for row in rows:
        for category, value in row.question.categories.items():
            for name in _names(row):
                table.setdefault(category, {}).setdefault(value, {}).setdefault(name, []).append(row)
    return {
        category: {
            value: {name: metric(name, by_name[name], seed=seed) for name in METRICS if name in by_name}
            for value, by_name in sorted(values.items())
        }
        for category, values in sorted(table.items())
        if len(values) <= MOST_VALUES
    }


def _replies(rows: Sequence[Row]) -> Replies:
    asked = [row for row in rows if row.answered]
    return Replies(
        answered=len(asked), empty=sum(row.empty for row in asked), looping=sum(row.looping for row in asked),
        cut_off=sum(row.cut_off for row in asked),
    )


def _answer_words(rows: Sequence[Row]) -> dict[str, float]:
    """Mean words per answer on real pictures, for each kind of question."""
    words: dict[str, list[int]] = {}
    for row in rows:
        if row.condition == "real" and row.scores is not None:
            words.setdefault(row.question.kind, []).append(row.words)
    return {kind: round(float(np.mean(counts)), 2) for kind, counts in words.items()}


def _reference_words(rows: Sequence[Row]) -> dict[str, float]:
    """Mean words per reference of open questions."""
    asked = [row.question for row in rows if row.condition == "real" and row.question.kind == "open"]
    words = [len(question.answer.split()) for question in asked]
    return {"open": round(float(np.mean(words)), 2)} if words else {}


def _baselines(name: str, questions: Sequence[Question]) -> dict[str, float]:
    """What an answer that ignores the picture and the question gets: ``chance`` and the best ``constant`` answer."""
    if name in {"box_iou", "box_centre"}:
        return _box_baseline(name, [question.box for question in questions if question.box is not None])
    if name.startswith("open_"):
        return {}
    labels: Counter[str] = Counter()
    for question in questions:
        try:
            label = reference(question)
        except DataError:
            continue
        # Lettered options differ from question to question; what stays the same is their place in the list.
        lettered = label in question.choices and split_option(label) is not None
        labels[str(question.choices.index(label)) if lettered else label.lower()] += 1
    if not labels:
        return {}
    if name in BALANCED:
        return {"chance": 0.5, "constant": 1 / len(labels)}
    found = {"constant": max(labels.values()) / labels.total()}
    options = [len(QUADRANTS) if name == "where" else len(question.choices) for question in questions]
    if all(options):
        found["chance"] = float(np.mean([1 / number for number in options]))
    return found


def _box_baseline(name: str, boxes: Sequence[Box]) -> dict[str, float]:
    """What two boxes get that are given as the answer to every question: the mean of all references (``constant``) and
    one in the middle of the picture (``centre``)."""
    if not boxes:
        return {}
    x1, y1, x2, y2 = (float(side) for side in np.mean([box.as_tuple() for box in boxes], axis=0))
    mean = Box(x1=x1, y1=y1, x2=x2, y2=y2)
    if name == "box_iou":
        found = {key: [box.iou(other) for other in boxes] for key, box in (("constant", mean), ("centre", CENTRE_BOX))}
        return {key: float(np.mean(values)) for key, values in found.items()}
    return {
        key: float(np.mean([other.contains(box.centre) for other in boxes]))
        for key, box in (("constant", mean), ("centre", CENTRE_BOX))
    }


def _notes(
    rows: Sequence[Row], gains: dict[str, Metric], rotation: dict[str, Metric], letters: dict[str, float]
) -> list[str]:
    notes = []
    firsts = {metrics_of(row.question)[0] for row in rows}
    gains = {name: found for name, found in gains.items() if name in firsts}
    told = {name: found for name, found in gains.items() if found.value is not None}
    if told and all(_blind(found) for found in told.values()):
        amounts = "; ".join(f"{name} {_amount(found)}" for name, found in told.items())
        count = sum(found.n for found in told.values())
        notes.append(f"On every metric {BLIND}, as far as {count} questions can tell. Visual gain: {amounts}.")
        told = {}
    seen = {name: found for name, found in told.items() if found.low is not None and found.low > 0}
    if seen:
        amounts = "; ".join(f"{name} {_amount(found)}" for name, found in seen.items())
        notes.append(f"The model looks at the picture: better than with a blank one by {amounts}.")
    for name, found in told.items():
        if _blind(found):
            notes.append(f"{name}: {BLIND}, as far as {found.n} questions can tell (visual gain {_amount(found)}).")
        elif found.value is not None and found.value < 0:
            notes.append(f"{name}: the answers are worse with the picture than with a blank one ({_amount(found)}).")
    same = rotation.get("same_answer")
    if same is not None and same.value is not None:
        most = max(letters, key=lambda letter: letters[letter], default="")
        often = f" Of all letters named, {most} is {letters[most]:.0%}." if most else ""
        notes.append(
            f"With the options in every order the model names the same one in {same.value:.0%} of {same.n}"
            f" questions.{often}"
        )
    notes += _class_notes(rows)
    groups = {row.question.group for row in rows}
    if len(groups) == 1:
        notes.append("Only 1 independent group (video or case): there are no intervals.")
    elif len(groups) < FEW_GROUPS:
        notes.append(f"Only {len(groups)} independent groups (videos or cases): the intervals are too narrow.")
    missing = sum(row.scores is None for row in rows if row.condition == "real")
    if missing:
        notes.append(f"{missing} questions on real pictures are unscored, left out of the means; see verdicts.jsonl.")
    replies = _replies([row for row in rows if row.condition == "real"])
    if replies.empty:
        notes.append(f"{replies.empty} of {replies.answered} replies on real pictures are empty.")
    if replies.looping:
        notes.append(f"{replies.looping} of {replies.answered} replies on real pictures go round in a loop.")
    if replies.cut_off:
        notes.append(f"{replies.cut_off} answers on real pictures were cut off at the token limit.")
    return notes


def _class_notes(rows: Sequence[Row]) -> list[str]:
    """Answers on real pictures that count as wrong because they could not be read, and sets of yes (or no) alone."""
    notes = []
    by_metric: dict[str, list[Row]] = {}
    for row in rows:
        if row.condition == "real" and row.scores is not None:
            by_metric.setdefault(metrics_of(row.question)[0], []).append(row)
    for name, asked in by_metric.items():
        unclear = sum(row.read is None for row in asked)
        if unclear and name in RIGHT_OR_WRONG:
            notes.append(f"{name}: {unclear} of {len(asked)} answers are unclear (no legal answer, or several): wrong.")
        balanced = [row for row in asked if BALANCED.intersection(metrics_of(row.question))]
        classes = {reference(row.question) for row in balanced}
        if len(classes) == 1:
            notes.append(
                f"The answer to every yes/no question is {classes.pop()}: nothing tells a model that always says so"
                " from one that knows."
            )
    return notes


def _amount(found: Metric) -> str:
    interval = "" if found.low is None else f" ({found.low:+.3f} to {found.high:+.3f})"
    return f"{found.value:+.3f}{interval}"


def _blind(found: Metric) -> bool:
    """True if the gain cannot be told from none: its interval holds 0 (or, with one group, it is not positive)."""
    if found.low is None or found.high is None:
        return found.value is not None and found.value <= 0
    return found.low <= 0 <= found.high
