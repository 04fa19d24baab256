"""Recipes: YAML files read into frozen, typed pydantic models, every problem told at once.

A recipe holds what is the same for everybody; the command line holds what differs on your machine and may override a
recipe's keys as ``key=value``. A path inside a recipe is relative to that recipe.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from medllava.errors import ConfigError


class Recipe(BaseModel):
    """Base of all recipes: unknown keys are refused, values cannot change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Kind = TypeVar("Kind", bound=Recipe)


def load_recipe(path: Path, kind: type[Kind], overrides: Sequence[str] = ()) -> Kind:
    """Read ``path`` as a ``kind`` with ``key=value`` overrides (dots reach into nested parts; values are YAML).

    Raises ConfigError that lists every problem, with "did you mean" for an unknown key.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not YAML ({getattr(error, 'problem', error)})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, got {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return parse_recipe(values, kind, str(path))


def parse_recipe(values: dict[str, Any], kind: type[Kind], where: str) -> Kind:
    """Validate a mapping as a ``kind``; ``where`` names it in the error. Raises ConfigError."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [_problem(fault, kind) for fault in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(problems)) from error


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML, for a copy in the run's own folder."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: an override is key=value, for example lr=1e-4")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{override!r}: {parent} is a value, not a group of keys")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not YAML") from error


def _problem(fault: Any, kind: type[BaseModel]) -> str:
    location = [str(part) for part in fault["loc"]]
    if fault["type"] != "extra_forbidden":
        return f"{'.'.join(location)}: {fault['msg'].removeprefix('Value error, ')}"
    near = difflib.get_close_matches(location[-1], _keys(kind, location[:-1]), n=1, cutoff=0.5)
    hint = f"; did you mean \"{near[0]}\"?" if near else ""
    return f"unknown key \"{'.'.join(location)}\"{hint}"


def _keys(kind: type[BaseModel], path: list[str]) -> list[str]:
    model: Any = kind
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        model = field.annotation if field else None
    return list(getattr(model, "model_fields", {}))
