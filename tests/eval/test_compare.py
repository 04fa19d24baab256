from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medllava.errors import ConfigError, DataError
from medllava.eval import __main__ as commands
from medllava.eval.compare import sign_flip
from medllava.eval.latex import escape
from medllava.eval.records import Answer, Question
from medllava.geometry import Box
from medllava.jsonl import read_records, write_records


def run_of(folder: Path, right: list[bool], first: int = 0) -> Path:
    asked = [
        Question(id=f"q{n}", image=None, question="Is it?", kind="closed", answer="yes" if n % 2 else "no",
                 choices=("yes", "no"), group=f"g{n // 2}")
        for n in range(first, first + len(right))
    ]
    write_records(folder / "questions.jsonl", asked)
    write_records(folder / "answers.jsonl", [
        Answer(question_id=q.id, text=q.answer if hit else "I cannot tell", model=folder.name)
        for q, hit in zip(asked, right, strict=True)
    ])
    return folder


def test_two_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = run_of(tmp_path / "base", [n % 4 == 0 for n in range(80)])
    better = run_of(tmp_path / "better_one", [n % 4 != 1 for n in range(80)])
    same = run_of(tmp_path / "same", [n % 4 == 0 for n in range(80)])
    assert commands.main(["compare", str(base), str(better), str(same), "--out", str(tmp_path / "out")]) == 0
    assert "| closed_accuracy | 0.250" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    test = written["paired"]["better_one"]["closed_accuracy"]
    assert test["value"] == pytest.approx(0.5)
    assert test["low"] > 0.3 and test["p"] < 0.001 and test["n"] == 80
    nothing = written["paired"]["same"]["closed_balanced"]
    assert (nothing["value"], nothing["p"]) == (0.0, 1.0)
    latex = (tmp_path / "out" / "compare.tex").read_text()
    assert r"better\_one" in latex and "$^*$" in latex
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "better_one" in page and "http:" not in page.replace("http://www.w3.org/2000/svg", "")


def test_the_page_shows_where_the_runs_disagree(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "pink").save(tmp_path / "p.png")
    box = Box(x1=0.2, y1=0.2, x2=0.6, y2=0.6)
    hostile = "<script>alert(1)</script>"
    for name in ("a", "b"):
        right = name == "a"
        write_records(tmp_path / name / "questions.jsonl", [
            Question(id="open", image="gone.png", question="What?", kind="open", answer="bone", group="h"),
            *(Question(id=f"q{n}", image="p.png", question="Which box?", kind="box", answer="", box=box, group=f"g{n}")
              for n in range(100)),
        ])
        write_records(tmp_path / name / "answers.jsonl", [
            Answer(question_id=f"q{n}", text="[0.2, 0.2, 0.6, 0.6]" if right or n % 10 == 0 else "[0.7, 0.7, 0.9, 0.9]",
                   model="m")
            for n in range(100)
        ] + [Answer(question_id="open", text="bone" if right else hostile, model="m")])
    runs = [str(tmp_path / name) for name in ("a", "b")]
    out = tmp_path / "out"
    assert commands.main(["compare", *runs, "--images", str(tmp_path), "--out", str(out)]) == 0
    page = (out / "compare.html").read_text()
    assert "91 questions are right in one run and not in another; 60 of them" in page
    assert page.count('<article class="card">') == 60
    assert page.count("<rect ") == 3 * 59, "reference and two answers for each box question"
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page and page.count("data:image") == 59
    assert commands.main(["compare", *runs[::-1], "--images", str(tmp_path / "gone"), "--out", str(out)]) == 0
    page = (out / "compare.html").read_text()
    assert "data:image" not in page and page.count('<article class="card">') == 60


def test_only_shared_questions_are_compared_and_the_rest_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, other = run_of(tmp_path / "a", [True] * 20), run_of(tmp_path / "b", [False] * 20, first=10)
    assert commands.main(["compare", str(base), str(other)]) == 0
    assert "10 questions only in a, 10 only in b" in capsys.readouterr().out
    far = run_of(tmp_path / "c", [False] * 20, first=100)
    with pytest.raises(DataError, match="no scored question in common"):
        commands.main(["compare", str(base), str(far)])
    with pytest.raises(ConfigError, match="two runs"):
        commands.main(["compare", str(base)])


