"""What the model is shown: the question's own picture, or what an ablation puts in its place."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from medllava.errors import DataError
from medllava.eval.records import Condition, Question
from medllava.images import load_image

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp"}


class Pictures:
    """Opens the picture of a question under a condition. The same seed and questions give the same pictures."""

    def __init__(self, folder: Path | None, questions: Sequence[Question], seed: int = 0) -> None:
        self.folder = folder
        self.seed = seed
        # Sorted and without repeats, so that neither the order of the file nor a popular picture changes the choice.
        self._by_group = sorted({(question.group, question.image) for question in questions if question.image})

    def path(self, image: str) -> Path:
        """Where a picture is. One that is not at its name is looked for by its bare name, with any ending if it has
        none, anywhere in the folder (archives unpack into folders of their own), and taken if there is just one."""
        path = self.folder / image if self.folder else Path(image)
        if self.folder is None or path.is_file():
            return path
        found = self._by_name.get(Path(image).name, [])
        return found[0] if len(found) == 1 else path

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        files = sorted(self.folder.rglob("*")) if self.folder else []
        for file in files:
            if file.suffix.lower() in SUFFIXES:
                for name in (file.name, file.stem):
                    found.setdefault(name, []).append(file)
        return found

    def show(self, question: Question, condition: Condition) -> Image.Image | None:
        """The RGB picture, or None for a question asked as text alone.

        blank: white (an empty slide) of the same size. noise: uniform random colours of the same size. mismatched:
        the picture of a question from another group. Raises DataError if a picture cannot be opened.
        """
        if question.image is None or condition == "no_image":
            return None
        if condition == "mismatched":
            return load_image(self.path(self._other(question)))
        picture = load_image(self.path(question.image))
        if condition == "blank":
            return Image.new("RGB", picture.size, "white")
        if condition == "noise":
            generator = np.random.default_rng(self._number(question))
            shape = (picture.height, picture.width, 3)
            return Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
        return picture

    def _other(self, question: Question) -> str:
        others = [image for group, image in self._by_group if group != question.group and image != question.image]
        if not others:
            raise DataError(f"question {question.id}: no picture from another group to mismatch it with")
        return str(random.Random(self._number(question)).choice(others))

    def _number(self, question: Question) -> int:
        """A random seed of the question's own, so that leaving out other questions does not change it."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{question.id}".encode()).digest()[:8])

    def sha256(self) -> str:
        """Hash of all pictures' bytes in a stable order; a missing one counts by its absence."""
        digest = hashlib.sha256()
        for image in sorted({image for _, image in self._by_group if image}):
            digest.update(image.encode())
            if self.path(image).is_file():
                digest.update(hashlib.sha256(self.path(image).read_bytes()).digest())
        return digest.hexdigest()
