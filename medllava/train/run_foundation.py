"""Stage 0 from nothing: a small image encoder and language model, made one after the other, then put together."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from medllava.conversation import InstructionSample
from medllava.model import checkpoint, tiny
from medllava.model.folders import full_disk_told
from medllava.model.prompt import PromptBuilder
from medllava.train.config import FoundationRecipe, Optim
from medllava.train.contrastive import ContrastiveData, ContrastiveLoss, read_pairs
from medllava.train.dataset import Examples, Order, Pictures, Steps, kind_weights, micro_batches, split_exchanges
from medllava.train.devices import accelerator_of
from medllava.train.forward import VisionLanguageLoss, encoder_of
from medllava.train.loop import Group, Pace, fit
from medllava.train.record import Paths, begin, facts_of, finish
from medllava.train.saves import Saves
from medllava.train.stages import Part, count_parameters, format_table

log = logging.getLogger(__name__)


def foundation(recipe: FoundationRecipe, paths: Paths, samples: Sequence[InstructionSample], *, plan: bool) -> None:
    """Tokenizer, contrastive image encoder (0a), language model (0b), then one folder with an untrained projector.
    Raises like :func:`medllava.train.run.run`."""
    from transformers import CLIPVisionModel, LlamaForCausalLM

    started = time.monotonic()
    accelerator = accelerator_of("no", paths.timeout)
    torch.manual_seed(recipe.seed)
    tokenizer = tiny.build_tokenizer(_all_texts(samples), recipe.tokenizer)
    processor = tiny.build_processor(tokenizer, recipe.vision)
    clip_part, language_part = recipe.contrastive, recipe.language
    clip = tiny.build_clip(
        recipe.vision, tokenizer, projection_dim=clip_part.projection_dim, text_layers=clip_part.text_layers,
        text_positions=clip_part.text_positions,
    )
    language = LlamaForCausalLM(tiny.llama_config(recipe.text, tokenizer))
    pairs = read_pairs(samples, clip_part, paths.captions)
    pair_order = Order(len(pairs), clip_part.optim.batch_size, recipe.seed)
    pair_steps = pair_order.steps(clip_part.optim)

    wanted = [sample for sample in samples if language_part.kinds is None or sample.kind in language_part.kinds]
    if language_part.split_exchanges:
        wanted = split_exchanges(wanted)
    patches = (recipe.vision.image_size // recipe.vision.patch_size) ** 2
    prompts = PromptBuilder(tokenizer, "medllava", tokens_per_image=patches if language_part.pictures else 0)
    examples = Examples(
        wanted, prompts, max_length=language_part.max_length, text_only=not language_part.pictures,
        supervise_all=language_part.supervise == "all",
    )
    text_order = Order(
        len(examples), language_part.optim.batch_size, recipe.seed,
        tuple(examples.lengths) if language_part.length_grouping else None,
        kind_weights(examples.samples, language_part.kind_weights),
    )
    text_steps = text_order.steps(language_part.optim)
    rates = (clip_part.optim.learning_rate, language_part.optim.learning_rate)
    counts = {"image encoder": clip.vision_model, "its text encoder": clip.text_model, "language model": language}
    table = [
        Part(name, count := count_parameters(part), count, rates[part is language]) for name, part in counts.items()
    ]
    log.info("%s", format_table(table))
    log.info(
        "0a: %d pictures, %d captions, %d boxes, %d steps; 0b: %d texts, %d tokens, %d steps; vocabulary %d",
        len(pairs), sum(len(pair.captions) for pair in pairs), sum(len(pair.regions) for pair in pairs), pair_steps,
        len(examples), sum(examples.lengths), text_steps, len(tokenizer),
    )
    if plan:
        return
    begin(recipe, paths, table)

    tower_file = paths.out / "contrastive" / "tower.safetensors"
    if not tower_file.is_file():
        data = ContrastiveData(
            pairs, clip_part, images=paths.images, processor=processor, patches=patches, seed=recipe.seed
        )
        _fit_all(
            "0a image encoder", ContrastiveLoss(clip, clip_part), clip_part.optim,
            Steps(pair_order, pair_steps, data.make), tower_file.parent, recipe, accelerator,
        )
        _write_part(clip.vision_model, tower_file)
    tower = CLIPVisionModel(tiny.vision_config(recipe.vision, clip_part.projection_dim))
    getattr(tower, "vision_model", tower).load_state_dict(load_file(tower_file))
    language_file = paths.out / "language" / "language.safetensors"
    if not language_file.is_file():
        torch.manual_seed(recipe.seed)
        reader = tiny.assemble(tower, language, tokenizer, feature_layer=recipe.vision.feature_layer)
        reader.model.vision_tower.requires_grad_(False)
        reader.model.multi_modal_projector.requires_grad_(language_part.pictures)
        pictures = None
        if language_part.pictures:
            pictures = Pictures(paths.images, processor.image_processor)
            names = list(dict.fromkeys(name for sample in examples.samples for name in sample.images))
            pictures.cache(names, range(4) if language_part.flip else (0,), encoder_of(reader, accelerator))
        make = micro_batches(
            examples, pictures, accumulate=language_part.optim.accumulate,
            flip_seed=recipe.seed if language_part.flip else None, pad_id=tokenizer.pad_token_id,
            image_token_id=prompts.image_token_id, rank=accelerator.process_index, processes=accelerator.num_processes,
        )
        _fit_all(
            "0b language model", VisionLanguageLoss(reader), language_part.optim, Steps(text_order, text_steps, make),
            language_file.parent, recipe, accelerator,
        )
        language.model.load_state_dict(reader.model.language_model.state_dict())
        language.lm_head.load_state_dict(reader.lm_head.state_dict())
        _write_part(language, language_file)

    language.load_state_dict(load_file(language_file))
    torch.manual_seed(recipe.seed + 1)  # another projector than the one that 0b threw away
    model = tiny.assemble(tower, language.cpu(), tokenizer, feature_layer=recipe.vision.feature_layer)
    if accelerator.is_main_process:
        checkpoint.save_full(paths.out, model, processor, chat_format="medllava", **facts_of(recipe, paths))
        finish(paths.out, started, {"stage": recipe.stage, "steps": pair_steps + text_steps})
    accelerator.wait_for_everyone()


def _fit_all(
    name: str, module: torch.nn.Module, optim: Optim, steps: Steps, out: Path, recipe: FoundationRecipe,
    accelerator: Any,
) -> None:
    """Train every weight of a part of stage 0."""
    trained = {key: value for key, value in module.named_parameters() if value.requires_grad}
    group = Group(name, optim.learning_rate, trained)
    saves = Saves(out, keep=recipe.keep, main=accelerator.is_main_process)
    if accelerator.is_main_process:
        saves.sweep()
    fit(
        name=name, module=module, groups=[group], optim=optim, steps=len(steps), batches=steps, out=out, saves=saves,
        pace=Pace(recipe.seed, recipe.log_every, recipe.save_every), accelerator=accelerator,
    )


def _write_part(module: Any, file: Path) -> None:
    """Keep a finished part of stage 0; its training state is no longer needed."""
    temporary = file.with_suffix(".part")
    with full_disk_told(file):
        save_file({name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}, temporary)
    temporary.replace(file)
    Saves(file.parent).clear()


def _all_texts(samples: Sequence[InstructionSample]) -> Iterator[str]:
    return (turn.text.replace("<image>", "") for sample in samples for turn in sample.turns)
