"""Checkpoint folders: saved whole or not at all, opened by path alone, refused if a tensor is missing or misfits.

A folder is one of:

- ``full``       a stock Hugging Face LLaVA folder (``config.json``, ``*.safetensors``, processor, chat template), with
                 ``medllava.json`` if this project made it;
- ``projector``  ``projector.safetensors``, the processor and ``medllava.json`` that names the base;
- ``lora``       a PEFT adapter (``adapter_config.json``, ``adapter_model.safetensors``), the projector that was trained
                 with it, the processor and ``medllava.json``.

The latter two also hold ``vision_tower.safetensors`` if layers of the tower were trained. Which kind it is is read from
the files; the folder's name means nothing. All that can be told from files' headers is told before weights are read.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medllava.errors import CheckpointError, ConfigError, MissingExtraError, first_line
from medllava.jsonl import read_json, write_json
from medllava.model import card, hugging_face
from medllava.model import manifest as manifests
from medllava.model.folders import write_folder
from medllava.model.hub import hub_id, local_folder
from medllava.model.manifest import Manifest
from medllava.model.pixels import image_side, padding_of
from medllava.model.prompt import TEMPLATES
from medllava.model.tensors import assign, differences, misfits, read_shapes, read_tensors, refuse, shapes_of

log = logging.getLogger(__name__)
# PEFT imports it where it is there, 4 bits or not. It says of each layer, each time, to which precision it converts,
# and that faster kernels could be fetched.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

PROJECTOR_FILE = "projector.safetensors"
TOWER_FILE = "vision_tower.safetensors"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Loaded:
    """An open checkpoint. ``model`` is a stock LlavaForConditionalGeneration (or a PeftModel around one, if a LoRA
    checkpoint was loaded without merging); ``manifest`` is written for plain Hugging Face folders too."""

    model: Any
    processor: Any
    manifest: Manifest
    base: str | None
    """The full model that a projector or LoRA folder stands on: a path or a hub id."""
    tower: tuple[str, ...] = ()
    """Tensors of the vision tower that are not the base's, as named in ``vision_tower.safetensors``."""

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def image_processor(self) -> Any:
        return self.processor.image_processor


def describe(path: Path) -> Manifest:
    """The folder's manifest, after checking that every file it needs is there; no weight is loaded.

    A stock Hugging Face LLaVA folder gets a manifest made from its files. Raises CheckpointError.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder" if not path.exists() else f"{path}: is not a folder")
    manifest = manifests.read_manifest(path)
    if manifest is None:
        _refuse_original(path)
        hugging_face.check_folder(path)
        processor = hugging_face.load_processor(path)
        return Manifest(
            kind="full", chat_format="template", image_size=image_side(processor.image_processor),
            padding=padding_of(processor.image_processor), regions=("mark",),
        )
    needed = {
        "full": ("config.json",),
        "projector": (PROJECTOR_FILE,),
        "lora": (*ADAPTER_FILES, PROJECTOR_FILE),
    }[manifest.kind]
    if manifest.tower_trained:
        needed += (TOWER_FILE,)
    for name in (*needed, "processor_config.json", "tokenizer_config.json"):
        if not (path / name).is_file():
            raise CheckpointError(
                f"{path}: {name} is missing; a {manifest.kind} checkpoint cannot be used without it (copy the whole"
                " folder again, or train again)"
            )
    if manifest.kind == "full":
        hugging_face.check_folder(path)
    elif manifest.base is None:
        raise CheckpointError(f"{path / manifests.FILE}: a {manifest.kind} checkpoint must name its base")
    hugging_face.check_tokenizer(path)
    return manifest


def _refuse_original(path: Path) -> None:
    """Folders of LLaVA's own format are converted once, not opened. Raises CheckpointError with the command."""
    config = path / "config.json"
    adapter = (path / "non_lora_trainables.bin").is_file()
    projector = (path / "mm_projector.bin").is_file()
    named = config.is_file() and "mm_vision_tower" in read_json(config)
    if not (adapter or projector or named):
        return
    whole = any(path.glob("pytorch_model*")) or any(path.glob("model*.safetensors"))
    needed = " --base LANGUAGE_MODEL" if adapter or not whole else ""
    raise CheckpointError(
        f"{path}: a folder in LLaVA's own format; convert it once, then name the new folder: python -m medllava.model"
        f" convert {path} {path.name}-hf{needed}"
    )


