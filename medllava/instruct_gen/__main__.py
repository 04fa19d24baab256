r"""``python -m medllava.instruct_gen STEP``: from narrated videos to instruction data.

example (each step takes --help):
  medllava instruct_gen narrate --videos lectures --out narrated
  medllava instruct_gen generate --captions narrated/captions.jsonl --out data \
      --config instruct_gen/recipes/quilt_instruct.yaml --dry-run
"""

from __future__ import annotations

import sys

from medllava.errors import run_cli
from medllava.steps import run_step

STEPS = ("narrate", "correct", "generate", "card", "export", "check")


def main(argv: list[str] | None = None) -> int:
    return run_step("medllava.instruct_gen", STEPS, __doc__, argv)


if __name__ == "__main__":
    sys.exit(run_cli(main))
