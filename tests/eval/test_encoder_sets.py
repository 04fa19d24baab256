"""Every definition of eval/benchmarks/encoder on a tiny made-up copy of its data set's layout."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from medllava.errors import ConfigError, DataError
from medllava.eval import __main__ as commands
from medllava.eval.benchmarks import known_files
from medllava.eval.encoder_sets import load_set, read_set

from . import make_encoder_samples as samples

LAYOUTS = samples.LAYOUTS


def test_every_definition_has_a_sample() -> None:
    assert set(known_files("benchmarks/encoder", ".yaml")) == set(LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read(name: str, tmp_path: Path) -> None:
    LAYOUTS[name](tmp_path)
    definition = load_set(name)
    found = read_set(definition, tmp_path)
    classes = set(definition.classes) or {"fat_tissue", "muscle", "nerve"}
    assert {pair.texts[0] for pair in found.train} == classes
    assert {pair.texts[0] for pair in found.test} <= classes and len(found.test) >= len(classes) / 2
    assert not {pair.where for pair in found.train} & {pair.where for pair in found.test}
    assert found.test[0].load().size == (24, 24)
    assert definition.about and (definition.source or name == "image_folder")
    again = read_set(definition, tmp_path)
    assert [pair.name for pair in again.test] == [pair.name for pair in found.test]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    samples.make_clip(folder)
    return folder


def test_all_figures_of_a_benchmark(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LAYOUTS["sicapv2"](tmp_path / "data")
    out = tmp_path / "out.json"
    line = ["encoder", "--model-path", str(clip), "--benchmark", "sicapv2", "--images", str(tmp_path / "data")]
    assert commands.main([*line, "--device", "cpu", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert set(written["tasks"]) == {"zero-shot", "linear-probe", "retrieval"}
    assert written["tasks"]["zero-shot"]["accuracy"]["n"] == 24
    assert written["tasks"]["linear-probe"]["balanced_accuracy"]["chance"] == 0.25
    assert "text_to_image_recall_at_10" in written["tasks"]["retrieval"]
    assert written["groups"] == 6 and written["benchmark"]["licence"] == "CC BY 4.0"
    told = capsys.readouterr().out
    assert "sicapv2: 24 pictures to learn from, 24 to test on, 4 classes, 6 groups; read from table" in told


def test_bad_data_is_told_in_a_line(clip: Path, tmp_path: Path) -> None:
    line = ["encoder", "--model-path", str(clip), "--images", str(tmp_path), "--benchmark"]
    with pytest.raises(ConfigError, match="did you mean 'mhist'"):
        commands.main([*line, "mhits"])
    with pytest.raises(DataError, match=r"annotations\.csv: no such file; eval/benchmarks/encoder/mhist.yaml says"):
        commands.main([*line, "mhist"])
    LAYOUTS["mhist"](tmp_path)
    (tmp_path / "images" / "MHIST_3.png").unlink()
    with pytest.raises(DataError, match=r"annotations\.csv:5: no such image file"):
        commands.main([*line, "mhist"])
    with pytest.raises(DataError, match="NCT-CRC-HE-100K: no such folder"):
        commands.main([*line, "nct_crc_he"])
    with pytest.raises(DataError, match=r"camelyonpatch_level_2_split_train_x\.h5: no such file, and no folder"):
        commands.main([*line, "pcam"])
    with pytest.raises(ConfigError, match="give --benchmark NAME"):
        commands.main(["encoder", "--model-path", str(clip)])


def test_classes_without_a_split_are_held_apart_by_name(tmp_path: Path) -> None:
    samples.fill(tmp_path, ["bone", "skin"])
    for folder in ("bone", "skin"):
        for each in range(samples.EACH, 40):
            samples.picture(tmp_path / folder / f"{folder}-{each}.png", each)
    found = read_set(load_set("image_folder"), tmp_path)
    assert len(found.train) + len(found.test) == 80 and 5 <= len(found.test) <= 30
    assert not {pair.name for pair in found.train} & {pair.name for pair in found.test}
    assert "no split" in found.layout and found.test == read_set(load_set("image_folder"), tmp_path).test
    found = read_set(load_set("image_folder"), tmp_path, r"-(\d)")
    learnt, tested = ({pair.name.split("-")[1][0] for pair in part} for part in (found.train, found.test))
    assert learnt and tested and not learnt & tested, "a case is on one side only"
    with pytest.raises(DataError, match=r"class 'skin' has no pictures to learn from; there are too few"):
        read_set(load_set("image_folder"), tmp_path, r"(bone|skin)/")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="fewer than two classes"):
        read_set(load_set("image_folder"), tmp_path)


def test_pcam_as_published(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    pixels = {}
    for split in ("train", "test"):
        pixels[split] = rng.integers(0, 256, (6, 96, 96, 3), dtype=np.uint8)
        labels = np.arange(6).reshape(-1, 1, 1, 1) % 2
        for part, values in (("x", pixels[split]), ("y", labels)):
            with h5py.File(tmp_path / f"camelyonpatch_level_2_split_{split}_{part}.h5", "w") as file:
                file[part] = values
    found = read_set(load_set("pcam"), tmp_path)
    assert found.layout == "HDF5" and [pair.texts[0] for pair in found.test] == ["0", "1"] * 3
    assert np.array_equal(np.asarray(found.test[3].load()), pixels["test"][3])


def test_sicapv2_as_published(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    LAYOUTS["sicapv2"](tmp_path)
    expected = [pair.texts[0] for pair in read_set(load_set("sicapv2"), tmp_path).test]
    for path in (tmp_path / "partition" / "Test").glob("*.csv"):
        book = openpyxl.Workbook()
        with path.open() as file:
            for row in csv.reader(file):
                book.active.append([int(cell) if cell.isdigit() else cell for cell in row])
        book.save(path.with_suffix(".xlsx"))
        path.unlink()
    assert [pair.texts[0] for pair in read_set(load_set("sicapv2"), tmp_path).test] == expected
