"""A training run: one of three kinds, by its recipe, each written top to bottom in a ``run_...`` module.

What a run leaves in its folder: the checkpoint, ``recipe.yaml`` (resolved), ``run.json`` (command, data, versions, what
trained), ``train_log.jsonl``, ``loss.png``, ``tensorboard/`` and, last of all, ``finished.json``.
"""

from __future__ import annotations

import logging

from medllava.conversation import InstructionSample
from medllava.errors import ConfigError
from medllava.train.config import AnyRecipe, ContrastiveRecipe, FoundationRecipe, TuneRecipe
from medllava.train.dataset import check_images, read_samples
from medllava.train.devices import threads_of
from medllava.train.plots import check_wandb
from medllava.train.record import Paths, already_finished
from medllava.train.run_contrastive import contrastive
from medllava.train.run_foundation import foundation
from medllava.train.run_tune import tune
from medllava.train.waiting import limit_told

log = logging.getLogger(__name__)


def run(recipe: AnyRecipe, paths: Paths, *, resume: bool = False, plan: bool = False) -> None:
    """Train one stage into ``paths.out``, or with ``plan`` only say what it would take.

    Raises ConfigError, DataError, CheckpointError before the first step; MedllavaError from the loop.
    """
    if paths.wandb:
        check_wandb()
    if isinstance(recipe, ContrastiveRecipe):
        samples: list[InstructionSample] = []
    else:
        samples = read_samples(paths.data)
        check_images(samples, paths.images)
    if paths.mix and not isinstance(recipe, TuneRecipe):
        raise ConfigError(f"--mix is for stages projector, lora and full, not {recipe.stage}")
    if not plan and already_finished(recipe, paths, resume=resume):
        log.info("%s: this run is finished; nothing to do", paths.out)
        return
    with threads_of(recipe), limit_told():
        if isinstance(recipe, FoundationRecipe):
            foundation(recipe, paths, samples, plan=plan)
        elif isinstance(recipe, ContrastiveRecipe):
            contrastive(recipe, paths, plan=plan)
        else:
            tune(recipe, paths, samples, plan=plan)
