"""Tiny made-up copies of the layouts of eval/benchmarks/encoder and a CLIP model of random weights, for tests and for
eval/run_all.sh.

example: python tests/eval/make_encoder_samples.py OUT
"""

from __future__ import annotations

import csv
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

EACH = 6
GLEASON = ("NC", "G3", "G4", "G5")


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = random.Random(str(path))
    Image.new("RGB", (24, 24), (40 * number % 256, rng.randrange(256), 120)).save(path)


def fill(root: Path, folders: list[str], suffix: str = ".png", count: int = EACH) -> None:
    for number, folder in enumerate(folders):
        for each in range(count):
            picture(root / folder / f"{Path(folder).name}-{each}{suffix}", number)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def lc25000(root: Path) -> None:
    base = "lung_colon_image_set"
    # There is no split: enough that every class has some left to learn from.
    fill(root, [f"{base}/colon_image_sets/colon_{name}" for name in ("aca", "n")], ".jpeg", 4 * EACH)
    fill(root, [f"{base}/lung_image_sets/lung_{name}" for name in ("aca", "n", "scc")], ".jpeg", 4 * EACH)


def pcam(root: Path) -> None:
    fill(root, [f"{split}/{label}" for split in ("train", "test") for label in "01"])


def nct_crc_he(root: Path) -> None:
    classes = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
    fill(root, [f"{split}/{name}" for split in ("NCT-CRC-HE-100K", "CRC-VAL-HE-7K") for name in classes], ".tif")


def mhist(root: Path) -> None:
    rows = []
    for number in range(4 * EACH):
        label, split = ("HP", "SSA")[number % 2], ("train", "test")[number // 2 % 2]
        picture(root / "images" / f"MHIST_{number}.png", number % 2)
        rows.append({"Image Name": f"MHIST_{number}.png", "Majority Vote Label": label,
                     "Number of Annotators who Selected SSA (Out of 7)": 3, "Partition": split})
    write_rows(root / "annotations.csv", rows)


def bach(root: Path) -> None:
    fill(root, [f"Photos/{name}" for name in ("Benign", "InSitu", "Invasive", "Normal")], ".tif")
    for name in ("Benign", "InSitu", "Invasive", "Normal"):
        for each in range(20):
            picture(root / "Photos" / name / f"{name[0]}{each:03}.tif", each)


def sicapv2(root: Path) -> None:
    for split in ("Train", "Test"):
        rows = []
        for number in range(EACH * len(GLEASON)):
            name = f"{split}{number // 4}_Block_Region_{number}_xini_0_yini_0.jpg"
            picture(root / "images" / name, number % 4)
            rows.append({"image_name": name, **{each: int(number % 4 == place) for place, each in enumerate(GLEASON)},
                         "G4C": 0})
        write_rows(root / "partition" / "Test" / f"{split}.csv", rows)


def image_folder(root: Path) -> None:
    fill(root, [f"{split}/{name}" for split in ("train", "test") for name in ("fat_tissue", "muscle", "nerve")])


LAYOUTS: dict[str, Callable[[Path], None]] = {
    made.__name__: made for made in (lc25000, pcam, nct_crc_he, mhist, bach, sicapv2, image_folder)
}


def make_clip(folder: Path) -> None:
    """A CLIP model of random weights."""
    import torch
    from transformers import CLIPImageProcessor

    from medllava.model import tiny

    texts = ["a histopathology image of benign prostate glands", "an H&E image of prostate adenocarcinoma of grade 3"]
    tokenizer = tiny.build_tokenizer(texts * 20, tiny.TokenizerSizes(vocab_size=300, coordinate_tokens=False))
    vision = tiny.VisionSizes(image_size=24, patch_size=12, hidden_size=32, intermediate_size=64, layers=1)
    torch.manual_seed(0)
    tiny.build_clip(vision, tokenizer, projection_dim=16, text_layers=1, text_positions=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=24).save_pretrained(folder)


if __name__ == "__main__":
    for layout, write in LAYOUTS.items():
        write(Path(sys.argv[1]) / "data" / layout)
    make_clip(Path(sys.argv[1]) / "clip")
