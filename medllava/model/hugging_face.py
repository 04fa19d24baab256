"""A stock Hugging Face LLaVA folder: whether all of it is there and fits together, told before weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medllava.errors import CheckpointError, first_line
from medllava.jsonl import read_json
from medllava.model import manifest as manifests
from medllava.model.tensors import read_shapes, refuse

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Any of these holds a tokenizer's vocabulary."""


def check_folder(folder: Path) -> None:
    """Config, tokenizer and every weight file there and whole, widths that fit. Raises CheckpointError."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(
            f"{folder}: not a checkpoint; looked for {manifests.FILE} (this project's) and config.json (Hugging Face)"
        )
    kind = read_json(config_file).get("model_type")
    if kind != "llava":
        raise CheckpointError(f"{config_file}: model_type is {kind!r}, expected 'llava'")
    index = folder / "model.safetensors.index.json"
    weight_map = read_json(index)["weight_map"] if index.is_file() else {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted(set(weight_map.values())) or ["model.safetensors"]:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: weight file {name} is missing")
        shapes |= read_shapes(folder / name)
    refuse(str(index), [f"missing {name}" for name in sorted(weight_map.keys() - shapes.keys())])
    _check_widths(folder, read_json(config_file), shapes)
    check_tokenizer(folder)


def _check_widths(folder: Path, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The tensors where the parts meet, by the end of their names: versions of transformers differ in the beginning."""
    vision, text = (config.get(part, {}).get("hidden_size") for part in ("vision_config", "text_config"))
    vocabulary = config.get("text_config", {}).get("vocab_size")
    layers = config.get("vision_feature_layer", -2)
    width = vision * len(layers) if vision and isinstance(layers, list) else vision
    expected = {
        "multi_modal_projector.linear_1.weight": (text, width), "multi_modal_projector.linear_2.weight": (text, text),
        "language_model.model.embed_tokens.weight": (vocabulary, text),
    }
    for name, found in shapes.items():
        wanted = next((shape for end, shape in expected.items() if name.endswith(end)), None)
        if wanted and None not in wanted and found != wanted:
            refuse(str(folder), [f"mis-shaped {name} (file {found}, config.json {wanted})"])


def check_tokenizer(folder: Path) -> None:
    """Raises CheckpointError if there is no vocabulary."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(f"{folder}: it has no tokenizer; looked for {', '.join(TOKENIZER_FILES)}")


def check_generation_config(folder: Path) -> None:
    """Raises CheckpointError if its generation settings could not be saved again."""
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if not file.is_file():
        return
    try:
        config = GenerationConfig.from_pretrained(folder)
        normalise_generation_config(config)
        config.validate(strict=True)
    except (ValueError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{file}: a model with these settings cannot be saved again ({first_line(error)}); correct or remove it"
        ) from error


def normalise_generation_config(config: Any) -> None:
    """Drop sampling values from a greedy generation config, and values of beam search from one without beams:
    transformers refuses to save the mixture (Vicuna ships it), and would do so only when training is over."""
    if config is None:
        return
    if not config.do_sample:
        for name in ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            if hasattr(config, name):
                setattr(config, name, None)
    if config.num_beams in (None, 1):
        config.early_stopping = config.length_penalty = None


def load_processor(folder: Path) -> Any:
    """The folder's processor, with what older folders leave to the model's config. Raises CheckpointError."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: its processor cannot be opened: {first_line(error)}") from error
    if not hasattr(processor, "image_processor"):
        raise CheckpointError(f"{folder}: it has a tokenizer but no image processor (preprocessor_config.json)")
    # Folders of llava-hf before transformers 4.46 leave these two to the model's config.
    config_file = folder / "config.json"
    if processor.patch_size is None and config_file.is_file():
        config = read_json(config_file)
        processor.patch_size = config["vision_config"].get("patch_size", 14)
        processor.vision_feature_select_strategy = config.get("vision_feature_select_strategy", "default")
        processor.num_additional_image_tokens = 1 if "clip" in config["vision_config"].get("model_type", "") else 0
    return processor
