"""DeepSpeed's ZeRO-2 and ZeRO-3 under the same loop: optimizer state, gradients and, in stage 3, weights are spread
over the processes (Rajbhandari et al. 2020).

Batch sizes, precision, clipping, optimizer and schedule come from the recipe; the JSON file says how to spread. Weights
that ZeRO-3 has spread are empty tensors to everyone else: whoever reads them does so within :meth:`Zero.gathered`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medllava.errors import CheckpointError, ConfigError, MissingExtraError
from medllava.jsonl import read_json
from medllava.train.saves import ZERO_FOLDER

_STAGING = ".zero.part"
_TAG = "state"
_OURS = ("optimizer", "scheduler", "fp16", "bf16", "train_batch_size", "train_micro_batch_size_per_gpu",
         "gradient_accumulation_steps", "gradient_clipping")


class Zero:
    """``file``: DeepSpeed's configuration. whole: checkpoints hold all weights, not only those that train.

    Raises ConfigError, or MissingExtraError if deepspeed is not installed.
    """

    def __init__(self, file: Path, *, half: bool, grad_clip: float, whole: bool) -> None:
        settings = read_json(file)
        stage = settings.get("zero_optimization", {}).get("stage") if isinstance(settings, dict) else None
        if stage not in (1, 2, 3):
            raise ConfigError(f"{file}: expected a DeepSpeed configuration with zero_optimization.stage 1, 2 or 3")
        theirs = sorted(key for key in _OURS if settings.get(key, "auto") != "auto")
        if theirs:
            raise ConfigError(f"{file}: {', '.join(theirs)} come from the recipe; remove them from this file")
        if not torch.distributed.is_initialized():
            raise ConfigError("--deepspeed needs processes: torchrun --nproc-per-node N -m medllava.train ...")
        try:
            import deepspeed
        except (ImportError, OSError, RuntimeError) as error:
            raise MissingExtraError("deepspeed", "gpu", error) from error
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())
        self.stage = int(stage)
        self._whole = whole
        self._deepspeed = deepspeed
        self._engine: Any = None
        # One micro-batch per call and one step per boundary: the loop itself accumulates and counts.
        self._settings = {key: value for key, value in settings.items() if key not in _OURS} | {
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": grad_clip,
            "bf16": {"enabled": half}, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 40,
        }

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """(the module as it must be called, the optimizer with the learning rates)"""
        self._engine, wrapped, _, _ = self._deepspeed.initialize(
            model=module, optimizer=optimizer, config=self._settings, dist_init_required=False
        )
        return self._engine, wrapped

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Gradients of a micro-batch; they are reduced over the processes with the ``last`` of a step."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self) -> float:
        """Clip, update and clear; the norm of the gradients before clipping."""
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it the weights that a checkpoint holds are whole on every process. All processes must enter."""
        if self.stage < 3 or self._engine is None:
            yield
            return
        chosen = [value for value in self._engine.module.parameters() if self._whole or value.requires_grad]
        with self._deepspeed.zero.GatheredParameters(chosen):
            yield

    def save(self, out: Path) -> Path:
        """Have every process write its part into a folder in ``out`` (on a disk that all share), to be moved into a
        save; returns that folder."""
        staging = out / _STAGING
        if not torch.distributed.get_rank():
            shutil.rmtree(staging, ignore_errors=True)
        torch.distributed.barrier()
        self._engine.save_checkpoint(str(staging), tag=_TAG, exclude_frozen_parameters=True)
        torch.distributed.barrier()
        return staging

    def restore(self, folder: Path) -> None:
        """Read what :meth:`save` wrote; ``folder``: of the save. Raises CheckpointError."""
        try:
            found, _ = self._engine.load_checkpoint(str(folder / ZERO_FOLDER), tag=_TAG, load_module_strict=False)
        except (RuntimeError, AssertionError, KeyError, OSError, EOFError) as error:
            raise CheckpointError(f"{folder}: cannot be resumed from ({error}); remove it") from error
        if found is None:
            raise CheckpointError(f"{folder / ZERO_FOLDER}: holds no state of DeepSpeed; remove {folder}")
