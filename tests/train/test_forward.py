from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medllava.conversation import InstructionSample, Turn
from medllava.model import checkpoint
from medllava.model.pixels import tokens_per_image
from medllava.model.prompt import PromptBuilder
from medllava.train.dataset import Examples, Pictures, micro_batches, read_samples
from medllava.train.forward import VisionLanguageLoss, embeddings, vision_features


@pytest.fixture(scope="module")
def loaded(stage0: Path) -> Any:
    return checkpoint.load(stage0, device="cpu")


@pytest.fixture(scope="module")
def examples(loaded: Any, data: Any) -> Examples:
    prompts = PromptBuilder(loaded.tokenizer, "medllava", tokens_per_image=tokens_per_image(loaded.processor))
    return Examples(read_samples(data.file, ["grounding", "other"]), prompts, max_length=512)


def batches(
    loaded: Any, examples: Examples, pictures: Pictures, *, accumulate: int = 1, flip: int | None = None
) -> Any:
    make = micro_batches(
        examples, pictures, accumulate=accumulate, flip_seed=flip, pad_id=0,
        image_token_id=loaded.model.config.image_token_id,
    )
    return make(0, [0, 1, 2, 3, 4, len(examples) - 1])


def test_the_loss_is_the_stock_models(loaded: Any, examples: Examples, data: Any) -> None:
    batch = batches(loaded, examples, Pictures(data.images, loaded.image_processor))[0]
    assert batch.input_ids.shape[0] == 6
    ours = VisionLanguageLoss(loaded.model)(batch) / batch.weight
    # The stock model shifts the labels itself; the padding is masked for it.
    mask = torch.zeros_like(batch.input_ids)
    for row, index in enumerate([0, 1, 2, 3, 4, len(examples) - 1]):
        mask[row, : examples.lengths[index]] = 1
    stock = loaded.model(
        input_ids=batch.input_ids, attention_mask=mask, pixel_values=batch.pixels, labels=batch.labels, use_cache=False
    )
    assert ours.item() == pytest.approx(stock.loss.item(), abs=1e-5)
    assert batch.weight == int((batch.labels != -100).sum())


def test_cached_features_are_the_live_ones(loaded: Any, examples: Examples, data: Any) -> None:
    live = Pictures(data.images, loaded.image_processor)
    cached = Pictures(data.images, loaded.image_processor)
    names = [sample.images[0] for sample in examples.samples if sample.images]
    cached.cache(names, range(4), lambda pixels: vision_features(loaded.model, pixels).detach())
    module = VisionLanguageLoss(loaded.model)
    seen = set()
    for seed in range(3):
        one, other = (batches(loaded, examples, pictures, flip=seed)[0] for pictures in (live, cached))
        assert other.pixels is None
        assert torch.equal(one.input_ids, other.input_ids)
        assert module(one).item() == pytest.approx(module(other).item(), rel=1e-6)
        seen.add(tuple(one.labels.flatten().tolist()))
    assert len(seen) == 3


def test_accumulated_gradients_are_those_of_the_whole_batch(loaded: Any, examples: Examples, data: Any) -> None:
    module = VisionLanguageLoss(loaded.model)
    pictures = Pictures(data.images, loaded.image_processor)
    weight = loaded.model.model.multi_modal_projector.linear_1.weight
    found = []
    for accumulate in (1, 3):
        micro = batches(loaded, examples, pictures, accumulate=accumulate)
        assert len(micro) == accumulate
        total = sum(batch.weight for batch in micro)
        loaded.model.zero_grad()
        for batch in micro:
            (module(batch) / total).backward()
        found.append(weight.grad.clone())
    loaded.model.zero_grad()
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-7)


def test_over_long_samples_are_counted(loaded: Any, data: Any) -> None:
    prompts = PromptBuilder(loaded.tokenizer, "medllava", tokens_per_image=16)
    samples = read_samples(data.file, ["grounding"])
    whole = Examples(samples, prompts, max_length=512)
    short = Examples(samples, prompts, max_length=min(whole.lengths) - 1)
    assert (whole.dropped_turns, whole.too_long) == (0, [])
    assert short.dropped_turns + len(short.too_long) > 0
    assert max(short.lengths) < min(whole.lengths)
    for index in range(len(short)):
        assert int((short.get(index).input_ids == prompts.image_token_id).sum()) == 16


def test_swapped_pictures_swap_what_the_language_model_reads(loaded: Any, data: Any) -> None:
    prompts = PromptBuilder(loaded.tokenizer, "medllava", tokens_per_image=tokens_per_image(loaded.processor))
    turns = ("<image>\nCompare it with <image>.", "They differ.", "And with <image>?", "A gland.")
    made = [
        Turn(role=("user", "assistant")[number % 2], text=text) for number, text in enumerate(turns)  # type: ignore[arg-type]
    ]
    read = []
    for images in (("0.png", "1.png", "2.png"), ("2.png", "1.png", "0.png")):
        samples = [InstructionSample(id="s", images=images, turns=tuple(made), kind="other")]
        pictures = Pictures(data.images, loaded.image_processor)
        examples = Examples(samples, prompts, max_length=512)
        make = micro_batches(
            examples, pictures, accumulate=1, flip_seed=None, pad_id=0, image_token_id=prompts.image_token_id
        )
        (batch,) = make(0, [0])
        with torch.no_grad():
            read.append((batch, embeddings(loaded.model, batch)[0]))
    places = read[0][0].image_positions.view(3, -1)
    assert torch.equal(read[0][0].input_ids, read[1][0].input_ids)
    first, second = read[0][1], read[1][1]
    for mine, other in ((0, 2), (1, 1), (2, 0)):
        assert torch.allclose(first[places[mine]], second[places[other]], atol=1e-6)
    assert not torch.allclose(first[places[0]], second[places[0]], atol=1e-2)
    text = torch.ones(len(first), dtype=torch.bool)
    text[places.flatten()] = False
    assert torch.equal(first[text], second[text])
