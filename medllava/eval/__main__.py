"""``python -m medllava.eval STEP``: fetch data, answer, score, judge, report, rescore, compare, overview, encoders."""

from __future__ import annotations

import sys

from medllava.errors import run_cli
from medllava.steps import run_step

STEPS = ("fetch", "answer", "score", "judge", "report", "rescore", "compare", "overview", "encoder", "harness")


def main(argv: list[str] | None = None) -> int:
    return run_step("medllava.eval", STEPS, __doc__, argv)


if __name__ == "__main__":
    sys.exit(run_cli(main))
