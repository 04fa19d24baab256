from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from medllava.eval import __main__ as commands
from medllava.eval.answer import answer_all
from medllava.eval.benchmarks import Benchmark, read_questions
from medllava.eval.models import Asked, Model, Reply
from medllava.eval.pictures import Pictures
from medllava.jsonl import write_json, write_records

Ask = Callable[[Sequence[Asked]], list[Reply]]


@pytest.fixture
def report(discs: Path, looks: Ask, guesses: Ask, tmp_path: Path) -> Path:
    """A report on answers of which half look at the picture."""
    questions = read_questions(discs / "questions.jsonl")

    def half(batch: Sequence[Asked]) -> list[Reply]:
        pairs = zip(looks(batch), guesses(batch), strict=True)
        return [pair[number % 2] for number, pair in enumerate(pairs)]

    answer_all(questions, Benchmark(name="discs"), Pictures(discs, questions), Model("stub <b>", half), tmp_path)
    write_records(tmp_path / "questions.jsonl", questions)
    judged = {"metrics": {"judge": {"value": 0.4, "low": 0.3, "high": 0.5, "n": 9, "unscored": 0}}}
    write_json(tmp_path / "judge.json", judged)
    out = tmp_path / "report"
    line = ["report", "--answers", str(tmp_path / "answers.jsonl"), "--images", str(discs), "--out", str(out)]
    assert commands.main([*line, "--judged", str(tmp_path / "judge.json"), "--title", "Discs & co"]) == 0
    return out


def test_the_page_stands_alone(report: Path) -> None:
    page = (report / "report.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "url(" not in page and "@import" not in page
    assert "Discs &amp; co" in page
    assert "stub &lt;b&gt;" in page
    assert page.count("data:image/jpeg;base64,") == 24
    assert "Unclear answers" in page
    assert "card right" in page and "card wrong" in page
    assert "#1a9850" in page and "#e6194b" in page


def test_report_holds_the_keys_others_read(report: Path) -> None:
    written = json.loads((report / "report.json").read_text())
    assert {"where", "yes_no", "what", "count", "box_iou", "judge"} <= set(written["metrics"])
    assert set(written["ablations"]) == {"no_image", "blank", "noise", "mismatched"}
    assert {"model", "questions_sha256", "answers_sha256", "versions", "command"} <= set(written["provenance"])


def test_markdown_and_chart(report: Path) -> None:
    text = (report / "report.md").read_text()
    assert "| where |" in text and "visual gain" in text and "chart.svg" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| ")}
    assert len(widths) == 2
    chart = ElementTree.fromstring((report / "chart.svg").read_text())
    assert chart.tag.endswith("svg")
    assert any("mismatch" in (node.text or "") or "another picture" in (node.text or "") for node in chart.iter())


def test_pictures_that_are_gone_leave_the_words(discs: Path, report: Path, tmp_path: Path) -> None:
    line = ["report", "--answers", str(tmp_path / "answers.jsonl"), "--images", str(tmp_path / "gone"), "--out"]
    assert commands.main([*line, str(tmp_path / "second")]) == 0
    page = (tmp_path / "second" / "report.html").read_text()
    assert "data:image" not in page and "Where is the" in page


def test_report_beside_the_answers(discs: Path, report: Path, tmp_path: Path) -> None:
    line = ["report", "--benchmark", "phantom", "--images", str(discs), "--out", str(tmp_path)]
    assert commands.main(line) == 0
    first, second = (json.loads((folder / "report.json").read_text()) for folder in (report, tmp_path))
    assert first["metrics"].pop("judge")
    assert first["metrics"] == second["metrics"]


def test_two_runs_give_the_same_bytes(discs: Path, looks: Ask, tmp_path: Path) -> None:
    """answers.jsonl and report.json of two greedy runs, made at different times into different folders."""
    questions = read_questions(discs / "questions.jsonl")
    made = []
    for name in ("one", "two"):
        out = tmp_path / name
        answer_all(questions, Benchmark(name="discs"), Pictures(discs, questions), Model("stub", looks), out)
        write_records(out / "questions.jsonl", questions)
        write_json(out / "run.json", {"model": "stub", "date": f"at time {name}"})
        line = ["report", "--answers", str(out / "answers.jsonl"), "--images", str(discs), "--out", str(out / "r")]
        assert commands.main(line) == 0
        made.append([(out / "answers.jsonl").read_bytes(), (out / "r" / "report.json").read_bytes()])
    assert made[0] == made[1]
    assert "at time one" in (tmp_path / "one" / "r" / "report.html").read_text()


def test_latex_and_categories(tmp_path: Path) -> None:
    questions = [
        {"id": f"q{n}", "image": None, "question": "Is it?", "kind": "closed", "answer": "yes",
         "choices": ["yes", "no"], "group": f"g{n}", "categories": {"tissue": "Bone" if n % 2 else "Breast"}}
        for n in range(20)
    ]
    write_records(tmp_path / "questions.jsonl", questions)
    write_records(tmp_path / "answers.jsonl", [
        {"question_id": f"q{n}", "text": "yes" if n % 2 else "I cannot tell", "model": "a_b"} for n in range(20)
    ])
    out = tmp_path / "out"
    assert commands.main(["report", "--answers", str(tmp_path / "answers.jsonl"), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert "| Bone | 10 | 1.000 | 1.000 |" in text and "| Breast | 10 | 0.000 | 0.000 |" in text
    assert "Share of answers that say they cannot tell: real 0.500." in text
    latex = (out / "report.tex").read_text()
    assert r"closed\_accuracy & 0.500" in latex and r"Model: a\_b." in latex
    assert latex.count(r"\\") == 3
