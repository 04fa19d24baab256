"""Stage 0 of a real run: an image-text encoder, trained on."""

from __future__ import annotations

import logging
import math
import time
from functools import partial
from pathlib import Path

import torch

from medllava.errors import ConfigError
from medllava.model import checkpoint, manifest
from medllava.model.embeddings import load_encoder
from medllava.model.image_text import read_image_texts
from medllava.train.config import ContrastiveRecipe
from medllava.train.contrastive_tune import (
    FullBatches,
    PairLoss,
    check_batch,
    groups_of,
    pair_batches,
    prove_encoder,
    save_encoder,
)
from medllava.train.dataset import Steps
from medllava.train.devices import accelerator_of, in_half
from medllava.train.loop import Pace, fit
from medllava.train.record import Paths, begin, facts_of, finish
from medllava.train.saves import Figures, Saves
from medllava.train.stages import Part, count_parameters, format_table

log = logging.getLogger(__name__)


def contrastive(recipe: ContrastiveRecipe, paths: Paths, *, plan: bool) -> None:
    """Train on the image-text encoder ``paths.init_from``. Raises like :func:`medllava.train.run.run`."""
    started = time.monotonic()
    if paths.init_from is None:
        raise ConfigError(f"stage {recipe.stage} starts from an image-text encoder: add --init-from FOLDER")
    half = in_half(recipe.precision)
    accelerator = accelerator_of("bf16" if half else "no", paths.timeout)
    pairs = read_image_texts(paths.data, paths.images, recipe.kinds)
    optim, processes = recipe.optim, accelerator.num_processes
    check_batch(optim.batch_size, optim.accumulate, processes, len(pairs))
    torch.manual_seed(recipe.seed)
    encoder = load_encoder(paths.init_from, device=str(accelerator.device))
    encoder.model.float()
    if recipe.temperature is not None:
        with torch.no_grad():
            encoder.model.logit_scale.fill_(-math.log(recipe.temperature))
    module = PairLoss(encoder, pieces=optim.accumulate)
    order = FullBatches(len(pairs), optim.batch_size, recipe.seed)
    steps = order.steps(optim)
    parts = {"image encoder": encoder.model.vision_model, "text encoder": encoder.model.text_model}
    table = [Part(name, count := count_parameters(part), count, optim.learning_rate) for name, part in parts.items()]
    whole = count_parameters(encoder.model)
    rest = whole - sum(part.parameters for part in table)
    table.append(Part("projections, temperature", rest, rest, optim.learning_rate))
    log.info("stage %s (%s) from %s\n%s", recipe.stage, encoder.kind, paths.init_from, format_table(table))
    log.info(
        "%d pictures, %d captions; %d steps of %d pairs = %.2f epochs; %d captions to tell from in each step; about"
        " %.2f GB for weights, gradients and AdamW", len(pairs), sum(len(pair.texts) for pair in pairs), steps,
        optim.batch_size, steps * optim.batch_size / len(pairs), optim.batch_size, 16 * whole / 1e9,
    )
    if plan:
        return
    facts = facts_of(recipe, paths) | {
        "base": checkpoint.base_reference(paths.init_from, paths.out), "versions": manifest.current_versions(),
    }

    def write(folder: Path, figures: Figures) -> None:
        save_encoder(folder, encoder, facts | {"figures": dict(figures), "created": manifest.now()})

    saves = Saves(paths.out, keep=recipe.keep, write=write, main=accelerator.is_main_process)
    if accelerator.is_main_process:
        size = 4 * whole
        saves.sweep()
        saves.check_room(size, 3 * size)
        saves.trial(lambda folder: prove_encoder(folder, encoder))
    begin(recipe, paths, table)

    batches = partial(pair_batches, encoder=encoder, rank=accelerator.process_index, processes=processes)
    validate = None
    if paths.eval_data is not None:
        held_out = read_image_texts(paths.eval_data, paths.images, recipe.kinds)
        size = min(optim.batch_size, len(held_out) // processes * processes)
        see = batches(held_out, seed=recipe.seed, flip=False)

        @torch.no_grad()
        def validate() -> dict[str, float]:
            module.eval()
            total = 0.0
            starts = range(0, len(held_out) - size + 1, size)
            for start in starts:
                (batch,) = see(0, list(range(start, start + size)))
                with accelerator.autocast():
                    loss = module(batch.to(accelerator.device))
                total += float(accelerator.reduce(loss, "sum"))
            return {"eval_loss": total / (size * len(starts))}

    figures = fit(
        name=f"stage {recipe.stage}", module=module, groups=groups_of(module, optim.learning_rate), optim=optim,
        steps=steps, batches=Steps(order, steps, batches(pairs, seed=recipe.seed, flip=recipe.flip)), out=paths.out,
        saves=saves, pace=Pace(recipe.seed, recipe.log_every, recipe.save_every, recipe.eval_every),
        accelerator=accelerator, validate=validate, workers=recipe.workers,
    )
    if accelerator.is_main_process:
        write(paths.out, figures)
        saves.finish(steps)
        finish(paths.out, started, {"stage": recipe.stage, "steps": steps, **figures})
    accelerator.wait_for_everyone()
