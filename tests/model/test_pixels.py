from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

from medllava.geometry import Box
from medllava.model import checkpoint
from medllava.model.pixels import image_side, padding_of, pixel_values, square_padding, tokens_per_image


@pytest.mark.parametrize("size", [(96, 96), (300, 100), (101, 211), (7, 5), (1, 1)])
def test_any_size_becomes_a_square(tiny: Path, size: tuple[int, int]) -> None:
    processor = checkpoint.load(tiny).image_processor
    values = pixel_values(processor, [Image.new("RGB", size, "#402060"), Image.new("L", size, 200)])
    assert values.shape == (2, 3, 96, 96)
    assert values.dtype == torch.float32


def test_a_box_finds_its_pixels_through_the_padding(tiny: Path) -> None:
    processor = checkpoint.load(tiny).image_processor
    image = Image.new("RGB", (200, 100), "white")
    box = Box(x1=0.5, y1=0.0, x2=0.75, y2=1.0)
    image.paste("black", tuple(round(value) for value in box.to_pixels(200, 100)))
    values = pixel_values(processor, [image])[0, 0]
    x0, y0, x1, y1 = (round(value * 96) for value in box.to_padded(200, 100))
    dark = values < values.mean() - values.std()
    assert dark[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2].all()
    assert not dark[:, : x0 - 2].any()
    assert not dark[: y0 - 2].any()
    # The margin is the mean colour: zero after normalisation, to a grey level.
    assert values[:20].abs().max() < 0.05


def test_padding_can_be_put_on_any_clip_processor() -> None:
    clip = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    assert (padding_of(clip), image_side(clip)) == ("none", 56)
    padded = square_padding(clip)
    assert (padding_of(padded), image_side(padded)) == ("square", 56)
    square = Image.effect_noise((80, 80), 90).convert("RGB")
    assert torch.equal(pixel_values(padded, [square]), pixel_values(clip, [square]))
    wide = Image.effect_noise((160, 80), 90).convert("RGB")
    assert not torch.equal(pixel_values(padded, [wide]), pixel_values(clip, [wide]))


@pytest.mark.parametrize("size", [(96, 96), (300, 101), (33, 200), (1, 7)])
@pytest.mark.parametrize("processor", [
    LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96}),
    LlavaImageProcessorPil(do_pad=False, size={"shortest_edge": 70}, crop_size={"height": 56, "width": 56}),
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_std=[0.1, 0.2, 0.3]),
    CLIPImageProcessorPil(size={"height": 64, "width": 48}, do_center_crop=False),
    CLIPImageProcessorPil(do_normalize=False, size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
], ids=["padded", "cropped", "clip", "any shape", "not normalised"])
def test_the_quick_path_makes_the_processors_own_pixels(processor: Any, size: tuple[int, int]) -> None:
    image = Image.merge("RGB", [Image.effect_noise(size, spread) for spread in (50, 90, 130)])
    own = processor(images=[image, image], return_tensors="pt")["pixel_values"].float()
    assert torch.equal(pixel_values(processor, [image, image]), own)


def test_tokens_per_image(tiny: Path) -> None:
    assert tokens_per_image(checkpoint.load(tiny).processor) == (96 // 24) ** 2
