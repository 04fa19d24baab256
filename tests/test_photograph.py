"""Photographs of any size, shape and format go through the terminal, the worker and the web chat."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from medllava.conversation import Turn
from medllava.geometry import Box, parse_boxes
from medllava.images import load_image
from medllava.serve.cli import save_boxes
from medllava.serve.client import Worker
from medllava.serve.session import SENT_SIDE, open_picture

Run = Callable[..., subprocess.CompletedProcess[str]]

QUESTION = "Where is the gland?"
SPOT = Box(x1=0.2, y1=0.3, x2=0.5, y2=0.7)
"""Where every photograph has its dark spot, as a person sees it upright."""


def spot_px(width: int, height: int) -> tuple[int, int, int, int]:
    """SPOT in whole pixels, at least one in each direction."""
    x0, y0, x1, y1 = (int(value) for value in SPOT.to_pixels(width, height))
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


def tissue(width: int, height: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(height, width, 3): noise in eosin's colour with one dark violet rectangle at SPOT."""
    noise = np.random.default_rng(seed).integers(-18, 19, (height, width, 1))
    pixels = np.clip(np.array([225, 170, 205]) + noise, 0, 255).astype(np.uint8)
    x0, y0, x1, y1 = spot_px(width, height)
    pixels[y0:y1, x0:x1] = (70, 30, 110)
    return pixels


def held_sideways(path: Path) -> tuple[int, int]:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me a quarter clockwise": the sensor lay on its side
    upright = Image.fromarray(tissue(3024, 4032, 0))
    upright.transpose(Image.Transpose.ROTATE_90).save(path, quality=85, exif=exif)
    with Image.open(path) as stored:
        assert stored.size == (4032, 3024)
    return upright.size


def narrow(path: Path) -> tuple[int, int]:
    Image.fromarray(tissue(300, 2000, 1)).save(path)
    return 300, 2000


def one_line(path: Path) -> tuple[int, int]:
    Image.fromarray(tissue(640, 1, 2)).save(path)
    return 640, 1


def for_print(path: Path) -> tuple[int, int]:
    Image.fromarray(tissue(800, 600, 3)).convert("CMYK").save(path, quality=90)
    return 800, 600


def sixteen_bit(path: Path) -> tuple[int, int]:
    grey = tissue(517, 389, 4)[:, :, 1].astype(np.uint16) * 150 + 900
    Image.fromarray(grey).save(path)
    with Image.open(path) as stored:
        assert stored.mode.startswith("I")
    return 517, 389


def palette_with_holes(path: Path) -> tuple[int, int]:
    image = Image.fromarray(tissue(700, 500, 5)).quantize(64)
    image.info["transparency"] = 0
    image.save(path, transparency=0)
    return 700, 500


