"""Original LLaVA folders (LLaVA, Quilt-LLaVA) to a stock Hugging Face folder, tensor by tensor.

Three kinds are told apart by their files: a full model, a LoRA adapter with ``non_lora_trainables.bin``, and a
projector alone (``mm_projector.bin``); the latter two need the language model that they were trained on. All become
full checkpoints. Every tensor that is read must find its place, and every place must be filled; pickled files are
opened with ``weights_only=True`` alone. What is written is read back and compared before the command ends.
"""

from __future__ import annotations

import hashlib
import logging
import math
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from medllava.conversation import IMAGE_TAG
from medllava.errors import CheckpointError, first_line
from medllava.jsonl import read_json
from medllava.model import checkpoint, manifest
from medllava.model.manifest import Padding
from medllava.model.pixels import square_padding
from medllava.model.prompt import TEMPLATES
from medllava.model.tensors import differences, read_tensors, refuse
from medllava.model.tower import extra_tokens, open_tower

log = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]

PROJECTOR = "mm_projector.bin"
NON_LORA = "non_lora_trainables.bin"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")

_TEXT_MODELS = {
    "llama": "llama", "llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "mistral": "mistral",
}
"""model_type of an original config -> that of its language model."""

_TOWER = "model.vision_tower.vision_tower."
_LINEARS = {"mm_projector.0.": "linear_1.", "mm_projector.2.": "linear_2."}
_ROUNDING = 1e-3
"""Most that a tower's copy in half precision differs from the tower, as a part of its largest weight."""


def convert(
    source: Path, target: Path, *, base: Path | None = None, vision_tower: Path | None = None,
    chat_format: str = "vicuna_v1", padding: Padding | None = None,
) -> None:
    """Write the original LLaVA folder ``source`` as a full checkpoint ``target``.

    base: the language model of a LoRA or projector folder; by default what the folder names, looked for beside it.
    vision_tower: folder of the image encoder; by default what the config names: an absolute path, one relative to the
        folder that holds ``source``, or a Hugging Face name.
    padding: whether pictures are padded to a square or the middle square is cut out; by default as the folder's
        ``image_aspect_ratio`` says, which is how it was trained.
    Raises CheckpointError naming the file and what was expected; nothing is left in ``target`` then.
    """
    if chat_format not in TEMPLATES:
        raise CheckpointError(f"--chat-format {chat_format}: choose one of {', '.join(TEMPLATES)}")
    config = _original_config(source)
    if padding is not None:
        config["image_aspect_ratio"] = "pad" if padding == "square" else "square"
    adapter = next((source / name for name in ADAPTERS if (source / name).is_file()), None)
    if adapter is not None:
        language = _base_folder(source, base, config, adapter=True)
        tensors = _weights(language)
        _merge_adapter(tensors, adapter, source)
    elif (source / PROJECTOR).is_file() and not _weight_files(source):
        language = _base_folder(source, base, config, adapter=False)
        tensors = _weights(language) | _renamed(_pickled(source / PROJECTOR))
    else:
        language = source
        tensors = _weights(source)
    tower, image_processor = _tower(source, config, vision_tower)
    model, processor = _assembled(source, language, config, tensors, tower, image_processor)
    model.generation_config = _generation_config(language)
    checkpoint.save_full(target, model, processor, chat_format=chat_format, regions=("mark",))
    written = _hashes(_stored(target))
    if written != _hashes(model.state_dict().items()):
        (target / manifest.FILE).unlink()
        raise CheckpointError(f"{target}: what was read back differs from what was written; the disk may be faulty")
    checkpoint.describe(target)


def _original_config(source: Path) -> dict[str, Any]:
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source}: no config.json; expected an original LLaVA folder")
    config: dict[str, Any] = read_json(source / "config.json")
    if "mm_vision_tower" not in config:
        raise CheckpointError(
            f"{source / 'config.json'}: no 'mm_vision_tower', so it is no original LLaVA folder; a Hugging Face LLaVA"
            " folder needs no conversion"
        )
    if config.get("model_type") not in _TEXT_MODELS:
        raise CheckpointError(f"{source}: model_type {config.get('model_type')!r}; known: {', '.join(_TEXT_MODELS)}")
    if config.get("mm_projector_type") != "mlp2x_gelu":
        raise CheckpointError(
            f"{source}: projector type {config.get('mm_projector_type')!r}; Hugging Face's LLaVA has mlp2x_gelu alone"
        )
    if config.get("mm_use_im_start_end"):
        raise CheckpointError(f"{source}: mm_use_im_start_end is set; pictures between two marker tokens are not known")
    return config


def _base_folder(source: Path, base: Path | None, config: dict[str, Any], *, adapter: bool) -> Path:
    """Where the language model of a LoRA or projector folder lies."""
    named = str(config.get("_name_or_path") or "")
    if adapter:
        named = str(read_json(source / checkpoint.ADAPTER_FILES[0]).get("base_model_name_or_path") or named)
    for place in [base] if base else [source.parent / named, Path(named)]:
        if place is not None and (place / "config.json").is_file():
            return place
    what = f"--base {base}: no language model there" if base else f"{source}: stands on {named or 'an unnamed model'!r}"
    raise CheckpointError(f"{what}; give the folder of the language model it was trained on with --base DIR")


