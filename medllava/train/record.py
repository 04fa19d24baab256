"""What a run is given, and what it writes down of itself: enough to tell later whether it is the same run."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from medllava.config import to_yaml
from medllava.errors import ConfigError
from medllava.jsonl import atomic_write, file_sha256, read_json, write_json
from medllava.model import manifest
from medllava.model.image_text import data_sha256
from medllava.train.config import AnyRecipe
from medllava.train.plots import LOG_FILE
from medllava.train.saves import Saves
from medllava.train.stages import Part

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


def already_finished(recipe: AnyRecipe, paths: Paths, *, resume: bool) -> bool:
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


def begin(recipe: AnyRecipe, paths: Paths, table: Sequence[Part]) -> None:
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


def finish(out: Path, started: float, facts: dict[str, Any]) -> None:
    """The completion marker, last of all."""
    write_json(out / FINISHED_FILE, facts | {"seconds": round(time.monotonic() - started, 1), "at": manifest.now()})


def facts_of(recipe: AnyRecipe, paths: Paths, training_mpp: float | None = None) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run that made it."""
    return {
        "recipe": recipe.model_dump(mode="json"), "data_sha256": data_sha256(paths.data), "training_mpp": training_mpp,
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
