"""Image-text encoders (CLIP, SigLIP and their kin) from Hugging Face folders: what turns pictures and texts into
vectors that can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from medllava.errors import CheckpointError, first_line
from medllava.model.pixels import pixel_values

KINDS = ("clip", "siglip", "siglip2", "chinese_clip", "altclip", "metaclip_2")
"""Model types whose image and text features can be compared."""

Tokens = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ImageTextEncoder:
    """A CLIPModel, SiglipModel or the like, with its image processor and tokenizer.

    kind: its ``model_type``. longest: tokens that a text can have. appended: the end token that CLIP reads a text's
        vector from, where the tokenizer does not put it there itself.
    """

    model: Any
    image_processor: Any
    tokenizer: Any
    kind: str
    longest: int
    appended: int | None

    @property
    def is_siglip(self) -> bool:
        return self.kind.startswith("siglip")

    def tokens(self, texts: Sequence[str]) -> Tokens:
        """``input_ids`` (texts, length), and ``attention_mask`` where the model knows one; long texts are cut."""
        room = self.longest - (self.appended is not None)
        rows = self.tokenizer(list(texts), truncation=True, max_length=room)["input_ids"]
        if self.appended is not None:
            rows = [[*row, self.appended] for row in rows]
        # SigLIP was trained on texts padded to one length, without a mask, and reads others wrongly.
        length = self.longest if self.is_siglip else max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        made = {"input_ids": torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])}
        if not self.is_siglip:
            made["attention_mask"] = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return made

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(pictures, width) float32 on the CPU, each of length 1."""
        pixels = pixel_values(self.image_processor, images).to(self.model.device, self.model.dtype)
        return unit(self.model.get_image_features(pixel_values=pixels)).cpu()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """(texts, width) float32 on the CPU, each of length 1."""
        tokens = {name: value.to(self.model.device) for name, value in self.tokens(texts).items()}
        return unit(self.model.get_text_features(**tokens)).cpu()

    @torch.inference_mode()
    def pool_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(pictures, width) float32 on the CPU: the image encoder's own summary, before it is projected to where texts
        are. Linear probes read this (Radford et al. 2021, appendix A.3)."""
        pixels = pixel_values(self.image_processor, images).to(self.model.device, self.model.dtype)
        pooled: torch.Tensor = self.model.vision_model(pixel_values=pixels).pooler_output
        return pooled.float().cpu()


def load_encoder(folder: Path, *, device: str | None = None) -> ImageTextEncoder:
    """Open a local folder in evaluation mode, on a GPU if there is one; nothing is downloaded.

    Raises CheckpointError if it does not hold such a model, or a tensor is missing or misfits.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json; expected a Hugging Face folder of a CLIP or SigLIP model")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.model_type not in KINDS:
            raise CheckpointError(
                f"{folder}: model_type is {config.model_type!r}; expected one of {', '.join(KINDS)}"
            )
        image_processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, report = AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: cannot be loaded: {first_line(error)}") from error
    absent = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if absent:
        raise CheckpointError(f"{folder}: tensors are missing or misfit: {', '.join(absent[:5])}")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return wrap(model.to(place).eval(), image_processor, tokenizer)


def wrap(model: Any, image_processor: Any, tokenizer: Any) -> ImageTextEncoder:
    """An open model as an ImageTextEncoder."""
    kind = str(model.config.model_type)
    end = tokenizer.eos_token_id
    ends = kind.startswith("siglip") or end is None or tokenizer("a")["input_ids"][-1] in (end, tokenizer.sep_token_id)
    longest = int(model.config.text_config.max_position_embeddings)
    return ImageTextEncoder(model, image_processor, tokenizer, kind, longest, None if ends else end)


def unit(features: Any) -> torch.Tensor:
    """What ``get_image_features`` or ``get_text_features`` gives, as float32 vectors of length 1."""
    return torch.nn.functional.normalize(getattr(features, "pooler_output", features).float(), dim=-1)