# -- reading ---------------------------------------------------------------------------------------------------------


def _weight_files(folder: Path) -> list[Path]:
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            names = sorted(set(read_json(folder / index)["weight_map"].values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise CheckpointError(f"{folder}: weight file {missing[0]} is missing ({index} names it)")
            return [folder / name for name in names]
    return [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()][:1]


def _weights(folder: Path) -> Tensors:
    files = _weight_files(folder)
    if not files:
        raise CheckpointError(f"{folder}: no weights; looked for model.safetensors and pytorch_model.bin, also split")
    tensors: Tensors = {}
    for file in files:
        tensors |= read_tensors(file) if file.suffix == ".safetensors" else _pickled(file)
    return _renamed(tensors)


def _pickled(path: Path) -> Tensors:
    """A ``.bin`` file of tensors and nothing else."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: holds something else than tensors; refused, nothing of it was run") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged, cut off or not a file of tensors ({first_line(error)})") from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise CheckpointError(f"{path}: expected names and tensors")
    return found


def _renamed(tensors: Tensors) -> Tensors:
    """Original names -> those of a LlavaForConditionalGeneration. Tables that are computed are left out: of the rotary
    embedding, and of position numbers."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.endswith(("rotary_emb.inv_freq", "embeddings.position_ids")):
            continue
        plain = name.removeprefix("base_model.")
        plain = plain.removeprefix("model.") if plain.startswith(("model.model.", "model.lm_head.")) else plain
        if plain.startswith(_TOWER):
            renamed["tower." + plain.removeprefix(_TOWER).removeprefix("vision_model.")] = tensor
            continue
        bare = plain.removeprefix("model.")
        linear = next((part for part in _LINEARS if bare.startswith(part)), None)
        if linear:
            plain = "model.multi_modal_projector." + _LINEARS[linear] + bare.removeprefix(linear)
        elif plain.startswith("model."):
            plain = "model.language_model." + bare
        renamed[plain] = tensor
    return renamed


def _merge_adapter(tensors: Tensors, adapter: Path, source: Path) -> None:
    """Add the LoRA products to the weights they belong to, and put in what else was trained (Hu et al. 2021, eq. 3)."""
    if not (source / NON_LORA).is_file():
        raise CheckpointError(f"{source}: {NON_LORA} is missing; the projector of a LoRA folder is in it")
    settings = read_json(source / checkpoint.ADAPTER_FILES[0])
    rank = float(settings["r"])
    scale = float(settings["lora_alpha"]) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    raw = read_tensors(adapter) if adapter.suffix == ".safetensors" else _pickled(adapter)
    parts = _renamed({re.sub(r"\.lora_([AB])\.default\.", r".lora_\1.", name): value for name, value in raw.items()})
    down = {name: value for name, value in parts.items() if name.endswith(".lora_A.weight")}
    up = {name: value for name, value in parts.items() if name.endswith(".lora_B.weight")}
    others = sorted(parts.keys() - down.keys() - up.keys())
    if others or settings.get("bias", "none") != "none" or settings.get("fan_in_fan_out"):
        raise CheckpointError(f"{adapter}: holds more than LoRA products ({', '.join(others[:3]) or 'biases'})")
    for name, a in down.items():
        stem = name.removesuffix(".lora_A.weight")
        weight, b = tensors.get(f"{stem}.weight"), up.pop(f"{stem}.lora_B.weight", None)
        if weight is None or b is None:
            missing = f"weight {stem}.weight in the base" if weight is None else f"{stem}.lora_B.weight"
            raise CheckpointError(f"{adapter}: no {missing}")
        if weight.shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"{adapter}: {stem}: B {tuple(b.shape)} times A {tuple(a.shape)} does not fit the base's"
                f" {tuple(weight.shape)}; it belongs to another base"
            )
        tensors[f"{stem}.weight"] = (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)
    if up:
        raise CheckpointError(f"{adapter}: {sorted(up)[0]} has no lora_A")
    trained = _renamed(_pickled(source / NON_LORA))
    unknown = sorted(name for name in trained.keys() - tensors.keys() if not name.startswith(
        ("model.multi_modal_projector.", "tower.")))
    if unknown:
        raise CheckpointError(f"{source / NON_LORA}: {unknown[0]} belongs to no part of the model")
    tensors |= trained


def _tower(source: Path, config: dict[str, Any], folder: Path | None) -> tuple[Any, Any]:
    """The image encoder with its weights, and its image processor."""
    named = str(config["mm_vision_tower"])
    beside = source.parent / named
    return open_tower(folder or (beside if beside.is_dir() else Path(named) if Path(named).is_dir() else named))


# -- putting together ------------------------------------------------------------------------------------------------


def _assembled(
    source: Path, language: Path, config: dict[str, Any], tensors: Tensors, tower: Any, image_processor: Any
) -> tuple[Any, Any]:
    from transformers import CONFIG_MAPPING, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = open_tokenizer(source if (source / "tokenizer_config.json").is_file() else language)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TAG]})
    tokenizer.image_token = IMAGE_TAG
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TAG)

    embedding = "model.language_model.embed_tokens.weight"
    if embedding not in tensors:
        raise CheckpointError(f"{language}: no word embedding (model.embed_tokens.weight) among the weights")
    tensors.setdefault("lm_head.weight", tensors[embedding])  # tied weights are stored once
    for name in (embedding, "lm_head.weight"):
        tensors[name] = with_rows(tensors[name], image_id + 1)

    family = CONFIG_MAPPING[_TEXT_MODELS[config["model_type"]]]
    text = family.from_dict({
        key: value for key, value in config.items()
        if not key.startswith(("mm_", "image_", "tune_", "freeze_", "use_mm"))
        and key not in {"model_type", "architectures", "_name_or_path", "transformers_version"}
    })
    text.vocab_size = tensors[embedding].shape[0]
    text.tie_word_embeddings = False
    patches = config.get("mm_vision_select_feature", "patch") == "patch"
    _use_own_tower(source, config, tensors, tower)
    made = LlavaConfig(
        text_config=text, vision_config=tower.config, image_token_index=image_id, projector_hidden_act="gelu",
        vision_feature_layer=int(config.get("mm_vision_select_layer", -2)),
        vision_feature_select_strategy="default" if patches else "full", tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(made)
    own = model.state_dict()
    prefix = "model.vision_tower."
    state = tower.state_dict()
    # Whether the encoder's weights lie under "vision_model." differs between versions of transformers.
    nested = any(name.startswith(f"{prefix}vision_model.") for name in own)
    for name, tensor in state.items():
        bare = name.removeprefix("vision_model.")
        tensors[prefix + ("vision_model." if nested else "") + bare] = tensor
    refuse(str(source), differences(own, tensors))
    model.load_state_dict(tensors, assign=True)
    model.config.dtype = tensors[embedding].dtype

    if config.get("image_aspect_ratio") == "pad":
        image_processor = square_padding(image_processor)
    processor = LlavaProcessor(
        image_processor=image_processor, tokenizer=tokenizer, patch_size=tower.config.patch_size,
        vision_feature_select_strategy=made.vision_feature_select_strategy,
        num_additional_image_tokens=extra_tokens(tower, image_processor, made.vision_feature_layer),
    )
    return model, processor


def open_tokenizer(folder: Path | str) -> Any:
    """As the class that the folder's tokenizer names: told by the config of a LLaVA model, transformers takes a general
    one, which leaves out the space in front of a text."""
    import transformers

    try:
        named = Path(folder) / "tokenizer_config.json"  # a hub id has none here
        name = str(read_json(named).get("tokenizer_class")) if named.is_file() else ""
        family = getattr(transformers, name, transformers.AutoTokenizer)
        return family.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: its tokenizer cannot be opened ({first_line(error)})") from error


def with_rows(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows for new tokens, each the mean of the others: as an output its score is the mean score, never the best."""
    if weight.shape[0] >= rows:
        return weight
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - weight.shape[0], -1)])


def _use_own_tower(source: Path, config: dict[str, Any], tensors: Tensors, tower: Any) -> None:
    """Take the tower's weights out of ``tensors``. The original code reads them only where the tower was trained
    (``unfreeze_mm_vision_tower``); elsewhere they are a copy, which is compared."""
    own = {name.removeprefix("tower."): tensors.pop(name) for name in list(tensors) if name.startswith("tower.")}
    if not own:
        return
    state = {name.removeprefix("vision_model."): value for name, value in tower.state_dict().items()}
    refuse(f"{source} (vision tower)", differences(state, own))
    if config.get("unfreeze_mm_vision_tower"):
        with torch.no_grad():
            for name, value in state.items():
                value.copy_(own[name])
        return
    far = [name for name, value in state.items() if not _near(value.float(), own[name].float())]
    if far:
        log.warning(
            "%s: holds other weights for the vision tower than the tower's own folder (%s and %d more); the original"
            " code uses the folder's, and so does this", source, far[0], len(far) - 1,
        )


def _near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).abs().max()) <= _ROUNDING * max(float(one.abs().max()), 1e-6)


def _generation_config(folder: Path) -> Any:
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        config = read_json(folder / "config.json")
        return GenerationConfig(**{key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")})
    known = read_json(folder / "generation_config.json")
    # max_length counts the prompt, too: a folder that sets it to the context's length only makes later calls warn.
    return GenerationConfig(
        **{key: value for key, value in known.items() if key not in {"transformers_version", "max_length"}}
    )


# -- proof -----------------------------------------------------------------------------------------------------------


def _stored(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                yield name, opened.get_tensor(name)


def _hashes(tensors: Iterable[tuple[str, torch.Tensor]]) -> Counter[str]:
    """What the tensors hold, whatever they are called: the names in a file are those of another layer of the model."""
    found: Counter[str] = Counter()
    for _, tensor in tensors:
        data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        found[f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(data).hexdigest()}"] += 1
    return found
