"""Samples that share a row: the same losses and gradients as apart, and none sees another."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional

from medllava.conversation import InstructionSample, Turn
from medllava.errors import ConfigError
from medllava.model.pixels import tokens_per_image
from medllava.model.prompt import IGNORE, PromptBuilder
from medllava.model.tiny import TextSizes, tiny_model
from medllava.train import forward
from medllava.train.batch import Example, collate, lay_out, pack
from medllava.train.dataset import Examples, Order, Pictures, micro_batches, useful_share
from medllava.train.forward import APART, VisionLanguageLoss, attend_apart, check_packing, embeddings, hidden_states

WORDS = ["gland", "vessel", "stroma", "keratin", "upper", "lower", "left", "right", "where", "is", "the", "and"]


@pytest.fixture(scope="module")
def loaded() -> Any:
    model, processor = tiny_model([" ".join(WORDS)], text=TextSizes(hidden_size=64, layers=2))
    return model, processor


@pytest.fixture(params=["sdpa", "apart"])
def attention(request: pytest.FixtureRequest, loaded: Any) -> Iterator[str]:
    """PyTorch's attention under a mask over the whole row, and for each sample by itself."""
    model, _ = loaded
    if request.param == "apart":
        attend_apart(model)
        assert model.model.language_model.config._attn_implementation == APART
    yield request.param
    model.model.language_model.config._attn_implementation = "sdpa"


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[InstructionSample]]:
    """Twelve of 20 to 150 tokens: no picture, one, or three of them in two turns."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = random.Random(3)
    made = []
    for number in range(12):
        images = tuple(f"{number}-{count}.png" for count in range((0, 1, 3)[number % 3]))
        for name in images:
            Image.effect_noise((rng.randrange(40, 120), 60), 80).convert("RGB").save(folder / name)
        first = "<image>\n" * min(len(images), 2)
        turns = [Turn(role="user", text=first + say(rng)), Turn(role="assistant", text=say(rng))]
        second = "<image> " if len(images) == 3 else ""
        turns += [Turn(role="user", text=second + say(rng)), Turn(role="assistant", text=say(rng))]
        made.append(InstructionSample(id=f"s{number}", images=images, turns=tuple(turns), kind="other"))
    return folder, made


def say(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randrange(2, 25)))


@pytest.fixture(scope="module")
def examples(loaded: Any, samples: Any) -> Examples:
    _, processor = loaded
    prompts = PromptBuilder(processor.tokenizer, "medllava", tokens_per_image=tokens_per_image(processor))
    return Examples(samples[1], prompts, max_length=512)


def step(loaded: Any, samples: Any, examples: Examples, **layout: Any) -> list[Any]:
    pictures = Pictures(samples[0], loaded[1].image_processor)
    make = micro_batches(
        examples, pictures, flip_seed=None, pad_id=0, image_token_id=loaded[0].config.image_token_id,
        **({"accumulate": 1} | layout),
    )
    return make(0, list(range(len(examples))))


def losses_of_samples(model: Any, batches: list[Any]) -> dict[str, float]:
    """Summed loss of each sample, from the places of its tokens in the rows."""
    found: dict[str, float] = {}
    for batch in batches:
        positions = batch.position_ids
        hidden = hidden_states(model, embeddings(model, batch), positions)
        logits = model.lm_head(hidden.flatten(0, 1)[batch.predict_positions])
        each = functional.cross_entropy(logits, batch.targets, reduction="none")
        if positions is None:
            positions = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
        # Samples stand in a row in the order of ids; the padding after them is never supervised.
        number = (positions == 0).flatten().cumsum(0) - 1
        owners = [int(number[place]) for place in batch.predict_positions]
        starts = list(dict.fromkeys(owners))
        assert len(starts) == len(batch.ids)
        for name, start in zip(batch.ids, starts, strict=True):
            found[name] = float(each[torch.tensor(owners) == start].sum())
    return found


@pytest.mark.usefixtures("attention")
def test_each_samples_loss_is_the_same_packed_and_apart(loaded: Any, samples: Any, examples: Examples) -> None:
    model, _ = loaded
    apart = step(loaded, samples, examples)
    packed = step(loaded, samples, examples, row_length=400)
    assert apart[0].position_ids is None
    assert packed[0].position_ids is not None
    assert packed[0].input_ids.shape == (1, sum(examples.lengths))
    assert packed[0].weight == apart[0].weight
    with torch.no_grad():
        before, after = losses_of_samples(model, apart), losses_of_samples(model, packed)
    assert before.keys() == after.keys() == {f"s{number}" for number in range(12)}
    assert max(abs(before[name] - after[name]) for name in before) < 1e-5 * max(before.values())


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_are_the_same_packed_and_apart(
    loaded: Any, samples: Any, examples: Examples, accumulate: int
) -> None:
    model, _ = loaded
    module = VisionLanguageLoss(model)
    found = []
    for layout in ({}, {"row_length": 300, "accumulate": accumulate}):
        batches = step(loaded, samples, examples, **layout)
        assert len(batches) == (accumulate if layout else 1)
        weight = sum(batch.weight for batch in batches)
        model.zero_grad()
        for batch in batches:
            (module(batch) / weight).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    assert found[0].keys() == found[1].keys()
    assert any("vision_tower" in name for name in found[0])
    worst = max(float((found[0][name] - found[1][name]).abs().max()) for name in found[0])
    assert worst < 1e-4 * max(1.0, max(float(gradient.abs().max()) for gradient in found[0].values()))


@pytest.mark.parametrize("eager", [False, True])
def test_a_changed_sample_changes_no_other(
    loaded: Any, samples: Any, examples: Examples, attention: str, eager: bool
) -> None:
    model, _ = loaded
    if eager and attention == "apart":
        pytest.skip("one or the other")
    if eager:
        model.set_attn_implementation("eager")
    packed = step(loaded, samples, examples, row_length=400)
    with torch.no_grad():
        before = losses_of_samples(model, packed)
        victim = packed[0].ids[0]
        ids = packed[0].input_ids.clone()
        length = examples.lengths[int(victim[1:])]
        image = model.config.image_token_id
        ids[0, :length] = torch.where(ids[0, :length] == image, image, (ids[0, :length] + 7) % 200 + 10)
        pixels = packed[0].pixels.clone()
        pixels[: victim_pictures(examples, victim)] = 0.0
        after = losses_of_samples(model, [replace(packed[0], input_ids=ids, pixels=pixels)])
    model.set_attn_implementation("sdpa")
    assert after[victim] != pytest.approx(before[victim], abs=0.1)
    for name in before.keys() - {victim}:
        assert after[name] == pytest.approx(before[name], abs=1e-5), name


def victim_pictures(examples: Examples, name: str) -> int:
    return len(examples.get(int(name[1:])).images)


def test_the_guard_notices_samples_that_see_one_another(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = loaded
    check_packing(model)
    real = forward.hidden_states
    monkeypatch.setattr(forward, "hidden_states", lambda model, embeds, positions: real(model, embeds, None))
    with pytest.raises(ConfigError, match="see one another.*set packing to false"):
        check_packing(model)


@pytest.mark.usefixtures("attention")
def test_attention_apart_holds_for_rows_with_padding_and_is_stock_elsewhere(loaded: Any) -> None:
    model, _ = loaded
    check_packing(model)
    lengths = ((5, 9), (3, 1, 4))
    rows = [[Example(f"{length}", torch.arange(length) + 20, torch.arange(length) + 20, ()) for length in row]
            for row in lengths]
    batch = collate(rows, pad_id=0, image_token_id=1)
    with torch.no_grad():
        hidden = hidden_states(model, embeddings(model, batch), batch.position_ids)
        alone = [
            hidden_states(model, embeddings(model, collate([[each]], pad_id=0, image_token_id=1)), None)[0]
            for row in rows for each in row
        ]
        ids = torch.tensor([[0, 0, 21, 22], [23, 24, 25, 26]])
        left = [model(input_ids=ids, attention_mask=(ids > 0).long()).logits]
        model.model.language_model.config._attn_implementation = "sdpa"
        left.append(model(input_ids=ids, attention_mask=(ids > 0).long()).logits)
    assert torch.allclose(torch.cat([hidden[0], hidden[1, :8]]), torch.cat(alone), atol=1e-5)
    assert torch.equal(left[0][1], left[1][1])
    assert torch.equal(left[0][0, 2:], left[1][0, 2:])


def test_no_sample_predicts_the_next_ones_first_token() -> None:
    one, other = (Example(name, torch.arange(3) + start, torch.arange(3) + start, ()) for name, start in
                  (("a", 5), ("b", 9)))
    batch = collate([[one, other], [other]], pad_id=0, image_token_id=1)
    assert batch.targets.tolist() == [6, 7, 10, 11, 10, 11]
    assert batch.predict_positions.tolist() == [0, 1, 3, 4, 6, 7]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 1, 2]]
    assert (batch.tokens, batch.ids) == (9, ("a", "b", "b"))


def test_rows_are_full_balanced_and_hold_every_sample_once() -> None:
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randrange(20, 900) for _ in range(rng.randrange(1, 60))]
        rows = pack(lengths, 1000)
        assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
        sums = [sum(lengths[number] for number in row) for row in rows]
        assert max(sums) <= 1000
        assert len(rows) <= 1.23 * sum(lengths) / 1000 + 1
        assert rows == pack(lengths, 1000)
    lengths = [rng.randrange(20, 300) for _ in range(128)]
    sums = [sum(lengths[number] for number in row) for row in pack(lengths, 1024, multiple=8)]
    assert len(sums) % 8 == 0
    assert min(sums) > 0.9 * max(sums)
    assert pack([10, 2000], 1000) in ([[1, 0]], [[1], [0]])


@pytest.mark.parametrize("row_length", [None, 1000])
@pytest.mark.parametrize(("count", "processes", "accumulate"), [(16, 1, 4), (7, 2, 2), (3, 4, 2), (1, 2, 3), (9, 4, 4)])
def test_every_process_gets_as_many_batches_and_rows(
    row_length: int | None, count: int, processes: int, accumulate: int
) -> None:
    rng = random.Random(count)
    lengths = [rng.randrange(20, 900) for _ in range(count)]
    shares = [
        lay_out(lengths, accumulate=accumulate, rank=rank, processes=processes, row_length=row_length)
        for rank in range(processes)
    ]
    assert len({tuple(len(rows) for rows in share) for share in shares}) == 1
    assert 1 <= len(shares[0]) <= accumulate
    assert sorted(place for share in shares for rows in share for row in rows for place in row) == list(range(count))


def test_packing_computes_fewer_useless_tokens() -> None:
    rng = random.Random(1)
    lengths = tuple(min(2048, int(rng.lognormvariate(6.2, 0.5))) for _ in range(2000))
    plain, grouped = Order(2000, 64, seed=0), Order(2000, 64, seed=0, lengths=lengths)
    packed = useful_share(plain, lengths, accumulate=4, row_length=2048)
    assert packed == 1.0
    assert useful_share(plain, lengths, accumulate=4) < 0.6
    # Grouping by length pads as little, but at the price of batches that are not drawn at random.
    assert useful_share(grouped, lengths, accumulate=4) > 0.9


def test_an_empty_row_takes_part_and_adds_nothing(loaded: Any) -> None:
    model, _ = loaded
    module = VisionLanguageLoss(model)
    side = model.config.vision_config.image_size
    batch = collate([[]], pad_id=0, image_token_id=model.config.image_token_id, pixels=torch.zeros(1, 3, side, side))
    assert (batch.weight, batch.tokens, batch.ids) == (0, 0, ())
    assert bool((batch.labels == IGNORE).all())
    model.zero_grad()
    loss = module(batch)
    loss.backward()
    assert float(loss) == 0.0
    for parameter in (model.model.multi_modal_projector.linear_1.weight, model.lm_head.weight):
        assert parameter.grad is not None
        assert not parameter.grad.any()
    model.zero_grad()
