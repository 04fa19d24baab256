from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

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


def items_of(page: str) -> list[dict[str, Any]]:
    """The answers in the page's gallery."""
    found = re.search(r'<script type="application/json" id="items">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    items: list[dict[str, Any]] = json.loads(found.group(1))
    return items


def test_the_page_stands_alone(report: Path) -> None:
    page = (report / "report.html").read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)""", page)
    assert "http:" not in page.replace("http://www.w3.org/2000/svg", "") and "https:" not in page
    assert "url(" not in page and "@import" not in page
    assert "Discs &amp; co" in page
    assert "stub &lt;b&gt;" in page
    assert page.count("data:image/jpeg;base64,") == 24
    assert "Content-Security-Policy" in page and "default-src 'none'" in page
    gallery = items_of(page)
    assert len(gallery) == 120 and {item["outcome"] for item in gallery} == {"right", "wrong", "unclear"}
    assert any(item["kind"] == "box" and "box" in item and "answered" in item for item in gallery)
    assert set(gallery[0]["others"]) == {"no_image", "blank", "noise", "mismatched"}


def test_report_holds_the_keys_others_read(report: Path) -> None:
    written = json.loads((report / "report.json").read_text())
    assert {"where", "yes_no", "what", "count", "box_iou", "judge"} <= set(written["metrics"])
    assert set(written["ablations"]) == {"no_image", "blank", "noise", "mismatched"}
    assert {"model", "questions_sha256", "answers_sha256", "versions", "command"} <= set(written["provenance"])


def test_markdown_and_chart(report: Path) -> None:
    text = (report / "report.md").read_text()
    assert "| where |" in text and "visual gain" in text and "chart.svg" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| ")}
    assert len(widths) == 3
    assert "| real | 120 | 0 | 0 | 0 |" in text
    chart = ElementTree.fromstring((report / "chart.svg").read_text())
    assert chart.tag.endswith("svg")
    assert any("mismatch" in (node.text or "") or "another picture" in (node.text or "") for node in chart.iter())


def test_pictures_that_are_gone_leave_the_words(discs: Path, report: Path, tmp_path: Path) -> None:
    line = ["report", "--answers", str(tmp_path / "answers.jsonl"), "--images", str(tmp_path / "gone"), "--out"]
    assert commands.main([*line, str(tmp_path / "second")]) == 0
    page = (tmp_path / "second" / "report.html").read_text()
    assert "data:image" not in page and "0 of 24 pictures" in page
    assert any(item["question"].startswith("Where is the") for item in items_of(page))


def test_the_pictures_have_a_limit(discs: Path, report: Path, tmp_path: Path) -> None:
    line = ["report", "--answers", str(tmp_path / "answers.jsonl"), "--images", str(discs), "--gallery-mb", "0.01"]
    assert commands.main([*line, "--gallery", "50", "--out", str(tmp_path / "small")]) == 0
    page = (tmp_path / "small" / "report.html").read_text()
    assert 0 < page.count("data:image/jpeg") < 10 and len(page) < 120_000
    assert sum(map(len, re.findall(r'"(data:image/jpeg[^"]*)"', page))) <= 10_000
    assert len(items_of(page)) == 50 and "0.01 MB in all" in page


HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def told(number: int) -> dict[str, Any]:
    """An answer to question ``number`` of the run below: calibrated, since it is right as often as it says."""
    chance = (number % 10 + 0.5) / 10
    right = number // 10 % 10 < number % 10
    text = {3: HOSTILE, 17: "Yes. " * 10}.get(number, "Yes" if right else "No")
    return {"question_id": f"q{number}", "text": text, "model": HOSTILE,
            "options": {"yes": chance, "no": 1 - chance} if right else {"yes": 1 - chance, "no": chance}}


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """The report of a run of 1,000 closed questions with categories, probabilities, and markup in an answer."""
    Image.new("RGB", (40, 30), "pink").save(tmp_path / "p.png")
    write_records(tmp_path / "questions.jsonl", [
        {"id": f"q{n}", "image": "p.png", "question": f"Is it {n}?", "kind": "closed", "answer": "yes",
         "choices": ["yes", "no"], "group": f"g{n % 50}", "categories": {"tissue": "Bone" if n % 4 else "<i>Skin</i>"}}
        for n in range(1000)
    ])
    write_records(tmp_path / "answers.jsonl", [told(n) for n in range(1000)])
    line = ["report", "--answers", str(tmp_path / "answers.jsonl"), "--images", str(tmp_path), "--out"]
    assert commands.main([*line, str(tmp_path / "out")]) == 0
    return tmp_path / "out"


def test_calibration_of_a_model_that_knows_what_it_knows(large: Path) -> None:
    found = json.loads((large / "report.json").read_text())["calibration"]["closed_accuracy"]
    assert found["n"] == 999 and len(found["bins"]) == 10
    assert found["error"] == pytest.approx(0.05, abs=0.005)
    assert all(each["right"]["low"] <= each["right"]["value"] <= each["right"]["high"] for each in found["bins"])
    page = (large / "report.html").read_text()
    assert "Does it know what it knows?" in page and "<title>Calibration</title>" in page
    assert "| closed_accuracy | 0.05" in (large / "report.md").read_text()


def test_scores_go_into_a_model_card(large: Path, tmp_path: Path) -> None:
    """The card's own head and text stay; a second time replaces the first."""
    card = tmp_path / "model" / "README.md"
    card.parent.mkdir()
    card.write_text("---\nlicense: mit\n---\n# Mine\n\n---\nmore\n")
    line = ["report", "--answers", str(tmp_path / "answers.jsonl"), "--out", str(large), "--model-card"]
    written = []
    for _ in range(2):
        assert commands.main([*line, str(card.parent)]) == 0
        written.append(card.read_text())
    assert written[0] == written[1]
    _, head, text = written[0].split("---\n", 2)
    assert text == "# Mine\n\n---\nmore\n" and head.startswith("license: mit\n")
    (result,) = yaml.safe_load(head)["model-index"][0]["results"]
    value = json.loads((large / "report.json").read_text())["metrics"]["closed_accuracy"]["value"]
    assert [m["value"] for m in result["metrics"] if m["type"] == "closed_accuracy"] == [pytest.approx(value, abs=1e-4)]


