"""Recipes of the training stages: every number that decides what a run computes.

stage ``foundation``: builds and trains the small parts that a demo without pretrained weights needs.
stage ``contrastive``: trains an image-text encoder on, before anything else.
stage ``projector``: stage 1 of LLaVA. ``lora``, ``full``: stage 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from medllava.config import Recipe, load_recipe
from medllava.errors import ConfigError
from medllava.model.tiny import TextSizes, TokenizerSizes, VisionSizes

Schedule = Literal["cosine", "onecycle", "constant"]


class Optim(Recipe):
    """How long and how fast to learn. AdamW.

    Exactly one of ``steps`` (of the optimizer) and ``epochs`` (passes over the data).
    batch_size: samples per optimizer step over all processes, taken in ``accumulate`` equal pieces; the loss is the
        mean over the supervised tokens of the whole batch, so that the split does not change it.
    schedule: ``cosine`` rises linearly during ``warmup`` (fraction of the steps), then falls to zero; ``onecycle``
        rises from 1/25 and falls along cosines; ``constant`` stays after the rise.
    """

    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=16, ge=1)
    accumulate: int = Field(default=1, ge=1)
    learning_rate: float = Field(gt=0)
    schedule: Schedule = "cosine"
    warmup: float = Field(default=0.03, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    grad_clip: float = 1.0

    @model_validator(mode="after")
    def _length(self) -> Optim:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set exactly one of steps and epochs")
        if self.batch_size % self.accumulate:
            raise ValueError("batch_size must be a multiple of accumulate")
        return self


class _Stage(Recipe):
    """What every stage has.

    seed: of weights, order, flips, dropout. threads: of PyTorch; by default left alone, or at most 2 for a tiny model,
        which more threads slow down. Keys of several stages: ``kinds`` uses only samples of these kinds;
        ``kind_weights`` says how often a sample of a kind comes in an epoch (1 by default; 0 never; fractions take a
        different part each epoch); ``flip`` mirrors pictures at random, with the boxes and words of place in texts.
    log_every, save_every: steps. A run goes on from its last save; it also saves when it is told to stop. keep: so many
        of the newest saves stay, beside the one with the lowest validation loss.
    """

    seed: int = 0
    threads: int | None = Field(default=None, ge=1)
    log_every: int = Field(default=10, ge=1)
    save_every: int = Field(default=200, ge=1)
    keep: int = Field(default=2, ge=1)


class Contrastive(Recipe):
    """Stage 0a: CLIP's symmetric loss on pictures and captions (Radford et al. 2021), and a term on regions.

    kinds: of the samples whose answers are captions. region_weight: of the loss that contrasts a box's patches with the
        text said about it (0: off). region_places: contrast it also with that text and the name of the box's quadrant,
        so that the patches keep where they are. regions_per_image: at most so many boxes of a picture in a batch.
        region_layer: hidden state of the encoder whose patches the region term reads (-1: the last); the language
        model reads ``vision.feature_layer``. temperature: at the start; it is learned.
    """

    optim: Optim
    kinds: tuple[str, ...] = ("caption",)
    region_kinds: tuple[str, ...] = ("grounding",)
    flip: bool = False
    projection_dim: int = 64
    text_layers: int = 2
    text_positions: int = 77
    temperature: float = 0.07
    caption_weight: float = Field(default=1.0, ge=0)
    region_weight: float = Field(default=0.0, ge=0)
    region_places: bool = False
    regions_per_image: int = Field(default=4, ge=1)
    region_layer: int = Field(default=-1, le=-1)


class Language(Recipe):
    """Stage 0b: next-word prediction on the conversations.

    pictures: each text follows its picture, which the encoder of 0a shows to the language model through a projector
        that is thrown away afterwards (a prefix language model, as SimVLM's; Wang et al. 2021). Without it the model
        sees text alone, and learns to guess answers instead of looking them up, which later stages undo only slowly.
    supervise: ``all`` text or only the assistant's ``answers``. split_exchanges, length_grouping: as in later stages.
    """

    optim: Optim
    kinds: tuple[str, ...] | None = None
    kind_weights: dict[str, float] = {}
    flip: bool = False
    pictures: bool = False
    split_exchanges: bool = False
    length_grouping: bool = True
    max_length: int = 512
    supervise: Literal["all", "answers"] = "all"


class FoundationRecipe(_Stage):
    """Stage 0: tokenizer, image encoder (0a) and language model (0b) from nothing, joined in one LLaVA folder whose
    projector is untrained. Only the demo needs it: real runs start from pretrained parts."""

    stage: Literal["foundation"]
    tokenizer: TokenizerSizes = TokenizerSizes()
    vision: VisionSizes = VisionSizes()
    text: TextSizes = TextSizes()
    contrastive: Contrastive
    language: Language


class ContrastiveRecipe(_Stage):
    """Stage 0 of a real run: a CLIP or SigLIP folder (``--init-from``) trained on on image-text pairs; the loss is the
    folder's own kind's. ``--data``: LLaVA JSON, WebDataset shards or an image folder with metadata.jsonl.

    optim: ``batch_size`` pairs of all processes, each contrasted with all others; ``accumulate`` pieces take less
        memory for the price of a second forward pass, and change nothing else. An epoch's last, smaller batch is left
        out. kinds: of LLaVA samples whose answers are captions. temperature: to start from; null keeps the folder's
        own. precision, workers, eval_every: as of the later stages.
    """

    stage: Literal["contrastive"]
    optim: Optim
    kinds: tuple[str, ...] = ("caption",)
    flip: bool = False
    temperature: float | None = Field(default=None, ge=0.01, le=1)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    workers: int = Field(default=0, ge=0)
    eval_every: int = Field(default=200, ge=1)


class Lora(Recipe):
    """Adapters on every linear layer of the language model but the output head (Hu et al. 2021)."""

    r: int = Field(default=128, ge=1)
    alpha: float = 256
    dropout: float = Field(default=0.0, ge=0, lt=1)


class TuneRecipe(_Stage):
    """Stages 1 and 2 on a LLaVA checkpoint (``--init-from``).

    chat_format: see :mod:`medllava.model.prompt`; by default the checkpoint's own.
    projector_learning_rate: of the projector, if not the same. tower_learning_rate: with ``tower_layers`` > 0, so many
        last layers of the image encoder are trained too.
    split_exchanges: take the questions of a conversation one by one, where none builds on another.
    quantize: keep the frozen language model's linear layers in 4 bits (``nf4``, with double quantization) or 8
        (``int8``) through bitsandbytes (QLoRA; Dettmers et al. 2023). Vision tower, projector and output head stay as
        they are; what is trained is float32.
    max_length: tokens, pictures included; whole trailing exchanges are dropped from longer samples.
    length_grouping: samples of like length share a batch. packing: the samples of a micro-batch share one row,
        and none sees another; a step has the same ``batch_size`` samples and learns the same, without padding (and
        without grouping by length).
    picture_group: with packing, at most so many samples of a picture come together in a step, and what they begin
        with alike (system prompt, picture) is computed once for them; losses and gradients are those of the samples
        apart, but a step holds fewer pictures, and ``flip`` mirrors a picture alike for all its samples in an epoch.
        1: the order is left to chance, and nothing is shared.
    cache_features: keep the frozen encoder's output instead of computing it every time: in memory (``true``; ``auto``:
        if it fits in ``cache_limit_gb``, in each process) or on ``disk`` (``--feature-cache``).
    precision: ``auto`` is bfloat16 on CUDA, else float32. Trained weights are always float32.
    compile: compile the language model's layers (``torch.compile``). liger: Liger's kernels for norms, rotary positions
        and MLPs (``auto``: if they are installed). Both on CUDA only.
    regions: how a question's region, a box in its text, is shown: ``text`` as it is written; ``mark`` as a red ellipse
        on the picture (see :mod:`medllava.regions`); ``both``: half of the samples one way, half the other, by their
        ids. Only samples that begin with a question about the one region they name can be marked; others stay text.
    eval_every: steps between validations (``--eval-data``). eval_answers: of so many held-out samples the first
        question is also answered, and compared with the sample's answer (0: none, which is faster).
    """

    stage: Literal["projector", "lora", "full"]
    optim: Optim
    chat_format: str | None = None
    kinds: tuple[str, ...] | None = None
    kind_weights: dict[str, float] = {}
    flip: bool = False
    split_exchanges: bool = False
    lora: Lora = Lora()
    quantize: Literal["nf4", "int8"] | None = None
    projector_learning_rate: float | None = Field(default=None, gt=0)
    tower_layers: int = Field(default=0, ge=0)
    tower_learning_rate: float | None = Field(default=None, gt=0)
    max_length: int = Field(default=2048, ge=8)
    length_grouping: bool = True
    packing: bool = False
    picture_group: int = Field(default=1, ge=1)
    cache_features: Literal["auto", "disk"] | bool = "auto"
    cache_limit_gb: float = 2.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    liger: Literal["auto"] | bool = "auto"
    workers: int = Field(default=0, ge=0)
    eval_every: int = Field(default=200, ge=1)
    eval_answers: int = Field(default=0, ge=0)
    training_mpp: float | None = None
    regions: Literal["text", "mark", "both"] = "text"

    @model_validator(mode="after")
    def _quantized_is_frozen(self) -> TuneRecipe:
        if self.quantize and self.stage == "full":
            raise ValueError("quantize needs a frozen language model; use stage lora")
        return self

    @model_validator(mode="after")
    def _kept_is_frozen(self) -> TuneRecipe:
        if self.tower_layers and self.cache_features in (True, "disk"):
            raise ValueError("cache_features needs a frozen vision tower; set it to auto, or tower_layers to 0")
        return self


AnyRecipe = FoundationRecipe | ContrastiveRecipe | TuneRecipe


def load_training_recipe(path: Path, overrides: list[str]) -> AnyRecipe:
    """Read a recipe as what its ``stage`` says. Raises ConfigError."""
    stage = _stage(path, overrides)
    if stage == "foundation":
        return load_recipe(path, FoundationRecipe, overrides)
    if stage == "contrastive":
        return load_recipe(path, ContrastiveRecipe, overrides)
    return load_recipe(path, TuneRecipe, overrides)


def _stage(path: Path, overrides: list[str]) -> str:
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return "unreadable"  # load_recipe says what is wrong
    stage = values.get("stage") if isinstance(values, dict) else None
    for override in overrides:
        if override.startswith("stage="):
            stage = override.removeprefix("stage=")
    if stage is None and isinstance(values, dict):
        raise ConfigError(f"{path}: no 'stage'; set it to foundation, contrastive, projector, lora or full")
    return str(stage)
