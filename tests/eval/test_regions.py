from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from medllava.eval import __main__ as commands
from medllava.eval.answer import answer_all
from medllava.eval.benchmarks import Benchmark
from medllava.eval.models import Asked, Model, Reply
from medllava.eval.pictures import Pictures
from medllava.eval.records import Question
from medllava.geometry import Box
from medllava.images import load_image
from medllava.jsonl import write_records
from medllava.model.tiny import tiny_checkpoint
from medllava.regions import draw_mark

BOX = Box(x1=0.1, y1=0.2, x2=0.5, y2=0.6)


def question(id: str, text: str, image: str = "a.png") -> Question:
    return Question(id=id, image=image, question=text, kind="open", answer="gland", group=image)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("a.png", "pink"), ("b.png", "white")):
        Image.new("RGB", (120, 90), colour).save(tmp_path / name)
    questions = [
        question("one", "What is in the region [0.10, 0.20, 0.50, 0.60]?"), question("none", "What is this?"),
        question("b", "Describe the region [0.10, 0.20, 0.50, 0.60].", "b.png"),
    ]
    write_records(tmp_path / "questions.jsonl", questions)
    return tmp_path


def test_the_same_questions_in_both_ways(folder: Path, tmp_path: Path) -> None:
    questions = [Question.model_validate_json(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    seen: dict[str, list[Asked]] = {}

    for way in ("text", "mark"):
        def ask(batch: Sequence[Asked], way: str = way) -> list[Reply]:
            seen.setdefault(way, []).extend(batch)
            return [Reply("A gland.", "stop") for _ in batch]

        pictures = Pictures(folder, questions, regions="mark" if way == "mark" else "text")
        benchmark = Benchmark(name="x", conditions=("real", "blank", "mismatched"))
        assert answer_all(questions, benchmark, pictures, Model("m", ask), tmp_path / way) == 0
    texts = {way: sorted({asked.prompt for asked in found}) for way, found in seen.items()}
    assert texts["mark"] == ["Describe the region marked in red.", "What is in the region marked in red?",
                             "What is this?"]
    assert any("[0.10" in text for text in texts["text"])
    for asked in seen["mark"]:
        red = (np.asarray(asked.picture) == (255, 0, 0)).all(2).any()
        assert red == ("marked" in asked.prompt)
    assert not any((np.asarray(asked.picture) == (255, 0, 0)).all(2).any() for asked in seen["text"])


def test_a_marked_picture_is_that_of_training(folder: Path) -> None:
    asked = question("one", "What is in the region [0.10, 0.20, 0.50, 0.60]?")
    shown = Pictures(folder, [asked], regions="mark").show(asked, "real")
    assert shown is not None
    assert ImageChops.difference(shown, draw_mark(load_image(folder / "a.png"), BOX)).getbbox() is None


def test_the_way_is_the_checkpoints_own_unless_told(folder: Path, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    (tmp_path / "bench.yaml").write_text("name: regions\nconditions: [real]\nmax_new_tokens: 3\n")
    command = ["answer", "--benchmark", str(tmp_path / "bench.yaml"), "--questions", str(folder / "questions.jsonl")]
    command += ["--images", str(folder), "--model-path", str(checkpoint), "--device", "cpu"]

    def way(out: str, *more: str) -> str:
        assert commands.main([*command, "--out", str(tmp_path / out), *more]) == 0
        decoding = json.loads((tmp_path / out / "run.json").read_text())["decoding"]
        return str(decoding.get("regions", "text"))

    assert (way("own"), way("told", "--regions", "mark")) == ("text", "mark")
    manifest = json.loads((checkpoint / "medllava.json").read_text())
    (checkpoint / "medllava.json").write_text(json.dumps(manifest | {"regions": ["mark"]}))
    assert (way("marks"), way("text", "--regions", "text")) == ("mark", "text")
