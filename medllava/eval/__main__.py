r"""``python -m medllava.eval STEP``: fetch data, answer, score, judge, report, rescore, compare, overview, encoders.

example (each step takes --help):
  medllava eval answer --benchmark phantom --questions demo-out/held-out/questions.jsonl \
      --images demo-out/held-out/narrated --model-path demo-out/stage2 --out answers
  medllava eval report --answers answers/answers.jsonl --out report
"""

from __future__ import annotations

import sys

from medllava.errors import run_cli
from medllava.steps import run_step

STEPS = ("fetch", "answer", "score", "judge", "report", "rescore", "compare", "overview", "encoder", "harness")


def main(argv: list[str] | None = None) -> int:
    return run_step("medllava.eval", STEPS, __doc__, argv)


if __name__ == "__main__":
    sys.exit(run_cli(main))
