from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from medllava.geometry import QUADRANTS, Box, format_box
from medllava.train.__main__ import main

RECIPES = Path(__file__).parents[2] / "train" / "recipes"
COLOURS = {"gland": "#802080", "vessel": "#c01010", "adipose": "#fdfdfd", "necrosis": "#404040"}
SMALL = [
    "vision.hidden_size=32", "vision.intermediate_size=64", "vision.heads=2", "vision.feature_layer=-2",
    "text.hidden_size=32", "text.intermediate_size=64", "tokenizer.vocab_size=330", "contrastive.optim.steps=3",
    "contrastive.optim.batch_size=8", "language.optim.steps=3", "language.optim.batch_size=8",
]


@dataclass(frozen=True)
class Data:
    """40 pictures with a spot each: captions, questions and boxed phrases."""

    file: Path
    images: Path
    captions: Path

    @property
    def arguments(self) -> list[str]:
        return ["--data", str(self.file), "--images", str(self.images)]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    rows, captions = [], []
    for number in range(40):
        kind, quadrant = rng.choice(list(COLOURS)), rng.choice(QUADRANTS)
        x, y = 0.25 + 0.5 * ("right" in quadrant), 0.25 + 0.5 * ("lower" in quadrant)
        box = Box(x1=x - 0.15, y1=y - 0.15, x2=x + 0.15, y2=y + 0.15)
        image = Image.new("RGB", (96, 96) if number % 4 else (120, 80), "#e8b0d8")
        ImageDraw.Draw(image).ellipse(box.to_pixels(*image.size), fill=COLOURS[kind])
        name = f"{number}.png"
        image.save(folder / name)
        rows.append(row(f"c{number}", name, "caption", ["<image>", f"{quadrant} {kind}"]))
        turns = [f"<image>\nWhere is the {kind}?", f"In the {quadrant}."]
        turns += [f"Give the box of the {kind}.", format_box(box)]
        if number % 3:
            turns += [f"What is in the region {format_box(box)}?", f"A {kind}."]
        rows.append(row(f"q{number}", name, "grounding", turns))
        captions.append({"id": str(number), "image": name, "phrases": [
            {"text": f"a {kind}", "box": list(box.as_tuple())}, {"text": "so", "box": None},
        ]})
    rows.append(row("t0", None, "other", ["What is a gland?", "A gland makes a secretion."]))
    (folder / "llava.json").write_text(json.dumps(rows))
    (folder / "captions.jsonl").write_text("".join(json.dumps(caption) + "\n" for caption in captions))
    return Data(folder / "llava.json", folder, folder / "captions.jsonl")


def row(name: str, image: str | None, kind: str, turns: list[str]) -> dict[str, object]:
    sides = ("human", "gpt")
    messages = [{"from": sides[number % 2], "value": text} for number, text in enumerate(turns)]
    return {"id": name, "kind": kind, "conversations": messages} | ({"image": image} if image else {})


@pytest.fixture(scope="session")
def stage0(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "stage0"
    arguments = ["--config", str(RECIPES / "demo_stage0.yaml"), *data.arguments, "--captions", str(data.captions)]
    assert main([*arguments, "--out", str(out), *SMALL]) == 0
    return out


@pytest.fixture(scope="session")
def clip(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of few random weights, as a stock folder."""
    import torch
    from transformers import CLIPImageProcessor

    from medllava.model import tiny

    folder = tmp_path_factory.mktemp("encoders") / "clip"
    texts = [turn["value"] for row in json.loads(data.file.read_text()) for turn in row["conversations"]]
    tokenizer = tiny.build_tokenizer(texts, tiny.TokenizerSizes(vocab_size=330))
    torch.manual_seed(0)
    vision = tiny.VisionSizes(hidden_size=32, intermediate_size=64, heads=2, layers=2, image_size=48)
    tiny.build_clip(vision, tokenizer, projection_dim=16, text_layers=1, text_positions=24).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=48).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
