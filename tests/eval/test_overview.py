from __future__ import annotations

import json
from pathlib import Path

import pytest

from medllava.errors import DataError
from medllava.eval import __main__ as commands
from medllava.jsonl import write_json, write_records


def test_a_line_for_each_benchmark_run_or_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "path_vqa"
    write_records(run / "questions.jsonl", [
        {"id": f"q{n}", "image": None, "question": "Is it?", "kind": "closed", "answer": "yes",
         "choices": ["yes", "no"], "group": f"g{n}"} for n in range(4)
    ])
    write_records(run / "answers.jsonl", [{"question_id": f"q{n}", "text": "Yes.", "model": "m"} for n in range(3)])
    write_json(run / "run.json", {"benchmark": {"name": "path_vqa"}, "model": "m"})
    assert commands.main(["report", "--answers", str(run / "answers.jsonl"), "--out", str(run / "report")]) == 0
    found = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "chance": 0.5}
    write_json(tmp_path / "bach.json", {
        "benchmark": {"name": "bach"}, "model": "/models/clip",
        "tasks": {"zero-shot": {"accuracy": found, "balanced_accuracy": found}},
    })
    write_json(tmp_path / "other.json", {"tasks": 3})
    capsys.readouterr()
    assert commands.main(["overview", str(tmp_path), str(run), "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "overview.md").read_text()
    assert "| path_vqa | m | closed_accuracy | 1.000 | 0.292 to 1.000 | 3 | 1 |  |\n" in text
    assert "| bach | clip | zero-shot balanced_accuracy | 0.500 | 0.400 to 0.600 | 9 | 0 |  |\n" in text
    assert text.count("| path_vqa |") == 1, "a folder given twice counts once"
    for name in ("quilt_vqa", "pmc_vqa", "pcam", "grounding"):
        assert f"| {name} | not run |" in text
    value = json.loads((tmp_path / "overview.json").read_text())
    assert [line["benchmark"] for line in value["run"]] == ["bach", "path_vqa"]
    assert "slake" in value["not_run"] and "bach" not in value["not_run"]


def test_nothing_to_show_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no report.json below"):
        commands.main(["overview", str(tmp_path)])
    write_json(tmp_path / "report.json", {"metrics": {"x": 3}})
    with pytest.raises(DataError, match="report.json: not a report of this program"):
        commands.main(["overview", str(tmp_path)])
