"""Tensors in files against tensors of a model: read whole or by their headers, compared by name and shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from medllava.errors import CheckpointError, first_line


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a file's tensors, from its header. Raises CheckpointError if the file is cut off or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or cut off ({first_line(error)})") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A file's tensors, on the CPU. Raises CheckpointError like :func:`read_shapes`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or cut off ({first_line(error)})") from error


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """By name, for :func:`misfits`."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def assign(module: torch.nn.Module, tensors: dict[str, torch.Tensor], source: Path, *, partly: bool = False) -> None:
    """Copy ``tensors``, all of the module's or with ``partly`` some, into it. Raises CheckpointError naming misfits."""
    own = module.state_dict()
    expected = {name: tensor for name, tensor in own.items() if name in tensors} if partly else own
    refuse(str(source), differences(expected, tensors))
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def differences(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> list[str]:
    """Tensors that are missing, unexpected or mis-shaped, by name."""
    return misfits(shapes_of(expected), shapes_of(found))


def misfits(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """:func:`differences`, given the shapes."""
    faults = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    faults += [f"unexpected {name}" for name in sorted(found.keys() - expected.keys())]
    faults += [
        f"mis-shaped {name} (file {found[name]}, model {expected[name]})"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    return faults


def refuse(source: str, faults: list[str]) -> None:
    """Raises CheckpointError that names the first five of ``faults``; none, and nothing happens."""
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(f"{source}: tensors do not match the model: {'; '.join(faults[:5])}{more}")
