"""The loss of a batch, on the stock model's own parts.

It computes what ``LlavaForConditionalGeneration(input_ids, pixel_values, labels)`` computes (a test compares them), but
can start from cached encoder features, and applies the output head only where a token is supervised.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from medllava.train.batch import Batch


class VisionLanguageLoss(nn.Module):
    """Sum of the cross-entropy over a batch's supervised tokens. ``model``: LlavaForConditionalGeneration, adapters in
    place or not."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        core = self.model.model
        embeds = core.get_input_embeddings()(batch.input_ids)
        if batch.pixels is not None or batch.features is not None:
            features = batch.features
            if features is None:
                features = vision_features(self.model, batch.pixels)
            projected = core.multi_modal_projector(features.to(embeds.dtype))
            rows = embeds.flatten(0, 1)
            embeds = rows.index_copy(0, batch.image_positions, projected.flatten(0, 1).to(rows.dtype)).view_as(embeds)
        hidden = core.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return _loss(hidden, self.model.lm_head, batch)


def _loss(hidden: torch.Tensor, head: nn.Module, batch: Batch) -> torch.Tensor:
    logits = head(hidden.flatten(0, 1)[batch.predict_positions])
    return functional.cross_entropy(logits.float(), batch.targets, reduction="sum")


def vision_features(model: Any, pixels: torch.Tensor | None) -> torch.Tensor:
    """Encoder features (pictures, tokens, width) that the projector takes, chosen as the model's config says."""
    config = model.config
    tower = model.model.vision_tower
    states = tower(pixels.to(tower.dtype), output_hidden_states=True).hidden_states  # type: ignore[union-attr]
    layers = config.vision_feature_layer
    chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    if config.vision_feature_select_strategy == "default":
        chosen = [state[:, 1:] for state in chosen]
    return torch.cat(chosen, dim=-1)
