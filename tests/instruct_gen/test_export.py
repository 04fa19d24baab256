from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medllava.errors import run_cli
from medllava.instruct_gen.__main__ import main
from medllava.instruct_gen.records import GroundedCaption, Narrative, Phrase, TracePoint, Utterance, Video, Word
from medllava.jsonl import read_json, read_rows, write_records

FORMATS = ("localized-narratives", "medical-narratives", "webdataset", "datasets")

SAID = (
    Utterance(start_s=9.5, end_s=11.5, text="Here is a gland."),
    Utterance(
        start_s=12.0, end_s=13.0, text="And mucin.",
        words=(Word(start_s=12.1, end_s=12.3, text="And"), Word(start_s=12.4, end_s=13.0, text="mucin.")),
    ),
)
TRACE = tuple(
    TracePoint(t_s=t_s, x=0.1 * number, y=0.05 * number)
    for number, t_s in enumerate((10.0, 10.1, 10.2, 12.0, 12.1))
)


@pytest.fixture(scope="module")
def narrated(tmp_path_factory) -> Path:
    """Two chunks of talk.v2.mp4 and one of other.mp4 in which nothing is said; pictures carry metadata."""
    folder = tmp_path_factory.mktemp("narrated")
    (folder / "frames").mkdir()
    narratives, captions = [], []
    for identity, video, said in (("talk.v2-000", "talk.v2.mp4", SAID), ("talk.v2-001", "talk.v2.mp4", SAID[1:]),
                                  ("other-000", "other.mp4", ())):
        pixels = np.random.default_rng(len(narratives)).integers(0, 255, (120, 160, 3), np.uint8)
        exif = Image.Exif()
        exif[0x010E] = "a patient's name"
        Image.fromarray(pixels).save(folder / "frames" / f"{identity}.png", exif=exif)
        common = {"id": identity, "video": video, "image": f"frames/{identity}.png", "crop_px": (0, 0, 160, 120)}
        narratives.append(Narrative(start_s=10, end_s=14, trace=TRACE, utterances=said, **common))
        if said:
            phrases = [Phrase(text=one.text, start_s=one.start_s, end_s=one.end_s) for one in said]
            phrases[-1] = phrases[-1].model_copy(update={"box": (0.25, 0.5, 0.5, 0.8), "confidence": 0.6})
            captions.append(
                GroundedCaption(phrases=tuple(Phrase.model_validate(dict(phrase)) for phrase in phrases), **common)
            )
    write_records(folder / "narratives.jsonl", narratives)
    write_records(folder / "captions.jsonl", captions)
    write_records(folder / "videos.jsonl", [Video(name="talk.v2.mp4", width=160, height=120, fps=25, duration_s=20)])
    return folder


def export(narrated: Path, kind: str, out: Path, *options: object) -> int:
    command = ["export", "--narrated", narrated, "--format", kind, "--out", out, *options]
    return run_cli(lambda: main([*map(str, command)]))


def everything(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in files}


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def test_localized_narratives(narrated, tmp_path, capsys):
    assert export(narrated, "localized-narratives", tmp_path / "ln.jsonl", "--dataset-id", "slides") == 0
    assert "2 narratives with 3 utterances" in (said := capsys.readouterr().out)
    assert "1 utterances have no word times" in said
    first, second = (row for _, row in read_rows(tmp_path / "ln.jsonl"))
    assert list(first) == [
        "dataset_id", "image_id", "annotator_id", "caption", "timed_caption", "traces", "voice_recording",
    ]
    assert (first["dataset_id"], first["image_id"], first["annotator_id"]) == ("slides", "talk.v2-000", 0)
    assert first["caption"] == "Here is a gland. And mucin." == " ".join(w["utterance"] for w in first["timed_caption"])
    assert first["voice_recording"] == "talk.v2.mp4#t=10,14"
    # Spoken from 9.5 s, before the chunk began at 10 s: the first of four words ends as the chunk begins.
    assert [(w["start_time"], w["end_time"]) for w in first["timed_caption"]] == [
        (0.0, 0.0), (0.0, 0.5), (0.5, 1.0), (1.0, 1.5), (2.1, 2.3), (2.4, 3.0),
    ]
    # The cursor was hidden between 10.2 s and 12 s.
    assert [[point["t"] for point in segment] for segment in first["traces"]] == [[0.0, 0.1, 0.2], [2.0, 2.1]]
    assert first["traces"][1][0] == {"x": 0.3, "y": 0.15, "t": 2.0}
    assert second["image_id"] == "talk.v2-001"


