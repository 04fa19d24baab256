"""The launch files for several nodes, with made-up Slurm commands and a Python that tells what it was given."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

LAUNCH = Path(__file__).parents[2] / "train" / "launch"


def launched(tmp_path: Path, file: str, commands: dict[str, str], *arguments: str, **environment: str) -> str:
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(LAUNCH / file), *arguments], capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, **environment, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    return done.stdout + done.stderr + f"exit {done.returncode}"


def test_torchrun_gets_nodes_and_the_rest_goes_to_training(tmp_path: Path) -> None:
    python = {"python": 'echo "$@"'}
    said = launched(tmp_path, "torchrun.sh", python, "--out", "a b", "lora.r=2", HOST="node1", NODES="3")
    assert said.startswith("-m torch.distributed.run --nnodes 3 --nproc-per-node gpu --max-restarts 0")
    assert "--rdzv-endpoint node1:29500 -m medllava.train --out a b lora.r=2" in said
    assert "say how many nodes there are" in launched(tmp_path, "torchrun.sh", python, HOST="node1")


def test_a_slurm_job_names_its_first_node_and_goes_on_after_its_time(tmp_path: Path) -> None:
    commands = {
        "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "scontrol $*"; fi',
        "srun": 'echo "$HOST $NODES $PER_NODE $PORT: $*"; [ -z "$LATE" ] || { kill -USR1 $PPID; sleep 2; exit 143; }',
        "scancel": 'echo "scancel $*"',
    }
    slurm = {
        "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_ID": "41", "SLURM_SUBMIT_DIR": "/repo", "SLURM_CPUS_PER_TASK": "64",
    }
    said = launched(tmp_path, "slurm.sbatch", commands, "--out", "o", LATE="", **slurm)
    script = "bash /repo/train/launch/torchrun.sh --out o --resume"
    assert said == f"node7 2 8 20041: --kill-on-bad-exit=0 --cpus-per-task=64 {script}\nexit 0"
    del slurm["SLURM_CPUS_PER_TASK"]  # where no number is asked for
    said = launched(tmp_path, "slurm.sbatch", commands, "--out", "o", LATE="", **slurm)
    assert said.startswith(f"node7 2 8 20041: --kill-on-bad-exit=0 {script}\n")
    said = launched(tmp_path, "slurm.sbatch", commands, "--out", "o", LATE="yes", **slurm)
    assert "scancel --signal=TERM 41.0" in said and "scontrol requeue 41\nexit 0" in said


def test_deepspeed_gets_the_hostfile(tmp_path: Path) -> None:
    said = launched(tmp_path, "deepspeed.sh", {"deepspeed": 'echo "$@"'}, "--out", "o", ZERO="2")
    assert f"--hostfile {LAUNCH}/hostfile --master_port 29500 --no_local_rank --module medllava.train --out o" in said
    zero = Path(said.split("--deepspeed ")[1].split()[0])
    assert zero.is_file() and zero.name == "zero2.json"
