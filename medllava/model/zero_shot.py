"""Zero-shot classes of pictures with any Hugging Face CLIP or SigLIP folder (Radford et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from medllava.model.embeddings import load_encoder


class ZeroShot:
    """An image-text encoder from a local folder, on a GPU if there is one; nothing is downloaded.

    Raises CheckpointError if the folder does not hold such a model.
    """

    def __init__(self, folder: Path) -> None:
        self._encoder = load_encoder(folder)
        self._known: dict[tuple[str, ...], torch.Tensor] = {}

    def probabilities(
        self, images: Sequence[npt.NDArray[np.uint8]], classes: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """For each RGB picture (height x width x 3) the probability of each class; a row sums to 1.

        A class is the mean direction of its sentences. The probabilities are relative to the given classes.
        """
        seen = self._encoder.embed_images([Image.fromarray(image) for image in images])
        meant = torch.stack([self.direction(tuple(sentences)) for sentences in classes])
        scale = float(self._encoder.model.logit_scale.exp())
        return [[float(value) for value in row] for row in (scale * seen @ meant.T).softmax(1)]

    def direction(self, sentences: tuple[str, ...]) -> torch.Tensor:
        """(width,): the mean direction of the sentences."""
        if sentences not in self._known:
            mean = self._encoder.embed_texts(sentences).mean(0)
            self._known[sentences] = torch.nn.functional.normalize(mean, dim=-1)
        return self._known[sentences]
