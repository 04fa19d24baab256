"""What stage0_contrastive makes of random weights: it tells phantom findings by name, by a probe and by text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medllava.errors import ConfigError, DataError
from medllava.eval.__main__ import main as eval_main
from medllava.model import tiny
from medllava.phantom.grammar import FINDINGS, article
from medllava.phantom.tissue import Finding, render_tissue, sample_stain
from medllava.train.__main__ import main as train_main

RECIPE = Path(__file__).parents[1] / "train" / "recipes" / "stage0_contrastive.yaml"
TEMPLATES = ("here is {}", "this shows {}", "{}")
SIDE = 48


def crops(count: int, seed: int) -> Iterator[tuple[str, Image.Image]]:
    """``count`` crops of each kind of finding, each of its own stain."""
    rng = np.random.default_rng(seed)
    for kind in FINDINGS:
        for _ in range(count):
            x0, y0 = rng.uniform(1, 8, 2)
            x1, y1 = SIDE - rng.uniform(1, 8, 2)
            tissue = render_tissue(rng, SIDE, SIDE, [Finding(kind, (x0, y0, x1, y1))], sample_stain(rng), 0.5)
            yield kind, Image.fromarray(tissue)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and test/: class folders, each with a metadata.jsonl of pairs beside them; clip/: random weights."""
    root = tmp_path_factory.mktemp("encoder")
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for part, count in (("train", 40), ("test", 12)):
        for number, (kind, image) in enumerate(crops(count, seed=len(part))):
            name = f"{kind.replace(' ', '_')}/{number:04d}.png"
            (root / part / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(root / part / name)
            wording = TEMPLATES[:2] if part == "train" else TEMPLATES[:1]
            rows[part] += [{"file_name": name, "text": text.format(article(kind))} for text in wording]
        lines = "".join(json.dumps(row) + "\n" for row in rows[part])
        (root / part / "metadata.jsonl").write_text(lines)
    from transformers import CLIPImageProcessor

    tokenizer = tiny.build_tokenizer([row["text"] for row in rows["train"]], tiny.TokenizerSizes(vocab_size=360))
    vision = tiny.VisionSizes(image_size=SIDE, patch_size=12, hidden_size=64, intermediate_size=128, layers=2)
    torch.manual_seed(0)
    clip = tiny.build_clip(vision, tokenizer, projection_dim=32, text_layers=1, text_positions=16)
    clip.save_pretrained(root / "clip")
    size = {"shortest_edge": SIDE}
    CLIPImageProcessor(
        size=size, crop_size=SIDE, image_mean=vision.image_mean, image_std=vision.image_std
    ).save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    (root / "prompts.yaml").write_text(json.dumps({
        "templates": TEMPLATES[:2], "names": {kind.replace(" ", "_"): [article(kind)] for kind in FINDINGS},
    }))
    return root


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    settings = [
        "optim.epochs=null", "optim.steps=120", "optim.batch_size=64", "optim.learning_rate=2e-3", "workers=0",
        "precision=float32", "flip=true",
    ]
    paths = ["--data", str(folder / "train"), "--init-from", str(folder / "clip"), "--out", str(folder / "stage0")]
    assert train_main(["--config", str(RECIPE), *paths, *settings]) == 0
    return folder / "stage0"


def figures(model: Path, folder: Path, task: str, *rest: str) -> dict[str, dict[str, float]]:
    out = folder / f"{task}.json"
    command = ["encoder", "--model-path", str(model), "--task", task, "--data", str(folder / "test")]
    assert eval_main([*command, "--out", str(out), *rest]) == 0
    found: dict[str, dict[str, float]] = json.loads(out.read_text())["figures"]
    return found


def test_all_three_are_above_chance_after_training(
    trained: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = figures(trained, folder, "zero-shot", "--prompts", str(folder / "prompts.yaml"))
    probed = figures(trained, folder, "linear-probe", "--train", str(folder / "train"))
    found = named | {f"probe_{name}": figure for name, figure in probed.items()} | figures(trained, folder, "retrieval")
    wanted = ["accuracy", "balanced_accuracy", "probe_accuracy", "probe_balanced_accuracy"]
    for name in [*wanted, "image_to_text_recall_at_1", "text_to_image_recall_at_1"]:
        figure = found[name]
        assert figure["chance"] < figure["low"] <= figure["value"] <= figure["high"], name
    assert named["accuracy"]["n"] == 96
    assert named["accuracy"]["chance"] == pytest.approx(1 / 8)
    assert found["text_to_image_recall_at_1"]["n"] == 8
    assert "95 % interval" in capsys.readouterr().out


def test_random_weights_are_at_chance(folder: Path) -> None:
    found = figures(folder / "clip", folder, "zero-shot", "--prompts", str(folder / "prompts.yaml"))
    assert found["accuracy"]["low"] <= found["accuracy"]["chance"] + 0.1


def test_mistakes_are_told(folder: Path, tmp_path: Path) -> None:
    clip = folder / "clip"
    with pytest.raises(ConfigError, match="needs --train"):
        figures(clip, folder, "linear-probe")
    with pytest.raises(DataError, match="pictures are learnt from and tested"):
        figures(clip, folder, "linear-probe", "--train", str(folder / "test"))
    (tmp_path / "prompts.yaml").write_text("names: {liver: [a liver]}")
    with pytest.raises(ConfigError, match="names of 'liver', but --data has no such class"):
        figures(clip, folder, "zero-shot", "--prompts", str(tmp_path / "prompts.yaml"))
    (tmp_path / "prompts.yaml").write_text("templates: [no place for it]")
    with pytest.raises(ConfigError, match="needs one {} for the class's name"):
        figures(clip, folder, "zero-shot", "--prompts", str(tmp_path / "prompts.yaml"))
    with pytest.raises(DataError, match="expected a folder for each class"):
        eval_main(["encoder", "--model-path", str(clip), "--task", "zero-shot", "--data", str(tmp_path)])
    with pytest.raises(ConfigError, match="--group-pattern"):
        figures(clip, folder, "zero-shot", "--group-pattern", "no group")
