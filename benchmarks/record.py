"""How a benchmark writes its result: rows of figures with their baseline, and where and on what they were measured."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from medllava.jsonl import write_json

PACKAGES = ("medllava", "torch", "transformers", "numpy", "av", "opencv-python-headless")


def write_result(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write ``path`` and print the rows."""
    for row in rows:
        against = f"   {row['ratio']} x {row['baseline']}" if row["ratio"] is not None else ""
        goal = f"   ({row['limit']} {row['target']}: {'holds' if row['holds'] else 'MISSED'})" if row["target"] else ""
        print(f"{row['figure']:<34}{row['value']:>10} {row['unit']}{against}{goal}")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    write_json(path, {
        "rows": rows, "commit": commit.stdout.strip(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    })
