"""One of two processes hangs: the run ends, and says which one and where."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from medllava.errors import MedllavaError
from medllava.model.tiny import tiny_checkpoint
from medllava.train.waiting import limit_told

RECIPES = Path(__file__).parents[2] / "train" / "recipes"
HANGS = """
import os, sys, time
from medllava.errors import run_cli
from medllava.train.__main__ import main
from medllava.train.dataset import Steps

real = Steps.__getitem__

def hang(self, step):
    if os.environ["RANK"] == "1" and step == 2:
        time.sleep(600)
    return real(self, step)

Steps.__getitem__ = hang
sys.exit(run_cli(lambda: main(sys.argv[1:])))
"""


def test_a_process_that_waits_too_long_says_who_is_behind_and_ends_the_run(data: Any, tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    start = tiny_checkpoint(tmp_path / "tiny")
    arguments = ["--config", str(RECIPES / "demo_stage2.yaml"), *data.arguments, "--init-from", str(start), "--out"]
    arguments += [str(tmp_path / "out"), "--timeout", "0.1", "optim.steps=5", "lora.r=2", "save_every=1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*launch, str(tmp_path / "hangs.py"), *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1
    # The hung process and the one that waits for it reach the limit together: the first to tell ends both.
    told = next(line for line in done.stderr.splitlines() if " has been at " in line)
    who = re.match(
        "error: rank [01] has been at (the samples of )?step 3 for 6 seconds, the limit. Where all are: ", told
    )
    assert who, told
    assert re.search(r"rank 0: step 3 \(.*; rank 1: the samples of step 3 \(", told[who.end() :]), told
    assert "Go on with --resume; --timeout MINUTES allows more" in told
    assert (tmp_path / "out" / "step-000002" / "medllava.json").is_file()


def test_a_wait_outside_the_steps_is_told_and_other_errors_stay_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    said = RuntimeError("[unbound_buffer.cc:78] Timed out waiting 90000ms for recv operation to complete")
    with pytest.raises(RuntimeError, match="unbound_buffer"), limit_told():
        raise said
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with pytest.raises(MedllavaError, match="rank 1 waited for another process, which did not come"), limit_told():
        raise said
    gone = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:53383. This is typically caused by ...")
    with pytest.raises(MedllavaError, match="rank 1 lost another process, which has ended; see what"), limit_told():
        raise gone
    with pytest.raises(RuntimeError, match="shape"), limit_told():
        raise RuntimeError("shape mismatch")
