"""How many cores a process may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from medllava import processes


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no binding to cores here")
def test_a_process_that_is_bound_to_one_core_uses_one(repository: Path) -> None:
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "from medllava.processes import usable_cores; print(usable_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_a_container_that_may_keep_some_cores_busy_uses_so_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, groups = tmp_path / "cgroup", tmp_path / "groups"
    monkeypatch.setattr(processes, "_CGROUP", told)
    monkeypatch.setattr(processes, "_CGROUPS", groups)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
    assert processes.usable_cores() == 64, "where there are no groups"
    inner = groups / "outer" / "inner"
    inner.mkdir(parents=True)
    told.write_text("1:cpu:/other\n0::/outer/inner\n")
    (inner / "cpu.max").write_text("max 100000\n")
    assert processes.usable_cores() == 64
    (groups / "outer" / "cpu.max").write_text("250000 100000\n")
    assert processes.usable_cores() == 3, "two and a half, of the group above"
    (inner / "cpu.max").write_text("20000 100000\n")
    assert processes.usable_cores() == 1
    told.write_text("0::/\n")
    (groups / "cpu.max").write_text("400000 100000\n")
    assert processes.usable_cores() == 4, "in a container that sees itself as the root"


def test_one_function_counts_cores(repository: Path) -> None:
    """A command that counts by itself starts 64 processes where it may use two cores."""
    counting = [path.name for path in (repository / "medllava").rglob("*.py") if "cpu_count" in path.read_text("utf-8")]
    assert counting == ["processes.py"]
