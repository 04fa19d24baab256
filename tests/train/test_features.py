"""Features kept in memory or on disk are those that the encoder makes, and are found again only for the same input."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from medllava.errors import ConfigError
from medllava.jsonl import read_rows
from medllava.model.tiny import tiny_model
from medllava.train.__main__ import main
from medllava.train.dataset import Pictures
from medllava.train.features import FeatureStore, encoder_key
from medllava.train.forward import vision_features

RECIPES = Path(__file__).parents[2] / "train" / "recipes"
NAMES = [f"{number}.png" for number in range(5)]


@pytest.fixture(scope="module")
def loaded() -> Any:
    return tiny_model(["gland"])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        Image.effect_noise((60 + number, 50), 80).convert("RGB").save(folder / name)
    return folder


class Encoder:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.pictures = 0

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.pictures += len(pixels)
        return vision_features(self.model, pixels)


def kept(loaded: Any, images: Path, folder: Path, **process: int) -> tuple[Pictures, Encoder]:
    model, processor = loaded
    pictures, encode = Pictures(images, processor.image_processor), Encoder(model)
    store = FeatureStore(folder, encoder_key(model, processor.image_processor), **process)
    pictures.cache_on_disk(store, NAMES, range(4), encode)
    return pictures, encode


def test_kept_features_are_the_live_ones_bit_for_bit(loaded: Any, images: Path, tmp_path: Path) -> None:
    model, processor = loaded
    live = Pictures(images, processor.image_processor)
    memory = Pictures(images, processor.image_processor)
    memory.cache(NAMES, range(4), Encoder(model))
    disk, _ = kept(loaded, images, tmp_path / "cache")
    wanted = [(name, variant) for name in NAMES for variant in range(4)]
    # The same pictures at once: a matrix product's last bit depends on how many rows it has.
    expected = vision_features(model, live.stack(wanted)["pixels"]).detach()
    assert torch.equal(memory.stack(wanted)["features"], expected)
    assert torch.equal(disk.stack(wanted)["features"], expected)
    alone = vision_features(model, live.stack(wanted[7:8])["pixels"]).detach()
    assert torch.allclose(disk.stack(wanted[7:8])["features"], alone, atol=1e-6)
    assert torch.equal(disk.stack([])["features"], torch.zeros(1, *expected.shape[1:]))


def test_what_is_there_is_not_computed_again(loaded: Any, images: Path, tmp_path: Path) -> None:
    first, encode = kept(loaded, images, tmp_path / "cache")
    assert encode.pictures == 20
    (images / "1.png").rename(images / "renamed.png")
    shutil.copy(images / "renamed.png", images / "1.png")
    again, encode = kept(loaded, images, tmp_path / "cache")
    assert encode.pictures == 0
    assert torch.equal(first.stack([("1.png", 2)])["features"], again.stack([("1.png", 2)])["features"])


def test_changed_pictures_encoders_and_processors_are(loaded: Any, images: Path, tmp_path: Path) -> None:
    model, processor = loaded
    kept(loaded, images, tmp_path / "cache")
    Image.new("RGB", (60, 50), "pink").save(images / "3.png")
    _, encode = kept(loaded, images, tmp_path / "cache")
    assert encode.pictures == 4
    before = encoder_key(model, processor.image_processor)
    weight = next(model.model.vision_tower.parameters())
    with torch.no_grad():
        weight.flatten()[0] += 1e-6
    assert encoder_key(model, processor.image_processor) != before
    with torch.no_grad():
        weight.flatten()[0] -= 1e-6
    mean = processor.image_processor.image_mean
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    assert encoder_key(model, processor.image_processor) != before
    processor.image_processor.image_mean = mean
    assert encoder_key(model.bfloat16(), processor.image_processor) != before
    model.float()


def test_a_file_that_was_being_written_when_a_run_died_does_no_harm(loaded: Any, images: Path, tmp_path: Path) -> None:
    kept(loaded, images, tmp_path / "cache")
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    file.rename(file.with_suffix(".part"))
    _, encode = kept(loaded, images, tmp_path / "cache")
    assert encode.pictures == 20


def test_processes_share_the_work(loaded: Any, images: Path, tmp_path: Path) -> None:
    model, processor = loaded
    key = encoder_key(model, processor.image_processor)
    stores = [FeatureStore(tmp_path / "cache", key, rank=rank, processes=2) for rank in range(2)]
    source = Pictures(images, processor.image_processor)
    encoders = [Encoder(model), Encoder(model)]
    # The second one starts before the first has written anything.
    stores[1].fill(images, source.pixels, NAMES, (0,), encoders[1])
    shutil.move(str(tmp_path / "cache"), tmp_path / "late")
    stores[0].fill(images, source.pixels, NAMES, (0,), encoders[0])
    shutil.copytree(tmp_path / "late", tmp_path / "cache", dirs_exist_ok=True)
    assert [encoder.pictures for encoder in encoders] == [3, 2] or [e.pictures for e in encoders] == [2, 3]
    for store in stores:
        store.open()
        assert len({tuple(store.get(name, 0).flatten().tolist()) for name in NAMES}) == 5


def test_a_run_on_disk_features_learns_what_a_live_one_does(data: Any, stage0: Path, tmp_path: Path) -> None:
    def run(name: str, *extra: str) -> list[float]:
        paths = [*data.arguments, "--init-from", str(stage0), "--out", str(tmp_path / name)]
        settings = ["optim.steps=3", "lora.r=2", "log_every=1", "kinds=[grounding]"]
        assert main(["--config", str(RECIPES / "demo_stage2.yaml"), *paths, *settings, *extra]) == 0
        return [row["loss"] for _, row in read_rows(tmp_path / name / "train_log.jsonl")]

    shared = ["cache_features=disk", "--feature-cache", str(tmp_path / "features")]
    live = run("live", "cache_features=false")
    assert run("disk", *shared) == pytest.approx(live, abs=1e-5)
    files = sorted((tmp_path / "features").rglob("*.safetensors"))
    assert run("again", *shared) == pytest.approx(live, abs=1e-5)
    assert sorted((tmp_path / "features").rglob("*.safetensors")) == files != []
    with pytest.raises(ConfigError, match="frozen vision tower"):
        run("tower", "tower_layers=1", *shared)
