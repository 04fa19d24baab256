"""Run every benchmark of this folder, or those that are named; options go to each of them.

    python benchmarks/run.py [narrate ...] [--clips DIR ...]
"""

from __future__ import annotations

import subprocess
import sys
from itertools import takewhile
from pathlib import Path

BENCHMARKS = ("narrate", "serve")


def main() -> int:
    named = list(takewhile(lambda argument: not argument.startswith("-"), sys.argv[1:]))
    options = sys.argv[1 + len(named) :]
    failed = False
    for name in named or BENCHMARKS:
        print(f"== {name}", flush=True)
        command = [sys.executable, str(Path(__file__).parent / f"{name}.py"), *options]
        failed |= subprocess.run(command, check=False).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
