from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from medllava.conversation import Turn
from medllava.errors import DataError
from medllava.model.answerer import Answerer
from medllava.model.decoding import Reply

PICTURES = [
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (90, 50 + 25 * number, 3), dtype=np.uint8))
    for number in range(8)
]


def ask(text: str) -> list[Turn]:
    return [Turn(role="user", text=text)]


@pytest.fixture(scope="module")
def answerer(tiny: Path) -> Answerer:
    return Answerer.load(tiny, device="cpu")


def test_a_batch_answers_as_one_by_one(answerer: Answerer) -> None:
    questions: list[tuple[list[Image.Image], list[Turn]]] = [
        ([picture], ask("Where is it?" + " Really?" * number)) for number, picture in enumerate(PICTURES)
    ]
    questions[2] = ([], ask("No picture at all."))
    questions[5] = (PICTURES[:2], ask("Compare <image> with <image>."))
    together = answerer.answer_batch(questions, max_new_tokens=20)
    assert together == [answerer.answer(*question, max_new_tokens=20) for question in questions]
    assert len({completion.text for completion in together}) > 4
    assert answerer.answer_batch([]) == []


def test_a_batch_of_long_and_short_histories_gives_the_same_tokens(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[int]] = []
    real = Reply.add

    def noted(self: Any, token: int, *, is_end: bool) -> None:
        real(self, token, is_end=is_end)
        if len(self.ids) == 32:
            given.append(self.ids)

    monkeypatch.setattr(Reply, "add", noted)
    monkeypatch.setattr(answerer, "_ends", [])
    said = Turn(role="assistant", text="In the upper left.")
    questions: list[tuple[list[Image.Image], list[Turn]]] = []
    for number in range(8):
        history = [*ask("<image>\nWhere?" if number % 3 else "Well?"), said] * (number % 4)
        pictures = PICTURES[: (number % 4) * bool(number % 3)]
        questions.append((pictures, [*history, *ask("And its box?" + " Please." * (number % 5))]))
    answerer.answer_batch(questions, max_new_tokens=32)
    together, given[:] = list(given), []
    for question in questions:
        answerer.answer(*question, max_new_tokens=32)
    assert sorted(len(pictures) for pictures, _ in questions) == [0, 0, 0, 0, 1, 1, 2, 3]
    assert together == given


def test_prompt_tokens_count_the_picture(answerer: Answerer) -> None:
    with_picture = answerer.answer(PICTURES[:1], ask("Where?"), max_new_tokens=1)
    without = answerer.answer([], ask("Where?"), max_new_tokens=1)
    assert answerer.num_image_tokens == 16
    assert with_picture.prompt_tokens == without.prompt_tokens + 16 + 1  # and a line break
    assert (without.completion_tokens, without.finish_reason) == (1, "length")


def test_the_stream_is_the_answer(answerer: Answerer) -> None:
    for picture in PICTURES[:4]:
        pieces = list(answerer.stream([picture], ask("Describe."), max_new_tokens=40))
        assert "".join(pieces) == answerer.answer([picture], ask("Describe."), max_new_tokens=40).text
        assert len(pieces) > 1


def test_closing_the_stream_ends_the_generation(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    forward = answerer._model.forward

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(answerer._model, "forward", counted)
    stream = cast(Generator[str, None, None], answerer.stream(PICTURES[:1], ask("Describe."), max_new_tokens=200))
    next(stream)
    before = calls
    stream.close()
    assert calls == before < 100


def test_stop_texts_end_the_answer_and_are_left_out(answerer: Answerer) -> None:
    whole = answerer.answer(PICTURES[:1], ask("Describe."), max_new_tokens=40).text
    stop = whole[6:9]
    cut = answerer.answer(PICTURES[:1], ask("Describe."), max_new_tokens=40, stop=[stop])
    assert cut.text == whole[: whole.index(stop)].rstrip()
    assert cut.finish_reason == "stop"
    pieces = list(answerer.stream(PICTURES[:1], ask("Describe."), max_new_tokens=40, stop=[stop]))
    assert "".join(pieces) == cut.text


def test_an_end_token_stops(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    first = answerer.answer(PICTURES[:1], ask("Describe."), max_new_tokens=3)
    assert first.finish_reason == "length"
    ids = answerer._tokenizer.encode(first.text, add_special_tokens=False)
    monkeypatch.setattr(answerer, "_ends", list(range(len(answerer._tokenizer))))
    stopped = answerer.answer(PICTURES[:1], ask("Describe."), max_new_tokens=3)
    assert (stopped.text, stopped.finish_reason, stopped.completion_tokens) == ("", "stop", 1)
    assert ids


def test_sampling_repeats_with_a_seed(answerer: Answerer) -> None:
    def sample(seed: int, top_p: float = 1.0) -> str:
        return answerer.answer(
            PICTURES[:1], ask("Describe."), max_new_tokens=20, temperature=1.0, top_p=top_p, seed=seed
        ).text

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    # The smallest set of tokens is the likeliest one: greedy.
    assert sample(1, top_p=1e-9) == answerer.answer(PICTURES[:1], ask("Describe."), max_new_tokens=20).text


def test_pictures_and_tags_must_agree(answerer: Answerer) -> None:
    with pytest.raises(DataError, match="1 <image> tags for 2 images"):
        answerer.answer(PICTURES[:2], ask("<image> What?"))
    with pytest.raises(DataError, match="1 <image> tags for 0 images"):
        list(answerer.stream([], ask("<image> What?")))


def test_a_prompt_beyond_the_context_is_told(answerer: Answerer) -> None:
    with pytest.raises(DataError, match="context"):
        answerer.answer([], ask("gland " * 3000))


def test_history_is_part_of_the_prompt(answerer: Answerer) -> None:
    turns = [*ask("Where?"), Turn(role="assistant", text="In the upper left."), *ask("And its box?")]
    assert answerer.answer(PICTURES[:1], turns, max_new_tokens=8) != answerer.answer(
        PICTURES[:1], turns[2:], max_new_tokens=8
    )


def test_a_model_of_single_exchanges_is_asked_without_the_history(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = Image.new("RGB", (40, 30), "pink")
    question = Turn(role="user", text="Where is the gland?")
    history = [Turn(role="user", text="<image>\nHow many findings?"), Turn(role="assistant", text="2 findings.")]
    alone = answerer.answer([picture], [question], max_new_tokens=4)
    monkeypatch.setattr(answerer, "manifest", answerer.manifest.model_copy(update={"single_exchange": True}))
    assert answerer.answer([picture], [*history, question], max_new_tokens=4) == alone


def test_no_gradients_are_kept(answerer: Answerer) -> None:
    answerer.answer(PICTURES[:1], ask("Where?"), max_new_tokens=2)
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in answerer._model.parameters())


def test_three_lines_of_python(answerer: Answerer, tmp_path: Path) -> None:
    PICTURES[0].save(tmp_path / "tissue.png")
    asked = answerer.ask("Where is the <image> gland?", tmp_path / "tissue.png", PICTURES[1], max_new_tokens=4)
    assert asked.completion_tokens
    assert asked.prompt_tokens > 2 * answerer.num_image_tokens
