"""``medllava doctor``: versions, devices, disk, and which optional features work here and why the others do not.

example: medllava doctor
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
import tomllib
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from io import StringIO
from pathlib import Path

import medllava
from medllava.errors import run_cli
from medllava.processes import usable_cores

MODULES = {
    "flash-attn": "flash_attn", "gradio_image_annotation": "gradio_image_annotation", "jinja2": "jinja2",
    "liger-kernel": "liger_kernel", "opencv-python-headless": "cv2", "openslide-bin": "openslide_bin",
    "openslide-python": "openslide", "pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn",
}
"""Package name -> the module it is imported as, where the two differ."""

EXTRAS = ("gen", "asr", "redact", "train", "gpu", "serve", "wsi", "eval", "ray", "wandb")
LEAST_FREE_GB = 10
PROJECT = Path(medllava.__file__).parents[1] / "pyproject.toml"
"""There in a checkout only."""


@dataclass(frozen=True)
class Finding:
    """One line of the report: ``state`` is ok, warn (works outside what was tested), missing or broken."""

    name: str
    state: str
    text: str


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="medllava doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--disk", type=Path, default=Path(), metavar="DIR", help="folder whose free space is told (default: this one)"
    )
    arguments = parser.parse_args(argv)
    requirements = read_requirements()
    _section("Python and packages", [_python(), *(check_package(line) for line in requirements.get("", []))])
    _section("Devices", devices())
    for extra in EXTRAS:
        found = [check_package(line) for line in requirements.get(extra, [])]
        works = all(finding.state in {"ok", "warn"} for finding in found)
        _section(f"Extra {extra}: {'works' if works else 'not complete'}", found)
    _section("Video", [_ffmpeg(), check_h264()])
    _section("Disk", [*(_disk(name, path) for name, path in _places(arguments.disk))])
    how = "-c constraints.txt -e '.[EXTRA]'" if PROJECT.is_file() else "'medllava[EXTRA]'"
    print(f"\nWhat is missing is needed only by the extra it stands under: pip install {how}")
    return 0


def _section(title: str, findings: list[Finding]) -> None:
    print(f"\n{title}")
    for finding in findings:
        print(f"  {finding.state:<8}{finding.name:<26}{finding.text}")


def read_requirements() -> dict[str, list[str]]:
    """Extra (``""``: none) -> requirement lines such as ``torch>=2.11``, of the checkout or the installed package."""
    found: dict[str, list[str]] = {}
    if PROJECT.is_file():
        table = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
        return {"": table["dependencies"], **table["optional-dependencies"]}
    try:
        lines = metadata.requires("medllava") or []
    except metadata.PackageNotFoundError:
        return found
    for line in lines:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        found.setdefault(extra.group(1) if extra else "", []).append(requirement.strip())
    return found


def check_package(requirement: str) -> Finding:
    """Import the package of a line such as ``flash-attn>=2.8`` and compare its version with the line.

    A package that is there but fails to import is told with the error it raised, unchanged.
    """
    name = re.split(r"[<>=!~\[ ]", requirement, maxsplit=1)[0]
    wanted = requirement[len(name) :].strip()
    module = MODULES.get(name, name.replace("-", "_"))
    if importlib.util.find_spec(module) is None:
        return Finding(name, "missing", f"not installed (wanted: {wanted})")
    try:
        with redirect_stdout(StringIO()):  # Some greet.
            importlib.import_module(module)
    except BaseException as error:  # A broken binary may raise anything, and to tell what is the point here.
        if isinstance(error, KeyboardInterrupt):
            raise
        return Finding(name, "broken", f"import {module} failed: {type(error).__name__}: {error}")
    version = _version(name, module)
    if version and not _fits(version, wanted):
        return Finding(name, "warn", f"{version}, tested with {wanted}")
    return Finding(name, "ok", version or "version unknown")


def _version(name: str, module: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return str(getattr(sys.modules[module], "__version__", ""))


def _fits(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def _python() -> Finding:
    version = platform.python_version()
    text = f"{version} on {platform.system()} {platform.machine()}, medllava {medllava.__version__}"
    return Finding("python", "ok" if sys.version_info >= (3, 11) else "warn", text)


def devices() -> list[Finding]:
    """Processor, memory and accelerators that torch can use, or why it cannot."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0.0
    found = [Finding("cpu", "ok", f"{usable_cores()} cores, {memory:.0f} GB of memory")]
    try:
        import torch
    except (ImportError, OSError) as error:
        return [*found, Finding("torch", "broken", f"{type(error).__name__}: {error}")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
            text = f"{properties.name}, {properties.total_memory / 2**30:.0f} GB, {bf16}"
            found.append(Finding(f"cuda:{index}", "ok", text))
    else:
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device or driver found"
        found.append(Finding("cuda", "missing", f"{reason} (torch {torch.__version__})"))
    if torch.backends.mps.is_available():
        found.append(Finding("mps", "ok", "Apple GPU"))
    return found


def _ffmpeg() -> Finding:
    path = shutil.which("ffmpeg")
    return Finding("ffmpeg", "ok" if path else "missing", path or "not on PATH; not needed, video goes through PyAV")


def check_h264() -> Finding:
    """Encode a few frames to H.264 and decode them again through PyAV."""
    try:
        import av
        import numpy as np

        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "probe.mp4")
            with av.open(path, "w") as video:
                stream = video.add_stream("libx264", rate=10)
                stream.width = stream.height = 64
                stream.pix_fmt = "yuv420p"
                for level in range(0, 250, 50):
                    frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), format="rgb24")
                    video.mux(stream.encode(frame))
                video.mux(stream.encode())
            with av.open(path) as video:
                count = sum(1 for _ in video.decode(video=0))
    except Exception as error:  # noqa: BLE001 (whatever goes wrong is the finding)
        return Finding("H.264 through PyAV", "broken", f"{type(error).__name__}: {error}")
    if count != 5:
        return Finding("H.264 through PyAV", "broken", f"5 frames encoded, {count} decoded")
    return Finding("H.264 through PyAV", "ok", f"encodes and decodes (PyAV {av.__version__})")


def _places(folder: Path) -> list[tuple[str, Path]]:
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return [("this folder", folder), ("Hugging Face cache", cache), ("temporary files", Path(tempfile.gettempdir()))]


def _disk(name: str, path: Path) -> Finding:
    path = path.expanduser().absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    free = shutil.disk_usage(there).free / 2**30
    return Finding(name, "ok" if free >= LEAST_FREE_GB else "warn", f"{free:.0f} GB free at {path}")


if __name__ == "__main__":
    sys.exit(run_cli(main))
