from __future__ import annotations

import pytest

from medllava.errors import DataError
from medllava.eval.records import Question, QuestionKind
from medllava.eval.text_metrics import bleu, longest_common, overlap
from medllava.eval.vqa import (
    abstains,
    grade,
    read_choices,
    read_numbers,
    read_options,
    read_quadrants,
    read_yes_no,
)
from medllava.geometry import Box


def question(kind: QuestionKind, answer: str, choices: tuple[str, ...] = (), box: Box | None = None) -> Question:
    return Question(id="q", image=None, question="?", kind=kind, answer=answer, choices=choices, box=box, group="g")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("   ", None),
        ("I am unable to tell", None),
        ("Yes, there is no doubt", "yes"),
        ("not uncommon", None),
        ("Yes", "yes"),
        ("NO!", "no"),
        ("**No.**", "no"),
        ("“No”", "no"),
        ("No, there is no gland.", "no"),
        ("No gland is seen", "no"),
        ("The answer is yes.", "yes"),
        ("Answer: no", "no"),
        ("It is not uncommon to see this, so yes.", "yes"),
        ("No doubt there is a gland", None),
        ("There is no way to tell", None),
        ("Yes or no", None),
        ("yes/no", None),
        ("yes no", None),
        ("Yes. No.", None),
        ("Nothing", None),
        ("none", None),
        ("Nonetheless", None),
        ("It cannot be excluded", None),
        ("Known glands", None),
        ("Eyes", None),
    ],
)
def test_yes_no_is_read_three_ways(text: str, expected: str | None) -> None:
    assert read_yes_no(text) == expected


@pytest.mark.parametrize("text", ["", "I am unable to tell", "not uncommon"])
@pytest.mark.parametrize("truth", ["Yes", "No"])
def test_an_unclear_answer_is_wrong_whatever_the_truth(text: str, truth: str) -> None:
    for asked in (question("yes_no", truth), question("closed", truth, ("yes", "no"))):
        graded = grade(asked, text)
        assert next(iter(graded.scores.values())) == 0
        assert graded.read is None
        assert graded.reason.startswith("unclear")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("In the upper left.", ["upper left"]),
        ("top-right corner", ["upper right"]),
        ("Bottom left", ["lower left"]),
        ("the left upper part", ["upper left"]),
        ("upper left and lower right", ["upper left", "lower right"]),
        ("in the centre", []),
        ("", []),
        ("upper leftover", []),
    ],
)
def test_quadrants(text: str, expected: list[str]) -> None:
    assert read_quadrants(text) == expected


def test_where_needs_exactly_one_quadrant() -> None:
    asked = question("where", "In the upper left.")
    assert grade(asked, "It is at the top left.").scores == {"where": 1.0}
    assert grade(asked, "In the lower left.").scores == {"where": 0.0}
    both = grade(asked, "Upper left or lower left.")
    assert both.scores == {"where": 0.0}
    assert both.read is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 findings.", [3]), ("Three.", [3]), ("none", [0]), ("10", [10]), ("1.5", []), ("v2", []), ("", []),
        ("2 glands and one vessel", [2, 1]), ("there are 2, yes 2", [2]), ("stone", []), ("I count 4.", [4]),
    ],
)
def test_numbers(text: str, expected: list[int]) -> None:
    assert read_numbers(text) == expected


def test_the_longest_choice_is_meant() -> None:
    choices = ("gland", "gland with a lumen", "blood vessel")
    assert read_choices("A gland with a lumen.", choices) == ["gland with a lumen"]
    assert read_choices("Glands, and a blood-vessel", choices) == ["gland", "blood vessel"]
    assert read_choices("glandular tissue", choices) == []
    asked = question("what", "A gland.", choices)
    assert grade(asked, "glands").scores == {"what": 1.0}
    assert grade(asked, "a gland or a blood vessel").scores == {"what": 0.0}


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("**B**", "B"), ("The answer is B", "B"), ("option b", "B"),
        ("B: hepatitis B", "B"), ("ghost cells", "A"), ("A gland is seen", ""), ("A or C", "AC"), ("", ""),
        ("not A, it is C.", "C"), ("hepatitis B", "B"), ("Vitamin deficiency", ""), ("A: giant cells", "ACD"),
        ("C: giant cells", "C"), ("E", ""),
    ],
)
def test_lettered_options(text: str, letters: str) -> None:
    options = ("A: ghost cells", "B: hepatitis B", "C: giant cells", "D: giant cells")
    found = "".join(option[0] for option in read_options(text, options))
    assert found == letters


def test_box_takes_the_first_box_and_no_box_is_zero() -> None:
    asked = question("box", "", box=Box(x1=0.0, y1=0.0, x2=0.5, y2=0.5))
    exact = grade(asked, "Here: [0.00, 0.00, 0.50, 0.50], not [0.5, 0.5, 1.0, 1.0].")
    assert exact.scores == {"box_iou": 1.0, "box_centre": 1.0}
    half = grade(asked, "[0, 0, 0.5, 0.25]")
    assert half.scores == {"box_iou": pytest.approx(0.5), "box_centre": 1.0}
    for nothing in ("", "upper left", "[0.5, 0.5, 0.1, 0.1]", "[1, 2, 3]"):
        assert grade(asked, nothing).scores == {"box_iou": 0.0, "box_centre": 0.0}
        assert grade(asked, nothing).read is None


