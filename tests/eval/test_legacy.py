"""The originals' numbers. Tables made by running the original scripts are compared with where they are at hand."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from medllava.errors import ConfigError, DataError
from medllava.eval import __main__ as commands
from medllava.eval.legacy import normalise, pmc_eval, quilt_eval, quilt_gpt_summarize, read_letter, word_scores
from medllava.jsonl import write_records

TABLES = Path(os.environ.get("MEDLLAVA_PARITY", Path(__file__).parents[3] / "shared" / "parity")) / "metrics"
SETS = sorted(path.name.removesuffix(".expected.json") for path in TABLES.glob("*[0-9].expected.json"))
REVIEWS = sorted(path.name.removesuffix(".expected.txt") for path in TABLES.glob("gpt_summary/*.expected.txt"))
needs_tables = pytest.mark.skipif(not SETS, reason="no tables of the original scripts here (MEDLLAVA_PARITY)")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def legacy(*arguments: str, out: Path) -> dict[str, Any]:
    assert commands.main(["score", *arguments, "--out", str(out)]) == 0
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def printed(*arguments: str) -> str:
    """What ``--as-printed`` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert commands.main(["score", *arguments, "--as-printed"]) == 0
    return told.getvalue().strip()


@needs_tables
@pytest.mark.parametrize("name", SETS or ["none"])
def test_the_originals_tables(name: str, tmp_path: Path) -> None:
    expected = json.loads((TABLES / f"{name}.expected.json").read_text())
    line = ["--gt", str(TABLES / f"{name}.gt.json"), "--answers", str(TABLES / f"{name}.pred.jsonl")]
    if expected["anchor_used"]:
        line += ["--anchor", str(TABLES / f"{name}.anchor.jsonl")]
    if name.startswith("pmc"):
        found = legacy("--legacy", "pmc_eval", *line, out=tmp_path / "o.json")
        assert (found["accuracy"], found["failed"]) == (expected["acc"], expected["n_failed"])
        assert printed("--legacy", "pmc_eval", *line) == expected["command"]["stdout"].strip()
        for row in expected["rows"]:
            assert read_letter(row["pred_text_used"]) == row["parsed"]
        return
    line += ["--quilt"] if expected["quilt_flag"] else []
    found = legacy("--legacy", "quilt_eval", *line, out=tmp_path / "o.json")
    for key in ("exact_match", "f1", "precision", "recall", "yes_no_accuracy", "n_open", "n_closed"):
        assert found[key] == expected["aggregate"][key], "to the last digit"
    assert printed("--legacy", "quilt_eval", *line) == expected["table"]
    for row in expected["rows"]:
        if row["kind"] == "open":
            scores = word_scores(row["norm_pred"], row["norm_gt"])
            wanted = (row["exact"], row["f1"], row["precision"], row["recall"])
            assert scores == pytest.approx(wanted, abs=1e-9)


@needs_tables
@pytest.mark.parametrize("name", REVIEWS or ["none"])
def test_the_originals_judge_summary(name: str, tmp_path: Path) -> None:
    folder = TABLES / "gpt_summary"
    reviews = tmp_path / f"{name}.jsonl"
    shutil.copy(folder / f"{name}.min.jsonl", reviews)
    line = ["--legacy", "quilt_gpt_summarize", "--answers", str(reviews), "--context"]
    line.append(str(folder / "captions.min.jsonl"))
    found = legacy(*line, out=tmp_path / "o.json")
    shown = (folder / f"{name}.expected.txt").read_text().strip()
    lines = shown.splitlines()[1:-1]
    assert found == {line.rsplit(" ", 3)[0]: float(line.rsplit(" ", 3)[1]) for line in lines}
    assert printed(*line) == shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The gland, an area; a cell.", "gland area cell"), ("two/three", "2 3"), ("a - b", "b"), ("3.5 mm.", "3.5 mm"),
        ("1,000 (x)", "1000 x"), ("dont", "don't"), ("couldn'tve", "couldn't've"), ("somebody'd", "somebodyd"),
        ("none", "0"), ("", ""),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalise(text) == expected


def closed(truth: str) -> dict[str, Any]:
    return {"id": 0, "answer_type": "CLOSED", "answer": truth}


@pytest.mark.parametrize(
    ("text", "taken_for"),
    [("", "yes"), ("I am unable to tell", "yes"), ("Yes, there is no doubt", "no"), ("not uncommon", "no"),
     ("none", "yes"), ("isn't", "yes"), ("No.", "no")],
)
def test_the_originals_yes_no_faults_are_kept(text: str, taken_for: str) -> None:
    found = quilt_eval([closed(taken_for)], [{"text": text}])
    assert found["yes_no_accuracy"] == 100
    assert found["exact_match"] is None


