"""Two answers compared by a text model, in both orders: relative score, win rate, consistency, length control.

The relative score is the one of LLaVA and Quilt-LLaVA, the mean of the candidate's points over the mean of the
reference's, but with both orders averaged. A comparison counts only if both orders could be read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medllava.eval.defuse import defuse, filled, read_object
from medllava.eval.metrics import RESAMPLES, bounded, estimate, group_draws
from medllava.eval.records import Condition, Metric, PairVerdict, Question, Report

if TYPE_CHECKING:
    from medllava.llm.base import Request, TextModel

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "first": {"type": "integer", "minimum": 1, "maximum": 10},
        "second": {"type": "integer", "minimum": 1, "maximum": 10},
        "reason": {"type": "string"},
    },
    "required": ["first", "second", "reason"],
    "additionalProperties": False,
}

NOT_HAD = "no judgement"
"""How the reason of a call begins that got no reply."""

METRICS = {
    "relative_score": "mean points of the answers over mean points of the others, both orders averaged",
    "win_rate": "share of questions on which the answer got more points over both orders; a tie is half",
    "win_rate_length_controlled": "the win rate of an answer as long as what it is compared with (logistic regression)",
    "consistency": "share of questions whose winner is the same in both orders",
}
_NONE = Metric(value=None, low=None, high=None, n=0)


@dataclass(frozen=True)
class Pair:
    """An answer and what it is compared with."""

    question: Question
    condition: Condition
    answer: str | None
    other: str


def request(pair: Pair, model: str, template: str, *, swapped: bool, with_reference: bool) -> Request:
    """The judge's prompt; with ``swapped`` the candidate is the second answer."""
    from medllava.llm.base import Request, Sampling

    texts = (pair.answer or "", pair.other)
    first, second = reversed(texts) if swapped else texts
    parts = {
        "question": pair.question.question, "first": first, "second": second,
        "reference": pair.question.answer if with_reference else "(none is given)",
    }
    return Request(
        model=model, messages=({"role": "user", "content": filled(template, parts)},), schema=SCHEMA,
        schema_name="comparison", sampling=Sampling(temperature=0.0, max_tokens=512, seed=0),
    )


def read_comparison(text: str) -> tuple[int, int]:
    """The points of the first and the second answer. Raises ValueError for anything but one JSON object with both as
    whole numbers from 1 to 10."""
    value = read_object(text)
    found = [value.get(name) for name in ("first", "second")]
    if any(isinstance(score, bool) or not isinstance(score, int) for score in found):
        raise ValueError("no whole numbers 'first' and 'second'")
    first, second = (int(score) for score in found if score is not None)
    if not (1 <= first <= 10 and 1 <= second <= 10):
        raise ValueError("points are not from 1 to 10")
    return first, second


async def compare_all(
    pairs: Sequence[Pair], judge: TextModel, model: str, template: str, *, with_reference: bool = False,
    concurrency: int = 8,
) -> list[PairVerdict]:
    """A verdict for each pair, in order; each is asked both ways. Raises ServiceError where no call can succeed."""
    from tqdm import tqdm

    from medllava.llm.base import for_each

    found: dict[int, PairVerdict] = {}
    with tqdm(total=len(pairs), desc=f"judge {model}", unit="", mininterval=0.5) as progress:

        async def work(number: int) -> None:
            found[number] = await _compare(pairs[number], judge, model, template, with_reference)
            progress.update()

        await for_each(range(len(pairs)), work, concurrency)
    return [found[number] for number in range(len(pairs))]


