"""Runs a training command that kill -9 ends in one of its steps: ``killed_run.py STEP ARGUMENT...``, counted from 1."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from medllava.train import loop
from medllava.train.__main__ import main

real, steps = loop._step, 0


def killed(*given: Any, **named: Any) -> Any:
    global steps
    steps += 1
    if steps == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given, **named)


loop._step = killed
main(sys.argv[2:])
