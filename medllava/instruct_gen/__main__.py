"""``python -m medllava.instruct_gen narrate | generate | check``: from narrated videos to instruction data."""

from __future__ import annotations

import argparse
import importlib
import sys

from medllava.errors import run_cli

STEPS = ("narrate", "generate", "check")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="medllava instruct_gen", description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    for name in STEPS:
        # A step's module imports what is heavy inside run(), so that --help answers at once.
        module = importlib.import_module(f"medllava.instruct_gen.{name}")
        step = steps.add_parser(
            name, help=module.HELP, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.configure(step)
        step.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    code: int = arguments.run(arguments)
    return code


if __name__ == "__main__":
    sys.exit(run_cli(main))