def verify(path: Path, base: str | Path | None = None) -> tuple[Manifest, Any, str | Path]:
    """Everything that can be told before weights are read: files there and whole, shapes that fit the base, a tokenizer
    and processor that open, generation settings that can be saved again.

    base: in place of the one that a projector or LoRA folder names.
    Returns (manifest, processor, the full model's folder or hub id). Raises CheckpointError.
    """
    manifest = describe(path)
    processor = hugging_face.load_processor(path)
    own = path if manifest.kind == "full" else None
    base = own or (resolve_base(path, manifest) if base is None else local_folder(base))
    if isinstance(base, Path):
        if base != path:
            hugging_face.check_folder(base)
        hugging_face.check_generation_config(base)
    if manifest.kind != "full":
        _check_parts(path, manifest, base)
    return manifest, processor, base


def load(
    path: str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    load_4bit: bool = False,
    load_8bit: bool = False,
    merge: bool = True,
    base: str | Path | None = None,
) -> Loaded:
    """Open a checkpoint folder (or hub id) for use, in evaluation mode.

    device: "cuda", "mps", "cpu", "cuda:1", ...; by default the first of these that exists. "auto": the layers of the
        language model are spread over all CUDA cards, for a model that is too large for one; with one card or none, as
        by default.
    dtype: "float32", "bfloat16" or "float16"; by default bfloat16 on CUDA (float16 on cards without it), else float32.
    load_4bit, load_8bit: quantize the language model (only it) through bitsandbytes.
    merge: fold LoRA adapters into the weights, which makes the model a stock one; never done on quantized weights.
    base: folder or hub id of the full model under a projector or LoRA folder, if not the one that it names.
    Raises CheckpointError (incomplete, damaged or misfitting folder), MissingExtraError (bitsandbytes) or ConfigError
    (no such device here).
    """
    folder = local_folder(path)
    spread = device == "auto" and torch.cuda.device_count() > 1
    place = _there(device) if device not in (None, "auto") else best_device()
    kind = _dtype(dtype, place)
    told = base is not None
    manifest, processor, base = verify(folder, base)
    quantization = _quantization(kind, load_4bit=load_4bit, load_8bit=load_8bit)
    model = _load_full(base, None if told else manifest.revision, place, kind, quantization, spread=spread)
    if manifest.kind == "full":
        return Loaded(model.eval(), processor, manifest, None)
    assign(model.model.multi_modal_projector, read_tensors(folder / PROJECTOR_FILE), folder / PROJECTOR_FILE)
    tower: dict[str, torch.Tensor] = {}
    if manifest.tower_trained:
        tower = read_tensors(folder / TOWER_FILE)
        assign(model.model.vision_tower, tower, folder / TOWER_FILE, partly=True)
    if manifest.kind == "lora":
        model = _with_adapter(model, folder)
        if merge and quantization is None:
            model = model.merge_and_unload()
    return Loaded(model.eval(), processor, manifest, str(base), tuple(tower))


def skeleton(base: str | Path, revision: str | None = None) -> Any:
    """The full model without weights (on the device ``meta``): its names and shapes, in no time and memory."""
    from transformers import AutoConfig, LlavaForConditionalGeneration

    try:
        config = AutoConfig.from_pretrained(base, revision=revision or "main")
        with torch.device("meta"):
            return LlavaForConditionalGeneration(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{base}: its config.json cannot be used: {first_line(error)}") from error


def add_adapters(model: Any, folder: Path) -> Any:
    """The model with adapters as the folder's ``adapter_config.json`` says, not yet with their weights."""
    from peft import LoraConfig, get_peft_model

    try:
        config = LoraConfig.from_pretrained(str(folder))
        config.base_model_name_or_path = model.name_or_path
        with quiet_peft():
            return get_peft_model(model, config)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder / ADAPTER_FILES[0]}: cannot be used: {first_line(error)}") from error


