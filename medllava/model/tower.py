"""Image encoders as vision towers: CLIP, SigLIP, and what else transformers opens that gives a state per patch (DINOv2,
DINOv3, ViT and their kin, which is what most pathology encoders are)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from medllava.errors import CheckpointError, first_line
from medllava.model.pixels import image_side


def open_tower(place: Path | str) -> tuple[Any, Any]:
    """The image encoder in a folder or at a hub id (of CLIP and SigLIP also where the text encoder lies beside it), and
    its image processor.

    Raises CheckpointError.
    """
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        CLIPVisionModel,
        SiglipVisionModel,
        ViTImageProcessorPil,
    )

    if Path(place, "open_clip_config.json").is_file() and not Path(place, "config.json").is_file():
        raise _other_format(place, "open_clip")
    try:
        config = AutoConfig.from_pretrained(place)
        kind = str(config.model_type)
        if kind == "timm_wrapper":  # with timm installed; without, transformers says that it wants it
            raise _other_format(place, "timm")
        pair = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}.get(kind.removesuffix("_vision_model"))
        if pair is None and not isinstance(getattr(config, "patch_size", None), int):
            raise CheckpointError(
                f"vision tower {place}: model_type is {kind!r}; expected an image encoder with patches: clip, siglip,"
                " dinov2, dinov2_with_registers, dinov3_vit, vit or the like"
            )
        tower, report = (pair or AutoModel).from_pretrained(place, output_loading_info=True)
        try:
            image_processor = AutoImageProcessor.from_pretrained(place, backend="pil")
        except ImportError:  # DINOv3's own exists for torchvision alone; size, mean and deviation are what is needed
            image_processor = ViTImageProcessorPil.from_pretrained(place)
    except ImportError as error:
        if "timm" not in str(error):
            raise CheckpointError(f"vision tower {place}: cannot be opened ({first_line(error)})") from error
        raise _other_format(place, "timm") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"vision tower {place}: cannot be opened ({first_line(error)}); give its folder with --vision-tower DIR"
        ) from error
    # Published without the layer that sums a picture up in one vector, as Phikon is: only patches are read here.
    names = [name for name in map(str, report["missing_keys"]) if not name.startswith("pooler.")]
    names += map(str, report["mismatched_keys"])
    if names:
        raise CheckpointError(f"vision tower {place}: tensors are missing or misfit: {', '.join(sorted(names)[:5])}")
    return tower, image_processor


def extra_tokens(tower: Any, image_processor: Any, layer: int) -> int:
    """How many states hidden state ``layer`` has before those of the patches: a class token, registers, or none.

    Found by running the tower on a blank picture. Raises CheckpointError if it has no state per patch.
    """
    side, kind = image_side(image_processor), tower.config.model_type
    patches = (side // int(tower.config.patch_size)) ** 2
    shape: tuple[int, ...]
    try:
        with torch.inference_mode():
            blank = torch.zeros(1, 3, side, side, dtype=tower.dtype, device=tower.device)
            shape = tuple(tower(blank, output_hidden_states=True).hidden_states[layer].shape)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"vision tower ({kind}): cannot read a picture of {side} x {side} pixels, the size in its"
            f" preprocessor_config.json, up to hidden state {layer}: {first_line(error)}"
        ) from error
    if len(shape) != 3 or shape[1] < patches or shape[2] != tower.config.hidden_size:
        raise CheckpointError(
            f"vision tower ({kind}): hidden state {layer} of a picture of {side} x {side} pixels has the shape {shape};"
            f" expected at least {patches} states (one per patch) of width {tower.config.hidden_size}"
        )
    return shape[1] - patches


def blocks(tower: Any) -> list[nn.Module]:
    """The tower's layers, in order; families name the list of them differently."""
    count = tower.config.num_hidden_layers
    return next(
        list(module) for module in tower.modules() if isinstance(module, nn.ModuleList) and len(module) == count
    )


def _other_format(place: Path | str, library: str) -> CheckpointError:
    return CheckpointError(
        f"vision tower {place}: in the format of {library}, which is not read; give an encoder in transformers' format"
        " (clip, siglip, dinov2, dinov3_vit, vit, ...). Many are published in both: look for a config.json with a"
        " model_type"
    )
