"""The demo model's parts, built from scratch: tokenizer, image encoder, language model, and the folder of all three.

Real use starts from pretrained parts. The demo has none (it needs no download), so it builds a model of about a
million parameters of the same stock classes. The choices below are those that learn at this size:

- few image tokens (large patches), a sin-cos position embedding of clearly visible amplitude, the mean and deviation of
  H&E pictures, few wide attention heads, and weights drawn wider than usual in the language model;
- ``</s>`` is not token 2: Hugging Face's CLIP text model treats that id as a sign of an old checkpoint and then takes
  its output from the token with the highest id instead of from ``</s>``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from medllava.config import Recipe
from medllava.model.prompt import TEMPLATES

PAD, IMAGE, BOS, EOS, USER, ASSISTANT = "<pad>", "<image>", "<s>", "</s>", "<|user|>", "<|assistant|>"

_COORDINATES = tuple(f"{value / 100:.2f}" for value in range(101))
# Words with their space, single digits, coordinates and the ", " between them, punctuation, space.
_WORDS = r", (?=[01]\.\d\d)|[01]\.\d\d(?!\d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS_DIGITS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class TokenizerSizes(Recipe):
    """``coordinate_tokens``: each of 0.00 .. 1.00 is one token (they come on top of ``vocab_size``)."""

    vocab_size: int = Field(default=600, ge=300)
    coordinate_tokens: bool = True


class VisionSizes(Recipe):
    """CLIP image encoder. ``position_amplitude``: scale of the sin-cos embedding that positions start from."""

    image_size: int = 96
    patch_size: int = 24
    hidden_size: int = 96
    intermediate_size: int = 384
    layers: int = 3
    heads: int = 4
    position_amplitude: float = 2.0
    image_mean: tuple[float, float, float] = (0.872, 0.627, 0.889)
    image_std: tuple[float, float, float] = (0.150, 0.140, 0.081)
    feature_layer: int = -2

    @model_validator(mode="after")
    def _fits(self) -> VisionSizes:
        if self.image_size % self.patch_size or self.hidden_size % self.heads or self.hidden_size % 4:
            raise ValueError("image_size must be a multiple of patch_size, hidden_size of heads and of 4")
        return self


class TextSizes(Recipe):
    """Llama language model. ``rope_theta``: base of the rotary positions; a large one keeps more of each head blind to
    distance, which helps a word find a patch by what it shows. ``tie_embeddings``: one matrix reads and writes words.
    """

    hidden_size: int = 96
    intermediate_size: int = 256
    layers: int = 3
    heads: int = 2
    initializer_range: float = 0.08
    max_positions: int = 2048
    rope_theta: float = 10_000.0
    tie_embeddings: bool = False


def build_tokenizer(texts: Iterable[str], sizes: TokenizerSizes) -> Any:
    """A byte-level BPE tokenizer trained on ``texts``: any text can be written and read back exactly."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    pattern = _WORDS if sizes.coordinate_tokens else _WORDS_DIGITS
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        # Coordinates need 100 merges for the last digit, and 13 for their beginnings and the comma between them.
        vocab_size=sizes.vocab_size + (113 if sizes.coordinate_tokens else 0),
        special_tokens=[PAD, IMAGE, BOS, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = list(texts)
    # Often enough that the coordinates are merged before the vocabulary is full of words.
    coordinates = [", ".join(_COORDINATES)] * max(500, len(texts) // 2) if sizes.coordinate_tokens else []
    bpe.train_from_iterator([*texts, *coordinates], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, bos_token=BOS, eos_token=EOS, extra_special_tokens={"image_token": IMAGE},
        additional_special_tokens=[USER, ASSISTANT], clean_up_tokenization_spaces=False, padding_side="left",
    )
    return tokenizer


def build_processor(tokenizer: Any, vision: VisionSizes) -> Any:
    """Stock LlavaProcessor: pads pictures to a square, and carries the ``medllava`` chat template."""
    from transformers import LlavaImageProcessorPil, LlavaProcessor

    side = vision.image_size
    image_processor = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": side}, crop_size={"height": side, "width": side},
        image_mean=list(vision.image_mean), image_std=list(vision.image_std),
    )
    return LlavaProcessor(
        image_processor=image_processor, tokenizer=tokenizer, patch_size=vision.patch_size,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATES["medllava"],
    )


def vision_config(vision: VisionSizes, projection_dim: int = 64) -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=vision.hidden_size, intermediate_size=vision.intermediate_size, num_hidden_layers=vision.layers,
        num_attention_heads=vision.heads, image_size=vision.image_size, patch_size=vision.patch_size,
        projection_dim=projection_dim,
    )


