"""Checkpoint folders: saved whole or not at all, opened by path alone, refused if a tensor is missing or misfits.

A folder is one of:

- ``full``       a stock Hugging Face LLaVA folder (``config.json``, ``*.safetensors``, processor, chat template), with
                 ``medllava.json`` if this project made it;
- ``projector``  ``projector.safetensors``, the processor and ``medllava.json`` that names the base;
- ``lora``       a PEFT adapter (``adapter_config.json``, ``adapter_model.safetensors``), the projector that was trained
                 with it, the processor and ``medllava.json``.

Which one is read from the files; the folder's name means nothing.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medllava.errors import CheckpointError, MissingExtraError
from medllava.jsonl import read_json
from medllava.model import manifest as manifests
from medllava.model.manifest import Manifest
from medllava.model.pixels import image_side, padding_of
from medllava.model.prompt import TEMPLATES

log = logging.getLogger(__name__)

PROJECTOR_FILE = "projector.safetensors"
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
        _check_hugging_face(path)
        processor = _load_processor(path)
        return Manifest(
            kind="full", chat_format="template", image_size=image_side(processor.image_processor),
            padding=padding_of(processor.image_processor),
        )
    needed = {
        "full": ("config.json",),
        "projector": (PROJECTOR_FILE,),
        "lora": (*ADAPTER_FILES, PROJECTOR_FILE),
    }[manifest.kind]
    for name in (*needed, "processor_config.json"):
        if not (path / name).is_file():
            raise CheckpointError(
                f"{path}: {name} is missing; a {manifest.kind} checkpoint cannot be used without it (copy the whole"
                " folder again, or train again)"
            )
    if manifest.kind == "full":
        _check_hugging_face(path)
    elif manifest.base is None:
        raise CheckpointError(f"{path / manifests.FILE}: a {manifest.kind} checkpoint must name its base")
    return manifest


def load(
    path: str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    load_4bit: bool = False,
    load_8bit: bool = False,
    merge: bool = True,
) -> Loaded:
    """Open a checkpoint folder for use (in evaluation mode).

    device: "cuda", "mps", "cpu", "cuda:1", ...; by default the first of these that exists.
    dtype: "float32", "bfloat16" or "float16"; by default bfloat16 on CUDA (float16 on cards without it), else float32.
    load_4bit, load_8bit: quantize the language model (only it) through bitsandbytes.
    merge: fold LoRA adapters into the weights, which makes the model a stock one; never done on quantized weights.
    Raises CheckpointError (incomplete, damaged or misfitting folder) or MissingExtraError (bitsandbytes).
    """
    folder = Path(path)
    manifest = describe(folder)
    place = device or best_device()
    kind = _dtype(dtype, place)
    quantization = _quantization(kind, load_4bit=load_4bit, load_8bit=load_8bit)
    if manifest.kind == "full":
        model = _load_full(folder, None, place, kind, quantization)
        return Loaded(model.eval(), _load_processor(folder), manifest, None)

    base = resolve_base(folder, manifest)
    projector = read_tensors(folder / PROJECTOR_FILE)
    _check_projector_fits(folder, projector, base)
    model = _load_full(base, manifest.revision, place, kind, quantization)
    _assign(model.model.multi_modal_projector, projector, folder / PROJECTOR_FILE)
    if manifest.kind == "lora":
        model = _with_adapter(model, folder)
        if merge and quantization is None:
            model = model.merge_and_unload()
    return Loaded(model.eval(), _load_processor(folder), manifest, str(base))


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def save_full(path: Path, model: Any, processor: Any, *, chat_format: str, **facts: Any) -> None:
    """Write a stock Hugging Face folder with its manifest. ``facts``: further fields of the manifest."""

    def write(folder: Path) -> None:
        normalise_generation_config(model)
        model.save_pretrained(folder)

    _save(path, write, processor, kind="full", chat_format=chat_format, **facts)


def save_projector(path: Path, model: Any, processor: Any, *, base: str | Path, chat_format: str, **facts: Any) -> None:
    """Write the projector alone; ``base`` is the full checkpoint (folder or hub id) that holds the rest."""

    def write(folder: Path) -> None:
        _write_projector(folder, model)

    facts["base"] = base_reference(base, path)
    _save(path, write, processor, kind="projector", chat_format=chat_format, **facts)


def save_lora(path: Path, model: Any, processor: Any, *, base: str | Path, chat_format: str, **facts: Any) -> None:
    """Write the adapters of a PeftModel together with the projector."""

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        # PEFT writes the absolute path that the base had during training, which is wrong anywhere else.
        config = read_json(folder / ADAPTER_FILES[0])
        config["base_model_name_or_path"] = base_reference(base, path)
        (folder / ADAPTER_FILES[0]).write_text(json.dumps(config, indent=1), encoding="utf-8")
        (folder / "README.md").unlink(missing_ok=True)
        _write_projector(folder, model.get_base_model())

    facts["base"] = base_reference(base, path)
    _save(path, write, processor, kind="lora", chat_format=chat_format, **facts)


def base_reference(base: str | Path, folder: Path) -> str:
    """How a manifest in ``folder`` writes its base: relative to the folder if it is a folder, else the hub id."""
    if not Path(base).exists():
        return str(base)
    relative = os.path.relpath(Path(base).resolve(), folder.resolve())
    return relative if relative.startswith(".") else f"./{relative}"


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


def normalise_generation_config(model: Any) -> None:
    """Drop sampling values from a greedy generation config: transformers refuses to save the mixture (Vicuna ships
    it), and would do so only when training is over."""
    config = getattr(model, "generation_config", None)
    if config is not None and not config.do_sample:
        config.temperature = config.top_p = config.top_k = None


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


def write_folder(path: Path, write: Callable[[Path], None], last: tuple[str, ...]) -> None:
    """Let ``write`` fill a temporary folder, then put its files into ``path``; files named in ``last`` go there last,
    and are removed first, so that a folder that has them is complete. Other files in ``path`` stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        with full_disk_told(path):
            write(temporary)
        mask = _umask()
        for file in temporary.iterdir():
            file.chmod(0o666 & ~mask)  # the libraries leave weights readable by their owner alone
            with file.open("rb") as written:
                os.fsync(written.fileno())
        if not path.exists():
            temporary.chmod(0o777 & ~mask)
            temporary.replace(path)
            return
        for name in last:
            (path / name).unlink(missing_ok=True)
        for file in sorted(temporary.iterdir(), key=lambda file: last.index(file.name) if file.name in last else -1):
            file.replace(path / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def full_disk_told(path: Path) -> Iterator[None]:
    """Turn the libraries' own words for a full disk into the OSError that it is."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if "os error 28" in str(error) or "unexpected pos" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _save(path: Path, write: Callable[[Path], None], processor: Any, **facts: Any) -> None:
    from transformers.utils import logging as transformers_logging

    image_processor = processor.image_processor
    manifest = Manifest(
        image_size=image_side(image_processor), padding=padding_of(image_processor),
        versions=manifests.current_versions(), created=manifests.now(), **facts,
    )
    if manifest.chat_format in TEMPLATES:
        processor.chat_template = TEMPLATES[manifest.chat_format]

    def write_all(folder: Path) -> None:
        transformers_logging.disable_progress_bar()
        write(folder)
        processor.save_pretrained(folder)
        manifests.write_manifest(folder, manifest)

    write_folder(path, write_all, last=("config.json", manifests.FILE))


def _write_projector(folder: Path, model: Any) -> None:
    from safetensors.torch import save_file

    save_file(projector_state(model), folder / PROJECTOR_FILE, metadata={"format": "pt"})


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
        except (ImportError, OSError, RuntimeError) as error:
            log.info("flash-attn is not usable (%s); using PyTorch's own attention", error)
        else:
            return "flash_attention_2"
    return "sdpa"


def _load_full(source: str | Path, revision: str | None, device: str, dtype: torch.dtype, quantization: Any) -> Any:
    """Load a stock folder or hub id; every tensor must be there, expected and of the right shape."""
    from safetensors import SafetensorError
    from transformers import LlavaForConditionalGeneration
    from transformers.utils import logging as transformers_logging

    if isinstance(source, Path):
        _check_hugging_face(source)
    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"quantization_config": quantization, "device_map": device} if quantization else {}
    try:
        model, report = LlavaForConditionalGeneration.from_pretrained(
            source, revision=revision or "main", dtype=dtype, attn_implementation=_attention(device, dtype),
            output_loading_info=True, ignore_mismatched_sizes=True, **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{source}: cannot be loaded: {_first_line(error)}") from error
    faults = [f"missing {name}" for name in sorted(report["missing_keys"])]
    faults += [f"unexpected {name}" for name in sorted(report["unexpected_keys"])]
    faults += [f"mis-shaped {_mismatch(entry)}" for entry in report["mismatched_keys"]]
    refuse(str(source), faults)
    normalise_generation_config(model)
    return model if quantization else model.to(device)


def _mismatch(entry: Any) -> str:
    if isinstance(entry, tuple | list) and len(entry) == 3:
        return f"{entry[0]} (file {tuple(entry[1])}, model {tuple(entry[2])})"
    return str(entry)


def _load_processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: its processor cannot be opened: {_first_line(error)}") from error
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


def _check_hugging_face(folder: Path) -> None:
    """Config and every weight file there and whole, before anything is loaded."""
    from safetensors import SafetensorError, safe_open

    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(
            f"{folder}: not a checkpoint; looked for {manifests.FILE} (this project's) and config.json (Hugging Face)"
        )
    kind = read_json(config_file).get("model_type")
    if kind != "llava":
        raise CheckpointError(f"{config_file}: model_type is {kind!r}, expected 'llava'")
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: weight file {name} is missing")
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder / name}: damaged or cut off ({_first_line(error)})") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or cut off ({_first_line(error)})") from error


def _check_projector_fits(folder: Path, projector: dict[str, torch.Tensor], base: str | Path) -> None:
    """Compare widths with the base's config, so that a misfit is told before gigabytes are read."""
    if not isinstance(base, Path):
        return
    _check_hugging_face(base)
    config = read_json(base / "config.json")
    vision, text = (config[part].get("hidden_size") for part in ("vision_config", "text_config"))
    layers = config.get("vision_feature_layer", -2)
    width = vision * len(layers) if vision and isinstance(layers, list) else vision
    weight = projector.get("linear_1.weight")
    if weight is not None and width and text and tuple(weight.shape) != (text, width):
        raise CheckpointError(
            f"{folder / PROJECTOR_FILE}: it maps {weight.shape[1]} -> {weight.shape[0]} features, but its base {base}"
            f" needs {width} -> {text}; it belongs to another base"
        )


def _assign(module: torch.nn.Module, tensors: dict[str, torch.Tensor], source: Path) -> None:
    own = module.state_dict()
    refuse(str(source), differences(own, tensors))
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _with_adapter(model: Any, folder: Path) -> Any:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    tensors = read_tensors(folder / ADAPTER_FILES[1])
    config = LoraConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = model.name_or_path
    with quiet_peft():
        wrapped = get_peft_model(model, config)
    refuse(str(folder / ADAPTER_FILES[1]), differences(get_peft_model_state_dict(wrapped), tensors))
    set_peft_model_state_dict(wrapped, tensors)
    return wrapped


def differences(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> list[str]:
    faults = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    faults += [f"unexpected {name}" for name in sorted(found.keys() - expected.keys())]
    faults += [
        f"mis-shaped {name} (file {tuple(found[name].shape)}, model {tuple(expected[name].shape)})"
        for name in sorted(expected.keys() & found.keys())
        if found[name].shape != expected[name].shape
    ]
    return faults


def refuse(source: str, faults: list[str]) -> None:
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(f"{source}: tensors do not match the model: {'; '.join(faults[:5])}{more}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
