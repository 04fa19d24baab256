"""The loss of a batch, on the stock model's own parts.

It computes what ``LlavaForConditionalGeneration(input_ids, pixel_values, labels)`` computes (a test compares them), but
can start from cached encoder features, and applies the output head only where a token is supervised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from medllava.errors import ConfigError, MissingExtraError
from medllava.train.batch import Batch

log = logging.getLogger(__name__)

APART = "medllava_apart"
"""Name of :func:`attend_apart`'s attention in transformers' interface."""


class VisionLanguageLoss(nn.Module):
    """Sum of the cross-entropy over a batch's supervised tokens. ``model``: LlavaForConditionalGeneration, adapters in
    place or not."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> VisionLanguageLoss:
        """A frozen encoder stays as it is in use, so that its features are the same live and cached."""
        super().train(mode)
        tower = self.model.model.vision_tower
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            tower.eval()
        return self

    def forward(self, batch: Batch) -> torch.Tensor:
        hidden = hidden_states(self.model, embeddings(self.model, batch), batch.position_ids)
        return _loss(hidden, self.model.lm_head, batch)


def embeddings(model: Any, batch: Batch) -> torch.Tensor:
    """(rows, length, width): what the language model reads, the pictures in their places."""
    core = model.model
    embeds: torch.Tensor = core.get_input_embeddings()(batch.input_ids)
    if batch.pixels is None and batch.features is None:
        return embeds
    features = vision_features(model, batch.pixels) if batch.features is None else batch.features
    projected: torch.Tensor = core.multi_modal_projector(features.to(embeds.dtype)).flatten(0, 1)
    if not len(batch.image_positions):
        # A blank picture: nothing changes, but every process runs the same modules and has the same gradients.
        return embeds + 0.0 * projected.sum().to(embeds.dtype)
    rows = embeds.flatten(0, 1)
    return rows.index_copy(0, batch.image_positions, projected.to(rows.dtype)).view_as(embeds)


