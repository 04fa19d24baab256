"""What the model is shown: the question's own picture, or what an ablation puts in its place."""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image

from medllava.errors import DataError
from medllava.eval.records import Condition, Question
from medllava.geometry import Box
from medllava.images import load_image
from medllava.regions import Way, as_mark, draw_mark

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp"}
KEPT_BYTES = 256 << 20
"""Memory for what was made of pictures and may be asked about again."""


class Pictures:
    """Opens the picture of a question under a condition. The same seed and questions give the same pictures.

    ``regions``: with ``mark``, the box that a question names is marked on its picture, whatever the condition.
    """

    def __init__(
        self, folder: Path | None, questions: Sequence[Question], seed: int = 0, regions: Way = "text"
    ) -> None:
        self.folder = folder
        self.seed = seed
        self.regions = regions
        # Sorted and without repeats, so that neither the order of the file nor a popular picture changes the choice.
        self._by_group = sorted({(each.group, each.image) for each in questions if each.image})
        self._places: dict[tuple[str, str], list[int]] = {}
        for place, (group, image) in enumerate(self._by_group):
            self._places.setdefault(("group", group), []).append(place)
            self._places.setdefault(("image", image), []).append(place)
        self._sizes: dict[str, tuple[int, int]] = {}

    def path(self, image: str) -> Path:
        """Where a picture is. One that is not at its name is looked for by its bare name, with any ending if it has
        none, anywhere in the folder (archives unpack into folders of their own), and taken if there is just one. So is
        one named in the way of Windows (``C:\\pictures\\a.png``)."""
        path = self.folder / image if self.folder else Path(image)
        if self.folder is None or path.is_file():
            return path
        found = self._by_name.get(PureWindowsPath(image).name, [])
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
        picture, region = self._plain(question, question.image, condition), self._region(question)
        return draw_mark(picture, region) if region else picture

    def worded(self, question: Question) -> Question:
        """The question as it is asked about what :meth:`show` shows."""
        found = as_mark(question.question) if self.regions == "mark" else None
        return question.model_copy(update={"question": found[0]}) if found else question

    def _region(self, question: Question) -> Box | None:
        found = as_mark(question.question) if self.regions == "mark" else None
        return found[1] if found else None

    def _plain(self, question: Question, image: str, condition: Condition) -> Image.Image:
        if condition == "mismatched":
            return self._load(self._other(question))
        if condition == "blank":
            return Image.new("RGB", self._size(image), "white")
        if condition == "noise":
            generator = np.random.default_rng(self._number(question))
            width, height = self._size(image)
            return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        return self._load(image)

    def key(self, question: Question, condition: Condition) -> str | None:
        """A name for what is shown, the same for all questions that are shown the same; None if only this one is."""
        if question.image is None or condition in {"no_image", "noise"}:
            return None
        region = self._region(question)
        mark = f" {region}" if region else ""
        if condition == "blank":
            return f"blank {self._size(question.image)}{mark}"
        return f"file {self._other(question) if condition == 'mismatched' else question.image}{mark}"

    def _load(self, image: str) -> Image.Image:
        picture = load_image(self.path(image))
        self._sizes[image] = picture.size
        return picture

    def _size(self, image: str) -> tuple[int, int]:
        return self._sizes.get(image) or self._load(image).size

    def _other(self, question: Question) -> str:
        """A picture of another group, by a number of the question's own."""
        own = {
            *self._places.get(("group", question.group), ()), *self._places.get(("image", str(question.image)), ()),
            *self._absent,
        }
        count = len(self._by_group) - len(own)
        if not count:
            raise DataError(f"question {question.id}: no picture from another group to mismatch it with")
        chosen = random.Random(self._number(question)).choice(range(count))
        for place in sorted(own):  # the chosen one of those that are not its own
            chosen += place <= chosen
        return self._by_group[chosen][1]

    @cached_property
    def _absent(self) -> list[int]:
        """Pictures that are not there: no question of another is asked with them."""
        return [place for place, (_, image) in enumerate(self._by_group) if not self.path(image).is_file()]

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


class Shown:
    """What a model is sent for the picture of a question (``make`` makes it: pixels, a data URI), made once for all
    questions about the picture as long as memory lasts."""

    def __init__(self, pictures: Pictures, make: Callable[[Image.Image], Any], most_bytes: int = KEPT_BYTES) -> None:
        self.pictures, self._make, self._room = pictures, make, most_bytes
        self._kept: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    def of(self, question: Question, condition: Condition) -> Any:
        """None for a question asked as text alone. Raises DataError if the picture cannot be opened."""
        key = self.pictures.key(question, condition)
        if key is not None and key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][0]
        picture = self.pictures.show(question, condition)
        if picture is None:
            return None
        made = self._make(picture)
        if key is not None:
            size = _bytes(made)
            self._kept[key] = made, size
            self._room -= size
            while self._room < 0:
                self._room += self._kept.popitem(last=False)[1][1]
        return made


def _bytes(made: Any) -> int:
    if isinstance(made, Image.Image):
        return made.width * made.height * len(made.getbands())
    return int(made.nbytes) if hasattr(made, "nbytes") else len(made)
