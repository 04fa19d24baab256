from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medllava.conversation import Turn
from medllava.model.answerer import Answerer
from medllava.model.decoding import Batch, Prepared, Reply

PICTURES = [Image.effect_noise((60 + 15 * number, 80), 60).convert("RGB") for number in range(6)]


@pytest.fixture(scope="module")
def answerer(tiny: Path) -> Answerer:
    answerer = Answerer.load(tiny, device="cpu")
    answerer._ends = []  # a model with random weights would end some answers early
    return answerer


def questions(answerer: Answerer, **options: Any) -> list[Prepared]:
    return [
        answerer.prepare(
            PICTURES[number % 6 : number % 6 + number % 3],
            [Turn(role="user", text="Where is it?" + " Really?" * number)],
            max_new_tokens=3 + 5 * (number % 4), **options,
        )
        for number in range(12)
    ]


def alone(answerer: Answerer, question: Prepared) -> list[int]:
    batch = answerer.batch()
    row = batch.join([question])[0]
    while not row.finished:
        batch.step()
    return row.ids


def join_at_random(batch: Batch, waiting: list[Prepared], dice: random.Random) -> list[Reply]:
    """Rows in the order of the questions, which join one, two or three at a time between steps."""
    rows: list[Reply] = []
    waiting = list(waiting)
    while waiting or batch.rows:
        if waiting and dice.random() < 0.4:
            count = dice.randint(1, 3)
            rows += batch.join(waiting[:count])
            del waiting[:count]
        batch.step()
    return rows


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 7}])
def test_rows_that_join_and_leave_get_the_tokens_they_get_alone(
    answerer: Answerer, seed: int, sampling: dict[str, Any]
) -> None:
    asked = questions(answerer, **sampling)
    rows = join_at_random(answerer.batch(), asked, random.Random(seed))
    assert [row.ids for row in rows] == [alone(answerer, question) for question in asked]
    assert [len(row.ids) for row in rows] == [question.room for question in asked]


def test_a_row_that_is_removed_changes_nothing_for_the_others(answerer: Answerer) -> None:
    asked = questions(answerer)
    batch = answerer.batch()
    rows = batch.join(asked)
    batch.step()
    batch.remove([rows[11], rows[7]])
    while batch.rows:
        batch.step()
    for number, (row, question) in enumerate(zip(rows, asked, strict=True)):
        if number not in (7, 11):
            assert row.ids == alone(answerer, question)
    assert len(rows[11].ids) == 2


def test_the_batch_is_as_narrow_as_its_longest_row(answerer: Answerer) -> None:
    asked = questions(answerer)
    batch = answerer.batch()
    rows = batch.join([asked[1], asked[11]])
    batch.remove([rows[1]])
    assert batch._state is not None
    assert batch._state.mask.tolist() == [[1] * len(asked[1].ids)]
    assert batch._state.cache.layers[0].keys.shape[2] == len(asked[1].ids)


@pytest.mark.parametrize("where", ["join", "step"])
def test_a_pass_that_fails_half_way_leaves_the_others_as_they_were(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    asked = questions(answerer)
    batch = answerer.batch()
    rows = batch.join(asked[1:4])
    batch.step()
    last = answerer._model.model.language_model.layers[-1]

    def full(*args: object, **options: object) -> None:
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(last, "forward", full)
        with pytest.raises(RuntimeError, match="out of memory"):
            batch.step() if where == "step" else batch.join(asked[:1])
    while batch.rows:
        batch.step()
    assert [row.ids for row in rows] == [alone(answerer, question) for question in asked[1:4]]


def test_log_probabilities(answerer: Answerer) -> None:
    question = questions(answerer, top_logprobs=3)[5]
    batch = answerer.batch()
    row = batch.join([question])[0]
    while batch.rows:
        batch.step()
    assert len(row.logprobs) == len(row.ids) == question.room
    for noted in row.logprobs:
        assert len(noted.top) == 3
        assert noted.top[0] == (noted.text, noted.data, noted.logprob)  # greedy: the likeliest
        assert [value for _, _, value in noted.top] == sorted((value for _, _, value in noted.top), reverse=True)
        assert noted.logprob < 0
