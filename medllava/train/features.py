"""The frozen encoder's output on disk, for data whose features do not fit in memory and for runs that share them.

``FOLDER/<key>/``: the key names everything that features depend on but the pictures: the encoder's weights, which of
its states are taken, the image processor, the precision. Within it, a picture is known by the SHA-256 of its file and
by how it is mirrored, so renamed and copied files are found again and changed ones are not. Each ``*.safetensors`` is
written whole or not at all; several runs may write into one folder at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from medllava.errors import DataError
from medllava.jsonl import file_sha256
from medllava.model.folders import full_disk_told
from medllava.regions import marked_name, named_mark
from medllava.train.augment import flip_pixels

log = logging.getLogger(__name__)

_PER_FILE = 512


def encoder_key(model: Any, image_processor: Any) -> str:
    """Hash of all that decides what the encoder of a LlavaForConditionalGeneration makes of a picture."""
    digest = hashlib.sha256()
    settings = {
        "processor": image_processor.to_dict(), "layer": model.config.vision_feature_layer,
        "select": model.config.vision_feature_select_strategy, "tower": model.config.vision_config.to_dict(),
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.model.vision_tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _digest(images: Path, name: str) -> str:
    """Hash of a picture's file and of the mark on it."""
    file, region = named_mark(name)
    found = file_sha256(images / file)
    return f"{found}-{hashlib.sha256(marked_name('', region).encode()).hexdigest()[:16]}" if region else found


class FeatureStore:
    """Features by picture; memory holds only where they are. Each process fills in its share, then all open the whole.

    ``encode``: pixels (pictures, 3, side, side) to features (pictures, tokens, width) on the CPU.
    """

    def __init__(self, folder: Path, key: str, *, rank: int = 0, processes: int = 1) -> None:
        self._folder = folder / key
        self._rank = rank
        self._processes = processes
        self._names: dict[str, str] = {}
        self._where: dict[str, Path] = {}
        self._opened: dict[Path, Any] = {}

    def fill(
        self, images: Path, pixels: Callable[[str], torch.Tensor], names: Sequence[str], variants: Sequence[int],
        encode: Callable[[torch.Tensor], torch.Tensor],
    ) -> int:
        """Encode this process's share of the pictures in ``images`` that are not there yet; returns how many."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._find()
        self._names = {name: _digest(images, name) for name in tqdm(names, desc="hash images", leave=False)}
        missing = list({
            digest: name for name, digest in self._names.items()
            if any(f"{digest}-{variant}" not in self._where for variant in variants)
        }.items())[self._rank :: self._processes]
        step = max(1, 32 // len(variants))
        pending: dict[str, torch.Tensor] = {}
        for start in tqdm(range(0, len(missing), step), desc="encode images", unit="batch", mininterval=0.5):
            part = missing[start : start + step]
            upright = [pixels(name) for _, name in part]
            encoded = encode(torch.stack([flip_pixels(each, variant) for each in upright for variant in variants]))
            keys = [f"{digest}-{variant}" for digest, _ in part for variant in variants]
            pending |= {key: each.clone() for key, each in zip(keys, encoded, strict=True)}
            if len(pending) >= _PER_FILE:
                self._write(pending)
                pending = {}
        if pending:
            self._write(pending)
        return len(missing)

    def open(self) -> None:
        """See what all processes have written. Raises DataError if features of a picture are missing."""
        self._find()
        lost = [name for name, digest in self._names.items() if f"{digest}-0" not in self._where]
        if lost:
            raise DataError(
                f"{self._folder}: no features of {lost[0]} (and {len(lost) - 1} more); all processes must see it"
            )
        log.info("features of %d pictures in %s", len(self._names), self._folder)

    def get(self, name: str, variant: int) -> torch.Tensor:
        """(tokens, width)"""
        from safetensors import safe_open

        key = f"{self._names[name]}-{variant}"
        file = self._where[key]
        if file not in self._opened:
            self._opened[file] = safe_open(file, framework="pt")
        found: torch.Tensor = self._opened[file].get_tensor(key)
        return found

    def any(self) -> torch.Tensor:
        return self.get(next(iter(self._names)), 0)

    def _find(self) -> None:
        from safetensors import safe_open

        for file in sorted(self._folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                self._where |= dict.fromkeys(opened.keys(), file)

    def _write(self, features: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        final = self._folder / f"{uuid.uuid4().hex}.safetensors"
        temporary = final.with_suffix(".part")
        with full_disk_told(final):
            save_file(features, temporary)
        temporary.replace(final)
        self._where |= dict.fromkeys(features, final)
