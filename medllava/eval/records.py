"""What flows through eval: questions, answers, verdicts, and the report."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from medllava.geometry import Box

QuestionKind = Literal["where", "yes_no", "what", "count", "box", "open", "closed"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Question(_Record):
    """One question about one image. ``group`` (video or case) is the unit that intervals resample; ``choices`` lists
    the legal answers of a closed question; ``box`` is the reference of a ``box`` question, 0..1 of the image;
    ``categories`` says what else it is (``tissue``: ``Breast``), each with scores of its own in the report."""

    id: str
    image: str | None
    question: str
    kind: QuestionKind
    answer: str
    choices: tuple[str, ...] = ()
    box: Box | None = None
    group: str
    categories: dict[str, str] = {}


Condition = Literal[
    "real", "no_image", "blank", "noise", "mismatched",
    "rotated_1", "rotated_2", "rotated_3", "rotated_4", "rotated_5",
]
"""What a question is asked with: its picture, what an ablation puts in the picture's place, or its picture and its
lettered options moved on by so many places."""


def _absent(value: object) -> bool:
    return value is None


class Answer(_Record):
    """A model's reply. ``condition`` is the picture it saw: real, or one of the ablations. Where the model tells:
    ``logprob`` is the log-probability of the whole text, of ``tokens`` tokens, and ``options`` the probability that the
    reply begins with each legal answer of a closed question."""

    question_id: str
    condition: Condition = "real"
    text: str
    finish_reason: str = "stop"
    model: str
    logprob: float | None = Field(default=None, exclude_if=_absent)
    tokens: int | None = Field(default=None, exclude_if=_absent)
    options: dict[str, float] | None = Field(default=None, exclude_if=_absent)


class Failure(_Record):
    """A question that got no answer, and why. It is left out of the mean and counted as unscored."""

    question_id: str
    condition: Condition = "real"
    reason: str


class Verdict(_Record):
    """A score 0..1 for one answer, or None with the reason when it could not be told (never averaged in)."""

    question_id: str
    condition: str = "real"
    score: float | None = Field(default=None, ge=0, le=1)
    reason: str = ""
    judge: str | None = None
    raw: str | None = None


class PairVerdict(_Record):
    """Two answers compared by a judge in both orders: the mean points of the answer and of the ``other``, or None with
    the reason. ``raw`` are the replies (candidate first, candidate second); ``removed`` counts sentences that spoke to
    the judge and were taken out before it read them."""

    question_id: str
    condition: str = "real"
    judge: str
    points: float | None = None
    other_points: float | None = None
    consistent: bool | None = None
    words: int = 0
    other_words: int = 0
    removed: int = 0
    reason: str = ""
    raw: tuple[str | None, ...] = ()


class Metric(_Record):
    """A mean with its 95 % interval; ``n`` scored, ``unscored`` left out of the mean."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    unscored: int = 0


class Bin(_Record):
    """The ``n`` answers whose probability, as the model says, lies from ``low`` to ``high``: their mean probability,
    and the share of them that is right, with its 95 % interval."""

    low: float
    high: float
    n: int
    confidence: float
    right: Metric


class Calibration(_Record):
    """How well a model knows what it knows. ``error``: the expected calibration error, the mean distance of probability
    and share of right answers over the bins, weighted by their answers (Guo et al. 2017)."""

    error: float
    n: int
    bins: tuple[Bin, ...]


class Replies(_Record):
    """How the ``answered`` replies under one condition look, whatever they score: ``empty`` ones
    (:func:`~medllava.eval.degenerate.is_empty`), ``looping`` ones (:func:`~medllava.eval.degenerate.loops`), and those
    ``cut_off`` at the token limit. One reply may be counted in several."""

    answered: int
    empty: int
    looping: int
    cut_off: int


class Report(_Record):
    """``report.json``: metrics on real images, the same under each ablation, and what produced them.

    ``visual_gain`` is real minus blank on the same questions. ``baselines`` are what a model that never looks gets:
    ``chance`` (a guess among the legal answers) and ``constant`` (always the most frequent reference). ``unclear``
    counts, per condition and metric, the answers that could not be read as any legal answer and so count as wrong.
    ``answer_words`` and ``reference_words``: mean words per answer and reference, by kind of question.
    ``abstention`` is the share of answers, per condition, that say they cannot tell. ``rotation``, where options were
    rotated: ``mean`` accuracy over all orders, ``same_answer`` (the same option named in every order), ``all_right``;
    ``difference`` is the accuracy in the order as published minus that in the others; ``letters``, the share of each
    letter among the answers to all orders. ``by_category``: category -> value -> metric, on real pictures.
    ``calibration``: on real pictures, where the model tells probabilities. ``replies``: condition -> how many are
    empty, looping and cut off. ``notes`` says in words what the numbers mean.
    """

    metrics: dict[str, Metric]
    ablations: dict[str, dict[str, Metric]] = {}
    visual_gain: dict[str, Metric] = {}
    baselines: dict[str, dict[str, float]] = {}
    unclear: dict[str, dict[str, int]] = {}
    answer_words: dict[str, float] = {}
    reference_words: dict[str, float] = {}
    abstention: dict[str, Metric] = {}
    rotation: dict[str, Metric] = {}
    letters: dict[str, float] = {}
    by_category: dict[str, dict[str, dict[str, Metric]]] = {}
    calibration: dict[str, Calibration] = {}
    replies: dict[str, Replies] = {}
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] = {}
