"""One picture and one question reach the model as the same tokens and the same pixels, whichever door they come by."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from medllava.conversation import InstructionSample, Turn
from medllava.eval.__main__ import main as evaluation
from medllava.images import to_data_uri
from medllava.jsonl import write_json
from medllava.model.answerer import Answerer
from medllava.model.checkpoint import load
from medllava.model.prompt import IGNORE, PromptBuilder
from medllava.model.tiny import tiny_checkpoint
from medllava.serve import cli
from medllava.serve.app import create_app
from medllava.train.dataset import Examples, Pictures

QUESTION = "Where is the gland?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Higher than wide, so that padding shows, and larger than the model's input, so that reducing does."""
    path = tmp_path_factory.mktemp("pictures") / "tissue.png"
    noise = np.random.default_rng(5).integers(0, 256, (403, 250, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What models are given."""
    questions: list[Any] = []
    prepare = Answerer.prepare

    def note(self: Answerer, *arguments: Any, **options: Any) -> Any:
        questions.append(prepare(self, *arguments, **options))
        return questions[-1]

    monkeypatch.setattr(Answerer, "prepare", note)
    yield questions


def by_training(checkpoint: Path, picture: Path) -> tuple[list[int], torch.Tensor]:
    """The tokens before the answer, and the pixels, of a training sample."""
    loaded = load(checkpoint)
    reader = Answerer(loaded, "tiny")
    prompts = PromptBuilder(
        loaded.tokenizer, loaded.manifest.chat_format, tokens_per_image=reader.num_image_tokens,
        image_token=loaded.processor.image_token, template=loaded.processor.chat_template,
    )
    turns = (Turn(role="user", text=f"<image>\n{QUESTION}"), Turn(role="assistant", text="A gland."))
    sample = InstructionSample(id="one", images=(picture.name,), turns=turns)
    example = Examples([sample], prompts, max_length=512).get(0)
    before = int((example.labels != IGNORE).nonzero()[0])
    return example.input_ids[:before].tolist(), Pictures(picture.parent, loaded.image_processor).pixels(picture.name)


def test_training_terminal_api_worker_and_evaluation_agree(
    checkpoint: Path, picture: Path, asked: list[Any], tmp_path: Path
) -> None:
    ids, pixels = by_training(checkpoint, picture)
    model = ["--model-path", str(checkpoint)]

    command = [*model, "--image-file", str(picture), "--prompt", QUESTION, "--max-new-tokens", "1"]
    assert cli.main(command) == 0
    Answerer.load(checkpoint).ask(QUESTION, picture, max_new_tokens=1)
    with TestClient(create_app(lambda: [Answerer.load(checkpoint)])) as client:
        while client.get("/health").status_code != 200:
            pass
        content = [
            {"type": "text", "text": QUESTION},
            {"type": "image_url", "image_url": {"url": to_data_uri(Image.open(picture))}},
        ]
        body = {"model": checkpoint.name, "messages": [{"role": "user", "content": content}], "max_tokens": 1}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
    rows = [{"question": QUESTION, "answer": "A gland.", "image": picture.name}]
    write_json(tmp_path / "questions.json", rows)
    command = ["--questions", str(tmp_path / "questions.json"), "--images", str(picture.parent)]
    assert evaluation(["answer", "--benchmark", "own", *command, *model, "--out", str(tmp_path / "out")]) == 0

    # Terminal, Python, worker, and the evaluation, which first asks with the picture and then without.
    assert len(asked) > 4
    for door in asked[:4]:
        assert door.ids == ids
        assert torch.equal(door.pixels[0].float(), pixels.float())


def test_a_checkpoint_is_what_its_files_say_whatever_its_folder_is_called(
    checkpoint: Path, picture: Path, tmp_path: Path
) -> None:
    """LLaVA's own loader chooses by "llava", "lora" and "mpt" in the folder's name."""
    said = Answerer.load(checkpoint).ask(QUESTION, picture, max_new_tokens=12).text
    for name in ("01", "llava-lora-mpt"):
        shutil.copytree(checkpoint, tmp_path / name)
        assert Answerer.load(tmp_path / name).ask(QUESTION, picture, max_new_tokens=12).text == said
