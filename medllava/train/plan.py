"""What a run would take, before any weight is read: tokens, padding, memory of a device, hours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medllava.errors import ConfigError
from medllava.train.batch import lay_out
from medllava.train.config import TuneRecipe
from medllava.train.cost import ASSUMED_MFU, Device, Memory, known_device, memory, this_device, work
from medllava.train.dataset import Examples, Order, computed_share, useful_share

_HEADROOM = 0.92
"""Part of a device's memory that a run can have: the rest goes to its driver, kernels and fragments."""


@dataclass(frozen=True)
class Machine:
    """What a run is planned for: so many devices, of which kind (None: unknown, as on a CPU), with ZeRO or not (0)."""

    devices: int = 1
    device: Device | None = None
    zero: int = 0


def machine(devices: int, name: str | None, zero: int = 0) -> Machine:
    """``name``: of a GPU; None for this machine's. Raises ConfigError if it is not known."""
    device = this_device() if name is None else known_device(name)
    if name is not None and device is None:
        raise ConfigError(f"--gpu {name}: its peak and memory are not known; known are H200, H100, A100, RTX 4090, ...")
    return Machine(devices, device, zero)


def plan_text(
    recipe: TuneRecipe, outline: Any, examples: Examples, order: Order, steps: int, on: Machine, *, image_tokens: int,
    image_token_id: int, cached: bool, half: bool,
) -> str:
    """The plan in a few lines. ``outline``: the model without weights, those that train marked. What samples of a
    picture share is left out of the operations, but not of the memory, which is at most what is told."""
    count, tokens = len(examples), sum(examples.lengths)
    epochs = steps * recipe.optim.batch_size / count
    lines = [
        f"{count} samples, {tokens} tokens per epoch ({examples.supervised} supervised; mean {tokens / count:.0f},"
        f" longest {max(examples.lengths)}); {steps} steps of {recipe.optim.batch_size} samples = {epochs:.2f} epochs",
        _padding(recipe, examples, order, on),
    ]
    part = 1.0
    if order.together > 1:
        part = computed_share(order, examples, image_token_id=image_token_id, row_length=recipe.max_length)
        lines.append(
            f"up to {order.together} samples of a picture share it in a step: {100 * part:.1f} % of the tokens are"
            " computed"
        )
    need = _memory(recipe, outline, examples, order, on, half=half)
    spread = f", ZeRO-{on.zero}" if on.zero else ""
    lines.append(
        f"memory per device ({on.devices}{spread}), at most: about {_size(need.total)}"
        f" (weights {_size(need.weights)}, gradients {_size(need.gradients)}, AdamW {_size(need.optimizer)},"
        f" activations {_size(need.activations)})"
    )
    if on.device:
        lines.append(_fit(recipe, outline, examples, order, on, half=half))
    pictures = sum(len(sample.images) for sample in examples.samples)
    cost = work(outline, lengths=examples.lengths, image_tokens=image_tokens, cached=cached)
    operations = epochs * cost.operations(round(part * tokens), examples.supervised, pictures)
    if on.device and half:
        hours = operations / (on.devices * on.device.peak * ASSUMED_MFU) / 3600
        lines.append(
            f"{operations:.3g} operations: about {hours:.2f} hours on {on.devices} x {on.device.name} at"
            f" {100 * ASSUMED_MFU:.0f} % MFU"
        )
    else:
        lines.append(f"{operations:.3g} operations; hours: unknown on this machine (name a GPU: --plan --gpu H200)")
    return "\n".join(lines)


def _padding(recipe: TuneRecipe, examples: Examples, order: Order, on: Machine) -> str:
    layout = {"accumulate": recipe.optim.accumulate, "processes": on.devices}
    apart = 1 - useful_share(order, examples.lengths, **layout)
    packed = 1 - useful_share(order, examples.lengths, row_length=recipe.max_length, **layout)
    first, second = ("on", "off") if recipe.packing else ("off", "on")
    now, other = (packed, apart) if recipe.packing else (apart, packed)
    return f"padding: {100 * now:.1f} % of the computed tokens (packing {first}; {second}: {100 * other:.1f} %)"


def _memory(
    recipe: TuneRecipe, outline: Any, examples: Examples, order: Order, on: Machine, *, half: bool
) -> Memory:
    """With the largest micro-batch of the first steps."""
    largest = 0
    for batch in order.epoch(0)[:200]:
        lengths = [examples.lengths[index] for index in batch]
        row_length = recipe.max_length if recipe.packing else None
        for rows in lay_out(
            lengths, accumulate=recipe.optim.accumulate, processes=on.devices, row_length=row_length
        ):
            largest = max(largest, len(rows) * max(sum(lengths[place] for place in row) for row in rows))
    targets = round(largest * examples.supervised / sum(examples.lengths))
    return memory(outline, recipe, tokens=largest, targets=targets, half=half, devices=on.devices, zero=on.zero)


def _fit(recipe: TuneRecipe, outline: Any, examples: Examples, order: Order, on: Machine, *, half: bool) -> str:
    """Whether it fits the device and, if not, the first change that does."""
    assert on.device is not None
    room = on.device.memory * _HEADROOM
    what = f"{on.device.name} has {_size(on.device.memory)}"
    pieces = [
        value for value in range(recipe.optim.accumulate, recipe.optim.batch_size + 1)
        if recipe.optim.batch_size % value == 0
    ]
    tried = [(value, recipe.gradient_checkpointing, recipe.quantize) for value in pieces[:3]]
    tried += [(value, True, recipe.quantize) for value in pieces]
    if recipe.stage != "full":
        tried += [(value, True, "nf4") for value in pieces]
    for accumulate, checkpointing, quantize in tried:
        changes = {
            "optim": recipe.optim.model_copy(update={"accumulate": accumulate}),
            "gradient_checkpointing": checkpointing, "quantize": quantize,
        }
        changed = recipe.model_copy(update=changes)
        if _memory(changed, outline, examples, order, on, half=half).total > room:
            continue
        told = [f"optim.accumulate={accumulate}"] if accumulate != recipe.optim.accumulate else []
        told += ["gradient_checkpointing=true"] if checkpointing != recipe.gradient_checkpointing else []
        told += [f"quantize={quantize}"] if quantize != recipe.quantize else []
        return f"{what}: it fits with {' '.join(told)}" if told else f"{what}: it fits"
    return f"{what}: it fits with no accumulate, gradient_checkpointing and quantize; use more devices with ZeRO"


def _size(count: float) -> str:
    """Bytes, for people: "27.6 GB", "3 MB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
