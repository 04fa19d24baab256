from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import pytest

from medllava.errors import DataError
from medllava.train.dataset import Order, Steps, check_images, kind_weights, read_samples


def test_every_sample_once_in_an_epoch_and_another_order_in_the_next() -> None:
    order = Order(103, 10, seed=1)
    first, second = order.epoch(0), order.epoch(1)
    assert sorted(index for batch in first for index in batch) == list(range(103))
    assert first != second
    assert first == Order(103, 10, seed=1).epoch(0) != Order(103, 10, seed=2).epoch(0)
    assert order.batches_per_epoch() == len(first) == 11


def test_grouping_by_length_wastes_less_padding() -> None:
    lengths = tuple((7 * number) % 97 + 10 for number in range(400))

    def padding(order: Order) -> int:
        return sum(max(lengths[i] for i in batch) - lengths[i] for batch in order.epoch(0) for i in batch)

    grouped = Order(400, 8, seed=0, lengths=lengths)
    assert padding(grouped) < 0.2 * padding(Order(400, 8, seed=0))
    assert sorted(index for batch in grouped.epoch(3) for index in batch) == list(range(400))


def test_weights_repeat_and_leave_out() -> None:
    order = Order(30, 4, seed=0, weights=(2.0,) * 10 + (0.5,) * 10 + (0.0,) * 10)
    counts: collections.Counter[int] = collections.Counter()
    for epoch in range(200):
        counts.update(index for batch in order.epoch(epoch) for index in batch)
    assert all(counts[index] == 400 for index in range(10))
    assert all(60 < counts[index] < 140 for index in range(10, 20))
    assert all(counts[index] == 0 for index in range(20, 30))


def test_any_step_can_be_asked_for_alone() -> None:
    def make(epoch: int, indices: list[int]) -> Any:
        return epoch, tuple(indices)

    order = Order(23, 5, seed=0, weights=(1.3,) * 23)
    in_order = [Steps(order, 40, make)[step] for step in range(40)]
    steps = Steps(order, 40, make)
    assert [steps[step] for step in reversed(range(40))] == in_order[::-1]
    assert [epoch for epoch, _ in in_order] == sorted(epoch for epoch, _ in in_order)
    assert in_order[0][0] == 0
    assert in_order[-1][0] > 4


def test_faults_name_the_row(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    good = {"id": "a", "kind": "caption", "image": "a.png", "conversations": [
        {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A gland."}]}
    path.write_text(json.dumps([good, {"id": "b", "conversations": []}]))
    with pytest.raises(DataError, match=r"data.json: row 1: no 'conversations'"):
        read_samples(path)
    path.write_text(json.dumps([good]))
    with pytest.raises(DataError, match="no sample of kind vqa; the file has: caption"):
        read_samples(path, ["vqa"])
    samples = read_samples(path)
    with pytest.raises(DataError, match=r"a.png: no such image file \(1 of 1 images are missing\)"):
        check_images(samples, tmp_path)
    assert kind_weights(samples, {"caption": 3.0}) == (3.0,)
    path.write_text("{}")
    with pytest.raises(DataError, match="expected a list"):
        read_samples(path)
