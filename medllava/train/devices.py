"""What a run computes on: processes, precision, threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from medllava.model import checkpoint
from medllava.train.config import AnyRecipe, FoundationRecipe
from medllava.train.waiting import process_group


def accelerator_of(mixed_precision: str, timeout: float) -> Any:
    """accelerate's Accelerator. ``timeout``: how long a process waits for the others, in minutes."""
    from accelerate import Accelerator

    on_cpu = checkpoint.best_device() == "cpu"
    if on_cpu:  # DeepSpeed, which accelerate imports where it is installed, would say that it finds no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Unless told that it is on the CPU, accelerate lets torchrun's processes run side by side without joining them.
    waits = process_group(timedelta(minutes=timeout))
    return Accelerator(mixed_precision=mixed_precision, cpu=on_cpu, kwargs_handlers=[waits])


def in_half(precision: str) -> bool:
    """Whether a recipe's ``precision`` is bfloat16 here."""
    return precision == "bfloat16" or (precision == "auto" and torch.cuda.is_available())


@contextmanager
def threads_of(recipe: AnyRecipe) -> Iterator[None]:
    """Set PyTorch's threads for this run; tiny models lose time to more than two."""
    before = torch.get_num_threads()
    threads = recipe.threads
    if threads is None and isinstance(recipe, FoundationRecipe):
        threads = min(2, before)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
