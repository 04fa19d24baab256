"""Samples of one picture that share its tokens in a row: the same losses and gradients as apart, in an order that
visits each sample once."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional

from medllava.conversation import InstructionSample, Turn
from medllava.errors import ConfigError
from medllava.model.pixels import tokens_per_image
from medllava.model.prompt import PromptBuilder
from medllava.model.tiny import TextSizes, tiny_model
from medllava.train import forward
from medllava.train.batch import Example, collate, pictures_within, share
from medllava.train.config import TuneRecipe
from medllava.train.dataset import Examples, Order, Pictures, computed_share, first_pictures, micro_batches
from medllava.train.features import FeatureStore
from medllava.train.forward import (
    APART,
    VisionLanguageLoss,
    attend_apart,
    check_packing,
    embeddings,
    hidden_states,
    vision_features,
)
from medllava.train.stages import select

SAMPLES = [
    # pictures, then what is asked and answered in turn
    ("a", "<image>\nwhere is the gland", "upper left", "and the vessel", "lower right and the keratin is upper"),
    ("a", "<image>\nwhere is the gland", "upper left", "and the stroma", "right"),
    ("a", "<image>\nwhere is the vessel", "the vessel is lower right"),
    ("b", "<image>\nwhere is the vessel", "left"),
    ("", "where is keratin", "in the gland"),
    ("a", "where is the gland <image>", "upper"),
    ("ab", "<image>\n<image>\nwhere is the gland", "left and right"),
    ("ac", "<image>\n<image>\nwhere is the gland", "left and lower"),
    ("b", "<image>\nthe keratin is where", "the stroma"),
    ("a", "<image>\nwhere is the gland", "upper left", "and the vessel", "lower right and the keratin is upper"),
    ("c", "<image>\nwhere", "left"),
]


@pytest.fixture(scope="module")
def loaded() -> Any:
    words = " ".join(text for sample in SAMPLES for text in sample[1:])
    model, processor = tiny_model([words], text=TextSizes(hidden_size=64, layers=2))
    attend_apart(model)
    assert model.model.language_model.config._attn_implementation == APART
    return model, processor


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[InstructionSample]]:
    folder = tmp_path_factory.mktemp("pictures")
    for name in "abc":
        Image.effect_noise((60, 50), 80).convert("RGB").save(folder / f"{name}.png")
    made = []
    for number, (pictures, *said) in enumerate(SAMPLES):
        turns = [Turn(role="assistant" if place % 2 else "user", text=text) for place, text in enumerate(said)]
        images = tuple(f"{name}.png" for name in pictures)
        made.append(InstructionSample(id=f"s{number}", images=images, turns=tuple(turns), kind="other"))
    return folder, made


def prepared(loaded: Any, samples: Any, chat_format: str = "medllava") -> Examples:
    _, processor = loaded
    prompts = PromptBuilder(processor.tokenizer, chat_format, tokens_per_image=tokens_per_image(processor))
    wanted = samples[1] if chat_format != "plain" else [each for each in samples[1] if len(each.turns) == 2]
    return Examples(wanted, prompts, max_length=512)


def step(loaded: Any, samples: Any, examples: Examples, **more: Any) -> list[Any]:
    pictures = more.pop("pictures", None) or Pictures(samples[0], loaded[1].image_processor)
    make = micro_batches(
        examples, pictures, pad_id=0, image_token_id=loaded[0].config.image_token_id,
        **({"accumulate": 1, "flip_seed": None, "row_length": 600} | more),
    )
    return make(0, list(range(len(examples))))


def losses(model: Any, examples: Examples, batches: list[Any]) -> dict[str, float]:
    """Summed loss of each sample, whose targets stand together, in the order of ids."""
    count = {each.id: int((examples.get(number).labels[1:] != -100).sum()) for number, each in
             enumerate(examples.samples)}
    found: dict[str, float] = {}
    for batch in batches:
        hidden = hidden_states(model, embeddings(model, batch), batch.position_ids)
        logits = model.lm_head(hidden.flatten(0, 1)[batch.predict_positions])
        each = functional.cross_entropy(logits, batch.targets, reduction="none").split([count[i] for i in batch.ids])
        found |= {name: float(part.sum()) for name, part in zip(batch.ids, each, strict=True)}
    return found


def gradients(model: Any, batches: list[Any]) -> dict[str, torch.Tensor]:
    module = VisionLanguageLoss(model)
    weight = sum(batch.weight for batch in batches)
    model.zero_grad()
    for batch in batches:
        (module(batch) / weight).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    most = max(float(each.abs().max()) for each in one.values())
    return max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-5 * max(1.0, most)


@pytest.mark.parametrize("chat_format", ["medllava", "vicuna_v1", "plain"])
def test_losses_and_gradients_are_those_of_the_samples_apart(loaded: Any, samples: Any, chat_format: str) -> None:
    model, _ = loaded
    examples = prepared(loaded, samples, chat_format)
    apart, shared = (step(loaded, samples, examples, shared=shared) for shared in (False, True))
    assert sorted(shared[0].ids) == sorted(apart[0].ids)
    assert shared[0].weight == apart[0].weight
    assert shared[0].tokens == apart[0].tokens == apart[0].computed == sum(examples.lengths)
    assert shared[0].computed == shared[0].input_ids.numel() < shared[0].tokens
    assert len(shared[0].pixels) < len(apart[0].pixels)
    with torch.no_grad():
        one, other = losses(model, examples, apart), losses(model, examples, shared)
    assert one.keys() == other.keys()
    assert max(abs(one[name] - other[name]) for name in one) < 1e-5 * max(one.values())
    assert "model.vision_tower" in " ".join(gradients(model, shared))
    assert equal(gradients(model, apart), gradients(model, shared))


def test_what_is_shared(loaded: Any, samples: Any) -> None:
    examples = prepared(loaded, samples, "vicuna_v1")
    image, size = loaded[0].config.image_token_id, tokens_per_image(loaded[1])
    made = [examples.get(number) for number in range(len(examples))]
    groups = share(made, [0] * len(made), image_token_id=image, room=600)
    assert sorted(number for group in groups for number, _ in group) == list(range(len(made)))
    # This format puts the picture of s5 in front of its text, the other leaves it behind.
    assert [[number for number, _ in group] for group in groups] == [[0, 9, 1, 5, 2, 6, 7], [3, 8], [4], [10]]
    as_written = prepared(loaded, samples)
    others = [as_written.get(number) for number in range(len(made))]
    assert [[number for number, _ in group] for group in share(others, [0] * 11, image_token_id=image, room=600)] == [
        [0, 9, 1, 2, 6, 7], [3, 8], [4], [5], [10],
    ]
    for group in groups:
        whole = made[group[0][0]]
        assert group[0][1] == 0
        for number, known in group[1:]:
            assert torch.equal(made[number].input_ids[:known], whole.input_ids[:known])
            assert pictures_within(made[number], known, image) == 1
            assert int((made[number].input_ids[:known] == image).sum()) == size  # the second picture is another
    known = dict(part for group in groups for part in group)
    assert known[9] == examples.lengths[9] - 1  # the same sample twice: all but its last token
    assert known[1] > known[2] > size
    # Mirrored otherwise, it is another picture; in too short a row, it stands twice.
    assert len(share(made[:2], [0, 1], image_token_id=image, room=600)) == 2
    room = examples.lengths[0] + examples.lengths[1] - known[1]
    assert len(share(made[:2], [0, 0], image_token_id=image, room=room)) == 1
    assert len(share(made[:2], [0, 0], image_token_id=image, room=room - 1)) == 2


def test_two_equal_pictures_are_shared_and_another_second_one_is_not() -> None:
    image, words = [1] * 4, [7, 8, 9]
    ids = torch.tensor([5, *image, *image, *words])
    one, same, other = (Example(name, ids, ids, ("a", name)) for name in ("b", "b", "c"))
    groups = share([one, same, other], [0, 0, 0], image_token_id=1, room=100)
    assert groups == [[(0, 0), (1, 11), (2, 5)]]
    text_first = Example("t", torch.tensor([6, *image, *words]), ids, ("a",))
    assert share([one, text_first], [0, 0], image_token_id=1, room=100) == [[(0, 0)], [(1, 0)]]


@pytest.mark.parametrize(("accumulate", "processes"), [(3, 1), (2, 2)])
def test_pieces_and_processes_add_up_to_the_whole(
    loaded: Any, samples: Any, accumulate: int, processes: int
) -> None:
    model, _ = loaded
    examples = prepared(loaded, samples)
    whole = step(loaded, samples, examples)
    shares = [
        step(loaded, samples, examples, shared=True, row_length=150, accumulate=accumulate, processes=processes,
             rank=rank)
        for rank in range(processes)
    ]
    assert {len(batches) for batches in shares} == {accumulate}
    pieces = [batch for batches in shares for batch in batches]
    assert sum(batch.weight for batch in pieces) == whole[0].weight
    assert sum(batch.computed for batch in pieces) < whole[0].tokens
    assert equal(gradients(model, whole), gradients(model, pieces))


@pytest.mark.parametrize("on_disk", [False, True])
def test_cached_features_and_mirrored_pictures(loaded: Any, samples: Any, tmp_path: Path, on_disk: bool) -> None:
    model, processor = loaded
    examples = prepared(loaded, samples)
    live, cached = (Pictures(samples[0], processor.image_processor) for _ in range(2))
    names = [f"{name}.png" for name in "abc"]

    @torch.no_grad()
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return vision_features(model, pixels)

    if on_disk:
        cached.cache_on_disk(FeatureStore(tmp_path, "key"), names, range(4), encode)
    else:
        cached.cache(names, range(4), encode)
    one, other = (
        step(loaded, samples, examples, shared=True, flip_seed=3, pictures=pictures) for pictures in (live, cached)
    )
    assert other[0].pixels is None
    assert len(other[0].features) == len(one[0].pixels)
    with torch.no_grad():
        first, second = losses(model, examples, one), losses(model, examples, other)
    assert max(abs(first[name] - second[name]) for name in first) < 1e-4
    # All samples that begin with one picture are mirrored alike, in every epoch in another way.
    assert len(one[0].pixels) == len(step(loaded, samples, examples, shared=True)[0].pixels)
    make = micro_batches(
        examples, None, accumulate=1, flip_seed=3, pad_id=0, image_token_id=model.config.image_token_id,
        row_length=600, shared=True,
    )
    texts = {tuple(make(epoch, list(range(len(examples))))[0].targets.tolist()) for epoch in range(6)}
    assert len(texts) > 1


def test_adapters_and_gradient_checkpointing(samples: Any) -> None:
    model, processor = tiny_model(["where is the gland upper left"], text=TextSizes(hidden_size=64, layers=2))
    attend_apart(model)
    examples = prepared((model, processor), samples)
    recipe = TuneRecipe.model_validate({"stage": "lora", "lora": {"r": 4}, "optim": {"steps": 1, "learning_rate": 1}})
    select(model, recipe)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    found = []
    for shared in (False, True):
        if shared:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        found.append(gradients(model, step((model, processor), samples, examples, shared=shared)))
    assert any("lora_A" in name for name in found[0])
    assert equal(*found)


def test_shared_keys_for_grouped_queries() -> None:
    """Two queries to a key: against a mask over the whole row."""
    torch.manual_seed(0)
    module: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    # A sample of 6, one of 5 that begins with 4 of it, one of 3, one of 4 that begins with 2 of that.
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 4, 0, 1, 2, 2, 3])
    samples = forward._samples(positions)
    assert samples.tolist() == [[6, 0, 0], [1, 4, 0], [3, 0, 2], [2, 2, 2]]
    query, key, value = (torch.randn(1, heads, 12, 8) for heads in (4, 2, 2))
    found, _ = forward._attention_apart(module, query, key, value, None, samples=samples)
    seen = torch.zeros(12, 12, dtype=torch.bool)
    for place, read in enumerate([
        [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6],
        [7], [7, 8], [7, 8, 9], [7, 8, 10], [7, 8, 10, 11],
    ]):
        seen[place, read] = True
    key, value = (each.repeat_interleave(2, dim=1) for each in (key, value))
    wanted = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    assert torch.allclose(found, wanted.transpose(1, 2), atol=1e-6)


def test_the_guard_notices_a_beginning_that_is_not_read(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = loaded
    check_packing(model)
    real = forward._samples
    monkeypatch.setattr(forward, "_samples", lambda positions: real(positions) * torch.tensor([1, 0, 1]))
    with pytest.raises(ConfigError, match="set picture_group to 1"):
        check_packing(model)


def test_a_changed_sample_changes_no_other(loaded: Any, samples: Any) -> None:
    model, _ = loaded
    examples = prepared(loaded, samples)
    (batch,) = step(loaded, samples, examples, shared=True)
    starts = [place for place, id_ in enumerate(batch.ids) if id_ == "s1"]
    groups = forward._samples(batch.position_ids[0])
    begin = int(groups[: starts[0], 0].sum())
    ids = batch.input_ids.clone()
    ids[0, begin : begin + int(groups[starts[0], 0])] += 1
    with torch.no_grad():
        before, after = (losses(model, examples, [each]) for each in (batch, replace(batch, input_ids=ids)))
    assert {name for name in before if abs(before[name] - after[name]) > 1e-5} == {"s1"}


def drawn(count: int = 400, pictures: int = 90, seed: int = 0) -> tuple[str | None, ...]:
    rng = random.Random(seed)
    return tuple(None if rng.random() < 0.1 else f"p{rng.randrange(pictures)}" for _ in range(count))


def test_the_order_visits_each_sample_once_and_keeps_pictures_together() -> None:
    names = drawn()
    order = Order(400, 32, seed=1, pictures=names, together=4)
    batches = order.epoch(3)
    assert sorted(index for batch in batches for index in batch) == list(range(400))
    assert batches == Order(400, 32, seed=1, pictures=names, together=4).epoch(3)
    assert batches != order.epoch(4)
    assert [len(batch) for batch in sorted(batches, key=len)] == [16, *[32] * 12]
    loose = Order(400, 32, seed=1, pictures=names, together=1)
    assert loose == replace(order, together=1)
    assert loose.epoch(3) == Order(400, 32, seed=1).epoch(3)

    def computed(batches: list[list[int]]) -> int:
        """Pictures, each once in a batch for up to four samples."""
        counts = [Counter(names[index] for index in batch if names[index]) for batch in batches]
        return sum(-(-each // 4) for count in counts for each in count.values())

    fewest = sum(-(-each // 4) for each in Counter(filter(None, names)).values())
    assert computed(batches) < fewest + len(batches)
    assert computed(loose.epoch(3)) > 2 * fewest
    most = max(
        len([1 for index in batch if names[index] == name]) for batch in batches for name in set(names) - {None}
    )
    assert most <= 8  # two groups of one picture may meet by chance


def test_a_samples_place_does_not_depend_on_its_picture() -> None:
    """Pictures of many samples come no earlier than those of one."""
    names = tuple(["often"] * 8 + [f"p{number}" for number in range(72)])
    places: dict[bool, list[int]] = {True: [], False: []}
    for seed in range(60):
        batches = Order(80, 8, seed=seed, pictures=names, together=4).epoch(0)
        for place, batch in enumerate(batches):
            for index in batch:
                places[index < 8].append(place)
    mean = {kind: sum(found) / len(found) for kind, found in places.items()}
    assert mean[True] == pytest.approx(mean[False], abs=0.6)


def test_repetitions_of_a_sample_stay_apart() -> None:
    names = tuple(f"p{index % 5}" for index in range(20))
    order = Order(20, 4, seed=0, weights=(3.0,) * 20, pictures=names, together=4)
    batches = order.epoch(0)
    assert Counter(index for batch in batches for index in batch) == dict.fromkeys(range(20), 3)
    assert all(len(set(batch)) == 4 for batch in batches)


def test_first_pictures(loaded: Any, samples: Any) -> None:
    assert first_pictures(prepared(loaded, samples)) == tuple(
        f"{pictures[0]}.png" if pictures else None for pictures, *_ in SAMPLES
    )


def test_collate_leaves_out_what_is_known() -> None:
    one, other = (Example(str(last), ids, ids, ()) for last in (5, 6) for ids in [torch.tensor([2, 3, 4, last])])
    batch = collate([[one, other]], pad_id=0, image_token_id=1, known=[[0, 3]])
    assert batch.input_ids.tolist() == [[2, 3, 4, 5, 6]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3]]
    assert batch.predict_positions.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.targets.tolist() == [3, 4, 5, 3, 4, 6]
    assert (batch.tokens, batch.computed, batch.weight) == (8, 5, 6)


def test_the_plan_tells_what_is_computed(loaded: Any, samples: Any) -> None:
    examples = prepared(loaded, samples)
    image = loaded[0].config.image_token_id
    order = Order(len(examples), 4, seed=0, pictures=first_pictures(examples), together=4)
    make = micro_batches(
        examples, None, accumulate=1, flip_seed=None, pad_id=0, image_token_id=image, row_length=600, shared=True
    )
    batches = [batch for indices in order.epoch(0) for batch in make(0, indices)]
    told = computed_share(order, examples, image_token_id=image, row_length=600)
    assert told == pytest.approx(sum(batch.computed for batch in batches) / sum(batch.tokens for batch in batches))
    assert 0 < told < 1
