"""``medllava.json``: what a checkpoint folder is, so that it can be opened by its path alone.

Nothing is ever read from a folder's name. The manifest is written last: a folder that has one is complete.
"""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from medllava import __version__
from medllava.errors import CheckpointError
from medllava.jsonl import describe, read_json, write_json
from medllava.regions import Way

FILE = "medllava.json"

PACKAGES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "numpy", "pillow", "openai")

Kind = Literal["full", "projector", "lora"]
Padding = Literal["square", "none"]


class Manifest(BaseModel):
    """A checkpoint's own description.

    kind: ``full`` is a whole model; ``projector`` holds only the projector; ``lora`` holds adapters and the projector.
    base: for the latter two, the full model they belong to: a path that starts with ``.`` is relative to this folder,
        an absolute path is taken as it is, anything else is a Hugging Face hub id, with ``revision``.
    chat_format: see :mod:`medllava.model.prompt`.
    image_size: side of the model's input, pixels. padding: ``square`` pads the picture to a square first.
    single_exchange: the model was trained on questions without a history, so earlier turns stay out of its prompts.
    training_mpp: micrometres per pixel of the training images, if known.
    regions: how a region of a question reaches the model, see :mod:`medllava.regions`: what it was trained on. Weights
        of others get ``mark``: LLaVA and Quilt-LLaVA were trained on neither, and Quilt-VQA-RED marks pictures in red.
    quantized: what the language model of the base was quantized to while the rest was trained; it can be loaded on the
        base as it is, or quantized.
    tower_trained: a projector or LoRA folder that also holds layers of the vision tower.
    tower_mark: a few weights of the base's vision tower, by which another one of the same shape is told.
    data_sha256, recipe, versions: what the weights were made from. figures: step, losses and the like when they were
        written, where known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    format: Literal[1] = 1
    kind: Kind
    base: str | None = None
    revision: str | None = None
    chat_format: str
    image_size: int
    padding: Padding = "square"
    single_exchange: bool = False
    training_mpp: float | None = None
    regions: tuple[Way, ...] = ("text",)
    box_format: str = "[x1, y1, x2, y2], 0..1 of the original image"
    quantized: Literal["nf4", "int8"] | None = None
    tower_trained: bool = False
    tower_mark: tuple[float, ...] = ()
    data_sha256: str | None = None
    recipe: dict[str, Any] = {}
    versions: dict[str, str] = {}
    figures: dict[str, float] = {}
    created: str = ""


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, or None if it has none. Raises CheckpointError if it is there but cannot be used."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return Manifest.model_validate(read_json(path))
    except ValidationError as error:
        raise CheckpointError(f"{path}: not a medllava manifest: {describe(error)}") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_json(folder / FILE, manifest.model_dump(mode="json"))


def current_versions() -> dict[str, str]:
    """Versions of what decides the numbers that a checkpoint computes and the scores it gets."""
    found = {"medllava": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def code_version() -> dict[str, str]:
    """The git commit of this code, marked if files differ from it; empty if it does not run from a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {}

    def git(*words: str) -> str:
        told = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True)
        return told.stdout.strip()

    try:
        modified = "-modified" if git("status", "--porcelain", "-uno") else ""
        return {"commit": git("rev-parse", "HEAD") + modified}
    except (OSError, subprocess.SubprocessError):
        return {}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
