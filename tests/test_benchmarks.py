"""The benchmarks' own self-test: they run, print one table and write the keys that others read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from medllava.jsonl import read_json

KEYS = {"figure", "value", "unit", "baseline", "baseline_value", "ratio", "limit", "target", "holds"}


def test_narrate_beside_the_papers_way(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "narrate.json"
    command = [sys.executable, "benchmarks/run.py", "narrate", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300, check=False)
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
        [*command, "--out", str(out)], cwd=repository, capture_output=True, text=True, timeout=300, check=False
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
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["figure"]: row for row in read_json(out)["rows"]}
    assert all(set(row) == KEYS for row in rows.values())
    assert rows["16 clients against one at a time"]["value"] >= 3
    assert rows["different right answers"]["value"] > 8
    assert rows["wrong answers"]["value"] == rows["requests left in the worker"]["value"] == 0
