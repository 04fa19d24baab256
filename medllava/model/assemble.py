"""A LLaVA checkpoint out of a trained image encoder and a trained language model: what stage 1 starts from.

Both keep their weights; the projector between them is new (PyTorch's own initialisation of a linear layer, as in the
original code), and the vocabulary gains the token that pictures take the place of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from medllava.conversation import IMAGE_TAG, Turn
from medllava.errors import CheckpointError, ConfigError, first_line
from medllava.model import checkpoint
from medllava.model.convert import open_tokenizer, with_rows
from medllava.model.pixels import square_padding, tokens_per_image
from medllava.model.prompt import TEMPLATES, PromptBuilder
from medllava.model.tensors import differences, refuse
from medllava.model.tower import extra_tokens, open_tower


def assemble(
    vision_tower: Path | str, language: Path | str, target: Path, *, chat_format: str | None = None,
    feature_layer: int = -2, seed: int = 0,
) -> None:
    """Write a full checkpoint ``target`` from two Hugging Face folders (or hub ids).

    vision_tower: CLIP or SigLIP, with or without its text encoder, or another encoder that :mod:`medllava.model.tower`
    opens. language: any decoder that transformers opens as a causal language model. chat_format: by default
    ``template`` if the tokenizer has a chat template. feature_layer: the hidden state of the encoder that the projector
    reads: its patches, and registers if it has them; a class token is left out.
    Raises CheckpointError or ConfigError, with nothing left in ``target``.
    """
    tokenizer = open_tokenizer(language)
    if chat_format is None:
        if not tokenizer.chat_template:
            raise ConfigError(f"{language}: its tokenizer has no chat template; add --chat-format, e.g. vicuna_v1")
        chat_format = "template"
    if chat_format not in (*TEMPLATES, "template"):
        raise ConfigError(f"--chat-format {chat_format}: choose one of {', '.join((*TEMPLATES, 'template'))}")
    tokenizer.add_special_tokens({"additional_special_tokens": [*_special(tokenizer), IMAGE_TAG]})
    tokenizer.image_token = IMAGE_TAG
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"

    tower, image_processor = open_tower(vision_tower)
    extra = extra_tokens(tower, image_processor, feature_layer)
    processor = _processor(tokenizer, image_processor, tower, extra)
    model = _joined(tower, _language_model(language), tokenizer, feature_layer, processor, seed)
    prompts = PromptBuilder(
        tokenizer, chat_format, tokens_per_image=tokens_per_image(processor), template=processor.chat_template
    )
    # A template that training could not use is told now.
    turns = [Turn(role="user", text=f"{IMAGE_TAG}\nWhere?"), Turn(role="assistant", text="There.")]
    prompts.sample([*turns, Turn(role="user", text="And?"), turns[1]], f"chat format {chat_format} of {language}")
    checkpoint.save_full(target, model, processor, chat_format=chat_format, regions=("mark",))
    checkpoint.verify(target)


def _special(tokenizer: Any) -> list[str]:
    """The tokenizer's own further special tokens, which stay special."""
    known = getattr(tokenizer, "additional_special_tokens", None) or getattr(tokenizer, "extra_special_tokens", None)
    return [str(token) for token in (known.values() if isinstance(known, dict) else known or [])]


def _language_model(place: Path | str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(place, dtype="auto", output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"language model {place}: cannot be opened ({first_line(error)})") from error
    absent = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if absent:
        raise CheckpointError(f"language model {place}: tensors are missing or misfit: {', '.join(absent[:5])}")
    return model


def _joined(tower: Any, language: Any, tokenizer: Any, feature_layer: int, processor: Any, seed: int) -> Any:
    """A LlavaForConditionalGeneration of both, in the language model's number format."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    image_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TAG))
    kind = next(language.parameters()).dtype
    words = language.get_input_embeddings().weight.detach()
    rows = max(words.shape[0], image_id + 1)
    text, vision = language.config, tower.config
    text.vocab_size = rows
    tied = bool(text.tie_word_embeddings)
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=image_id, projector_hidden_act="gelu",
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        image_seq_length=tokens_per_image(processor), tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = LlavaMultiModalProjector(config)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    own = model.state_dict()
    tensors = {
        f"model.language_model.{name}": value for name, value in language.get_decoder().state_dict().items()
    }
    embedding = "model.language_model.embed_tokens.weight"
    tensors[embedding] = with_rows(words, rows)
    tensors["lm_head.weight"] = (
        tensors[embedding] if tied else with_rows(language.get_output_embeddings().weight.detach(), rows)
    )
    tensors |= {f"model.multi_modal_projector.{name}": value for name, value in projector.state_dict().items()}
    # Whether the encoder's weights lie under "vision_model." differs between versions of transformers.
    nested = any(name.startswith("model.vision_tower.vision_model.") for name in own)
    for name, value in tower.state_dict().items():
        bare = name.removeprefix("vision_model.")
        tensors["model.vision_tower." + ("vision_model." if nested else "") + bare] = value
    refuse("the assembled model", differences(own, tensors))
    model.load_state_dict({name: value.to(kind) for name, value in tensors.items()}, assign=True)
    model.tie_weights()
    model.config.dtype = kind
    model.generation_config = language.generation_config
    return model


def _processor(tokenizer: Any, image_processor: Any, tower: Any, extra: int) -> Any:
    """``extra``: states before those of the patches; the first of them is the class token."""
    from transformers import LlavaProcessor

    return LlavaProcessor(
        image_processor=square_padding(image_processor), tokenizer=tokenizer, patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default" if extra else "full", num_additional_image_tokens=extra,
        chat_template=tokenizer.chat_template,
    )
