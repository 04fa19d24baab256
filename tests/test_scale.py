"""docs/scale.md says what its script computes, and the benchmark of the bookkeeping runs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from medllava.jsonl import read_json


def test_the_page_holds_the_tables_of_the_script(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/scale.py", "--check"], cwd=repository, capture_output=True, text=True, check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (repository / "docs" / "scale.md").read_text()
    assert page.count("<!-- table ") == 4 and "<!-- end -->\n<!-- end -->" not in page


def test_a_page_without_a_place_for_a_table_is_refused(repository: Path) -> None:
    spec = importlib.util.spec_from_file_location("scale", repository / "benchmarks" / "scale.py")
    assert spec is not None and spec.loader is not None
    scale = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scale)
    page = "<!-- table a -->\nold\n<!-- end -->\n"
    assert scale.filled(page, {"a": "| new |"}) == "<!-- table a -->\n| new |\n<!-- end -->\n"
    with pytest.raises(SystemExit, match="expected one place for the table b, found 0"):
        scale.filled(page, {"b": ""})
    assert [scale._round(value) for value in (0.0123, 3.14159, 45.6, 1234.5)] == ["0.012", "3.1", "46", "1,200"]


def test_bookkeeping_in_small(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "bookkeeping.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/bookkeeping.py", "--quick", "--out", str(out)], cwd=repository,
        capture_output=True, text=True, check=False, timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["figure"]: row for row in read_json(out)["rows"]}
    assert rows["bookkeeping.narrate_chunks"]["value"] == 30 * 105
    assert all(row["holds"] for row in rows.values() if row["target"] is not None)
