from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from medllava.eval import __main__ as commands
from medllava.eval.degenerate import is_empty, loops
from medllava.jsonl import write_records


@pytest.mark.parametrize(
    ("text", "empty"),
    [("", True), (" \n\t", True), ("...", True), ("\u3000\u2014", True), ("0", False), ("\u7ec6", False)],
)
def test_empty_is_without_letter_and_digit(text: str, empty: bool) -> None:
    assert is_empty(text) is empty


PROSE = "the gland is lined by tall cells with round nuclei at the base and clear cytoplasm above"


@pytest.mark.parametrize(
    ("text", "looping"),
    [
        ("", False), ("yes", False), (PROSE, False), ("no no no no", False), ("yes " * 7, False), ("yes " * 8, True),
        ("The cells. the CELLS. the cells. The cells.", True), ("A gland. " * 3, False), ("A gland. " * 4, True),
        (f"{PROSE}. " * 3, False), (f"{PROSE}. " * 4, True), (f"{PROSE}. " * 3 + PROSE[:20], False),
        (f"{PROSE}. " * 4 + PROSE[:20], True),
        (PROSE + " of the stroma" * 4, True), (PROSE + " of the stroma" * 4 + " " + PROSE, False),
        ("of the stroma " * 4 + "is seen", True), (" ".join(f"w{n}" for n in range(40)) + " and the" * 4, True),
        ("ab" * 16, True), ("ab" * 15, False), ("\u7ec6\u80de" * 16, True), ("[0.1, 0.2, 0.1, 0.2]", False),
        ("CD" + "0123456789" * 3, False), ("https://example.org/a/long/name/of/a/page", False),
        ("1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16", False), ("a 1, b 1, c 1, d 1, e 1, f 1, g 1, h 1", False),
    ],
)
def test_a_loop_is_the_same_four_times_in_a_row(text: str, looping: bool) -> None:
    assert loops(text) is looping


def test_short_cuts_leave_no_loop_out() -> None:
    """The quick refusal beside the definition word by word."""
    rng = random.Random(0)
    for _ in range(3000):
        words = [rng.choice("abc") for _ in range(rng.randrange(12))]
        words += [rng.choice("abc") for _ in range(rng.randrange(1, 4))] * rng.randrange(1, 6)
        words += [rng.choice("abcdefghi") for _ in range(rng.randrange(12))]
        count = len(words)
        expected = any(
            all(words[place] == words[place - unit] for place in range(start + unit, end))
            and (2 * (end - start) >= count or end == count)
            for unit in range(1, count // 4 + 1)
            for start in range(count)
            for end in range(start + max(4 * unit, 8), count + 1)
        )
        assert loops(" ".join(words)) is expected, words


def test_the_report_counts_them(tmp_path: Path) -> None:
    texts = ["", "Yes. " * 10, "Yes.", "..."]
    write_records(tmp_path / "questions.jsonl", [
        {"id": f"q{n}", "image": None, "question": "Is it?", "kind": "closed", "answer": "yes",
         "choices": ["yes", "no"], "group": f"g{n}"} for n in range(5)
    ])
    write_records(tmp_path / "answers.jsonl", [
        {"question_id": f"q{n}", "text": text, "finish_reason": "length" if n == 1 else "stop"}
        for n, text in enumerate(texts)
    ])
    out = tmp_path / "out"
    assert commands.main(["report", "--answers", str(tmp_path / "answers.jsonl"), "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["replies"] == {"real": {"answered": 4, "empty": 2, "looping": 1, "cut_off": 1}}
    assert report["metrics"]["closed_accuracy"]["unscored"] == 1, "the question without an answer"
    assert "2 of 4 replies on real pictures are empty." in report["notes"]
    assert "1 of 4 replies on real pictures go round in a loop." in report["notes"]
    assert "| real | 4 | 2 | 1 | 1 |" in (out / "report.md").read_text()
    page = (out / "report.html").read_text()
    assert "<td>the picture</td><td>4</td><td>2</td><td>1</td><td>1</td>" in page
    shown = re.search(r'<script type="application/json" id="items">(.*?)</script>', page, re.DOTALL)
    assert shown is not None
    assert [item.get("reply") for item in json.loads(shown.group(1))] == [
        ["empty"], ["looping", "cut off"], None, ["empty"], None,
    ]
    line = ["rescore", str(tmp_path / "answers.jsonl"), "--against", str(out / "report.json")]
    assert commands.main(line) == 0


def scored(tmp_path: Path, rows: list[tuple[str, str]]) -> dict[str, Any]:
    """The report on answers to questions of these references, each a group of its own."""
    write_records(tmp_path / "q.jsonl", [
        {"id": n, "question": "Is it?", "answer": answer} for n, (answer, _) in enumerate(rows)
    ])
    write_records(tmp_path / "answers.jsonl", [{"question_id": n, "text": text} for n, (_, text) in enumerate(rows)])
    line = ["score", "--answers", str(tmp_path / "answers.jsonl"), "--gt", str(tmp_path / "q.jsonl")]
    assert commands.main([*line, "--out", str(tmp_path / "report.json")]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    return found


def test_one_question_has_no_interval(tmp_path: Path) -> None:
    report = scored(tmp_path, [("gland", "gland")])
    assert report["metrics"]["open_f1"] == {"value": 1, "low": None, "high": None, "n": 1, "unscored": 0}
    assert "Only 1 independent group (video or case): there are no intervals." in report["notes"]


def test_nothing_right_and_nothing_clear(tmp_path: Path) -> None:
    """An interval never claims certainty, and the words at the top say that answers could not be read."""
    report = scored(tmp_path, [("yes", "hm"), ("yes", "I cannot tell"), ("gland", "hm"), ("vessel", "")])
    assert report["metrics"]["closed_accuracy"] == {
        "value": 0, "low": 0, "high": pytest.approx(1 - 0.025**0.5), "n": 2, "unscored": 0,
    }
    assert report["metrics"]["open_f1"]["high"] == pytest.approx(1 - 0.025**0.5)
    assert report["abstention"]["real"]["value"] == 0.5
    assert "closed_accuracy: 2 of 2 answers are unclear (no legal answer, or several): wrong." in report["notes"]


def test_a_set_of_yes_alone_tells_nothing(tmp_path: Path) -> None:
    report = scored(tmp_path, [("yes", "Yes.")] * 3)
    assert report["baselines"]["closed_balanced"] == {"chance": 0.5, "constant": 1.0}
    assert any(note.startswith("The answer to every yes/no question is yes") for note in report["notes"])
    report = scored(tmp_path, [("yes", "Yes."), ("no", "Yes.")])
    assert report["baselines"]["closed_balanced"] == {"chance": 0.5, "constant": 0.5}
    assert not any(note.startswith("The answer to every") for note in report["notes"])
