"""BERTScore (Zhang et al. 2020): how near the words of two texts are in a text encoder's space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from medllava.errors import CheckpointError, first_line


class BertScorer:
    """A text encoder from a local Hugging Face folder (BERT, RoBERTa and their kin). ``layer``: whose hidden states are
    compared, -1 for the last. Neither weighted by rarity nor rescaled by a baseline. Raises CheckpointError."""

    def __init__(self, folder: Path, layer: int = -1, device: str | None = None) -> None:
        from transformers import AutoModel, AutoTokenizer

        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: no config.json; expected a Hugging Face folder of a text encoder")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{folder}: cannot be loaded: {first_line(error)}") from error
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(self._device)
        layers = int(self._model.config.num_hidden_layers)
        if not -layers - 1 <= layer <= layers:
            raise CheckpointError(f"{folder}: has {layers} layers, not the layer {layer}")
        self._layer = layer
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        # Some tokenizers do not say how long a text may be; the positions of RoBERTa begin after the padding's.
        room = int(getattr(self._model.config, "max_position_embeddings", 512)) - 2
        self._longest = min(room, int(self._tokenizer.model_max_length))

    @torch.inference_mode()
    def f1(self, answers: Sequence[str], references: Sequence[str], batch: int = 32) -> list[float]:
        """BERTScore F1 of each answer with its reference, 0 for an empty one."""
        texts = sorted({text for text in (*answers, *references) if text.strip()}, key=lambda text: (len(text), text))
        found: dict[str, torch.Tensor] = {}
        for start in range(0, len(texts), batch):
            some = texts[start : start + batch]
            tokens = self._tokenizer(
                some, padding=True, truncation=True, max_length=self._longest, return_tensors="pt",
                return_special_tokens_mask=True,
            )
            words = (tokens.pop("special_tokens_mask") == 0) & (tokens["attention_mask"] == 1)
            hidden = self._model(**tokens.to(self._device), output_hidden_states=True).hidden_states[self._layer]
            vectors = torch.nn.functional.normalize(hidden.float(), dim=-1).cpu()
            found |= {text: rows[kept] for text, rows, kept in zip(some, vectors, words, strict=True)}
        return [
            _f1(found.get(answer), found.get(reference)) for answer, reference in zip(answers, references, strict=True)
        ]


def _f1(answer: torch.Tensor | None, reference: torch.Tensor | None) -> float:
    if answer is None or reference is None or not len(answer) or not len(reference):
        return 0.0
    likeness = answer @ reference.T
    precision, recall = float(likeness.max(1).values.mean()), float(likeness.max(0).values.mean())
    return round(2 * precision * recall / (precision + recall), 6) if precision + recall > 0 else 0.0