def test_a_point_in_the_box_counts_for_the_centre_alone() -> None:
    asked = question("box", "", box=Box(x1=0.0, y1=0.0, x2=0.5, y2=0.5))
    assert grade(asked, "At [0.25, 0.4].").scores == {"box_iou": 0.0, "box_centre": 1.0}
    assert grade(asked, "At (0.75, 0.4)").scores == {"box_iou": 0.0, "box_centre": 0.0}
    assert grade(asked, "[0.25, 0.4]").read is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", True), ("I am unable to tell.", True), ("It cannot be determined from this field.", True), ("No.", False),
     ("I can't see the image", True), ("The nuclei cannot be ignored.", False), ("necrosis", False)],
)
def test_abstention(text: str, expected: bool) -> None:
    assert abstains(text) == expected


def test_overlap_of_open_answers() -> None:
    same = overlap("a gland in the stroma", "gland in stroma")
    assert (same.exact, same.bleu, same.rouge_l, same.f1) == (1.0, 1.0, 1.0, 1.0)
    turned = overlap("stroma gland in", "gland in stroma")
    assert (turned.f1, turned.exact) == (1.0, 0.0)
    assert turned.rouge_l == pytest.approx(2 / 3)
    assert 0 < turned.bleu < 1
    assert overlap("", "gland") == overlap("vessel", "gland")
    assert longest_common("abcbdab", "bdcaba") == 4
    # By hand: 3 of 4 words, (1 + 1) / (3 + 1) pairs, 1 / 3, 1 / 2; as long as the reference.
    assert bleu(["a", "b", "x", "c"], ["a", "b", "c", "d"]) == pytest.approx((3 / 4 * 2 / 4 * 1 / 3 * 1 / 2) ** 0.25)


def test_token_overlap() -> None:
    assert overlap("the mitotic figure", "A mitotic figure.").f1 == 1.0
    assert overlap("", "gland").f1 == overlap("", "gland").recall == 0.0
    found = overlap("gland gland gland vessel", "gland")
    f1, recall = found.f1, found.recall
    assert recall == 1.0
    assert f1 == pytest.approx(2 * 0.25 / 1.25)
    assert overlap("about 3.5 mm", "3.5 mm").recall == 1.0


def test_a_reference_that_cannot_be_read_is_told() -> None:
    for asked in (
        question("yes_no", "Perhaps"), question("where", "everywhere"), question("what", "gland"), question("box", "x"),
        question("open", " .,"),
    ):
        with pytest.raises(DataError, match="question q"):
            grade(asked, "yes")


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("Answer: b.", "B"), ("Answer:\nB", "B"), ("B) and C)", "BC"), ("A/B", "AB"), ("neither A nor B", ""),
        ("The answer is B because A is wrong", "B"), ("The answer is B because C is wrong", "B"),
        ("The answer is B because there is no gland", "B"), ("The answer is B. A is wrong.", "B"),
        ("Option A is unlikely. The best answer would be D", "D"), ("A: gland\nB: vessel\nAnswer: B", "B"),
        ("A is the answer", "A"), ("A\nIt is dark.", "A"), ("[A]", "A"), ("<answer>a</answer>", "A"),
        ("\\boxed{\\text{A}}", "A"), ("\N{FULLWIDTH LATIN CAPITAL LETTER B}", "B"), ("the letter b", "B"),
        ("The correct option is: c", "C"), ("It cannot be B, so C", "C"), ("no necrosis", "C"), ("necrosis", "D"),
        ("The answer is a vessel", "B"), ("Answer: A vessel", "B"), ("It is not a vessel", ""), ("not B: vessel", ""),
        ("The answer is B. Actually C.", "BC"), ("The answer is B, or the answer is C", "BC"),
        ("Answer: B: gland", "AB"),
        ("The answer is not B", ""), ("The answer is E", ""), ("I cannot answer a question like this", ""),
    ],
)
def test_lettered_options_in_many_words(text: str, letters: str) -> None:
    """What is announced as the answer counts with what follows it; what is denied or given as a reason does not."""
    options = ("A: gland", "B: vessel", "C: no necrosis", "D: necrosis")
    assert "".join(option[0] for option in read_options(text, options)) == letters


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("In my opinion, yes, this is cancer", "yes"), ("<answer>no</answer>", "no"), ("Not yes", None),
        ("No problem", None), ("No one can tell", None), ("No.1 finding", None), ("It is present.", None),
        ("\\boxed{yes}", "yes"), ("- No", "no"), ("Yes? No.", None), ("Yes, no mitoses", "yes"),
    ],
)
def test_yes_and_no_in_more_words(text: str, expected: str | None) -> None:
    assert read_yes_no(text) == expected
