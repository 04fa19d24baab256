"""What a step costs, from sizes alone: floating-point operations, memory of a device, hours.

Operations are those that the model needs (as for the MFU of PaLM; Chowdhery et al. 2022, appendix B), whatever is
computed besides: padding, activations computed again under checkpointing and the like do not count. A multiplication
with its addition is two operations. Per token of the language model, pictures' tokens included:

- 6 N for N weights that are trained (2 forward, 2 for the gradient of what comes in, 2 for that of the weights);
- 4 N for N that are frozen, because the gradient still passes through them to the projector or the adapters;
- attention: 6 L d T for L layers of width d (heads times head size): scores and values take d T each forward (causal
  masking leaves half of the square), and twice that backward. T is the mean length of the sample that a token is in,
  also when samples share a row.

What samples share (see :func:`medllava.train.batch.share`) counts once.

The output head counts 6 V h, or 4 V h if frozen, per supervised token only; embeddings are looked up, not multiplied.
Per picture that is not read from a cache: 2 N of the vision tower's layers up to the one that is used (6 N for trained
layers), and its attention; 4 N of the projector per picture token, 6 N if layers of the tower train.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from medllava.model.tower import blocks
from medllava.train.config import TuneRecipe

# Dense bfloat16 operations per second as the makers state them, without sparsity, and GB of memory (a number of GB in
# the device's name goes before it). The longest name that fits counts.
_DEVICES = {
    "A10": (125e12, 24), "A10G": (70e12, 24), "A100": (312e12, 80), "A30": (165e12, 24), "A40": (149.7e12, 48),
    "B200": (2250e12, 180), "GH200": (989e12, 96), "H100": (989e12, 80), "H100 NVL": (835e12, 94),
    "H100 PCIe": (756e12, 80), "H20": (148e12, 96), "H200": (989e12, 141), "L4": (121e12, 24), "L40": (181e12, 48),
    "L40S": (362e12, 48), "MI300X": (1307e12, 192), "RTX 3090": (71e12, 24), "RTX 4090": (165e12, 24),
    "RTX 5090": (209e12, 32), "RTX 6000 Ada": (364e12, 48), "RTX A6000": (154.8e12, 48),
}
ASSUMED_MFU = 0.4
"""For the estimate of hours: what packed LoRA runs of 7B models reach; short samples without packing reach less."""
NF4_BYTES = 0.516
"""Per weight: 4 bits, an 8-bit scale per 64 of them, and a 32-bit scale per 256 of those."""


@dataclass(frozen=True)
class Work:
    """Operations of a step. ``peak``: of the device, per second; None where it is not known (CPU, float32)."""

    per_token: float
    per_target: float
    per_picture: float
    image_tokens: int
    peak: float | None = None

    def operations(self, tokens: int, targets: int, pictures: int) -> float:
        return tokens * self.per_token + targets * self.per_target + pictures * self.per_picture

    def of(self, batches: Sequence[Any]) -> float:
        """Of one step on this process."""
        return sum(
            self.operations(batch.computed, batch.weight, len(batch.image_positions) // self.image_tokens)
            for batch in batches
        )


def work(
    model: Any, *, lengths: Sequence[int], image_tokens: int, cached: bool, peak: float | None = None
) -> Work:
    """Of a model whose trained weights are marked (``requires_grad``), on samples of these lengths in tokens."""
    text = model.config.get_text_config()
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    context = sum(length * length for length in lengths) / sum(lengths)
    per_token = 6.0 * text.num_hidden_layers * width * context
    for name, parameter in model.model.language_model.named_parameters():
        if parameter.dim() >= 2 and "embed_tokens" not in name:
            per_token += (6 if parameter.requires_grad else 4) * _count(parameter)
    # A tied head is the embedding, which trains with it.
    head = model.lm_head.weight
    per_target = float((6 if head.requires_grad else 4) * text.vocab_size * text.hidden_size)
    tower, trains = _tower(model, image_tokens)
    projector = sum(value.numel() for value in model.model.multi_modal_projector.parameters() if value.dim() == 2)
    per_picture = (0.0 if cached else tower) + (6 if trains else 4) * projector * image_tokens
    return Work(per_token, per_target, per_picture, max(image_tokens, 1), peak)


@dataclass(frozen=True)
class Device:
    """A GPU: its name, peak bfloat16 operations per second, bytes of memory."""

    name: str
    peak: float
    memory: float


def known_device(name: str) -> Device | None:
    """What is known of the GPU that calls itself ``name``, such as "NVIDIA H100 80GB HBM3"; None if nothing is."""
    words = f" {name.replace('-', ' ').replace('_', ' ').lower()} "
    fit = [known for known in _DEVICES if f" {known.lower()} " in words]
    if not fit:
        return None
    operations, size = _DEVICES[max(fit, key=len)]
    told = re.search(r"(\d+) ?gb", words)
    return Device(name, operations, 1e9 * (int(told[1]) if told else size))


def this_device() -> Device | None:
    """The GPU of this process; None without one, or if its peak is not known."""
    return known_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. ``activations``: what a micro-batch keeps for the backward pass, at its largest."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def memory(
    model: Any, recipe: TuneRecipe, *, tokens: int, targets: int, half: bool, devices: int = 1, zero: int = 0
) -> Memory:
    """At most ``tokens`` (padding included) with ``targets`` supervised in a micro-batch of a device.

    Frozen weights take 2 bytes under bfloat16, trained ones 4 and 2 for their copy in the product; gradients 4,
    AdamW 8. ZeRO spreads optimizer (1), gradients (2) and weights (3) over the devices.
    """
    element = 2 if half else 4
    weights = trained = 0.0
    for name, parameter in model.named_parameters():
        count = _count(parameter)
        if parameter.requires_grad:
            trained += count
            weights += (6 if half else 4) * count
        elif recipe.quantize and ".language_model." in name and parameter.dim() == 2 and "embed" not in name:
            weights += (NF4_BYTES if recipe.quantize == "nf4" else 1.0) * count
        else:
            weights += element * count
    text = model.config.get_text_config()
    hidden, inner = text.hidden_size, text.intermediate_size
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or hidden // heads
    keys = size * (text.num_key_value_heads or heads)
    # Two norms keep their input and its scaled form in float32 and their output; attention keeps queries, keys, values
    # and its result; the MLP its two branches, the activation and the product. Adapters keep the input of each layer.
    layer = 16 * hidden + element * (2 * hidden + 2 * heads * size + 2 * keys + 4 * inner)
    if recipe.stage == "lora":
        layer += element * (6 * hidden + inner)
    layers = text.num_hidden_layers
    kept = tokens * (element * hidden * layers + layer if recipe.gradient_checkpointing else layer * layers)
    kept += targets * text.vocab_size * 12  # logits in half and full precision, their gradient, the softmax
    spread = [1 if zero < stage else devices for stage in (1, 2, 3)]
    return Memory(weights / spread[2], 4 * trained / spread[1], 8 * trained / spread[0], float(kept))


def _tower(model: Any, image_tokens: int) -> tuple[float, bool]:
    """(operations of the vision tower per picture, whether any of its layers trains)."""
    tower = model.model.vision_tower
    layers = blocks(tower)
    used = model.config.vision_feature_layer
    last = max(state % (len(layers) + 1) for state in (used if isinstance(used, list) else [used]))
    total, trains = 0.0, False
    for layer in layers[:last]:
        learns = any(value.requires_grad for value in layer.parameters())
        trains |= learns
        count = sum(value.numel() for value in layer.parameters() if value.dim() >= 2)
        attention = 2 * image_tokens * image_tokens * tower.config.hidden_size
        total += (6 if learns else 2) * (count * image_tokens + attention)
    embedding = sum(value.numel() for name, value in tower.named_parameters() if "patch_embed" in name)
    return total + 2 * embedding * image_tokens, trains


def _count(parameter: nn.Parameter) -> int:
    """Weights in a parameter; bitsandbytes packs two 4-bit ones into a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
