"""What produced a score: hashes, versions, command and date, kept beside the answers in ``run.json``."""

from __future__ import annotations

import hashlib
import shlex
import sys
from pathlib import Path
from typing import Any

from medllava.errors import ConfigError
from medllava.jsonl import read_json, write_json

_MODEL_FILES = {".json", ".safetensors", ".bin", ".model", ".jinja", ".txt"}

SAME = ("benchmark", "model", "model_sha256", "questions_sha256", "images_sha256", "decoding")
"""What must not change between two runs that append to the same answers."""


def command(step: str, *, without: tuple[str, ...] = ("--out",)) -> str:
    """The command line as it was given, without the place that results are written to."""
    kept, skip = [], False
    for word in sys.argv[1:]:
        if skip:
            skip = False
        elif word in without:
            skip = True
        elif not word.startswith(tuple(f"{flag}=" for flag in without)):
            kept.append(word)
    if kept[:1] == ["eval"]:
        kept = kept[1:]
    return shlex.join(["medllava", "eval", *(kept if kept[:1] == [step] else [step, *kept])])


def folder_hash(folder: Path) -> str:
    """SHA-256 over the model files directly in a checkpoint folder, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _MODEL_FILES and path.is_file()):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def start_run(folder: Path, run: dict[str, Any]) -> None:
    """Write ``run.json``, or check that the one there is of the same run. Raises ConfigError naming what differs."""
    path = folder / "run.json"
    if not path.exists():
        write_json(path, run)
        return
    before = read_json(path)
    different = [key for key in SAME if before.get(key) != run.get(key)]
    if different:
        raise ConfigError(
            f"{folder}: holds answers of another run ({', '.join(different)} differ);"
            " choose another --out, or remove that folder"
        )


def read_run(answers: Path) -> dict[str, Any]:
    """``run.json`` beside an answers file, or nothing if there is none (answers made by other programs)."""
    path = answers.parent / "run.json"
    return dict(read_json(path)) if path.exists() else {}
