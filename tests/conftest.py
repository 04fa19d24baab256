"""What the tests of whole commands share: a way to run them, a few videos, a checkpoint, a full disk, a slide."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

# Several processes of this suite share few cores: threads that wait for each other must not spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

REPOSITORY = Path(__file__).resolve().parents[1]

Run = Callable[..., subprocess.CompletedProcess[str]]


def command(*arguments: object) -> list[str]:
    """``medllava`` with ``arguments`` as a person types it: ("eval", "answer", "--out", ...)."""
    return [sys.executable, "-m", "medllava", *map(str, arguments)]


@pytest.fixture(scope="module", autouse=True)
def no_real_time_priority() -> Iterator[None]:
    """A library that raises the priority of the tests, for which it must be root, would starve the whole machine."""
    yield
    if sys.platform == "linux":
        assert os.sched_getscheduler(0) == os.SCHED_OTHER, "a test left this process on a real-time priority"


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def seconds_of_children() -> Callable[[], float]:
    """Tells the seconds of a processor that all ended processes started here have used; other work on the machine does
    not add to them."""
    import resource  # not there on Windows

    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    return used


@pytest.fixture(scope="session")
def seven_billion() -> Callable[[], Any]:
    """Makes a model of LLaVA-1.5-7B's shapes, without weights, in float32."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )

    def make() -> Any:
        with torch.device("meta"):
            return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))

    return make


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a command to its end in a process of its own; text of stdout and stderr is kept."""

    def run_command(*arguments: object, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments), cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run_command


@pytest.fixture(scope="session")
def phantoms(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two short narrated videos with transcripts and truth."""
    out = tmp_path_factory.mktemp("phantoms") / "videos"
    done = run("phantom", "--out", out, "--videos", 2, "--seed", 11, "--fields", 3)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def narrated(run: Run, phantoms: Path) -> Path:
    """What ``narrate`` makes of them."""
    out = phantoms.parent / "narrated"
    done = run("instruct_gen", "narrate", "--videos", phantoms, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def teacher() -> Iterator[str]:
    """The address of a running phantom teacher."""
    process = subprocess.Popen(
        command("phantom.teacher", "--port", 0), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    yield process.stdout.readline().split()[-1]
    process.terminate()
    process.wait()


@pytest.fixture(scope="session")
def checkpoint(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a very small model with random weights."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    done = run("model", "tiny", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount an empty disk of a given size (``"64k"``); skips where this needs rights that the tests do not have."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        disk = tmp_path / f"disk-{size}-{len(mounted)}"
        disk.mkdir()
        if os.geteuid() != 0:
            pytest.skip("a disk of a chosen size can be mounted by root only")
        options = ["-t", "tmpfs", "-o", f"size={size}"]
        made = subprocess.run(["mount", *options, "tmpfs", str(disk)], capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"no disk can be mounted here: {made.stderr.strip()}")
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@dataclass(frozen=True)
class SyntheticSlide:
    """A pyramidal TIFF of one repeated tile and coloured marks (pixels of the finest level, colour)."""

    path: Path
    size: tuple[int, int]
    mpp: float
    marks: list[tuple[tuple[int, int, int, int], tuple[int, int, int]]]


TILE = 256


def write_slide(
    path: Path, tile: Image.Image, size: tuple[int, int] = (40_960, 32_768), mpp: float = 0.5, *,
    marks: Sequence[tuple[tuple[int, int, int, int], tuple[int, int, int]]] = (), steps: Sequence[int] = (1, 4, 16, 64),
    description: str = "", label: Image.Image | None = None,
) -> SyntheticSlide:
    """Write a tiled TIFF with JPEG tiles, one level per entry of ``steps``, resolution in its tags. Equal tiles are
    stored once, so that a slide of a gigapixel takes less than a megabyte and a second."""
    content = bytearray(b"II*\0\0\0\0\0")
    stored: dict[bytes, int] = {}

    def store(data: bytes) -> int:
        if data not in stored:
            stored[data] = len(content)
            content.extend(data + b"\0" * (len(data) % 2))
        return stored[data]

    def jpeg(picture: Image.Image) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        return buffer.getvalue()

    def tile_at(x: int, y: int, step: int, plain: Image.Image) -> Image.Image:
        here = [
            (tuple(round(v / step) - o for v, o in zip(box, (x, y, x, y), strict=True)), colour)
            for box, colour in marks
        ]
        here = [(box, colour) for box, colour in here if box[0] < TILE and box[1] < TILE and box[2] > 0 and box[3] > 0]
        if not here:
            return plain
        drawn = plain.copy()
        for box, colour in here:
            drawn.paste(colour, (max(box[0], 0), max(box[1], 0), min(box[2], TILE), min(box[3], TILE)))
        return drawn

    directories: list[list[tuple[int, int, Sequence[int]]]] = []
    for step in steps:
        width, height = size[0] // step, size[1] // step
        mean = tile.resize((1, 1), Image.Resampling.BOX).resize((TILE, TILE))
        plain = tile if step == 1 else mean
        encoded: dict[bytes, bytes] = {}
        places, lengths = [], []
        for y in range(0, height, TILE):
            for x in range(0, width, TILE):
                picture = tile_at(x, y, step, plain)
                pixels = b"" if picture is plain else picture.tobytes()
                if pixels not in encoded:
                    encoded[pixels] = jpeg(picture)
                data = encoded[pixels]
                places.append(store(data))
                lengths.append(len(data))
        per_cm = round(10_000 / (mpp * step) * 1000), 1000
        directories.append([
            (254, 4, [int(step > 1)]), (256, 4, [width]), (257, 4, [height]), (258, 3, [8, 8, 8]), (259, 3, [7]),
            (262, 3, [6]), (270, 2, [*description.encode(), 0]), (277, 3, [3]), (282, 5, per_cm), (283, 5, per_cm),
            (284, 3, [1]), (296, 3, [3]), (322, 4, [TILE]), (323, 4, [TILE]), (324, 4, places), (325, 4, lengths),
            (530, 3, [2, 2]),
        ])
    if label is not None:
        place = store(label.tobytes())
        directories.append([
            (254, 4, [1]), (256, 4, [label.width]), (257, 4, [label.height]), (258, 3, [8, 8, 8]), (259, 3, [1]),
            (262, 3, [2]), (270, 2, [*b"Aperio Image Library\nlabel 100x100", 0]), (273, 4, [place]), (277, 3, [3]),
            (278, 4, [label.height]), (279, 4, [len(label.tobytes())]), (284, 3, [1]),
        ])
    link = 4  # where the offset of the next directory is to be written
    codes = {2: "B", 3: "H", 4: "I", 5: "I"}
    for directory in directories:
        entries = b""
        for tag, kind, values in directory:
            packed = struct.pack(f"<{len(values)}{codes[kind]}", *values)
            field = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", store(packed))
            entries += struct.pack("<HHI", tag, kind, len(values) // 2 if kind == 5 else len(values)) + field
        content[link : link + 4] = struct.pack("<I", len(content))
        link = len(content) + 2 + len(entries)
        content.extend(struct.pack("<H", len(directory)) + entries + b"\0\0\0\0")
    path.write_bytes(content)
    return SyntheticSlide(path, size, mpp, list(marks))


@pytest.fixture(scope="session")
def make_slide() -> Callable[..., SyntheticSlide]:
    """See :func:`write_slide`."""
    return write_slide


@pytest.fixture(scope="session")
def tissue_tile() -> Image.Image:
    """A tile of H&E-like tissue."""
    import numpy as np

    from medllava.phantom.tissue import render_tissue, sample_stain

    rng = np.random.default_rng(5)
    return Image.fromarray(render_tissue(rng, TILE, TILE, [], sample_stain(rng)))


@pytest.fixture(scope="session")
def gigapixel(tissue_tile: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> SyntheticSlide:
    """A slide of 1.3 gigapixels at 0.5 µm per pixel with two marks."""
    marks = [((8192, 6144, 12_288, 9216), (200, 30, 40)), ((30_000, 25_000, 30_600, 25_500), (20, 60, 180))]
    return write_slide(tmp_path_factory.mktemp("slides") / "big.tiff", tissue_tile, marks=marks)
