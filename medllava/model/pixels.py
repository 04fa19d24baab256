"""The one pixel path: a picture to what the model's image encoder reads. Training, answering and evaluation use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from medllava.model.manifest import Padding


def pixel_values(image_processor: Any, images: Sequence[Image.Image]) -> torch.Tensor:
    """RGB pictures of any size -> float32 tensor (number of pictures, 3, side, side), padded, resized, normalised as
    the checkpoint's own image processor says."""
    rgb = [image.convert("RGB") for image in images]
    values: torch.Tensor = image_processor(images=rgb, return_tensors="pt")["pixel_values"]
    return values.float()


def image_side(image_processor: Any) -> int:
    """Side in pixels of the square that the encoder sees."""
    size = image_processor.crop_size if getattr(image_processor, "do_center_crop", False) else image_processor.size
    return int(size["height"] if "height" in size else size["shortest_edge"])


def padding_of(image_processor: Any) -> Padding:
    """Whether the processor pads to a square (in the mean colour) before it resizes."""
    return "square" if getattr(image_processor, "do_pad", False) else "none"


def square_padding(image_processor: Any) -> Any:
    """A processor with the same size and normalisation that pads to a square first, as LLaVA trains: nothing at the
    picture's edges is cropped away, so that boxes keep their meaning."""
    from transformers import LlavaImageProcessorPil

    side = image_side(image_processor)
    return LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        resample=image_processor.resample,
        image_mean=list(image_processor.image_mean),
        image_std=list(image_processor.image_std),
    )


def tokens_per_image(processor: Any) -> int:
    """How many tokens one picture takes in the prompt: the encoder's patches (plus or minus its class token)."""
    side = image_side(processor.image_processor)
    count = (side // int(processor.patch_size)) ** 2 + int(processor.num_additional_image_tokens or 0)
    return count - 1 if processor.vision_feature_select_strategy == "default" else count
