"""Whether two checkpoints compute the same: logits and greedy tokens on a made picture and a question.

The source's answer is recorded first and the copy asked afterwards, so that only one model is in memory at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from medllava.conversation import IMAGE_TAG, Turn
from medllava.errors import CheckpointError
from medllava.model.checkpoint import Loaded
from medllava.model.pixels import pixel_values, tokens_per_image
from medllava.model.prompt import PromptBuilder

TOKENS = 32
TOLERANCE = 1e-3
"""Largest difference of a logit, as part of the largest logit; float32 on one machine stays far below."""

_QUESTION = f"{IMAGE_TAG}\nWhat is in this picture?"


@dataclass(frozen=True)
class Trace:
    """What a checkpoint computes: ids of the prompt, pixels it sees, 32 greedy tokens, and logits (32, vocabulary)."""

    prompt: list[int]
    pixels: torch.Tensor
    tokens: list[int]
    logits: torch.Tensor


def trace(loaded: Loaded, seed: int = 0) -> Trace:
    """Ask ``loaded`` about a picture drawn from ``seed``. End tokens do not end the answer: all 32 are compared."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 17, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((340, 240), Image.Resampling.BICUBIC)
    prompts = PromptBuilder(
        loaded.tokenizer, loaded.manifest.chat_format, tokens_per_image=tokens_per_image(loaded.processor),
        image_token=loaded.processor.image_token, template=loaded.processor.chat_template,
    )
    prompt = prompts.question([Turn(role="user", text=_QUESTION)])
    pixels = pixel_values(loaded.image_processor, [picture])
    model = loaded.model
    inputs: dict[str, Any] = {"pixel_values": pixels.to(model.device, model.dtype)}
    ids = torch.tensor([prompt], device=model.device)
    cache, tokens, logits = None, [], []
    with torch.inference_mode():
        for _ in range(TOKENS):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs)
            cache, inputs = output.past_key_values, {}
            logits.append(output.logits[0, -1].float().cpu())
            tokens.append(int(logits[-1].argmax()))
            ids = torch.tensor([[tokens[-1]]], device=model.device)
    return Trace(prompt, pixels, tokens, torch.stack(logits))


def check_same(source: Trace, copy: Trace) -> float:
    """The largest difference of a logit. Raises CheckpointError that says what differs first: prompt, pixels, a greedy
    token, logits."""
    if source.prompt != copy.prompt:
        raise CheckpointError("the copy makes other token ids of the same question")
    if not torch.equal(source.pixels, copy.pixels):
        raise CheckpointError("the copy makes other pixel values of the same picture")
    if source.logits.shape != copy.logits.shape:
        raise CheckpointError(
            f"the copy has a vocabulary of {copy.logits.shape[1]} tokens, the source one of {source.logits.shape[1]}"
        )
    for place, (wanted, got) in enumerate(zip(source.tokens, copy.tokens, strict=True), start=1):
        if wanted != got:
            raise CheckpointError(f"greedy token {place} of {TOKENS} differs: {wanted} before, {got} now")
    difference = float((source.logits - copy.logits).abs().max())
    if not difference <= TOLERANCE * float(source.logits.abs().max()):
        raise CheckpointError(f"logits differ by up to {difference:.3g}")
    return difference