def test_a_number_that_means_another_question_is_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files without ids of their own number their questions; two benchmarks then have the same ids."""
    folders = [run_of(tmp_path / name, [True] * 6) for name in ("a", "b")]
    asked = list(read_records(folders[1] / "questions.jsonl", Question))
    other = [asked[0].model_copy(update={"question": "Is  it?\n"}), asked[1].model_copy(update={"answer": "no"})]
    other += [question.model_copy(update={"question": "Is that?"}) for question in asked[2:4]]
    write_records(folders[1] / "questions.jsonl", [*other, *asked[4:]])
    assert commands.main(["compare", *map(str, folders), "--out", str(tmp_path / "out")]) == 0
    paired = json.loads((tmp_path / "out" / "compare.json").read_text())["paired"]["b"]["closed_accuracy"]
    assert (paired["n"], paired["only_first"], paired["only_second"]) == (3, 3, 3)
    assert "3 questions only in a, 3 only in b" in capsys.readouterr().out
    write_records(folders[1] / "questions.jsonl", [q.model_copy(update={"question": "Else?"}) for q in asked])
    with pytest.raises(DataError, match="no scored question in common"):
        commands.main(["compare", *map(str, folders)])


def test_the_permutation_test_holds_its_level_and_sees_groups() -> None:
    """Under no difference p < 0.05 comes about 5 times in 100, also where questions of a group are alike."""
    rng = np.random.default_rng(0)
    groups = [f"g{n // 5}" for n in range(200)]
    rejected = 0
    for trial in range(300):
        shared = np.repeat(rng.normal(size=40), 5)
        p = sign_flip(list(shared + 0.1 * rng.normal(size=200)), groups, flips=400, seed=trial)
        rejected += p is not None and p < 0.05
    assert 0.02 <= rejected / 300 <= 0.09
    assert sign_flip([1.0, 1.0, 1.0], ["a", "b", "c"]) == 0.25, "few groups: every flip is tried"
    assert sign_flip([1.0, 1.0], ["a", "a"]) is None


def test_latex_special_characters() -> None:
    assert escape("a_b 5 % & $^*$") == r"a\_b 5 \% \& $^*$"
    assert escape("p < 0.05 > |") == r"p \textless{} 0.05 \textgreater{} \textbar{}", "other signs in OT1"


def test_ten_thousand_answers_are_scored_in_time(tmp_path: Path) -> None:
    """Open, closed and lettered questions in 5,000 groups, with categories: scored, resampled, reported."""
    words = [f"word{n}" for n in range(200)]
    rng = np.random.default_rng(0)
    asked, given = [], []
    options = ("A: one", "B: two", "C: three", "D: four")
    for n in range(10_000):
        common = {"id": f"q{n}", "image": None, "group": f"g{n // 2}", "categories": {"tissue": f"t{n % 14}"}}
        if n % 3 == 0:
            asked.append(Question(question="What?", kind="open", answer=" ".join(rng.choice(words, 20)), **common))
            text = " ".join(rng.choice(words, 60))
        elif n % 3 == 1:
            asked.append(Question(question="Is it?", kind="closed", answer="yes", choices=("yes", "no"), **common))
            text = str(rng.choice(["Yes, it is.", "No.", "Perhaps."]))
        else:
            asked.append(Question(question="Which?", kind="closed", answer="B: two", choices=options, **common))
            text = str(rng.choice(list("ABCD")))
        given.append(Answer(question_id=f"q{n}", text=text, model="m"))
    write_records(tmp_path / "questions.jsonl", asked)
    write_records(tmp_path / "answers.jsonl", given)
    began = time.process_time()  # what other work on the machine does not change
    assert commands.main(["report", "--answers", str(tmp_path / "answers.jsonl"), "--out", str(tmp_path / "out")]) == 0
    assert time.process_time() - began < 20
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["by_category"]["tissue"]) == 14