def test_medical_narratives(narrated, tmp_path):
    out = tmp_path / "mn.jsonl"
    assert export(narrated, "medical-narratives", out, "--domain", "CT") == 0
    first, second = (row for _, row in read_rows(out))
    assert (first["index"], first["uid"], first["image"]) == (0, "talk.v2-000", "frames/talk.v2-000.png")
    assert (first["text"], first["med_num"]) == ([one.text for one in SAID], 2)
    assert (first["domains"], first["video"], first["article"]) == ("['CT']", True, False)
    assert (first["video_id"], first["duration"], first["fps"]) == ("talk.v2", 20.0, 25.0)
    assert (first["sample_uids"], second["sample_index"]) == ({"talk.v2-000": 0, "talk.v2-001": 1}, 1)
    assert first["chunk_times"] == [[10.0, 14.0], [10.0, 14.0]] and first["roi_chunk_times"] == [[12.0, 13.0]]
    assert first["spw"] == 0.5
    (box,) = first["boxes"]
    assert box == {
        "text": "And mucin.", "box": [0.25, 0.5, 0.5, 0.8], "confidence": 0.6, "start_time": 2.0, "end_time": 3.0,
    }
    seen = Video(name="talk.v2.mp4", width=160, height=120, fps=25, duration_s=20, domain="MRI")
    for name in ("narratives.jsonl", "captions.jsonl"):
        (tmp_path / name).write_bytes((narrated / name).read_bytes())
    write_records(tmp_path / "videos.jsonl", [seen])
    assert export(tmp_path, "medical-narratives", out, "--domain", "CT") == 0
    assert [row["domains"] for _, row in read_rows(out)] == ["['MRI']"] * 2
    assert export(narrated, "medical-narratives", out, "--min-confidence", 0.7) == 0
    assert [row["boxes"] for _, row in read_rows(out)] == [[], []]