def test_answers_are_text_and_no_markup(large: Path) -> None:
    page = (large / "report.html").read_text()
    assert "<script>document" not in page and "<img src=x" not in page and "<i>Skin" not in page
    assert items_of(page)[3]["answer"] == HOSTILE


def test_the_gallery_in_a_browser(large: Path) -> None:
    playwright_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here")
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        faults: list[str] = []
        asked: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((large / "report.html").as_uri())
        count = page.locator("#count")
        assert count.inner_text() == "1 to 24 of 1000 answers"
        assert page.locator("#cards .card img").first.evaluate("image => image.naturalWidth") == 40
        page.locator("#cards .card").last.scroll_into_view_if_needed()
        page.keyboard.press("ArrowRight")
        assert count.inner_text() == "25 to 48 of 1000 answers"
        top = page.locator("#cards .card").first.evaluate("card => card.getBoundingClientRect().top")
        assert 0 <= top < 400, "a new page is read from its first answer"
        page.get_by_role("button", name="unclear 1").click()
        assert page.locator("#cards .said").all_inner_texts() == [HOSTILE]
        page.keyboard.press("0")
        page.locator("#group").select_option("tissue: <i>Skin</i>")
        assert count.inner_text() == "1 to 24 of 250 answers"
        page.locator("#group").select_option("reply: looping")
        assert count.inner_text() == "1 to 1 of 1 answers"
        page.locator("#group").select_option("tissue: <i>Skin</i>")
        page.locator("#cards .card").first.focus()
        page.keyboard.press("/")
        page.keyboard.type("is it 40?")
        assert count.inner_text() == "1 to 1 of 1 answers"
        page.keyboard.press("Escape")
        page.keyboard.press("0")
        assert count.inner_text() == "1 to 1 of 1 answers"
        assert not faults and page.title() == "Evaluation: answers"
        assert [url for url in asked if not url.startswith(("data:", "file:"))] == []
        browser.close()


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


def test_odd_names_break_no_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A bar or a line break in a category, and half a line of answers, which is told once."""
    write_records(tmp_path / "questions.jsonl", [
        {"id": f"q{n}", "image": None, "question": "Is it?", "kind": "closed", "answer": "yes",
         "choices": ["yes", "no"], "group": f"g{n}", "categories": {"a|b": "50 %|#1\nx"}} for n in range(2)
    ])
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"question_id": "q0", "text": "yes", "model": "m"}\n{"question_id": "q1", "te')
    out = tmp_path / "out"
    assert commands.main(["report", "--answers", str(answers), "--out", str(out)]) == 0
    lines = (out / "report.md").read_text().splitlines()
    assert r"| a\|b | questions | closed_accuracy | closed_balanced |" in lines
    assert r"| 50 %\|#1 x | 1 | 1.000 | 1.000 |" in lines
    told = [record.message for record in caplog.records]
    assert told == [f"{answers}:2: the last line is half written and was left out"]
