"""The code passes its own checks: ruff, mypy --strict, import-linter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_lint_types_and_layers(repository: Path) -> None:
    beside_python = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        ["bash", "tests/check.sh"], cwd=repository, capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": beside_python},
    )
    assert done.returncode == 0, done.stdout + done.stderr
