"""A training run, top to bottom: the recipe as code.

What a run leaves in its folder: the checkpoint, ``recipe.yaml`` (resolved), ``run.json`` (command, data, versions, what
trained), ``train_log.jsonl``, ``loss.png``, ``tensorboard/`` and, last of all, ``finished.json``.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from medllava.config import to_yaml
from medllava.conversation import InstructionSample
from medllava.errors import ConfigError
from medllava.jsonl import atomic_write, file_sha256, read_json, write_json
from medllava.model import checkpoint, manifest, tiny
from medllava.model.embeddings import load_encoder
from medllava.model.folders import full_disk_told
from medllava.model.image_text import data_sha256, read_image_texts
from medllava.model.pixels import tokens_per_image
from medllava.model.prompt import PromptBuilder
from medllava.regions import parse_ways
from medllava.train.config import AnyRecipe, ContrastiveRecipe, FoundationRecipe, Optim, TuneRecipe
from medllava.train.contrastive import ContrastiveData, ContrastiveLoss, read_pairs
from medllava.train.contrastive_tune import (
    FullBatches,
    PairLoss,
    check_batch,
    groups_of,
    pair_batches,
    prove_encoder,
    save_encoder,
)
from medllava.train.cost import this_device, work
from medllava.train.dataset import (
    Examples,
    Order,
    Pictures,
    Steps,
    check_images,
    first_pictures,
    kind_weights,
    micro_batches,
    names_region,
    read_samples,
    show_regions,
    split_exchanges,
)
from medllava.train.features import FeatureStore, encoder_key
from medllava.train.forward import VisionLanguageLoss, attend_apart, check_packing, speed_up, vision_features
from medllava.train.loop import Group, Pace, fit
from medllava.train.plan import machine, plan_text
from medllava.train.plots import LOG_FILE, check_wandb
from medllava.train.saves import Figures, Saves
from medllava.train.stages import Part, check_adapters, format_table, select
from medllava.train.validation import answerable, check_held_out, exact_match, validation
from medllava.train.waiting import limit_told, process_group
from medllava.train.zero import Zero

log = logging.getLogger(__name__)

RUN_FILE = "run.json"
FINISHED_FILE = "finished.json"
_BOOKKEEPING = ("log_every", "save_every", "keep", "eval_every", "eval_answers", "workers")
"""Keys that may change when a run is gone on with: they decide what is written, not what is computed."""


@dataclass(frozen=True)
class Paths:
    """What differs on each machine: data file (LLaVA JSON), image folder, output, checkpoint to start from.

    mix: files of other samples (their images in the same folder), and how many of them come for each of ``data``.
    timeout: how long a process waits for the others in a step, in minutes.
    devices, gpu: how many, and of which name, a plan is for. wandb: project of Weights & Biases to log to.
    """

    data: Path
    images: Path
    out: Path
    init_from: Path | None = None
    eval_data: Path | None = None
    captions: Path | None = None
    mix: tuple[tuple[Path, float], ...] = ()
    feature_cache: Path | None = None
    devices: int = 1
    gpu: str | None = None
    wandb: str | None = None
    deepspeed: Path | None = None
    timeout: float = 30


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
    if not plan and _already_finished(recipe, paths, resume=resume):
        log.info("%s: this run is finished; nothing to do", paths.out)
        return
    with _threads(recipe), limit_told():
        if isinstance(recipe, FoundationRecipe):
            _foundation(recipe, paths, samples, plan=plan)
        elif isinstance(recipe, ContrastiveRecipe):
            _contrastive(recipe, paths, plan=plan)
        else:
            _tune(recipe, paths, samples, plan=plan)


def _foundation(recipe: FoundationRecipe, paths: Paths, samples: Sequence[InstructionSample], *, plan: bool) -> None:
    """Stage 0: tokenizer, contrastive image encoder, language model, then one folder with an untrained projector."""
    from transformers import CLIPVisionModel, LlamaForCausalLM

    started = time.monotonic()
    accelerator = _accelerator("no", paths)
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
    pair_steps = _steps(clip_part.optim, pair_order)

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
    text_steps = _steps(language_part.optim, text_order)
    rates = (clip_part.optim.learning_rate, language_part.optim.learning_rate)
    counts = {"image encoder": clip.vision_model, "its text encoder": clip.text_model, "language model": language}
    table = [
        Part(name, _count(part), _count(part), rates[part is language]) for name, part in counts.items()
    ]
    log.info("%s", format_table(table))
    log.info(
        "0a: %d pictures, %d captions, %d boxes, %d steps; 0b: %d texts, %d tokens, %d steps; vocabulary %d",
        len(pairs), sum(len(pair.captions) for pair in pairs), sum(len(pair.regions) for pair in pairs), pair_steps,
        len(examples), sum(examples.lengths), text_steps, len(tokenizer),
    )
    if plan:
        return
    _begin(recipe, paths, table)

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
            pictures.cache(names, range(4) if language_part.flip else (0,), _encoder(reader, accelerator))
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
        checkpoint.save_full(paths.out, model, processor, chat_format="medllava", **_facts(recipe, paths))
        _finish(paths.out, started, {"stage": recipe.stage, "steps": pair_steps + text_steps})
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


def _contrastive(recipe: ContrastiveRecipe, paths: Paths, *, plan: bool) -> None:
    """Stage 0 of a real run: an image-text encoder, trained on."""
    started = time.monotonic()
    if paths.init_from is None:
        raise ConfigError(f"stage {recipe.stage} starts from an image-text encoder: add --init-from FOLDER")
    half = _in_half(recipe.precision)
    accelerator = _accelerator("bf16" if half else "no", paths)
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
    steps = _steps(optim, order)
    parts = {"image encoder": encoder.model.vision_model, "text encoder": encoder.model.text_model}
    table = [Part(name, count := _count(part), count, optim.learning_rate) for name, part in parts.items()]
    rest = _count(encoder.model) - sum(part.parameters for part in table)
    table.append(Part("projections, temperature", rest, rest, optim.learning_rate))
    log.info("stage %s (%s) from %s\n%s", recipe.stage, encoder.kind, paths.init_from, format_table(table))
    log.info(
        "%d pictures, %d captions; %d steps of %d pairs = %.2f epochs; %d captions to tell from in each step; about"
        " %.2f GB for weights, gradients and AdamW", len(pairs), sum(len(pair.texts) for pair in pairs), steps,
        optim.batch_size, steps * optim.batch_size / len(pairs), optim.batch_size, 16 * _count(encoder.model) / 1e9,
    )
    if plan:
        return
    facts = _facts(recipe, paths) | {
        "base": checkpoint.base_reference(paths.init_from, paths.out), "versions": manifest.current_versions(),
    }

    def write(folder: Path, figures: Figures) -> None:
        save_encoder(folder, encoder, facts | {"figures": dict(figures), "created": manifest.now()})

    saves = Saves(paths.out, keep=recipe.keep, write=write, main=accelerator.is_main_process)
    if accelerator.is_main_process:
        size = 4 * _count(encoder.model)
        saves.sweep()
        saves.check_room(size, 3 * size)
        saves.trial(lambda folder: prove_encoder(folder, encoder))
    _begin(recipe, paths, table)

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
        _finish(paths.out, started, {"stage": recipe.stage, "steps": steps, **figures})
    accelerator.wait_for_everyone()


def _in_half(precision: str) -> bool:
    return precision == "bfloat16" or (precision == "auto" and torch.cuda.is_available())


def _tune(recipe: TuneRecipe, paths: Paths, samples: Sequence[InstructionSample], *, plan: bool) -> None:
    """Stages 1 and 2: freeze, tokenize, cache, train, save."""
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
    half = _in_half(recipe.precision)

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
    steps = _steps(recipe.optim, order)
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

    accelerator = _accelerator("bf16" if half else "no", paths)
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
    facts = _facts(recipe, paths, training_mpp=recipe.training_mpp or source.training_mpp)
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
    _begin(recipe, paths, table)
    accelerator.wait_for_everyone()  # no process looks for saves before those of another run are gone

    variants = range(4) if recipe.flip else (0,)
    if recipe.cache_features == "disk":
        folder = paths.feature_cache or paths.out / "features"
        key = encoder_key(model, processor.image_processor)
        store = FeatureStore(folder, key, rank=accelerator.process_index, processes=accelerator.num_processes)
        pictures.cache_on_disk(store, names, variants, _encoder(model, accelerator), accelerator.wait_for_everyone)
    elif cached:
        pictures.cache(names, variants, _encoder(model, accelerator))
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
            _finish(paths.out, started, {"stage": recipe.stage, "steps": steps, **figures})
        accelerator.wait_for_everyone()


def _accelerator(mixed_precision: str, paths: Paths) -> Any:
    from accelerate import Accelerator

    on_cpu = checkpoint.best_device() == "cpu"
    if on_cpu:  # DeepSpeed, which accelerate imports where it is installed, would say that it finds no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Unless told that it is on the CPU, accelerate lets torchrun's processes run side by side without joining them.
    waits = process_group(timedelta(minutes=paths.timeout))
    return Accelerator(mixed_precision=mixed_precision, cpu=on_cpu, kwargs_handlers=[waits])


def _steps(optim: Optim, order: Order) -> int:
    return optim.steps or max(1, math.ceil(float(optim.epochs or 0) * order.batches_per_epoch()))


def _worth_caching(recipe: TuneRecipe, model: Any, pictures: int, tokens: int, element: int) -> bool:
    """Whether the frozen encoder's output, of numbers of ``element`` bytes, is kept."""
    if recipe.tower_layers:
        return False
    if recipe.cache_features != "auto":
        return bool(recipe.cache_features)
    width = model.model.multi_modal_projector.linear_1.in_features
    needed = pictures * (4 if recipe.flip else 1) * tokens * width * element
    return bool(pictures and needed <= recipe.cache_limit_gb * 1e9)