def animated(path: Path) -> tuple[int, int]:
    frames = [Image.fromarray(tissue(320, 200, 6)), Image.new("RGB", (320, 200), "green")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return 320, 200


MAKERS: dict[str, Callable[[Path], tuple[int, int]]] = {
    "sideways.jpg": held_sideways, "narrow.png": narrow, "line.png": one_line, "print.jpg": for_print,
    "sixteen.tif": sixteen_bit, "palette.png": palette_with_holes, "animated.gif": animated,
}
TYPES = {".jpg": "jpeg", ".png": "png", ".tif": "tiff", ".gif": "gif"}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, tuple[int, int]]:
    """Each file with its upright size."""
    folder = tmp_path_factory.mktemp("photographs")
    return {folder / name: make(folder / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def said(
    run: Run, checkpoint: Path, photographs: dict[Path, tuple[int, int]], repository: Path
) -> dict[Path, dict[str, Any]]:
    """What the terminal answers about each photograph."""
    script = "".join(f"/image {path}\n/reset\n{QUESTION}\n" for path in photographs)
    command = [sys.executable, "-m", "medllava.serve.cli", "--model-path", str(checkpoint), "--json"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "24"], cwd=repository, input=script, capture_output=True, text=True, timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(photographs, answers, strict=True))


@pytest.fixture(scope="module")
def worker(checkpoint: Path, repository: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "medllava.serve.worker", "--model-path", str(checkpoint), "--port", "0"]
    process = subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().removeprefix("listening on ").strip()
    assert process.stdout.readline().startswith("ready: ")
    yield url
    process.terminate()
    process.wait()


def test_pictures_are_read_upright_and_whole(photographs: dict[Path, tuple[int, int]]) -> None:
    for path, size in photographs.items():
        image = load_image(path)
        assert (image.size, image.mode) == (size, "RGB"), path.name
        grey = np.asarray(image.convert("L"), dtype=float)
        x0, y0, x1, y1 = spot_px(*size)
        inside = grey[y0:y1, x0:x1].mean()
        outside = grey[:, : size[0] // 10].mean()
        assert inside < outside - 60, path.name


def test_the_terminal_answers_about_each(said: dict[Path, dict[str, Any]]) -> None:
    for path, answer in said.items():
        assert answer["usage"]["completion_tokens"] > 0, path.name
        assert answer["usage"]["prompt_tokens"] > 16, path.name  # the picture is part of the prompt
        assert answer["boxes"] == [list(box.as_tuple()) for box in parse_boxes(answer["text"])]


def test_one_question_about_a_region_of_a_photograph_from_a_telephone(
    run: Run, checkpoint: Path, photographs: dict[Path, tuple[int, int]], tmp_path: Path
) -> None:
    path = next(iter(photographs))
    drawn = tmp_path / "drawn.jpg"
    done = run(
        "serve.cli", "--model-path", checkpoint, "--image-file", path, "--prompt", "What is in this region?", "--box",
        "0.2,0.3,0.5,0.7", "--json", "--save-boxes", drawn, "--max-new-tokens", 8,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).keys() == {"text", "boxes", "finish_reason", "usage", "model"}
    assert load_image(drawn).size == photographs[path]


def test_a_box_in_an_answer_is_drawn_where_it_is_in_the_original(
    photographs: dict[Path, tuple[int, int]], tmp_path: Path
) -> None:
    text = "Here: [0.20, 0.30, 0.50, 0.70]"
    for path, size in photographs.items():
        save_boxes(load_image(path), text, tmp_path / "drawn.png")
        red = np.abs(np.asarray(load_image(tmp_path / "drawn.png")).astype(int) - (0xE6, 0x19, 0x4B)).sum(axis=2) == 0
        rows, columns = np.nonzero(red)
        drawn_px = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert drawn_px == pytest.approx(spot_px(*size), abs=1), path.name


def test_the_worker_says_what_the_terminal_says(worker: str, said: dict[Path, dict[str, Any]]) -> None:
    client = openai.OpenAI(base_url=f"{worker}/v1", api_key="none")
    model = client.models.list().data[0].id
    for path, answer in said.items():
        uri = f"data:image/{TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
        reply = client.chat.completions.create(
            model=model, temperature=0, max_tokens=24,
            messages=[{"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": QUESTION},
            ]}],
        )
        assert reply.choices[0].message.content == answer["text"], path.name
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == answer["usage"]["prompt_tokens"]


def test_the_web_chat_shows_sends_and_streams(worker: str, said: dict[Path, dict[str, Any]]) -> None:
    async def ask(path: Path) -> str:
        picture = open_picture(path)
        sent = load_image(picture.uri)
        assert max(sent.size) <= SENT_SIDE
        # The same frame for what is shown, what is sent and the original: fractions hold for all three.
        assert sent.width / picture.image.width == pytest.approx(sent.height / picture.image.height, rel=0.01)
        pieces = [
            piece async for piece in Worker(worker).ask(
                [Turn(role="user", text=QUESTION)], {0: picture.uri}, max_new_tokens=24
            )
        ]
        return "".join(pieces)

    for path, answer in said.items():
        text = asyncio.run(ask(path))
        assert text
        if path.name != "sideways.jpg":  # sent smaller, so its pixels are others
            assert text == answer["text"], path.name