def llama_config(text: TextSizes, tokenizer: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=text.hidden_size, intermediate_size=text.intermediate_size,
        num_hidden_layers=text.layers, num_attention_heads=text.heads, num_key_value_heads=text.heads,
        initializer_range=text.initializer_range, max_position_embeddings=text.max_positions,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=text.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
    )


def build_clip(
    vision: VisionSizes, tokenizer: Any, *, projection_dim: int, text_layers: int, text_positions: int
) -> Any:
    """CLIPModel with random weights: the image encoder, and a text encoder that only contrastive training needs."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=vision.hidden_size, intermediate_size=vision.intermediate_size,
        num_hidden_layers=text_layers, num_attention_heads=vision.heads, projection_dim=projection_dim,
        max_position_embeddings=text_positions, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )
    assert text.eos_token_id != 2, "CLIP's text model would pool at the wrong token"
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision_config(vision, projection_dim).to_dict(),
        projection_dim=projection_dim,
    )
    model = CLIPModel(config)
    embedding = model.vision_model.embeddings.position_embedding
    with torch.no_grad():
        embedding.weight.copy_(sin_cos_positions(vision))
    return model


def sin_cos_positions(vision: VisionSizes) -> torch.Tensor:
    """(1 + patches, hidden): the class token's row is zero; half of each other row tells y, half x (MAE's scheme)."""
    grid = vision.image_size // vision.patch_size
    quarter = vision.hidden_size // 4
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(quarter) / quarter)
    angles = torch.arange(grid).float()[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = line[:, None, :].expand(grid, grid, -1)
    columns = line[None, :, :].expand(grid, grid, -1)
    patches = torch.cat([rows, columns], dim=-1).reshape(grid * grid, -1)
    return torch.cat([torch.zeros(1, vision.hidden_size), vision.position_amplitude * patches])


def assemble(vision_tower: Any, language_model: Any, tokenizer: Any, *, feature_layer: int) -> Any:
    """A LlavaForConditionalGeneration of a trained CLIPVisionModel and LlamaForCausalLM; its projector is untrained."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = vision_tower.config
    config = LlavaConfig(
        vision_config=vision.to_dict(), text_config=language_model.config.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE), vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default", image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    # Transformers keeps the encoder itself one level down in some versions.
    tower, source = (getattr(part, "vision_model", part) for part in (model.model.vision_tower, vision_tower))
    tower.load_state_dict(source.state_dict(), strict=True)
    model.model.language_model.load_state_dict(language_model.model.state_dict(), strict=True)
    model.lm_head.load_state_dict(language_model.lm_head.state_dict(), strict=True)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def tiny_model(
    texts: Sequence[str], *, tokenizer_sizes: TokenizerSizes | None = None, vision: VisionSizes | None = None,
    text: TextSizes | None = None, seed: int = 0,
) -> tuple[Any, Any]:
    """(LlavaForConditionalGeneration with random weights, LlavaProcessor)."""
    from transformers import CLIPVisionModel, LlamaForCausalLM

    tokenizer_sizes, vision, text = tokenizer_sizes or TokenizerSizes(), vision or VisionSizes(), text or TextSizes()
    tokenizer = build_tokenizer(texts, tokenizer_sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = CLIPVisionModel(vision_config(vision))
        with torch.no_grad():
            embeddings = getattr(tower, "vision_model", tower).embeddings
            embeddings.position_embedding.weight.copy_(sin_cos_positions(vision))
        language = LlamaForCausalLM(llama_config(text, tokenizer))
        model = assemble(tower, language, tokenizer, feature_layer=vision.feature_layer)
    return model.eval(), build_processor(tokenizer, vision)


def tiny_checkpoint(path: Path, *, seed: int = 0) -> Path:
    """Write a complete checkpoint folder with random weights: it answers nonsense, in the right shape, at once."""
    from medllava.model.checkpoint import save_full

    texts = [
        "Where is the gland? In the upper left. In the lower right.",
        "Is there a mitotic figure in this image? Yes, there is a mitotic figure. No, there is no necrosis.",
        "What do you see here? A blood vessel and a keratin pearl. How many findings? 2 findings.",
    ]
    model, processor = tiny_model(texts, seed=seed)
    save_full(path, model, processor, chat_format="medllava")
    return path
