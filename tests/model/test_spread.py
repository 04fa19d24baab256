"""A model over several cards, as far as one machine without a card can show it: where its parts would go, and that
answers stay the same behind the hooks that move what passes between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from PIL import Image

from medllava.conversation import Turn
from medllava.errors import CheckpointError
from medllava.model import checkpoint
from medllava.model.answerer import Answerer

GIB = 1 << 30
LAYER = "LlamaDecoderLayer", "CLIPEncoderLayer"


def places(model: Any, cards: dict[int | str, int]) -> dict[str, int | str]:
    """What ``device_map="auto"`` comes to on cards of so many bytes."""
    memory = get_balanced_memory(model, max_memory=cards, no_split_module_classes=list(LAYER))
    found: dict[str, int | str] = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=list(LAYER))
    return found


def test_on_two_cards_pictures_and_words_are_read_on_the_first_and_no_layer_is_split(
    seven_billion: Callable[[], Any],
) -> None:
    found = places(seven_billion().to(torch.bfloat16), {0: 12 * GIB, 1: 12 * GIB})
    checkpoint.check_spread("big", found)
    assert set(found.values()) == {0, 1}
    first = [name for name, place in found.items() if place == 0]
    assert any("vision_tower" in name for name in first)
    assert any("multi_modal_projector" in name for name in first)
    assert any("embed_tokens" in name for name in first)
    assert found["lm_head"] == 1
    layers = [name.removeprefix("model.language_model.layers.") for name in found if ".language_model.layers." in name]
    assert sorted(layers, key=int) == [str(number) for number in range(32)]


def test_what_does_not_fit_on_the_cards_is_refused(seven_billion: Callable[[], Any]) -> None:
    found = places(seven_billion().to(torch.bfloat16), {0: 5 * GIB, 1: 5 * GIB, "cpu": 64 * GIB})
    with pytest.raises(CheckpointError, match=r"big: does not fit on the \d+ cards \(no room for .* --load-4bit"):
        checkpoint.check_spread("big", found)


@pytest.mark.parametrize("kind", ["tiny", "projector", "lora"])
def test_answers_are_the_same_when_every_layer_has_a_place_of_its_own(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder: Path = request.getfixturevalue(kind)
    picture = Image.effect_noise((60, 90), 80).convert("RGB")
    questions = [
        ([picture], [Turn(role="user", text="Where is the gland?")]),
        ([], [Turn(role="user", text="How many findings are there in this image?")]),
        ([picture], [Turn(role="user", text="What?")]),
    ]

    def told() -> tuple[list[str], float]:
        answerer = Answerer(checkpoint.load(folder, device="auto"), "x")
        texts = [reply.text for reply in answerer.answer_batch(questions, max_new_tokens=12)]
        looked = answerer.looker.look(answerer.looker.prepare(*questions[0], "There.", attention=True))
        assert looked.attention is not None
        return texts, looked.log_likelihood

    wanted = told()
    asked: list[bool] = []
    load_full = checkpoint._load_full

    def spread(*given: Any, **options: Any) -> Any:
        """As a load over two cards, with both of them the CPU."""
        asked.append(options["spread"])
        model = load_full(*given, **options | {"spread": False})
        layers = [f"model.language_model.layers.{number}" for number in range(len(model.model.language_model.layers))]
        rest = ["model.vision_tower", "model.multi_modal_projector", "model.language_model.embed_tokens",
                "model.language_model.norm", "model.language_model.rotary_emb", "lm_head"]
        return dispatch_model(model, dict.fromkeys([*rest, *layers], "cpu"), main_device="cpu", force_hooks=True)

    monkeypatch.setattr(checkpoint, "_load_full", spread)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    again = told()
    assert asked == [True]
    assert again[0] == wanted[0]
    assert again[1] == pytest.approx(wanted[1], abs=1e-5)