def test_open_scores_by_hand() -> None:
    truth = [{"id": 0, "answer_type": "OPEN", "answer": "gland"}]
    found = quilt_eval(truth, [{"text": "gland gland vessel"}])
    assert found["exact_match"] == pytest.approx(100 / 3)
    assert found["precision"] == pytest.approx(200 / 3)
    assert found["recall"] == 100
    assert found["yes_no_accuracy"] == 0.0, "as the original prints it"
    assert quilt_eval(truth, [{"text": "gland gland vessel"}], [{"text": "x----"}])["f1"] == 0


def test_letters_by_hand() -> None:
    texts = ("B", "B: x", "The answer is B", "it is not D. it is B.", "e", "A or B.")
    assert [read_letter(text) for text in texts] == ["B", "B", "T", "B", "FAILED", "FAILED"]
    truth = [{"conversations": [{}, {"value": "B"}]}]
    assert pmc_eval(truth, [{"text": "B"}])["accuracy"] == 100
    assert pmc_eval([], [])["accuracy"] is None


def test_summary_by_hand_averages_failures_in() -> None:
    captions = [{"question_id": 0, "type": "Bone"}, {"question_id": 1, "type": "Renal"}]
    reviews = [
        {"question_id": 0, "category": "conv", "tuple": [8, 6]},
        {"question_id": 1, "category": "conv", "tuple": [-1, -1]},
    ]
    assert quilt_gpt_summarize(reviews, captions) == {"Bone": 75.0, "Renal": 100.0, "all": 71.4, "conv": 71.4}


def test_reviews_as_the_original_walks_through_them() -> None:
    """By place, as far as both files go; without category or type only into the parts there are; numbers only."""
    captions = [{"question_id": n, "type": "Bone" if n else None} for n in range(3)]
    reviews: list[dict[str, Any]] = [
        {"question_id": 0, "score": [8, 6]}, {"question_id": 1, "category": "conv", "tuple": [4, 7.5, 1]},
    ]
    assert quilt_gpt_summarize(reviews, captions) == {"Bone": 187.5, "all": 112.5, "conv": 187.5}
    assert quilt_gpt_summarize(reviews, captions[:1]) == {"all": 75.0}
    assert quilt_gpt_summarize([{"question_id": 0, "score": [0, 6]}], captions) == {"all": None}
    for odd in ("8 7", [8], ["8", "7"], [8, None], None):
        with pytest.raises(DataError, match="row 0: expected two scores as numbers"):
            quilt_gpt_summarize([{"question_id": 0, "score": odd}], captions)
    with pytest.raises(DataError, match="row 0 is question 1 in the one and 0 in the other"):
        quilt_gpt_summarize(reviews[1:], captions)
    with pytest.raises(DataError, match="row 0 has no 'tuple'"):
        quilt_gpt_summarize([{"question_id": 0, "category": "conv", "score": [8, 6]}], captions)


