"""Zero-shot classes of pictures with any Hugging Face CLIP or SigLIP folder (Radford et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from medllava.errors import CheckpointError
from medllava.model.pixels import pixel_values

KINDS = ("clip", "siglip", "siglip2", "chinese_clip", "altclip", "metaclip_2")
"""Model types whose image and text features can be compared."""


class ZeroShot:
    """An image-text encoder from a local folder, on a GPU if there is one; nothing is downloaded.

    Raises CheckpointError if the folder does not hold such a model.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: no config.json; expected a Hugging Face folder of a CLIP or SigLIP model")
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            if config.model_type not in KINDS:
                raise CheckpointError(
                    f"{folder}: model_type is {config.model_type!r}; expected one of {', '.join(KINDS)}"
                )
            self._images = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModel.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder}: cannot be loaded: {str(error).splitlines()[0]}") from error
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.to(self._device).eval()
        # SigLIP was trained on texts padded to one length and reads others wrongly.
        self._padding = "max_length" if config.model_type.startswith("siglip") else "longest"
        self._longest = int(config.text_config.max_position_embeddings)
        self._known: dict[tuple[str, ...], torch.Tensor] = {}

    def probabilities(
        self, images: Sequence[npt.NDArray[np.uint8]], classes: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """For each RGB picture (height x width x 3) the probability of each class; a row sums to 1.

        A class is the mean direction of its sentences. The probabilities are relative to the given classes.
        """
        with torch.inference_mode():
            pixels = pixel_values(self._images, [Image.fromarray(image) for image in images]).to(self._device)
            seen = _unit(self._model.get_image_features(pixel_values=pixels))
            meant = torch.stack([self._direction(tuple(sentences)) for sentences in classes])
            logits = self._model.logit_scale.exp() * seen @ meant.T
            return [[float(value) for value in row] for row in logits.softmax(1).cpu()]

    def _direction(self, sentences: tuple[str, ...]) -> torch.Tensor:
        if sentences not in self._known:
            tokens = self._tokenizer(
                list(sentences), return_tensors="pt", padding=self._padding, truncation=True, max_length=self._longest
            ).to(self._device)
            self._known[sentences] = _unit(_unit(self._model.get_text_features(**tokens)).mean(0, keepdim=True))[0]
        return self._known[sentences]


def _unit(features: Any) -> torch.Tensor:
    return torch.nn.functional.normalize(getattr(features, "pooler_output", features).float(), dim=-1)
