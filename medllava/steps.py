"""One command of several steps, each a module with ``HELP``, a docstring, ``configure(parser)`` and ``run(args)``."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence


def run_step(package: str, names: Sequence[str], description: str | None, argv: list[str] | None) -> int:
    """Run the step of ``package`` that ``argv`` names, and return its exit code.

    A step's module imports what is heavy inside its ``run``, so that ``--help`` answers at once.
    """
    parser = argparse.ArgumentParser(
        prog=package.replace(".", " "), description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    for name in names:
        module = importlib.import_module(f"{package}.{name}")
        step = steps.add_parser(
            name, help=module.HELP, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.configure(step)
        step.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    code: int = arguments.run(arguments)
    return code
