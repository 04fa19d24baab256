"""Run every benchmark of this folder, or those that are named, and render what they found into README.md and plots.

    python benchmarks/run.py [narrate ...] [--quick] [further options of the named ones]

--quick tries them out in seconds each; its figures say nothing and go to benchmarks/quick/, which git does not keep.
"""

from __future__ import annotations

import subprocess
import sys
from itertools import takewhile
from pathlib import Path

HERE = Path(__file__).resolve().parent
BENCHMARKS = ("start", "narrate", "generate", "bookkeeping", "load", "train_step", "serve", "eval")
"""What runs without a GPU; gpu_train.py needs one."""


def main() -> int:
    named = list(takewhile(lambda argument: not argument.startswith("-"), sys.argv[1:]))
    options = sys.argv[1 + len(named) :]
    own_place = any(option.split("=")[0] == "--out" for option in options)
    folder = HERE / "quick" if "--quick" in options else HERE
    failed = []
    for name in named or BENCHMARKS:
        print(f"== {name}", flush=True)
        out = [] if own_place else ["--out", str(folder / "results" / f"{name}.json")]
        if subprocess.run([sys.executable, str(HERE / f"{name}.py"), *options, *out], check=False).returncode:
            failed.append(name)
    if not own_place:
        subprocess.run([sys.executable, str(HERE / "render.py"), "--folder", str(folder)], check=True)
    if failed:
        print(f"failed, or a target was missed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