def test_reviews_that_are_no_numbers_or_cut_short(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """"nan 5" was read as two scores: the original prints nan, where JSON has none. A half line is told."""
    reviews, captions = tmp_path / "gpt4_text_x.jsonl", tmp_path / "captions.jsonl"
    write_records(captions, [{"question_id": n, "type": "Bone"} for n in range(3)])
    write_records(reviews, [{"question_id": 0, "score": [8, 6]}, {"question_id": 1, "score": [float("nan"), 5.0]}])
    with reviews.open("a") as file:
        file.write('{"question_id": 2, "sc')
    line = ("--legacy", "quilt_gpt_summarize", "--answers", str(reviews), "--context", str(captions))
    assert printed(*line).splitlines()[:2] == ["x", "Bone nan nan 55.0"]
    told = {record.message for record in caplog.records}
    assert told == {f"{reviews}:3: the last line is half written and was left out"}
    assert legacy(*line, out=tmp_path / "o.json") == {"Bone": None, "all": None}


def test_anchors_cut_by_place_and_end_the_set() -> None:
    """The original looks neither at an anchor's question nor at how many anchors there are."""
    truth = [{"id": n, "answer_type": "OPEN", "answer": "gland"} for n in range(3)]
    given = [{"text": "gland in stroma"}, {"text": "gland"}, {"text": "gland"}]
    anchors = [{"question_id": 9, "text": "x----"}, {"question_id": 8, "text": "gland"}]
    found = quilt_eval(truth, given, anchors)
    assert (found["n_open"], found["f1"]) == (2, 50.0)
    assert quilt_eval(truth, given, [])["n_open"] == 3


def test_accuracy_of_prompts_with_a_picture() -> None:
    truth = [{"conversations": [{}, {"value": "B"}]}] * 3
    found = pmc_eval(truth, [{"text": "B", "prompt": "<image>\nx"}, {"text": "C", "prompt": "<image>"}, {"text": "B"}])
    assert found["img_accuracy"] == 50 and found["count"] == 3
    assert pmc_eval(truth[:1], [{"text": "B"}])["img_accuracy"] is None


@pytest.mark.parametrize("answer", [3, None, ["gland"]])
def test_a_row_that_the_original_stops_at_is_one_clear_line(answer: object, tmp_path: Path) -> None:
    gt, answers = tmp_path / "gt.json", tmp_path / "a.jsonl"
    gt.write_text(json.dumps([{"id": 0, "answer_type": "OPEN", "answer": answer}]))
    answers.write_text('{"question_id": 0, "text": "gland"}\n')
    with pytest.raises(DataError, match=r"gt.json and .*a.jsonl: row 0 holds something else"):
        commands.main(["score", "--answers", str(answers), "--legacy", "quilt_eval", "--gt", str(gt)])
    gt.write_text('{"id": 0}')
    with pytest.raises(DataError, match="one JSON list"):
        commands.main(["score", "--answers", str(answers), "--legacy", "quilt_eval", "--gt", str(gt)])


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    gt, answers = tmp_path / "gt.json", tmp_path / "a.jsonl"
    gt.write_text(json.dumps([closed("yes")]))
    answers.write_text('{"question_id": 1, "text": "yes"}\n')
    line = ["score", "--answers", str(answers)]
    with pytest.raises(DataError, match="differ at row 0"):
        commands.main([*line, "--legacy", "quilt_eval", "--gt", str(gt)])
    with pytest.raises(ConfigError, match="--gt"):
        commands.main([*line, "--legacy", "pmc_eval"])
    with pytest.raises(ConfigError, match="--context"):
        commands.main([*line, "--legacy", "quilt_gpt_summarize"])
    answers.write_text('{"question_id": 0, "text": "yes"}\n' * 2)
    with pytest.raises(DataError, match="differ at row 1"):
        commands.main([*line, "--legacy", "quilt_eval", "--gt", str(gt)])
    answers.write_text('{"question_id": 0, "text": "yes"}\n')
    with pytest.raises(DataError, match="yes_no_answer"):
        commands.main([*line, "--legacy", "quilt_eval", "--gt", str(gt), "--quilt"])
    gt.write_text('[{"answer_type": "OPEN", "answer": "x"}]')
    answers.write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match="gt.json: row 0 has no 'id'"):
        commands.main([*line, "--legacy", "quilt_eval", "--gt", str(gt)])


ODD = json.loads((TABLES / "errors.expected.json").read_text()) if (TABLES / "errors.expected.json").is_file() else {}


@pytest.mark.skipif(not ODD, reason="no tables of the original scripts here (MEDLLAVA_PARITY)")
@pytest.mark.parametrize("name", ODD or ["none"])
def test_where_the_original_stops(name: str, tmp_path: Path) -> None:
    """Its numbers where it prints some; where it stops, an error of ours, or no number for a kind that has no rows."""
    if not (TABLES / f"{name}.gt.json").is_file():
        pytest.skip(f"no files of {name} here")
    line = ["--legacy", "quilt_eval", "--gt", str(TABLES / f"{name}.gt.json")]
    line += ["--answers", str(TABLES / f"{name}.pred.jsonl")]
    stopped = ODD[name].get("stderr_last") or ""
    if ODD[name]["returncode"] and "ZeroDivisionError" not in stopped:
        with pytest.raises(DataError, match="ids and their order"):
            legacy(*line, out=tmp_path / "o.json")
        return
    found = legacy(*line, out=tmp_path / "o.json")
    if ODD[name]["returncode"]:
        assert found["f1"] is None and found["yes_no_accuracy"] is not None
        return
    for key, title in (
        ("exact_match", "exact match score"), ("f1", "f1 score"), ("precision", "precision"), ("recall", "recall"),
        ("yes_no_accuracy", "yes/no accuracy"),
    ):
        shown = re.search(rf"{title}\s+([\d.]+)", ODD[name]["stdout"])
        assert shown is not None and found[key] == pytest.approx(float(shown.group(1)), abs=1e-3)
