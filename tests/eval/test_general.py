"""The questions that show what tuning has lost: every reference is legal; a run that knows less compares as less."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from PIL import Image

from medllava.eval.benchmarks import load_benchmark, read_question_set
from medllava.eval.compare import compare
from medllava.eval.metrics import grade_all
from medllava.eval.records import Answer
from medllava.eval.vqa import grade

FOLDER = Path(__file__).parents[2] / "eval" / "general"


def test_what_was_forgotten_shows_beside_what_was_kept() -> None:
    benchmark = load_benchmark(str(FOLDER / "general.yaml"))
    assert benchmark.questions is not None and benchmark.images is not None
    questions = read_question_set(benchmark.questions, benchmark).questions
    assert Counter(question.image is None for question in questions) == {True: 22, False: 20}
    named = {question.image for question in questions if question.image}
    assert named == {path.name for path in benchmark.images.iterdir()}
    assert all(Image.open(benchmark.images / name).size == (192, 192) for name in named)
    for question in questions:
        assert set(grade(question, f"{question.answer}.").scores.values()) == {1.0}, question.id
    # No letter, word or number that is always said gets by.
    for kind in ("yes_no", "what", "count"):
        most = Counter(question.answer for question in questions if question.kind == kind).most_common(1)[0][1]
        assert most <= 0.6 * sum(question.kind == kind for question in questions)
    knows = [Answer(question_id=question.id, text=question.answer, model="before") for question in questions]
    forgot = [each.model_copy(update={"text": "In the upper left."}) if question.kind == "count" else each
              for question, each in zip(questions, knows, strict=True)]
    found = compare(grade_all(questions, knows), grade_all(questions, forgot))
    assert found["count"].value == -1
    assert found["what"].value == found["yes_no"].value == 0
