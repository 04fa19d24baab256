from __future__ import annotations

import numpy as np
import pytest

from medllava.errors import DataError
from medllava.eval.metrics import BLIND, confidence, estimate, grade_all, summarise, verdicts
from medllava.eval.records import Answer, Condition, Failure, Question
from medllava.geometry import Box


def asked(number: int, truth: str, group: str | None = None, image: str | None = "i.png") -> Question:
    return Question(
        id=f"q{number}", image=image, question="Is there a gland?", kind="yes_no", answer=truth,
        group=group or f"g{number}",
    )


def said(number: int, text: str, condition: Condition = "real") -> Answer:
    return Answer(question_id=f"q{number}", condition=condition, text=text, model="m")


def test_balanced_accuracy_does_not_reward_the_common_answer() -> None:
    questions = [asked(n, "Yes" if n < 18 else "No") for n in range(20)]
    report = summarise(grade_all(questions, [said(n, "Yes.") for n in range(20)]), {})
    assert report.metrics["yes_no"].value == 0.5
    assert report.metrics["yes_no"].n == 20
    assert report.baselines["yes_no"] == {"chance": 0.5, "constant": 0.5}


def test_cluster_bootstrap_covers_the_truth() -> None:
    """Answers within a group are alike; the interval must still hold the true mean about 95 times in 100."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        level = rng.beta(2, 2, size=40)
        groups = np.repeat(np.arange(40), 5)
        scores = (rng.random(200) < level[groups]).astype(float)
        found = estimate(list(scores), [str(group) for group in groups], resamples=400, seed=trial)
        assert found.low is not None and found.high is not None
        covered += found.low <= 0.5 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_intervals_resample_groups_not_questions() -> None:
    scores = [1.0] * 50 + [0.0] * 50
    together = estimate(scores, [f"g{n // 10}" for n in range(100)])
    apart = estimate(scores, [f"g{n}" for n in range(100)])
    assert together.value == apart.value == 0.5
    assert together.high - together.low > 2 * (apart.high - apart.low)  # type: ignore[operator]
    assert estimate(scores, [f"g{n // 10}" for n in range(100)]) == together


def test_one_group_has_no_interval_and_nothing_has_no_value() -> None:
    assert estimate([1.0, 0.0], ["g", "g"]).low is None
    assert estimate([], []).value is None


def test_all_right_does_not_claim_certainty() -> None:
    questions = [asked(n, "Yes" if n % 2 else "No") for n in range(20)]
    rows = grade_all(questions, [said(n, questions[n].answer) for n in range(20)])
    found = summarise(rows, {}).metrics["yes_no"]
    assert found.value == found.high == 1.0
    assert found.low == pytest.approx(0.025 ** (1 / 20))


def test_unanswered_is_unscored_with_its_reason() -> None:
    questions = [asked(n, "Yes") for n in range(4)]
    rows = grade_all(
        questions, [said(0, "yes"), said(1, "no")], [Failure(question_id="q2", reason="no such image file")]
    )
    report = summarise(rows, {})
    assert report.metrics["yes_no"].value == 0.5
    assert (report.metrics["yes_no"].n, report.metrics["yes_no"].unscored) == (2, 2)
    reasons = {verdict.question_id: verdict.reason for verdict in verdicts(rows) if verdict.score is None}
    assert reasons == {"q2": "no such image file", "q3": "no answer"}
    assert any("2 questions" in note for note in report.notes)


def test_no_answer_at_all_has_no_value() -> None:
    report = summarise(grade_all([asked(0, "Yes")], []), {})
    assert report.metrics["yes_no"].value is None
    assert report.metrics["yes_no"].unscored == 1


def test_gain_is_paired_and_told_in_words() -> None:
    questions = [asked(n, "Yes" if n % 2 else "No") for n in range(30)]
    blind = [said(n, "Yes.", condition) for n in range(30) for condition in ("real", "blank")]
    report = summarise(grade_all(questions, blind), {})
    assert report.visual_gain["yes_no"].value == 0.0
    assert any(BLIND in note for note in report.notes)
    seeing = [said(n, questions[n].answer) for n in range(30)] + [said(n, "Yes.", "blank") for n in range(30)]
    report = summarise(grade_all(questions, seeing), {})
    assert report.visual_gain["yes_no"].value == 0.5
    assert not any(BLIND in note for note in report.notes)


def test_questions_without_a_picture_are_no_ablation() -> None:
    questions = [asked(0, "Yes"), asked(1, "No", image=None)]
    rows = grade_all(questions, [said(0, "yes"), said(1, "no"), said(0, "yes", "blank")])
    assert [(row.question.id, row.condition) for row in rows] == [("q0", "real"), ("q1", "real"), ("q0", "blank")]


def test_the_constant_box_is_the_mean_box() -> None:
    box = Box(x1=0.2, y1=0.2, x2=0.6, y2=0.6)
    questions = [
        Question(id=f"q{n}", image="i", question="Box?", kind="box", answer="", box=box, group=f"g{n}")
        for n in range(3)
    ]
    report = summarise(grade_all(questions, [said(n, "no") for n in range(3)]), {})
    assert report.baselines["box_iou"]["constant"] == pytest.approx(1.0)
    assert report.metrics["box_iou"].value == 0.0
    assert report.unclear["real"] == {"box_iou": 3}


def test_always_no_is_not_always_the_second_option() -> None:
    """In a set of yes/no and lettered questions a constant answer is one of either."""
    lettered = ("A: gland", "B: vessel")
    questions = [
        Question(id=f"q{n}", image="i", question="?", kind="closed", answer=answer, choices=choices, group=f"g{n}")
        for n, (answer, choices) in enumerate([
            ("no", ("yes", "no")), ("No", ("Yes", "No")), ("yes", ("yes", "no")), ("B: vessel", lettered),
            ("A: gland", lettered),
        ])
    ]
    report = summarise(grade_all(questions, [said(n, "no") for n in range(5)]), {})
    assert report.baselines["closed_accuracy"] == {"constant": 2 / 5, "chance": 0.5}


def test_answers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="'q9'"):
        grade_all([asked(0, "Yes")], [said(9, "yes")])
    with pytest.raises(DataError, match="answered twice"):
        grade_all([asked(0, "Yes")], [said(0, "yes"), said(0, "no")])
    with pytest.raises(DataError, match="more than once"):
        grade_all([asked(0, "Yes"), asked(0, "No")], [])


def test_calibration_error_by_hand() -> None:
    """Two answers at 0.9 of which one is right, two at 0.6 that are right: (2 |0.9 - 0.5| + 2 |0.6 - 1|) / 4 = 0.4."""
    questions = [asked(n, "Yes") for n in range(6)]
    given = [
        said(n, text).model_copy(update={"options": {"yes": yes, "no": no}})
        for n, text, yes, no in (
            (0, "Yes.", 0.9, 0.1), (1, "No.", 0.1, 0.9), (2, "Yes.", 0.6, 0.4), (3, "Yes.", 0.3, 0.2),
            (4, "Perhaps.", 0.5, 0.5),
        )
    ]
    report = summarise(grade_all(questions, [*given, said(5, "Yes.")]), {})
    found = report.calibration["yes_no"]
    assert found.n == 4, "an unclear answer and one without probabilities tell nothing"
    assert found.error == pytest.approx(0.4)
    assert [(part.n, part.right.value) for part in found.bins] == [(2, 1.0), (2, 0.5)]
    assert [part.confidence for part in found.bins] == pytest.approx([0.6, 0.9])
    alone = said(0, "Yes.").model_copy(update={"logprob": float(np.log(0.25)), "tokens": 2})
    assert confidence(questions[0], alone, "yes") == pytest.approx(0.25), "the whole text, where no options are told"


@pytest.mark.parametrize("count", [3, 8])
def test_the_order_of_the_options_by_hand(count: int) -> None:
    """Who always says A is right only where the right option stands first; of 8 options 6 orders are asked."""
    choices = tuple(f"{letter}: option {letter.lower()}" for letter in "ABCDEFGH"[:count])
    orders: list[Condition] = ["real", "rotated_1", "rotated_2", "rotated_3", "rotated_4", "rotated_5"]
    orders = orders[:count]
    questions = [
        Question(id=f"q{n}", image="i", question="Which?", kind="closed", answer=choices[0], choices=choices,
                 group=f"g{n}")
        for n in range(4)
    ]
    report = summarise(grade_all(questions, [said(n, "A", order) for n in range(4) for order in orders]), {})
    found = report.rotation
    assert found["mean"].value == pytest.approx(1 / len(orders)) and found["mean"].n == 4
    assert found["difference"].value == 1.0, "right as published, never in another order"
    assert found["same_answer"].value == found["all_right"].value == 0.0
    assert found["all_right"].high == pytest.approx(1 - 0.025 ** (1 / 4)), "four questions make nothing certain"
    assert (found["difference"].low, found["difference"].high) == (1.0, 1.0)
    assert report.letters == {"A": 1.0}
    lost = summarise(grade_all(questions, [said(n, "A", order) for n in range(3) for order in orders]), {})
    assert (lost.rotation["difference"].n, lost.rotation["difference"].unscored) == (3, 1)
