from __future__ import annotations

import argparse

HELP = "x"
def configure(parser: argparse.ArgumentParser) -> None: ...
def run(arguments: argparse.Namespace) -> int:
    return 0