def best_device() -> str:
    """The first that is here of "cuda", "mps", "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _there(device: str) -> str:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {device!r} cannot be used here ({first_line(error)}); leave it out to use {best_device()!r}"
        ) from error
    return device


def save_full(path: Path, model: Any, processor: Any, *, chat_format: str, **facts: Any) -> None:
    """Write a stock Hugging Face folder with its manifest. ``facts``: further fields of the manifest."""

    def write(folder: Path) -> None:
        hugging_face.normalise_generation_config(getattr(model, "generation_config", None))
        model.save_pretrained(folder)

    _save(path, write, processor, kind="full", chat_format=chat_format, **facts)


def save_projector(
    path: Path, model: Any, processor: Any, *, base: str | Path, chat_format: str, tower: Collection[str] = (),
    **facts: Any,
) -> None:
    """Write the projector, and the tensors of the vision tower that are named in ``tower``; ``base`` is the full
    checkpoint (folder or hub id) that holds the rest."""

    def write(folder: Path) -> None:
        _write_projector(folder, model, tower)

    facts |= _standing_on(base, path) | {"tower_trained": bool(tower)}
    _save(path, write, processor, kind="projector", chat_format=chat_format, **facts)


def save_lora(
    path: Path, model: Any, processor: Any, *, base: str | Path, chat_format: str, tower: Collection[str] = (),
    **facts: Any,
) -> None:
    """Write the adapters of a PeftModel together with what :func:`save_projector` writes."""

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        # PEFT writes the absolute path that the base had during training, which is wrong anywhere else.
        config = read_json(folder / ADAPTER_FILES[0])
        config["base_model_name_or_path"] = base_reference(base, path)
        write_json(folder / ADAPTER_FILES[0], config)
        (folder / "README.md").unlink(missing_ok=True)
        _write_projector(folder, model.get_base_model(), tower)

    facts |= _standing_on(base, path) | {"tower_trained": bool(tower)}
    _save(path, write, processor, kind="lora", chat_format=chat_format, **facts)


def base_reference(base: str | Path, folder: Path) -> str:
    """How a manifest in ``folder`` writes its base: relative to the folder if it is a folder, else the hub id."""
    if not Path(base).exists():
        return str(base)
    if found := hub_id(Path(base)):
        return found[0]
    relative = os.path.relpath(Path(base).resolve(), folder.resolve())
    return relative if relative.startswith(".") else f"./{relative}"


def _standing_on(base: str | Path, folder: Path) -> dict[str, Any]:
    """What a manifest in ``folder`` says of its base."""
    found = hub_id(Path(base))
    return {
        "base": base_reference(base, folder), "revision": found[1] if found else None,
        "tower_mark": _tower_mark(Path(base)),
    }


def _tower_mark(base: Path) -> tuple[float, ...]:
    """Eight weights of the first layer of a full folder's vision tower; none where they cannot be read from here."""
    from safetensors import safe_open

    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if "vision_tower." in name and "patch_embed" in name and name.endswith(".weight"):
                    values = file.get_tensor(name).flatten().float()
                    return tuple(round(float(value), 6) for value in values[:: max(1, len(values) // 8)][:8])
    return ()


def resolve_base(folder: Path, manifest: Manifest) -> str | Path:
    """Where the base is now. Raises CheckpointError if it is a path and nothing is there."""
    base = manifest.base or ""
    if not base.startswith(".") and not Path(base).is_absolute():
        return base
    found = (folder.resolve() / base).resolve()
    if not found.is_dir():
        raise CheckpointError(
            f"{folder}: its base model is not at {found}; move the base there, or set 'base' in"
            f" {folder / manifests.FILE} to where it is"
        )
    return found


def prove(folder: Path, trained: Mapping[str, torch.Tensor]) -> None:
    """Read a checkpoint back and compare every trained weight (named as in the model that was saved) bit by bit.

    Raises CheckpointError that names the first tensor that is not what was saved.
    """
    manifest, _, _ = verify(folder)
    if manifest.kind == "full":
        found = dict(load(folder, device="cpu", dtype="float32").model.named_parameters())
    else:
        found = {f"model.multi_modal_projector.{k}": v for k, v in read_tensors(folder / PROJECTOR_FILE).items()}
        if manifest.tower_trained:
            found |= {f"model.vision_tower.{k}": v for k, v in read_tensors(folder / TOWER_FILE).items()}
        if manifest.kind == "lora":
            found |= {
                re.sub(r"\.(lora_[AB])\.", r".\1.default.", name.removeprefix("base_model.model.")): tensor
                for name, tensor in read_tensors(folder / ADAPTER_FILES[1]).items()
            }
    for name, value in trained.items():
        if name not in found:
            raise CheckpointError(f"{folder}: the trained weight {name} is not in the checkpoint that was written")
        if not torch.equal(found[name].float(), value.detach().cpu().float()):
            raise CheckpointError(f"{folder}: {name} was written, but is not the same when read back")


@contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT asks transformers a question that some versions answer with a deprecation warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        yield


def projector_state(model: Any) -> dict[str, torch.Tensor]:
    """The projector's tensors, on the CPU, named as in ``projector.safetensors``."""
    state = model.model.multi_modal_projector.state_dict()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def new_manifest(processor: Any, **facts: Any) -> Manifest:
    """A manifest of what is in memory now."""
    image_processor = processor.image_processor
    return Manifest(
        image_size=image_side(image_processor), padding=padding_of(image_processor),
        versions=manifests.current_versions() | manifests.code_version(), created=manifests.now(), **facts,
    )


def _save(path: Path, write: Callable[[Path], None], processor: Any, **facts: Any) -> None:
    from transformers.utils import logging as transformers_logging

    manifest = new_manifest(processor, **facts)
    if manifest.chat_format in TEMPLATES:
        processor.chat_template = TEMPLATES[manifest.chat_format]

    # Decides the ids after "</s>" (see PromptBuilder); transformers reads it, but leaves it out of what it writes.
    if getattr(processor.tokenizer, "legacy", False):
        processor.tokenizer.init_kwargs["legacy"] = True

    def write_all(folder: Path) -> None:
        transformers_logging.disable_progress_bar()
        write(folder)
        processor.save_pretrained(folder)
        manifests.write_manifest(folder, manifest)
        (folder / card.FILE).write_text(card.model_card(manifest), encoding="utf-8")

    write_folder(path, write_all, last=("config.json", manifests.FILE))


def _write_projector(folder: Path, model: Any, tower: Collection[str]) -> None:
    from safetensors.torch import save_file

    save_file(projector_state(model), folder / PROJECTOR_FILE, metadata={"format": "pt"})
    if tower:
        state = model.model.vision_tower.state_dict()
        chosen = {name: state[name].detach().cpu().contiguous() for name in tower}
        save_file(chosen, folder / TOWER_FILE, metadata={"format": "pt"})


def _dtype(name: str | None, device: str) -> torch.dtype:
    if name is None:
        if not device.startswith("cuda"):
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in kinds:
        raise CheckpointError(f"dtype {name!r} is not one of: {', '.join(kinds)}")
    return kinds[name]


def _quantization(dtype: torch.dtype, *, load_4bit: bool, load_8bit: bool) -> Any:
    """A config that quantizes the language model's linear layers and nothing else; None if none was asked for."""
    if not (load_4bit or load_8bit):
        return None
    if load_4bit and load_8bit:
        raise CheckpointError("choose one of 4-bit and 8-bit loading")
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingExtraError("bitsandbytes", "gpu", error) from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=load_4bit, load_in_8bit=load_8bit, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # Full module paths: a bare "vision_tower" does not match, and would silently be quantized.
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )


def _attention(device: str, dtype: torch.dtype) -> str:
    if device.startswith("cuda") and dtype != torch.float32:
        try:
            import flash_attn  # noqa: F401
        except ModuleNotFoundError:
            log.info("flash-attn is not installed; using PyTorch's own attention")
        except (ImportError, OSError, RuntimeError) as error:
            log.warning("flash-attn is installed and broken (%s); using PyTorch's own attention", error)
        else:
            return "flash_attention_2"
    return "sdpa"


def _load_full(
    source: str | Path, revision: str | None, device: str, dtype: torch.dtype, quantization: Any, *, spread: bool
) -> Any:
    """Load a stock folder or hub id; every tensor must be there, expected and of the right shape."""
    from safetensors import SafetensorError
    from transformers import LlavaForConditionalGeneration
    from transformers.utils import logging as transformers_logging

    if isinstance(source, Path):
        hugging_face.check_folder(source)
    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"quantization_config": quantization, "device_map": device} if quantization else {}
    if spread:
        options["device_map"] = "auto"
    try:
        model, report = LlavaForConditionalGeneration.from_pretrained(
            source, revision=revision or "main", dtype=dtype, attn_implementation=_attention(device, dtype),
            output_loading_info=True, ignore_mismatched_sizes=True, **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{source}: cannot be loaded: {first_line(error)}") from error
    faults = [f"missing {name}" for name in sorted(report["missing_keys"])]
    faults += [f"unexpected {name}" for name in sorted(report["unexpected_keys"])]
    faults += [f"mis-shaped {_mismatch(entry)}" for entry in report["mismatched_keys"]]
    refuse(str(source), faults)
    hugging_face.normalise_generation_config(model.generation_config)
    if spread:
        check_spread(source, model.hf_device_map)
    if quantization is None:
        return model if spread else model.to(device)
    for module in model.modules():
        # bitsandbytes packs 4-bit weights anew for CPUs with AVX-512, 64 columns at a time, and fails on others.
        if getattr(module, "support_avx512bf16_for_cpu", False) and module.in_features % 64:
            module.support_avx512bf16_for_cpu = False
    return model


def check_spread(source: str | Path, places: Mapping[str, int | str]) -> None:
    """Refuse a model that does not fit on the cards, parts of which accelerate would keep elsewhere and fetch for every
    token. ``places``: part of the model -> device."""
    off = [name for name, place in places.items() if place in ("cpu", "disk")]
    if off:
        raise CheckpointError(
            f"{source}: does not fit on the {torch.cuda.device_count()} cards (no room for {off[0]} and {len(off) - 1}"
            " further parts); try --load-4bit, or more cards"
        )


def _mismatch(entry: Any) -> str:
    if isinstance(entry, tuple | list) and len(entry) == 3:
        return f"{entry[0]} (file {tuple(entry[1])}, model {tuple(entry[2])})"
    return str(entry)


def _check_parts(folder: Path, manifest: Manifest, base: str | Path) -> None:
    """Compare the headers of a projector or LoRA folder's files with the base, so that a misfit is told before
    gigabytes are read."""
    projector = read_shapes(folder / PROJECTOR_FILE)
    model = skeleton(base, manifest.revision)
    own = shapes_of(model.model.multi_modal_projector.state_dict())
    weight = projector.get("linear_1.weight")
    if weight is not None and weight != own["linear_1.weight"]:
        raise CheckpointError(
            f"{folder / PROJECTOR_FILE}: it maps {weight[1]} -> {weight[0]} features, but its base {base}"
            f" needs {own['linear_1.weight'][1]} -> {own['linear_1.weight'][0]}; mis-shaped linear_1.weight (file"
            f" {weight}, model {own['linear_1.weight']}): it belongs to another base"
        )
    refuse(str(folder / PROJECTOR_FILE), misfits(own, projector))
    mark = _tower_mark(base) if isinstance(base, Path) else ()
    # Less exact than any number format that a base may be copied into.
    if any(abs(one - other) > 0.02 * abs(one) + 1e-4 for one, other in zip(manifest.tower_mark, mark, strict=False)):
        raise CheckpointError(
            f"{folder}: was trained on another vision tower than that of {base}, so that its projector means nothing"
            " there; name the base that it was trained on, or train a projector for this one"
        )
    if manifest.tower_trained:
        tower = read_shapes(folder / TOWER_FILE)
        every = shapes_of(model.model.vision_tower.state_dict())
        refuse(str(folder / TOWER_FILE), misfits({k: v for k, v in every.items() if k in tower}, tower))
    if manifest.kind == "lora":
        found = read_shapes(folder / ADAPTER_FILES[1])
        from peft import get_peft_model_state_dict

        expected = shapes_of(get_peft_model_state_dict(add_adapters(model, folder)))
        refuse(str(folder / ADAPTER_FILES[1]), misfits(expected, found))


def _with_adapter(model: Any, folder: Path) -> Any:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    tensors = read_tensors(folder / ADAPTER_FILES[1])
    wrapped = add_adapters(model, folder)
    expected = get_peft_model_state_dict(wrapped)
    refuse(str(folder / ADAPTER_FILES[1]), differences(expected, tensors))
    set_peft_model_state_dict(wrapped, tensors)
    return wrapped
