from __future__ import annotations

from typing import Any

import pytest
import torch

from medllava.geometry import Box
from medllava.model.tiny import (
    TokenizerSizes,
    VisionSizes,
    build_clip,
    build_processor,
    build_tokenizer,
    sin_cos_positions,
)
from medllava.train.config import Contrastive, Optim
from medllava.train.contrastive import ContrastiveData, ContrastiveLoss, patch_weights, read_pairs
from medllava.train.dataset import read_samples


def test_patch_weights_follow_the_box_through_the_padding() -> None:
    whole = patch_weights(Box(x1=0, y1=0, x2=1, y2=1), (96, 96), 4)
    assert torch.allclose(whole, torch.full((16,), 1 / 16))
    corner = patch_weights(Box(x1=0.5, y1=0.5, x2=1, y2=1), (96, 96), 2)
    assert corner.tolist() == [0, 0, 0, 1]
    # A picture twice as wide as high fills the middle half of the square.
    wide = patch_weights(Box(x1=0, y1=0, x2=0.5, y2=1), (200, 100), 4).reshape(4, 4)
    assert wide[1:3, :2].sum() == pytest.approx(1)


def test_positions_are_distinct_and_of_the_set_amplitude() -> None:
    table = sin_cos_positions(VisionSizes(position_amplitude=3.0))
    assert table.shape == (17, 96)
    assert table[0].abs().max() == 0
    assert table.abs().max() == pytest.approx(3.0, abs=0.1)
    assert len({tuple(row.tolist()) for row in table[1:]}) == 16


@pytest.mark.parametrize("region_weight", [0.0, 1.0])
def test_a_small_set_is_learnt_by_heart(data: Any, region_weight: float) -> None:
    recipe = Contrastive(
        optim=Optim(steps=1, learning_rate=1e-3), region_weight=region_weight, caption_weight=1.0 - region_weight,
        flip=True,
    )
    samples = read_samples(data.file)
    pairs = read_pairs(samples, recipe, data.captions)
    assert len(pairs) == 40
    assert all(len(pair.captions) == 1 and len(pair.regions) in (1, 2) for pair in pairs)
    vision = VisionSizes(hidden_size=32, intermediate_size=64, heads=2, layers=2)
    texts = [turn.text for sample in samples for turn in sample.turns]
    tokenizer = build_tokenizer(texts, TokenizerSizes(vocab_size=330))
    torch.manual_seed(0)
    clip = build_clip(vision, tokenizer, projection_dim=16, text_layers=1, text_positions=32)
    made = ContrastiveData(
        pairs, recipe, images=data.images, processor=build_processor(tokenizer, vision), patches=16, seed=0
    )
    module = ContrastiveLoss(clip, recipe)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    losses = []
    for step in range(40):
        loss = module(made.make(step, list(range(step % 2, 40, 2)))[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_the_order_of_the_vocabulary_avoids_the_old_pooling() -> None:
    tokenizer = build_tokenizer(["a gland"], TokenizerSizes())
    clip = build_clip(VisionSizes(), tokenizer, projection_dim=8, text_layers=1, text_positions=16)
    ids = torch.tensor([[10, 11, tokenizer.eos_token_id, 0, 0]])
    longer = torch.tensor([[10, 11, tokenizer.eos_token_id, 200, 0]])
    # Pooled at </s>, not at the highest id: what comes after it makes no difference.
    with torch.no_grad():
        one, other = (clip.text_model(input_ids=row).pooler_output for row in (ids, longer))
    assert torch.allclose(one, other, atol=1e-6)
