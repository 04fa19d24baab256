"""Stages 1 and 2: a checkpoint's projector, adapters or language model, trained on instruction samples."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from medllava.conversation import InstructionSample
from medllava.errors import ConfigError
from medllava.jsonl import read_json
from medllava.model import checkpoint
from medllava.model.pixels import tokens_per_image
from medllava.model.prompt import PromptBuilder
from medllava.regions import parse_ways
from medllava.train.config import TuneRecipe
from medllava.train.cost import this_device, work
from medllava.train.dataset import (
    Examples,
    Order,
    Pictures,
    Steps,
    check_images,
    first_pictures,
    micro_batches,
    names_region,
    read_samples,
    show_regions,
    split_exchanges,
)
from medllava.train.devices import accelerator_of, in_half
from medllava.train.features import FeatureStore, encoder_key
from medllava.train.forward import VisionLanguageLoss, attend_apart, check_packing, encoder_of, speed_up
from medllava.train.loop import Pace, fit
from medllava.train.plan import machine, plan_text
from medllava.train.record import Paths, begin, facts_of, finish
from medllava.train.saves import Figures, Saves
from medllava.train.stages import check_adapters, format_table, select
from medllava.train.validation import answerable, check_held_out, exact_match, validation
from medllava.train.zero import Zero

log = logging.getLogger(__name__)


def tune(recipe: TuneRecipe, paths: Paths, samples: Sequence[InstructionSample], *, plan: bool) -> None:
    """Freeze, tokenize, cache, train, save. Raises like :func:`medllava.train.run.run`."""
    started = time.monotonic()
    if paths.init_from is None:
        raise ConfigError(f"stage {recipe.stage} starts from a checkpoint: add --init-from FOLDER")
    source, processor, base = checkpoint.verify(paths.init_from)
    again = source.kind == "lora" and recipe.stage == "lora"
    if source.kind == "lora" and recipe.stage == "projector":
        raise ConfigError(
            f"{paths.init_from} is a LoRA checkpoint; fold it into its base first: python -m medllava.model merge"
            f" {paths.init_from} MERGED, then --init-from MERGED"
        )
    # What trains, the samples and the plan need the model's shapes alone: a mistake is told before gigabytes are read.
    outline = checkpoint.skeleton(base, source.revision)
    adapted = checkpoint.add_adapters(outline, paths.init_from) if again else None
    if adapted is not None:
        check_adapters(adapted, recipe, paths.init_from)
        log.info("%s: going on with its adapters, on its base", paths.init_from)
    _, _, table = select(outline, recipe, adapted)
    log.info("stage %s from %s\n%s", recipe.stage, paths.init_from, format_table(table))
    half = in_half(recipe.precision)

    chat_format = recipe.chat_format or source.chat_format
    prompts = PromptBuilder(
        processor.tokenizer, chat_format, tokens_per_image=tokens_per_image(processor),
        image_token=processor.image_token, template=processor.chat_template,
    )
    wanted = [sample for sample in samples if recipe.kinds is None or sample.kind in recipe.kinds]
    if not wanted:
        raise ConfigError(f"{paths.data}: no sample of kinds {', '.join(recipe.kinds or ())}")
    if recipe.split_exchanges:
        wanted = split_exchanges(wanted)
    ways = parse_ways(recipe.regions)
    known_regions = ways if names_region(wanted) else source.regions
    wanted = show_regions(wanted, ways)
    mixed: list[InstructionSample] = []
    as_read = list(samples)
    often = {} if not recipe.kind_weights else {id(each): recipe.kind_weights.get(each.kind, 1.0) for each in wanted}
    for file, part in paths.mix:
        others = read_samples(file)
        check_images(others, paths.images)
        as_read += others
        others = split_exchanges(others) if recipe.split_exchanges else others
        others = show_regions(others, ways)
        log.info("%s: %d samples, each %.3g times in an epoch", file, len(others), part * len(wanted) / len(others))
        often |= {id(each): part * len(wanted) / len(others) for each in others}
        mixed += others
    examples = Examples([*wanted, *mixed], prompts, max_length=recipe.max_length)
    order = Order(
        len(examples), recipe.optim.batch_size, recipe.seed,
        tuple(examples.lengths) if recipe.length_grouping and not recipe.packing else None,
        tuple(often.get(id(each), 1.0) for each in examples.samples) if often else None,
        pictures=first_pictures(examples), together=recipe.picture_group if recipe.packing else 1,
    )
    steps = order.steps(recipe.optim)
    evaluation = _held_out(recipe, paths, as_read, prompts)
    pictures = Pictures(paths.images, processor.image_processor)
    names = [name for part in (examples, evaluation) if part for sample in part.samples for name in sample.images]
    names = list(dict.fromkeys(names))
    cached = _worth_caching(recipe, outline, len(names), prompts.tokens_per_image, 2 if half else 4)
    auto = recipe.precision == "auto"
    log.info("%s", plan_text(
        recipe, outline, examples, order, steps, machine(paths.devices, paths.gpu, _zero_stage(paths.deepspeed)),
        image_tokens=prompts.tokens_per_image, image_token_id=prompts.image_token_id, cached=cached,
        half=half or (paths.gpu is not None and auto),
    ))
    if plan:
        return

    accelerator = accelerator_of("bf16" if half else "no", paths.timeout)
    zero = None
    if paths.deepspeed is not None:
        zero = Zero(paths.deepspeed, half=half, grad_clip=recipe.optim.grad_clip, whole=recipe.stage == "full")
        if zero.stage == 3 and recipe.quantize:
            raise ConfigError("quantized weights cannot be spread over processes; use train/deepspeed/zero2.json")
    torch.manual_seed(recipe.seed)
    loaded = checkpoint.load(
        paths.init_from, device=str(accelerator.device), dtype="bfloat16" if half else "float32", merge=not again,
        load_4bit=recipe.quantize == "nf4", load_8bit=recipe.quantize == "int8",
    )
    model = loaded.model.get_base_model() if again else loaded.model
    wrapped, groups, _ = select(model, recipe, loaded.model if again else None)
    layout: dict[str, Any] = {
        "accumulate": recipe.optim.accumulate, "row_length": recipe.max_length if recipe.packing else None,
        "processes": accelerator.num_processes, "shared": recipe.packing and recipe.picture_group > 1,
    }

    # Stage 1's own format has no questions; its checkpoint is talked to in the format of its base.
    facts = facts_of(recipe, paths, training_mpp=recipe.training_mpp or source.training_mpp)
    facts["single_exchange"] = recipe.split_exchanges
    facts["quantized"] = recipe.quantize
    facts["regions"] = known_regions
    facts["chat_format"] = source.chat_format if chat_format == "plain" else chat_format
    base = loaded.base or paths.init_from
    trained = {name: value for group in groups for name, value in group.parameters.items()}
    own_tower = [name.partition("vision_tower.")[2] for name in trained if name.startswith("model.vision_tower.")]
    tower = sorted({*own_tower, *loaded.tower})  # what the start had of its own is no more the base's now

    def write(folder: Path, figures: Figures) -> None:
        model.eval()
        known = facts | {"figures": dict(figures)}
        if recipe.stage == "projector":
            checkpoint.save_projector(folder, model, processor, base=base, tower=tower, **known)
        elif recipe.stage == "lora":
            checkpoint.save_lora(folder, wrapped, processor, base=base, tower=tower, **known)
        else:
            checkpoint.save_full(folder, model, processor, **known)
        module.train()

    module = VisionLanguageLoss(model)
    if recipe.packing:
        apart = attend_apart(model, instead_of_flash=layout["shared"])
        layout["shared"] &= apart
        check_packing(model)
    speed_up(model, liger=recipe.liger, compile_layers=recipe.compile)
    saves = Saves(paths.out, keep=recipe.keep, write=write, main=accelerator.is_main_process)
    if accelerator.is_main_process:
        saves.sweep()
        saves.check_room(_saved_bytes(model, trained, recipe.stage), 3 * sum(4 * p.numel() for p in trained.values()))
        saves.trial(lambda folder: checkpoint.prove(folder, trained))
    begin(recipe, paths, table)
    accelerator.wait_for_everyone()  # no process looks for saves before those of another run are gone

    variants = range(4) if recipe.flip else (0,)
    if recipe.cache_features == "disk":
        folder = paths.feature_cache or paths.out / "features"
        key = encoder_key(model, processor.image_processor)
        store = FeatureStore(folder, key, rank=accelerator.process_index, processes=accelerator.num_processes)
        pictures.cache_on_disk(store, names, variants, encoder_of(model, accelerator), accelerator.wait_for_everyone)
    elif cached:
        pictures.cache(names, variants, encoder_of(model, accelerator))
    if recipe.gradient_checkpointing:
        # Renamed in transformers 5.2x; the old name warns there.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.enable_input_require_grads()

    pad_id = processor.tokenizer.pad_token_id if processor.tokenizer.pad_token_id is not None else 0
    share: dict[str, Any] = {"pad_id": pad_id, "image_token_id": prompts.image_token_id}
    make = micro_batches(
        examples, pictures, flip_seed=recipe.seed if recipe.flip else None, rank=accelerator.process_index, **layout,
        **share,
    )
    validate = None
    if evaluation is not None:
        see = micro_batches(evaluation, pictures, accumulate=1, flip_seed=None, **share)
        answers = None
        if recipe.eval_answers:
            asked = answerable(evaluation.samples, recipe.eval_answers)
            described = checkpoint.new_manifest(processor, kind="full", **facts)
            opened = checkpoint.Loaded(model, processor, described, None)
            answers = partial(exact_match, opened, asked, paths.images, accelerator)
        size, count = recipe.optim.batch_size, len(evaluation)
        parts = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
        validate = validation(
            model, lambda: chain.from_iterable(see(0, part) for part in parts), accelerator, answers
        )
    figures = fit(
        name=f"stage {recipe.stage}", module=module, groups=groups, optim=recipe.optim, steps=steps,
        batches=Steps(order, steps, make), out=paths.out, saves=saves,
        pace=Pace(recipe.seed, recipe.log_every, recipe.save_every, recipe.eval_every), accelerator=accelerator,
        validate=validate, workers=recipe.workers, zero=zero, wandb=paths.wandb, work=work(
            model, lengths=examples.lengths, image_tokens=prompts.tokens_per_image, cached=cached,
            peak=known.peak if half and (known := this_device()) else None,
        ),
    )
    with zero.gathered() if zero else nullcontext():
        if accelerator.is_main_process:
            write(paths.out, figures)
            saves.finish(steps)
            finish(paths.out, started, {"stage": recipe.stage, "steps": steps, **figures})
        accelerator.wait_for_everyone()


def _held_out(
    recipe: TuneRecipe, paths: Paths, training: Sequence[InstructionSample], prompts: PromptBuilder
) -> Examples | None:
    """The validation samples, tokenized. Raises DataError if they are not held out, or a picture is missing."""
    if paths.eval_data is None:
        return None
    samples = [s for s in read_samples(paths.eval_data) if recipe.kinds is None or s.kind in recipe.kinds]
    if not samples:
        raise ConfigError(f"{paths.eval_data}: no sample of kinds {', '.join(recipe.kinds or ())}")
    if recipe.eval_answers and prompts.chat_format == "plain":
        raise ConfigError("eval_answers needs a chat format with questions; 'plain' has none: set eval_answers to 0")
    check_images(samples, paths.images)
    check_held_out(training, samples, paths.images)
    samples = split_exchanges(samples) if recipe.split_exchanges else samples
    samples = show_regions(samples, parse_ways(recipe.regions))
    return Examples(samples, prompts, max_length=recipe.max_length)


def _worth_caching(recipe: TuneRecipe, model: Any, pictures: int, tokens: int, element: int) -> bool:
    """Whether the frozen encoder's output, of numbers of ``element`` bytes, is kept."""
    if recipe.tower_layers:
        return False
    if recipe.cache_features != "auto":
        return bool(recipe.cache_features)
    width = model.model.multi_modal_projector.linear_1.in_features
    needed = pictures * (4 if recipe.flip else 1) * tokens * width * element
    return bool(pictures and needed <= recipe.cache_limit_gb * 1e9)


def _saved_bytes(model: Any, trained: dict[str, torch.nn.Parameter], stage: str) -> int:
    """Size of a checkpoint's weights: all of them in stage ``full``, else only what trains and the projector."""
    written = dict(model.model.multi_modal_projector.named_parameters(prefix="model.multi_modal_projector")) | trained
    if stage == "full":
        written |= dict(model.named_parameters())
    return sum(value.numel() * value.element_size() for value in written.values())


def _zero_stage(file: Path | None) -> int:
    if file is None:
        return 0
    settings = read_json(file)
    return int(settings.get("zero_optimization", {}).get("stage", 0)) if isinstance(settings, dict) else 0
