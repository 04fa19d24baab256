from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from medllava.conversation import Turn
from medllava.errors import CheckpointError
from medllava.model.answerer import Answerer

PICTURE = Image.effect_noise((90, 60), 70).convert("RGB")
QUESTION = [Turn(role="user", text="Where is it?")]


def test_each_adapter_answers_as_its_merged_checkpoint(tiny: Path, lora: Path) -> None:
    base, first, second = Answerer.load_adapters(tiny, {"first": lora, "second": lora}, device="cpu")
    assert [base.model_id, first.model_id, second.model_id] == ["tiny", "first", "second"]
    alone = {
        path: Answerer.load(path, device="cpu").answer([PICTURE], QUESTION, max_new_tokens=12) for path in (tiny, lora)
    }
    assert alone[tiny] != alone[lora]
    for _ in range(2):
        assert base.answer([PICTURE], QUESTION, max_new_tokens=12) == alone[tiny]
        assert first.answer([PICTURE], QUESTION, max_new_tokens=12) == alone[lora]
        assert second.answer([PICTURE], QUESTION, max_new_tokens=12) == alone[lora]


def test_batches_of_base_and_adapter_take_turns(tiny: Path, lora: Path) -> None:
    answerers = Answerer.load_adapters(tiny, {"first": lora}, device="cpu")
    batches = [answerer.batch() for answerer in answerers]
    rows = [
        batch.join([answerer.prepare([PICTURE], QUESTION, max_new_tokens=12)])[0]
        for answerer, batch in zip(answerers, batches, strict=True)
    ]
    while any(batch.rows for batch in batches):
        for batch in batches:
            batch.step()
    wanted = [Answerer.load(path, device="cpu").answer([PICTURE], QUESTION, max_new_tokens=12) for path in (tiny, lora)]
    assert [row.completion() for row in rows] == wanted


def test_what_is_no_adapter_of_this_base(tiny: Path, projector: Path, lora: Path) -> None:
    with pytest.raises(CheckpointError, match="projector checkpoint, no LoRA"):
        Answerer.load_adapters(tiny, {"x": projector}, device="cpu")