async def _compare(pair: Pair, judge: TextModel, model: str, template: str, with_reference: bool) -> PairVerdict:
    common: dict[str, Any] = {"question_id": pair.question.id, "condition": pair.condition, "judge": model}
    if pair.answer is None:
        return PairVerdict(**common, reason="no answer")
    removed = defuse(pair.answer)[1]
    lengths: dict[str, Any] = {
        "words": len(pair.answer.split()), "other_words": len(pair.other.split()), "removed": removed,
    }
    orders = await asyncio.gather(*(
        _ask(request(pair, model, template, swapped=swapped, with_reference=with_reference), judge)
        for swapped in (False, True)
    ))
    raw = tuple(text for text, _, _ in orders)
    faults = [fault for _, _, fault in orders if fault]
    if faults:
        return PairVerdict(**common, **lengths, raw=raw, reason="; ".join(dict.fromkeys(faults)))
    (first, second), (second_swapped, first_swapped) = (points or (0, 0) for _, points, _ in orders)
    return PairVerdict(
        **common, **lengths, raw=raw, points=(first + first_swapped) / 2, other_points=(second + second_swapped) / 2,
        consistent=_sign(first - second) == _sign(first_swapped - second_swapped),
    )


async def _ask(asked: Request, judge: TextModel) -> tuple[str | None, tuple[int, int] | None, str | None]:
    """(raw reply, points, fault)"""
    from medllava.llm.base import RefusedError, UnansweredError

    try:
        reply = await judge.ask(asked)
    except (RefusedError, UnansweredError) as error:
        return None, None, f"{NOT_HAD}: {error}"
    try:
        return reply.text, read_comparison(reply.text), None
    except ValueError as error:
        return reply.text, None, f"unreadable judgement: {error}"


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)


# -------------------------------------------------------------------------------------------------------------- figures


def summarise_pairs(
    questions: Sequence[Question], verdicts: Sequence[PairVerdict], provenance: dict[str, Any], *, most_unscored: float,
    seed: int = 0,
) -> Report:
    """Figures per condition, over all judges (a question's points are the mean over them) and for each judge.

    A condition with more than ``most_unscored`` of its verdicts unread has none. ``by_category`` holds the categories
    of the questions and the judges.
    """
    known = {question.id: question for question in questions}
    judges = list(dict.fromkeys(verdict.judge for verdict in verdicts))
    found: dict[str, dict[str, Metric]] = {}
    notes: list[str] = []
    for condition in dict.fromkeys(verdict.condition for verdict in verdicts):
        rows = [verdict for verdict in verdicts if verdict.condition == condition]
        missing = sum(verdict.points is None for verdict in rows)
        if missing > most_unscored * len(rows):
            notes.append(
                f"{condition}: {missing} of {len(rows)} comparisons could not be read or had, more than"
                f" {most_unscored:.0%}: no score is given; run again to ask for what failed"
            )
        told = missing <= most_unscored * len(rows)
        found[condition] = figures(known, _over_judges(rows), rows, seed=seed, told=told)
    real = [verdict for verdict in verdicts if verdict.condition == "real"]
    told = found.get("real", {}).get("win_rate", _NONE).value is not None
    categories: dict[str, dict[str, list[PairVerdict]]] = {}
    for verdict in real:
        for name, value in {**known[verdict.question_id].categories, "judge": verdict.judge}.items():
            categories.setdefault(name, {}).setdefault(value, []).append(verdict)
    removed = sum(verdict.removed > 0 for verdict in real if verdict.judge == judges[0])
    if removed:
        notes.append(f"{removed} answers spoke to the judge; those words were taken out before it read them.")
    if len(judges) > 1 and told:
        notes.append(f"{len(judges)} judges name the same winner in {_agreement(real):.0%} of the questions.")
    consistency = found.get("real", {}).get("consistency", _NONE).value
    if consistency is not None and consistency < 0.8:
        notes.append(f"The judge changes its mind with the order in {1 - consistency:.0%} of the comparisons.")
    return Report(
        metrics=found.pop("real", {}), ablations=found, notes=tuple(notes), provenance=provenance,
        by_category={
            name: {
                value: figures(known, _over_judges(rows), rows, seed=seed, told=told)
                for value, rows in sorted(values.items())
            }
            for name, values in categories.items()
        },
    )


