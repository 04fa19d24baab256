"""The one pixel path: a picture to what the model's image encoder reads. Training, answering and evaluation use it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from medllava.model.manifest import Padding

LONGEST = 12_000
"""Longest side of a picture that is padded as it is; many times what any encoder sees."""


def pixel_values(image_processor: Any, images: Sequence[Image.Image]) -> torch.Tensor:
    """RGB pictures of any size -> float32 tensor (number of pictures, 3, side, side), padded, resized, normalised as
    the checkpoint's own image processor says."""
    rgb = [image if image.mode == "RGB" else image.convert("RGB") for image in images]
    if getattr(image_processor, "do_pad", False):
        rgb = [_shortened(image) for image in rgb]
    if _is_stock(image_processor):
        return torch.from_numpy(np.stack([_stock_values(image_processor, image) for image in rgb]))
    values: torch.Tensor = image_processor(images=rgb, return_tensors="pt")["pixel_values"]
    return values.float()


def _shortened(image: Image.Image) -> Image.Image:
    """The picture, or a copy of at most :data:`LONGEST` pixels a side: padded to a square, a strip of 100,000 x 10
    pixels would take 40 GB."""
    if max(image.size) <= LONGEST:
        return image
    factor = -(-max(image.size) // LONGEST)
    return image.reduce((min(factor, image.width), min(factor, image.height)))


def _is_stock(image_processor: Any) -> bool:
    """Whether :func:`_stock_values` knows all that the processor does."""
    from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

    steps = (image_processor.do_resize, image_processor.do_rescale, image_processor.do_normalize)
    kind = type(image_processor)
    pads = bool(getattr(image_processor, "do_pad", False))
    return all(steps) and (kind is LlavaImageProcessorPil or (kind is CLIPImageProcessorPil and not pads))


def _stock_values(image_processor: Any, image: Image.Image) -> npt.NDArray[np.float32]:
    """(3, height, width): bit for bit what the processor gives (a test compares them), in a third of its time: the
    picture stays one of PIL until it is small, and each of the 256 values of a channel is normalised once."""
    from transformers.image_transforms import get_resize_output_image_size
    from transformers.image_utils import ChannelDimension

    if image_processor.do_pad and image.width != image.height:
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in image_processor.image_mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    size = image_processor.size
    if "shortest_edge" in size and size["shortest_edge"]:
        # Asked of transformers, which reads the picture's shape only.
        shape = np.broadcast_to(np.uint8(0), (3, image.height, image.width))
        height, width = get_resize_output_image_size(
            shape, size=size["shortest_edge"], default_to_square=False, input_data_format=ChannelDimension.FIRST
        )
    else:
        height, width = size["height"], size["width"]
    small = np.asarray(image.resize((width, height), image_processor.resample))
    channels = small.transpose(2, 0, 1)
    if image_processor.do_center_crop:
        crop = image_processor.crop_size
        if (crop["height"], crop["width"]) != (height, width):
            channels = image_processor.center_crop(channels, crop)
    mean, std = tuple(image_processor.image_mean), tuple(image_processor.image_std)
    kind: Any = type(image_processor)
    tables = _normalised(kind, float(image_processor.rescale_factor), mean, std)
    return np.stack([table[channel] for table, channel in zip(tables, channels, strict=True)])


@lru_cache(maxsize=8)
def _normalised(
    kind: Any, factor: float, mean: tuple[float, ...], std: tuple[float, ...]
) -> npt.NDArray[np.float32]:
    """(3, 256): what the processor makes of each value of each channel."""
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, None], (3, 1, 256))
    processor = kind()
    values = processor.normalize(processor.rescale(ramp, factor), list(mean), list(std))
    return np.asarray(values, dtype=np.float32)[:, 0]


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