def hidden_states(model: Any, embeds: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """(rows, length, width) of the language model's last layer.

    ``position_ids`` that start anew within a row keep its samples apart. That holds only without any attention mask
    and without a cache; FlashAttention and :func:`attend_apart` also want all rows in one. Samples that share a
    beginning (see :class:`Batch`) take :func:`attend_apart`.
    """
    language = model.model.language_model
    attention = str(language.config._attn_implementation)
    rows, positions = embeds, position_ids
    told: dict[str, Any] = {}
    if positions is not None and ("flash" in attention or attention == APART):
        rows, positions = embeds.flatten(0, 1)[None], positions.flatten()[None]
        if attention == APART:
            told["samples"] = _samples(positions[0])
            # Anything with four axes is taken for a finished mask, so that none of length x length is made.
            told["attention_mask"] = rows.new_empty(1, 1, 1, 1)
    hidden: torch.Tensor = language(
        inputs_embeds=rows, position_ids=positions, use_cache=False, **told
    ).last_hidden_state
    return hidden.view_as(embeds)


def _samples(positions: torch.Tensor) -> torch.Tensor:
    """(samples, 3) of a row, from its positions: how many tokens of a sample stand there, how many before these it has
    in common with an earlier sample, and the number of that one. On the CPU, so that no layer waits for the GPU; a
    tensor, so that compiled layers take any number of samples."""
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[1:] = positions[1:] != positions[:-1] + 1
    starts = begins.nonzero()[:, 0]
    starts, known = torch.stack([starts, positions[starts]]).cpu()
    ends = torch.cat([starts[1:], torch.tensor([len(positions)])])
    whole = torch.where(known == 0, torch.arange(len(starts)), 0).cummax(0).values
    return torch.stack([ends - starts, known, whole], dim=1)


def attend_apart(model: Any, *, instead_of_flash: bool = False) -> bool:
    """Where PyTorch's own attention is in use, compute it for each sample of a packed row by itself: the same result
    as under a mask over the whole row, without the pairs of tokens that the mask throws away. Other attention is left
    as it is; FlashAttention does the same by itself, but knows no shared beginnings. Returns whether it is in use."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    config = model.model.language_model.config
    if config._attn_implementation in (("sdpa", "flash_attention_2") if instead_of_flash else ("sdpa",)):
        AttentionInterface.register(APART, _attention_apart)
        AttentionMaskInterface.register(APART, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        config._attn_implementation = APART
    return bool(config._attn_implementation == APART)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a loop would be compiled anew for each number of samples
def _attention_apart(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    samples: torch.Tensor | None = None, **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' interface; of the one row's ``samples`` (see :func:`_samples`), or stock attention."""
    from transformers.integrations import sdpa_attention

    stock: Callable[..., tuple[torch.Tensor, None]] = sdpa_attention.sdpa_attention_forward
    if samples is None:
        return stock(module, query, key, value, attention_mask, **options)
    # split, as its gradient is one concatenation; that of a slice would be as long as the row.
    lengths = samples[:, 0].tolist()
    queries, keys, values = (torch.split(each, lengths, dim=2) for each in (query, key, value))
    found = []
    for number, (length, known, whole) in enumerate(samples.tolist()):
        read, mask = (keys[number], values[number]), None
        if known:
            before = (keys[whole][:, :, :known], values[whole][:, :, :known])
            read = (torch.cat([before[0], read[0]], dim=2), torch.cat([before[1], read[1]], dim=2))
            # Causal masks begin at the first key; this one ends at the last.
            mask = torch.ones(1, 1, length, known + length, dtype=torch.bool, device=query.device).tril(known)
        found.append(stock(module, queries[number], *read, mask, **options)[0])
    return torch.cat(found, dim=1), None


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Two samples in one row, then the first one changed: the second must not notice. Raises ConfigError if it does,
    as it would, silently, with a library that does not read positions as this project's does."""
    training = model.training
    model.eval()
    vocabulary = model.model.get_input_embeddings()
    ids = torch.arange(1, 17, device=vocabulary.weight.device)[None]
    positions = torch.arange(16, device=ids.device)[None] % 8
    changed = torch.where(torch.arange(16, device=ids.device) < 8, ids + 16, ids)
    before, after = (hidden_states(model, vocabulary(each), positions)[0, 8:] for each in (ids, changed))
    model.train(training)
    if not torch.allclose(before, after, rtol=0, atol=1e-3 * float(before.abs().max())):
        raise ConfigError(
            "packing: samples that share a row see one another with these versions of transformers and its attention"
            f" ({model.model.language_model.config._attn_implementation}); set packing to false"
        )
    if model.model.language_model.config._attn_implementation == APART:
        # A whole sample, then one that goes on from its first four tokens.
        positions = torch.cat([positions[0, :8], positions[0, 4:8]])[None]
        shared = torch.cat([ids[0, :8], changed[0, 12:]])[None]
        apart = torch.cat([ids[0, :4], changed[0, 12:]])[None]
        model.eval()
        after = hidden_states(model, vocabulary(shared), positions)[0, 8:]
        before = hidden_states(model, vocabulary(apart), None)[0, 4:]
        model.train(training)
        if not torch.allclose(before, after, rtol=0, atol=1e-3 * float(before.abs().max())):
            raise ConfigError(
                "picture_group: samples that share a beginning are not computed as they are apart with these versions"
                " of transformers and PyTorch; set picture_group to 1"
            )


def speed_up(model: Any, *, liger: str | bool, compile_layers: bool) -> None:
    """Liger's kernels and compiled layers for the language model, where there is a GPU; what is asked for and cannot
    be had is told. Raises MissingExtraError if Liger must be used and is not installed."""
    language = model.model.language_model
    if not torch.cuda.is_available():
        if liger is True or compile_layers:
            log.info("no CUDA device: liger and compile are left off")
        return
    if liger:
        try:
            from liger_kernel.transformers import _apply_liger_kernel_to_instance as apply_to
        except (ImportError, OSError, RuntimeError) as error:
            if liger is True:
                raise MissingExtraError("liger-kernel", "gpu", error) from error
            log.info("liger-kernel is not usable (%s); using PyTorch's own", error)
        else:
            apply_to(model=language)
    if compile_layers:
        for layer in language.layers:
            layer.compile()


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


def encoder_of(model: Any, accelerator: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Pixels (pictures, 3, side, side) to :func:`vision_features` on the CPU, without gradients."""
    @torch.no_grad()
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return vision_features(model, pixels.to(accelerator.device)).cpu()

    return encode