def _over_judges(rows: Sequence[PairVerdict]) -> list[PairVerdict]:
    """One verdict per question: the mean over the judges that could be read."""
    by_question: dict[str, list[PairVerdict]] = {}
    for row in rows:
        if row.points is not None:
            by_question.setdefault(row.question_id, []).append(row)
    return [
        some[0].model_copy(update={
            "points": float(np.mean([row.points for row in some])),
            "other_points": float(np.mean([row.other_points for row in some])),
        })
        for some in by_question.values()
    ]


def _agreement(rows: Sequence[PairVerdict]) -> float:
    winners: dict[str, set[int]] = {}
    for row in rows:
        if row.points is not None and row.other_points is not None:
            winners.setdefault(row.question_id, set()).add(_sign(row.points - row.other_points))
    return float(np.mean([len(signs) == 1 for signs in winners.values()]))


def figures(
    questions: dict[str, Question], scored: Sequence[PairVerdict], rows: Sequence[PairVerdict], *, seed: int, told: bool
) -> dict[str, Metric]:
    """The metrics of :data:`METRICS`, without values where they are not ``told``. ``scored``: one per question."""
    missing = len({row.question_id for row in rows}) - len(scored)
    counts = {"n": len(scored), "unscored": missing}
    if not told or not scored:
        return {name: Metric(value=None, low=None, high=None, **counts) for name in METRICS}
    groups = [questions[row.question_id].group for row in scored]
    own = np.array([row.points or 0.0 for row in scored])
    other = np.array([row.other_points or 0.0 for row in scored])
    wins = np.where(own > other, 1.0, np.where(own < other, 0.0, 0.5))
    lengths = np.array([row.words - row.other_words for row in scored], dtype=float)
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    draws = group_draws(len(names), RESAMPLES, seed) if len(names) > 1 else None
    consistent = [float(bool(row.consistent)) for row in rows if row.points is not None]
    consistent_groups = [questions[row.question_id].group for row in rows if row.points is not None]
    rate = bounded(list(wins), groups, estimate(list(wins), groups, seed=seed))
    steady = bounded(consistent, consistent_groups, estimate(consistent, consistent_groups, seed=seed))

    def ratio(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray((weights @ own) / (weights @ other))

    def controlled(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return length_controlled(wins, lengths, weights)

    found = {"relative_score": ratio, "win_rate_length_controlled": controlled}
    metrics = {}
    for name, formula in found.items():
        value = float(formula(np.ones((1, len(own))))[0])
        low = high = None
        if draws is not None:
            low, high = (float(edge) for edge in np.nanpercentile(formula(draws[:, group]), (2.5, 97.5)))
        metrics[name] = Metric(value=value, low=low, high=high, **counts)
    metrics["win_rate"] = Metric(value=rate.value, low=rate.low, high=rate.high, **counts)
    metrics["consistency"] = Metric(value=steady.value, low=steady.low, high=steady.high, **counts)
    return {name: metrics[name] for name in METRICS}


def length_controlled(
    wins: NDArray[np.float64], lengths: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The win rate at equal length for each row of ``weights`` (``(draws, questions)``): sigmoid(a) of the fit
    win ~ sigmoid(a + b tanh(difference in words / its standard deviation)), after Dubois et al. 2024. A slight pull of
    a and b towards 0 keeps the fit finite where one side always wins."""
    spread = lengths.std()
    x = np.tanh(lengths / spread) if spread > 0 else np.zeros_like(lengths)
    intercept, slope = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(25):
        chance = 1 / (1 + np.exp(-(intercept[:, None] + slope[:, None] * x)))
        error, spread_of = weights * (wins - chance), weights * chance * (1 - chance)
        g0, g1 = error.sum(axis=1) - 0.1 * intercept, error @ x - 0.1 * slope
        h00, h01, h11 = spread_of.sum(axis=1) + 0.1, spread_of @ x, spread_of @ (x * x) + 0.1
        determinant = h00 * h11 - h01 * h01
        intercept = intercept + np.clip((h11 * g0 - h01 * g1) / determinant, -2, 2)
        slope = slope + np.clip((h00 * g1 - h01 * g0) / determinant, -2, 2)
    return np.asarray(1 / (1 + np.exp(-intercept)))