def test_webdataset_shards_are_read_back(narrated, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    out = tmp_path / "shards"
    assert export(narrated, "webdataset", out, "--crops", "--shard-size", 3) == 0
    assert read_json(out / "export.json")["shards"] == {"shard-000000.tar": 3, "shard-000001.tar": 1}
    urls = [str(path) for path in sorted(out.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil"))
    assert len({sample["__key__"] for sample in samples}) == 4
    assert [sample["txt"] for sample in samples] == ["Here is a gland. And mucin.", *["And mucin."] * 3]
    assert [sample["json"]["part"] for sample in samples] == ["image", "region"] * 2
    whole = Image.open(narrated / "frames/talk.v2-000.png")
    assert np.array_equal(pixels(samples[0]["png"]), pixels(whole))
    assert np.array_equal(pixels(samples[1]["png"]), pixels(whole)[60:96, 40:80])
    assert samples[1]["json"] == {
        "id": "talk.v2-000", "video": "talk.v2.mp4", "part": "region", "box": [0.25, 0.5, 0.5, 0.8],
        "confidence": 0.6, "start_s": 12.0, "end_s": 13.0,
    }


def test_the_datasets_folder_is_read_back(narrated, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    out = tmp_path / "folder"
    assert export(narrated, "datasets", out, "--crops") == 0
    read = datasets.load_dataset("imagefolder", data_dir=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert sorted(read.column_names) == ["box", "end_s", "id", "image", "part", "start_s", "text", "video"]
    assert read["text"][:2] == ["Here is a gland. And mucin.", "And mucin."] and len(read) == 4
    whole = Image.open(narrated / "frames/talk.v2-000.png")
    assert np.array_equal(pixels(read[0]["image"]), pixels(whole))
    assert read[1]["box"] == [0.25, 0.5, 0.5, 0.8] and read[1]["image"].size == (40, 36)


@pytest.mark.parametrize("kind", FORMATS)
def test_same_input_same_bytes(narrated, tmp_path, kind):
    crops = ["--crops"] if kind in FORMATS[2:] else []
    for name in ("one", "two"):
        assert export(narrated, kind, tmp_path / name / "out", *crops) == 0
    assert everything(tmp_path / "one/out") == everything(tmp_path / "two/out")


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_pictures_carry_no_metadata(narrated, tmp_path, ending):
    assert "name" in str(dict(Image.open(narrated / "frames/talk.v2-000.png").getexif()))
    assert export(narrated, "datasets", tmp_path / "out", "--image-format", ending) == 0
    files = sorted((tmp_path / "out/train").glob(f"*.{ending}"))
    assert len(files) == 2
    for file in files:
        assert b"patient" not in file.read_bytes()
        picture = Image.open(io.BytesIO(file.read_bytes()))
        assert not dict(picture.getexif())
        assert set(picture.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_without_crops_and_unsure_boxes(narrated, tmp_path):
    assert export(narrated, "webdataset", tmp_path / "a") == 0
    assert read_json(tmp_path / "a/export.json")["pairs"] == {"image": 2}
    assert export(narrated, "webdataset", tmp_path / "b", "--crops", "--min-confidence", 0.7) == 0
    assert read_json(tmp_path / "b/export.json")["pairs"] == {"image": 2}


def test_an_export_is_replaced_but_nothing_else(narrated, tmp_path, capsys):
    assert export(narrated, "webdataset", tmp_path / "out", "--shard-size", 1) == 0
    assert export(narrated, "webdataset", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["export.json", "shard-000000.tar"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert export(narrated, "datasets", other) == 1
    assert "was not written by export" in capsys.readouterr().err
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_a_picture_that_is_missing_leaves_no_folder(narrated, tmp_path, capsys):
    for name in ("narratives.jsonl", "captions.jsonl"):
        (tmp_path / name).write_bytes((narrated / name).read_bytes())
    assert export(tmp_path, "webdataset", tmp_path / "out") == 1
    assert "talk.v2-000.png: no such image file" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.jsonl", "narratives.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--crops"], "--crops: image-text pairs only"),
        (["--min-confidence", "1.5"], "--min-confidence 1.5: expected 0 to 1"),
        (["--shard-size", "0"], "--shard-size 0: expected 1 or more"),
    ],
)
def test_options_that_do_not_fit(narrated, tmp_path, capsys, options, message):
    assert export(narrated, "localized-narratives", tmp_path / "ln.jsonl", *options) == 1
    assert message in capsys.readouterr().err


def test_nothing_to_export(tmp_path, capsys):
    assert export(tmp_path, "datasets", tmp_path / "out") == 1
    assert "holds no narratives.jsonl" in capsys.readouterr().err
    (tmp_path / "narratives.jsonl").write_text("")
    (tmp_path / "captions.jsonl").write_text("")
    assert export(tmp_path, "datasets", tmp_path / "out") == 1
    assert "nothing was said" in capsys.readouterr().err


def test_metadata_lines_are_plain_json(narrated, tmp_path):
    assert export(narrated, "datasets", tmp_path / "out", "--crops") == 0
    rows = [json.loads(line) for line in (tmp_path / "out/train/metadata.jsonl").read_text().splitlines()]
    assert all((tmp_path / "out/train" / row["file_name"]).is_file() for row in rows)
    assert all(value is not None for row in rows for value in row.values())
