"""Run every benchmark of this folder, or those that are named:  python benchmarks/run.py [narrate ...]"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = ("narrate",)


def main() -> int:
    failed = 0
    for name in sys.argv[1:] or BENCHMARKS:
        print(f"== {name}", flush=True)
        failed += subprocess.run([sys.executable, str(Path(__file__).parent / f"{name}.py")], check=False).returncode
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
