"""The benchmarks' own self-test: they run, print one table and write the keys that others read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medllava.jsonl import read_json

KEYS = {"figure", "value", "unit", "baseline", "baseline_value", "ratio", "limit", "target", "holds", "better"}


def _rows(repository: Path, out: Path, name: str, *options: str) -> dict[str, dict[str, Any]]:
    """What a benchmark's self-test writes."""
    command = [sys.executable, "benchmarks/run.py", name, "--quick", *options, "--out", str(out / f"{name}.json")]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = read_json(out / f"{name}.json")
    assert {"rows", "commit", "versions", "machine"} <= set(result)
    rows = {row["figure"]: row for row in result["rows"]}
    assert all(set(row) == KEYS for row in rows.values())
    assert all(row["value"] >= 0 for row in rows.values())
    return rows


def test_generate(repository: Path, tmp_path: Path) -> None:
    rows = _rows(repository, tmp_path, "generate")
    assert 0 < rows["generate.share_of_limit_64"]["value"] <= 1
    assert rows["generate.samples_per_s_8"]["ratio"] > 2
    assert rows["generate.resumed_samples"]["value"] == 300
    assert rows["generate.bookkeeping_peak_memory"]["holds"] and rows["generate.finished_peak_memory"]["holds"]


def test_load(repository: Path, tmp_path: Path) -> None:
    rows = _rows(repository, tmp_path, "load")
    assert rows["load.largest_difference_of_a_pixel"]["holds"]
    assert rows["load.cached_in_memory_samples_per_s"]["ratio"] > 5
    assert rows["load.live_over_usual"]["limit"] > 1


def test_train_step(repository: Path, tmp_path: Path) -> None:
    rows = _rows(repository, tmp_path, "train_step")
    assert rows["train_step.largest_difference_of_a_loss"]["holds"]
    assert rows["train_step.packed_over_padded"]["value"] > 1
    assert rows["train_step.useful_share_packed"]["value"] > 0.9


def test_eval(repository: Path, tmp_path: Path) -> None:
    rows = _rows(repository, tmp_path, "eval")
    assert rows["eval.answers_that_differ"]["holds"]
    assert rows["eval.batched_over_serial"]["value"] > 1


def test_start(repository: Path, tmp_path: Path) -> None:
    rows = _rows(repository, tmp_path, "start")
    assert rows["start.help_demo"]["holds"]
    assert 0 < rows["start.worker_listening"]["value"] < rows["start.worker_ready"]["value"]
    assert rows["start.weight_base"]["value"] > 100


def test_the_page_says_what_the_results_say(repository: Path) -> None:
    """Each figure on the page is in results/, and so is each that the README vouches for with a row's name."""
    done = subprocess.run(
        [sys.executable, "benchmarks/render.py", "--check"], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_figure_is_found(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import record
    import render

    row = record.row("serve.tokens_per_s_16", 1234.5, "tokens/s", baseline="one by one", baseline_value=400.0, least=3)
    older = {**row, "figure": "eval.old", "limit": "max", "target": 7}
    del older["better"]  # such a row names the direction of its target in the place of the limit
    record.write_result(tmp_path / "serve.json", [row, older])
    results = render.read_results(tmp_path)
    page = render.render(results)
    assert "| serve.tokens_per_s_16 | 1,234 | tokens/s | one by one: 400 | 3.09 |  | at least 3 | yes |" in page
    assert "| eval.old | 1,234 | tokens/s | one by one: 400 | 3.09 |  | at most 7 | yes |" in page
    name = "`serve.tokens_per_s_16`"
    assert render.unfounded(f"It makes 1,234 tokens a second ({name}), 3.1 times as many ({name}).", results) == []
    assert render.unfounded("| worker | 1,234 | 400 | `serve.tokens_per_s_16` |", results) == []
    assert render.unfounded("It makes 1,300 (`serve.tokens_per_s_16`)", results)
    assert render.unfounded("It makes 1,234 (`serve.tokens_per_s_17`)", results)
    assert render.unfounded("`medllava.jsonl` and 3 files, `serve.cli`", results) == []


def test_narrate_beside_the_papers_way(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "narrate.json"
    command = [sys.executable, "benchmarks/run.py", "narrate", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = read_json(out)
    assert set(result) == {"rows", "commit", "versions", "machine"}
    rows = {row["figure"]: row for row in result["rows"]}
    assert all(set(row) == KEYS for row in rows.values())
    assert all(figure in done.stdout for figure in rows)
    box, aside = rows["phantoms: phrase box, mean IoU"], rows["phantoms: asides given a box"]
    assert box["holds"] and box["value"] > box["baseline_value"] + 0.2
    assert aside["holds"] and aside["value"] < aside["baseline_value"]
    for cost in ("phantoms: CPU", "phantoms: peak memory"):
        assert 0 < rows[cost]["value"] < rows[cost]["baseline_value"]


def test_gpu_train_tries_itself_on_a_cpu(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "gpu_train.json"
    command = [sys.executable, "benchmarks/gpu_train.py", "--self-test", "--steps", "4", "--batch-size", "4"]
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=repository, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = read_json(out)
    assert "not run on a GPU" in result["note"]
    assert "failed" not in result["note"]
    rows = {row["figure"]: row for row in result["rows"]}
    assert all(set(row) == KEYS for row in rows.values())
    for stage in ("stage 1, packing", "stage 2 LoRA, packing"):
        for figure in ("speed", "speed, tokens", "peak memory"):
            assert rows[f"{stage}: {figure}"]["value"] > 0
    assert rows["packing beside the plain path: loss"]["holds"]
    assert not any("projected" in figure or "MFU" in figure for figure in rows)


def test_serve_checks_every_answer(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "serve.json"
    command = [sys.executable, "benchmarks/run.py", "serve", "--quick", "--clients", "16", "--out", str(out)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["figure"]: row for row in read_json(out)["rows"]}
    assert all(set(row) == KEYS for row in rows.values())
    assert rows["serve.soak_batch16_over_serial"]["value"] > 1
    assert rows["serve.different_right_answers"]["value"] > 8
    assert rows["serve.wrong_answers"]["value"] == rows["serve.left_in_worker"]["value"] == 0
    assert rows["serve.over_transformers_serve"]["baseline"].startswith("transformers serve")
    assert rows["serve.tokens_per_s_16"]["value"] > rows["serve.tokens_per_s_1"]["value"]
