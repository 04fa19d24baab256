from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from medllava.conversation import Turn
from medllava.errors import DataError, PromptTooLong
from medllava.geometry import Box
from medllava.images import draw_heat
from medllava.model.answerer import Answerer
from medllava.model.decoding import Prepared
from medllava.model.looking import LookingBatch, LookingQuestion, covered, coverings
from medllava.model.prompt import IGNORE
from medllava.model.tiny import tiny_checkpoint

QUESTION = [Turn(role="user", text="<image>\nWhere is the gland?")]


@pytest.fixture(scope="module")
def answerer(tmp_path_factory: pytest.TempPathFactory) -> Answerer:
    return Answerer.load(tiny_checkpoint(tmp_path_factory.mktemp("looking") / "tiny"), device="cpu")


def spotted(size: tuple[int, int], box: Box) -> Image.Image:
    image = Image.new("RGB", size, (230, 190, 210))
    image.paste((70, 20, 110), tuple(round(value) for value in box.to_pixels(*size)))
    return image


@pytest.mark.parametrize("size", [(210, 210), (300, 120), (90, 200), (1400, 700)])
@pytest.mark.parametrize("fill", ["mean", "blur"])
def test_the_peak_is_where_the_answer_came_from(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], fill: str
) -> None:
    """The likelihood is that of a model that looks at the dark spot and at nothing else."""
    box = Box(x1=4 / 7, y1=2 / 7, x2=5 / 7, y2=3 / 7)

    def darkness(self: Any, question: LookingQuestion, pictures: Sequence[Image.Image]) -> list[float]:
        return [float((np.asarray(picture)[..., 1] < 60).sum()) for picture in pictures]

    monkeypatch.setattr("medllava.model.looking.Looker.likelihoods", darkness)
    looked = answerer.where_did_it_look("Where?", spotted(size, box), answer="There.", fill=fill, attention=False)
    assert looked.peak().iou(box) > 0.99
    assert looked.attention is None and len(looked.drops) == 7 and {len(row) for row in looked.drops} == {7}
    assert looked.log_likelihood > looked.blank == 0
    # What is nowhere near the spot does nothing.
    assert looked.drops[6][0] == pytest.approx(0, abs=1e-6)
    assert looked.drops[2][4] == max(max(row) for row in looked.drops) > 0


def test_likelihoods_together_are_those_alone_and_those_of_the_tokens_it_gives(answerer: Answerer) -> None:
    image = spotted((200, 140), Box(x1=0.1, y1=0.1, x2=0.4, y2=0.5))
    said = answerer.answer([image], QUESTION, max_new_tokens=6)
    looker = answerer.looker
    question = looker.prepare([image], QUESTION, "In the upper left.")
    others = [question.picture, covered(question.picture, "mean"), question.picture.rotate(180)]
    together = looker.likelihoods(question, others)
    alone = [value for picture in others for value in looker.likelihoods(question, [picture])]
    assert together == pytest.approx(alone, abs=1e-3)
    assert len({round(value, 3) for value in alone}) == 3
    # Token by token, from the model's own logits.
    ids, labels = torch.tensor(question.ids), torch.tensor(question.labels)
    with torch.inference_mode():
        logits = answerer._model(input_ids=ids[None], pixel_values=answerer.pixels([image])).logits[0].log_softmax(-1)
    told = (labels != IGNORE).nonzero()[:, 0]
    assert alone[0] == pytest.approx(float(logits[told - 1, ids[told]].sum()), abs=0.2)  # resized twice
    assert said.prompt_tokens == int(told[0])


def test_the_same_each_time_and_the_same_through_the_engines_steps(answerer: Answerer) -> None:
    image = spotted((120, 160), Box(x1=0.5, y1=0.5, x2=0.9, y2=0.9))
    question = answerer.looker.prepare([image], QUESTION, "A gland.", cells=4)
    first, second = answerer.looker.look(question), answerer.looker.look(question)
    assert first == second
    batch = answerer.looker.batch()
    other = answerer.looker.prepare([image], QUESTION, "No.", cells=3)
    rows = batch.join([question, other])
    while batch.rows:
        batch.step()
    assert rows[0].result() == first and rows[1].result().answer == "No."
    assert answerer.answer([image], QUESTION, max_new_tokens=4) == answerer.answer([image], QUESTION, max_new_tokens=4)


def test_attention_is_a_share_of_the_picture(answerer: Answerer) -> None:
    image = spotted((300, 100), Box(x1=0.1, y1=0.1, x2=0.3, y2=0.9))
    looked = answerer.where_did_it_look("Where?", image, answer="There.", cells=5)
    assert looked.attention is not None
    assert sum(map(sum, looked.attention)) == pytest.approx(1, abs=1e-3)
    assert all(value >= 0 for row in looked.attention for value in row)
    assert answerer._model.config.text_config._attn_implementation != "eager"


