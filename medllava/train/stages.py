"""Which weights each stage trains, and the table that says so at the start of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from medllava.errors import ConfigError
from medllava.model.checkpoint import quiet_peft
from medllava.model.tower import blocks
from medllava.train.config import TuneRecipe
from medllava.train.loop import Group


@dataclass(frozen=True)
class Part:
    """A line of the table: a part of the model, its parameters, how many of them train, and how fast."""

    name: str
    parameters: int
    trainable: int
    learning_rate: float | None


def select(model: Any, recipe: TuneRecipe, adapted: Any = None) -> tuple[Any, list[Group], list[Part]]:
    """Set up a LlavaForConditionalGeneration for the recipe's stage: freeze, add adapters, choose learning rates.
    ``adapted``: the PeftModel around it if it already has adapters, which then go on learning.

    Returns (the model, inside a PeftModel for stage ``lora``; parameter groups; table). The vision tower is frozen but
    for ``tower_layers``; stage ``projector`` trains the projector alone; ``lora`` the projector and adapters; ``full``
    the projector and the language model with its head.
    """
    model.requires_grad_(False)
    core = model.model
    wrapped = adapted or (_with_lora(model, recipe) if recipe.stage == "lora" else model)
    chosen: dict[str, tuple[Iterable[str], float]] = {}
    rate = recipe.optim.learning_rate
    chosen["projector"] = (_names(model, core.multi_modal_projector), recipe.projector_learning_rate or rate)
    if recipe.stage == "lora":
        chosen["LoRA"] = ([name for name, _ in model.named_parameters() if ".lora_" in name], rate)
    if recipe.stage == "full":
        # A tied output head is the same parameter as the embedding, under one name.
        chosen["language model"] = ([*_names(model, nn.ModuleList([core.language_model, model.lm_head]))], rate)
    if recipe.tower_layers:
        layers = _tower_layers(model)
        if recipe.tower_layers > len(layers):
            raise ConfigError(
                f"tower_layers is {recipe.tower_layers}, but {len(layers)} layers of the vision tower make the features"
            )
        last = [name for layer in layers[-recipe.tower_layers :] for name in _names(model, layer)]
        chosen["vision tower"] = (last, recipe.tower_learning_rate or rate)
    own = dict(model.named_parameters())
    groups = []
    for name, (names, learning_rate) in chosen.items():
        parameters = {key: own[key] for key in names}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
        groups.append(Group(name, learning_rate, parameters))
    rates = {group.name: group.learning_rate for group in groups}
    parts = {
        "vision tower": core.vision_tower, "projector": core.multi_modal_projector,
        "language model": core.language_model, "output head": model.lm_head,
    }
    table = [_part(name, module, rates.get(name)) for name, module in parts.items()]
    if recipe.stage == "full":
        table[-1] = _part("output head", model.lm_head, rates["language model"])
    if recipe.stage == "lora":
        count = sum(parameter.numel() for parameter in groups[1].parameters.values())
        language = table[2]
        table[2] = Part(language.name, language.parameters - count, 0, None)
        table.append(Part("LoRA", count, count, rates["LoRA"]))
    return wrapped, groups, table


def format_table(parts: Sequence[Part]) -> str:
    """The table as text, also for parts that are frozen."""
    lines = [f"{'part':<18}{'parameters':>16}{'trainable':>16}{'learning rate':>16}"]
    for part in parts:
        rate = "frozen" if part.learning_rate is None or not part.trainable else f"{part.learning_rate:g}"
        lines.append(f"{part.name:<18}{part.parameters:>16,}{part.trainable:>16,}{rate:>16}")
    total, trainable = sum(part.parameters for part in parts), sum(part.trainable for part in parts)
    lines.append(f"{'total':<18}{total:>16,}{trainable:>16,}{f'{100 * trainable / max(total, 1):.2f} %':>16}")
    return "\n".join(lines)


def count_parameters(module: nn.Module) -> int:
    """Frozen ones, too."""
    return sum(parameter.numel() for parameter in module.parameters())


def _part(name: str, module: nn.Module, rate: float | None) -> Part:
    parameters = list(module.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return Part(name, sum(p.numel() for p in parameters), trainable, rate if trainable else None)


def _with_lora(model: Any, recipe: TuneRecipe) -> Any:
    from peft import LoraConfig, get_peft_model

    linear = sorted({
        name.rpartition(".")[2] for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear)
    })
    config = LoraConfig(
        r=recipe.lora.r, lora_alpha=recipe.lora.alpha, lora_dropout=recipe.lora.dropout, bias="none",
        # A full match on the path: the vision tower has layers of the same names, which must stay as they are.
        target_modules=rf"model\.language_model\..*\.({'|'.join(linear)})",
    )
    with quiet_peft():
        return get_peft_model(model, config)


def check_adapters(adapted: Any, recipe: TuneRecipe, source: Path) -> None:
    """Raises ConfigError if the adapters of a checkpoint are not those that the recipe trains, so that it cannot go on
    with them."""
    config = adapted.peft_config["default"]
    wanted = {"lora.r": recipe.lora.r, "lora.alpha": recipe.lora.alpha, "lora.dropout": recipe.lora.dropout}
    found = {"lora.r": config.r, "lora.alpha": config.lora_alpha, "lora.dropout": config.lora_dropout}
    language = adapted.get_base_model().model.language_model
    bare = [
        name for name, module in language.named_modules()
        if isinstance(module, nn.Linear) and "base_layer" not in name and ".lora_" not in name
    ]
    if wanted == found and not bare:
        return
    differ = [f"{key}={found[key]:g}" for key in wanted if wanted[key] != found[key]]
    what = f"its adapters have {' '.join(differ)}" if differ else f"its adapters leave out {bare[0]}"
    how = f"set {' '.join(differ)} to go on with them, or " if differ and not bare else ""
    raise ConfigError(
        f"{source}: {what}, unlike this recipe; {how}fold them into their base first: python -m medllava.model merge"
        f" {source} MERGED, then --init-from MERGED"
    )


def _names(model: nn.Module, part: nn.Module) -> list[str]:
    """Names in ``model`` of the parameters of ``part``."""
    own = {id(parameter) for parameter in part.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in own and ".lora_" not in name]


def _tower_layers(model: Any) -> list[nn.Module]:
    """The vision tower's layers up to the one whose output is used; those after it would get no gradient."""
    layers = blocks(model.model.vision_tower)
    used = model.config.vision_feature_layer
    # The tower's states are its embedding and then the output of each layer, so state n is made by n layers.
    count = max(state % (len(layers) + 1) for state in (used if isinstance(used, list) else [used]))
    return layers[:count]