def _encoder(model: Any, accelerator: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    @torch.no_grad()
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return vision_features(model, pixels.to(accelerator.device)).cpu()

    return encode


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


def _all_texts(samples: Sequence[InstructionSample]) -> Iterator[str]:
    return (turn.text.replace("<image>", "") for sample in samples for turn in sample.turns)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _facts(recipe: AnyRecipe, paths: Paths, training_mpp: float | None = None) -> dict[str, Any]:
    return {
        "recipe": recipe.model_dump(mode="json"), "data_sha256": data_sha256(paths.data),
        "training_mpp": training_mpp,
    }


def _identity(recipe: AnyRecipe, paths: Paths) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    start = None
    if paths.init_from is not None:
        marks = [paths.init_from / name for name in (manifest.FILE, "config.json")]
        start = next((file_sha256(mark) for mark in marks if mark.is_file()), None)
    return {
        "recipe": recipe.model_dump(mode="json"), "data_sha256": data_sha256(paths.data), "init_sha256": start,
    } | ({"mix": [[data_sha256(file), part] for file, part in paths.mix]} if paths.mix else {})


def _already_finished(recipe: AnyRecipe, paths: Paths, *, resume: bool) -> bool:
    """True if the very run is finished. Raises ConfigError if another run, or one not asked to be resumed, is there."""
    record = paths.out / RUN_FILE
    if not record.is_file():
        return False
    if not resume:
        raise ConfigError(f"{paths.out}: holds a run; add --resume to go on with it, or choose another --out")
    before, now = read_json(record)["identity"], _identity(recipe, paths)
    old, new = _deciding(before.get("recipe", {}), recipe), _deciding(now["recipe"], recipe)
    changed = [f"recipe key {key}" for key in sorted(new | old) if old.get(key) != new.get(key)]
    changed += [key for key in sorted(now | before) if key != "recipe" and before.get(key) != now.get(key)]
    if changed:
        raise ConfigError(
            f"{paths.out}: holds a run with other settings ({', '.join(changed)}); choose another --out, or remove it"
        )
    return (paths.out / FINISHED_FILE).is_file()


def _deciding(values: dict[str, Any], like: AnyRecipe) -> dict[str, Any]:
    """A recipe's values that decide what is computed, flat: ``optim.steps``. Keys that the recipe of an older run did
    not have yet get their defaults."""
    try:
        values = type(like).model_validate(values).model_dump(mode="json")
    except ValidationError:
        log.debug("the recipe of the run cannot be read by this version; its values are compared as they are")
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": each for inner, each in value.items()}
        elif key not in _BOOKKEEPING:
            flat[key] = value
    return flat


def _begin(recipe: AnyRecipe, paths: Paths, table: Sequence[Part]) -> None:
    """Write down what is run, before the first step."""
    if int(os.environ.get("RANK", "0")):
        return
    paths.out.mkdir(parents=True, exist_ok=True)
    if not (paths.out / RUN_FILE).is_file():
        (paths.out / LOG_FILE).unlink(missing_ok=True)
        Saves(paths.out).clear()
    with atomic_write(paths.out / "recipe.yaml") as file:
        file.write(to_yaml(recipe))
    write_json(paths.out / RUN_FILE, {
        "command": sys.argv,
        "paths": {name: str(value) for name, value in vars(paths).items() if value is not None},
        "identity": _identity(recipe, paths),
        "parts": [vars(part) for part in table],
        "versions": manifest.current_versions() | manifest.code_version(),
        "started": manifest.now(),
    })


def _finish(out: Path, started: float, facts: dict[str, Any]) -> None:
    """The completion marker, last of all."""
    write_json(out / FINISHED_FILE, facts | {"seconds": round(time.monotonic() - started, 1), "at": manifest.now()})


@contextmanager
def _threads(recipe: AnyRecipe) -> Iterator[None]:
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