def test_of_several_pictures_one_is_covered(answerer: Answerer) -> None:
    images = [spotted((96, 96), Box(x1=x, y1=0.2, x2=x + 0.3, y2=0.6)) for x in (0.1, 0.3, 0.5)]
    turns = [Turn(role="user", text="<image><image><image>\nWhich is odd?")]
    question = answerer.looker.prepare(images, turns, "The last.", picture=1)
    assert (len(question.before), len(question.after)) == (1, 1)
    assert ImageChops.difference(question.picture, images[1]).getbbox() is None
    assert answerer.looker.look(question).attention is not None


def test_out_of_memory_halves_the_pass(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def small(self: Any, question: LookingQuestion, pictures: Sequence[Image.Image]) -> list[float]:
        if len(pictures) > 3:
            raise RuntimeError("CUDA out of memory")
        counts.append(len(pictures))
        return [0.0] * len(pictures)

    monkeypatch.setattr("medllava.model.looking.Looker.likelihoods", small)
    looked = answerer.where_did_it_look("Where?", Image.new("RGB", (60, 60)), answer="There.", attention=False)
    assert max(counts) == 2 and sum(counts) == 2 + len(coverings(7)) and looked.drops[0][0] == 0


@pytest.mark.parametrize(
    ("images", "answer", "options", "why"),
    [
        (1, " ", {}, "empty answer"), (0, "x", {}, "no picture"), (1, "x", {"picture": 1}, "picture 1"),
        (1, "x", {"cells": 1}, "2 to 16"), (1, "x", {"cells": 99}, "2 to 16"),
    ],
)
def test_what_cannot_be_looked_into(
    answerer: Answerer, images: int, answer: str, options: dict[str, Any], why: str
) -> None:
    turns = QUESTION if images else [Turn(role="user", text="Where?")]
    with pytest.raises(DataError, match=why):
        answerer.looker.prepare([Image.new("RGB", (50, 50))] * images, turns, answer, **options)


def test_too_long_an_answer(answerer: Answerer) -> None:
    with pytest.raises(PromptTooLong, match="2048"):
        answerer.looker.prepare([Image.new("RGB", (50, 50))], QUESTION, "gland " * 3000)


@pytest.mark.parametrize("said", ["x</s>y", "<|user|>Hi<|assistant|>", "An <image> here"])
def test_special_names_in_question_and_answer_stay_text(answerer: Answerer, said: str) -> None:
    from medllava.conversation import as_text

    turns = [Turn(role="user", text="<image>\n" + as_text(said))]
    question = answerer.looker.prepare([Image.new("RGB", (50, 50))], turns, as_text(said))
    asked: Prepared = answerer.prepare([Image.new("RGB", (50, 50))], turns)
    assert question.ids[: len(asked.ids)] == asked.ids
    assert all(label == IGNORE for label in question.labels[: len(asked.ids)])
    assert all(label != IGNORE for label in question.labels[len(asked.ids) :])
    special = set(answerer._tokenizer.all_special_ids)
    assert [token for token in question.ids[len(asked.ids) :] if token in special] == [question.ids[-1]]


def test_a_batch_lets_a_question_go(answerer: Answerer) -> None:
    batch = LookingBatch(answerer.looker)
    rows = batch.join([answerer.looker.prepare([Image.new("RGB", (50, 50))], QUESTION, "x")])
    batch.step()
    batch.remove(rows)
    assert batch.rows == []


def test_a_model_of_single_exchanges_is_shown_the_last_questions_picture(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answerer, "manifest", answerer.manifest.model_copy(update={"single_exchange": True}))
    a, b = Image.new("RGB", (50, 50), "red"), Image.new("RGB", (50, 50), "blue")
    first = [Turn(role="user", text="<image>\nWhat?"), Turn(role="assistant", text="This.")]
    new, follow = Turn(role="user", text="<image>\nAnd here?"), Turn(role="user", text="Sure?")
    assert answerer.shown([a, b], [*first, new])[0] == [b]
    assert answerer.shown([a], [*first, follow])[0] == [a]
    assert answerer.shown([a, b], [*first, new, first[1], follow])[0] == [b]
    assert [turn.text for turn in answerer.shown([a, b], [*first, new])[1]] == ["And here?"]


def test_the_heat_map() -> None:
    image = Image.new("RGB", (210, 140), "white")
    grid = [[0.0] * 7 for _ in range(7)]
    grid[1][5] = 2.0
    drawn = draw_heat(image, grid, title="Where is the gland? In the upper right.")
    assert drawn.width >= 210 and drawn.height > 140
    red, _green, blue = drawn.getpixel((5 * 30 + 15, 20 + 10))
    assert red > 200 and blue < 140
    assert drawn.getpixel((5, 135)) == (255, 255, 255)
    nothing = draw_heat(image, [[-1.0, 0.0], [0.0, -2.0]])
    assert ImageChops.difference(nothing.crop((0, 0, 210, 140)), image).getbbox() is None
