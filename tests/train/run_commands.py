"""Runs training commands one after the other in this process: ``run_commands.py FILE``, started by torchrun.

FILE: a JSON list of {"arguments": [...], "stop_at": n}; ``stop_at`` ends the run before its n-th step, as a kill would.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from medllava.train import loop
from medllava.train.__main__ import main

real = loop._step
for command in json.loads(Path(sys.argv[1]).read_text()):
    calls = 0

    def counted(*given: Any, stop_at: int | None = command.get("stop_at")) -> Any:
        global calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        return real(*given)

    loop._step = counted
    try:
        assert main(command["arguments"]) == 0
    except KeyboardInterrupt:
        assert command.get("stop_at")
