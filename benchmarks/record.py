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


def write_result(path: Path, rows: list[dict[str, Any]], note: str = "") -> None:
    """Write ``path`` and print the rows as one table. ``note``: what a reader must know of how they came about."""
    print(f"{'figure':<44}{'ours':>10}{'baseline':>12}  {'unit':<16}{'target':<12}{'holds':<8}baseline is")
    for row in rows:
        target = "" if row["target"] is None else f"{row['limit']} {row['target']:g}"
        holds = {True: "yes", False: "NO", None: ""}[row["holds"]]
        other = "" if row["baseline_value"] is None else f"{row['baseline_value']:.5g}"
        print(
            f"{row['figure']:<44}{row['value']:>10.5g}{other:>12}  {row['unit']:<16}{target:<12}{holds:<8}"
            f"{row['baseline'] or ''}"
        )
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    write_json(path, {
        "rows": rows, "commit": commit.stdout.strip(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    } | ({"note": note} if note else {}))
