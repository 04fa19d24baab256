"""A small benchmark of coloured discs, and two stand-ins for a model: one that looks and one that does not."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from medllava.eval.models import Asked, Reply
from medllava.eval.records import Question
from medllava.geometry import Box, format_box
from medllava.jsonl import write_records

COLOURS = {"red disc": (200, 30, 40), "green disc": (30, 160, 60), "blue disc": (40, 60, 200)}
GROUPS = 12
SIZE = 96


def _disc(box: Box, colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGB", (SIZE, SIZE), (235, 215, 225))
    ImageDraw.Draw(image).ellipse(box.to_pixels(SIZE, SIZE), fill=colour)
    return image


def _questions(group: str, number: int, image: str, colour: str, box: Box) -> list[Question]:
    other = [name for name in COLOURS if name != colour][number % 2]
    asked = colour if number % 2 else other
    common = {"image": image, "group": group}
    stem = f"{group}-{number}"
    return [
        Question(id=f"{stem}-where", question=f"Where is the {colour}?", kind="where",
                 answer=f"In the {box.centre.quadrant()}.", **common),
        Question(id=f"{stem}-yes", question=f"Is there a {asked} here?", kind="yes_no",
                 answer="Yes." if asked == colour else "No.", **common),
        Question(id=f"{stem}-what", question="What is in this image?", kind="what", answer=colour,
                 choices=tuple(COLOURS), **common),
        Question(id=f"{stem}-count", question="How many discs are there?", kind="count", answer="1", **common),
        Question(id=f"{stem}-box", question=f"Give the box of the {colour}.", kind="box", answer=format_box(box),
                 box=box, **common),
    ]


@pytest.fixture(scope="session")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with questions.jsonl and its pictures: 12 groups of 2 pictures, 5 questions each."""
    folder = tmp_path_factory.mktemp("discs")
    rng = random.Random(0)
    questions = []
    for index in range(GROUPS):
        for number in range(2):
            colour = rng.choice(list(COLOURS))
            x, y = rng.choice((0.1, 0.6)), rng.choice((0.1, 0.6))
            box = Box(x1=x, y1=y, x2=x + 0.3, y2=y + 0.3)
            image = f"g{index:02}_{number}.png"
            _disc(box, COLOURS[colour]).save(folder / image)
            questions += _questions(f"g{index:02}", number, image, colour, box)
    write_records(folder / "questions.jsonl", questions)
    return folder


def looks(batch: Sequence[Asked]) -> list[Reply]:
    """Answers by looking for a disc of a known colour in the picture."""
    return [Reply(_look(image, prompt), "stop") for image, prompt, _ in batch]


def guesses(batch: Sequence[Asked]) -> list[Reply]:
    """Answers from the words of the question alone."""
    return [Reply(_guess(prompt), "stop") for _, prompt, _ in batch]


def _look(image: Image.Image | None, prompt: str) -> str:
    if image is None:
        return _guess(prompt)
    pixels = np.asarray(image).astype(int)
    name, mask = max(
        ((name, np.abs(pixels - colour).sum(axis=2) < 30) for name, colour in COLOURS.items()),
        key=lambda pair: int(pair[1].sum()),
    )
    if mask.sum() <= 50:
        return _guess(prompt)
    rows, columns = np.nonzero(mask)
    height, width = pixels.shape[:2]
    box = Box(x1=columns.min() / width, y1=rows.min() / height, x2=(columns.max() + 1) / width,
              y2=(rows.max() + 1) / height)
    if prompt.startswith("Where"):
        return f"In the {box.centre.quadrant()}."
    if prompt.startswith("Is there"):
        return f"Yes, there is a {name}." if name in prompt else "No."
    if prompt.startswith("What"):
        return f"A {name}."
    return "There is 1." if prompt.startswith("How many") else format_box(box)


def _guess(prompt: str) -> str:
    if prompt.startswith("Where"):
        return "In the upper left."
    if prompt.startswith("Is there"):
        return "Yes."
    if prompt.startswith("What"):
        return "A red disc."
    return "2" if prompt.startswith("How many") else "I cannot tell."


@pytest.fixture(name="looks")
def looks_fixture() -> object:
    """The stand-in that looks at the picture."""
    return looks


@pytest.fixture(name="guesses")
def guesses_fixture() -> object:
    """The stand-in that only reads the question."""
    return guesses
