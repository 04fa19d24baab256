from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
from PIL import Image

from medllava.errors import CheckpointError, ConfigError, DataError
from medllava.instruct_gen import check as step
from medllava.instruct_gen import image_index


def main(argv):
    parser = argparse.ArgumentParser()
    step.configure(parser)
    return step.run(parser.parse_args(argv))


def row(id, image="good.png", question="<image>\nWhat?", answer="A gland.", **more):
    conversations = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": id, **({"image": image} if image else {}), "conversations": conversations, **more}


@pytest.fixture(autouse=True)
def kept_facts(tmp_path, monkeypatch):
    """The database of image facts, in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "medllava" / "images.sqlite"


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (40, 30), "pink").save(folder / "good.png")
    Image.new("RGB", (40, 30), "pink").save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:60])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no picture")
    return folder


def check(tmp_path, images, rows, capsys, *more):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows))
    code = main([str(data), "--images", str(images), *more])
    return code, capsys.readouterr().out.splitlines()


FAULTS = [
    (row("missing", "absent.png"), "missing image"),
    (row("empty-file", "empty.png"), "empty image"),
    (row("cut", "cut.png"), "bad image"),
    (row("text", "text.png"), "bad image"),
    (row("role") | {"conversations": [{"from": "alien", "value": "hi"}]}, "malformed"),
    (row("none") | {"conversations": []}, "malformed"),
    (row("number", image=7), "malformed"),
    ("no object", "malformed"),
    (row("order") | {"conversations": [{"from": "gpt", "value": "A."}, {"from": "human", "value": "B <image>?"}]},
     "turn order"),
    (row("unanswered") | {"conversations": [{"from": "human", "value": "<image>\nWhat?"}]}, "turn order"),
    (row("tags", question="<image><image>\nWhat?"), "<image> count"),
    (row("list", image=["good.png", "good.png"]), "<image> count"),
    (row("no-picture", image=None), "<image> count"),
    (row("silent", answer="  "), "empty answer"),
    (row("box", answer="[10, 20, 300, 400]"), "box out of range"),
    (row("box2", question="<image>\nWhat is in [0.50, 0.10, 0.20, 0.40]?"), "box out of range"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "kind"), FAULTS, ids=[kind for _, kind in FAULTS])
def test_each_fault_is_reported_once_with_its_row(tmp_path, images, capsys, bad, kind):
    code, lines = check(tmp_path, images, [row("ok"), bad, row("ok2", answer="Necrosis.")], capsys)
    assert code == 1
    reports = [line for line in lines if line.startswith("row ")]
    assert [line.split()[1] for line in reports if kind in line] == ["1"]
    assert [line.split()[-2:] for line in lines if line.startswith(kind)] == [["1", "1"]]  # one row, and which
    assert all(line.split()[1] == "1" for line in reports)
    assert lines[-1].endswith("3 rows, 0 of them text only; 1 rows with faults")


def test_good_files_pass(tmp_path, images, capsys):
    rows = [
        row("a"), row("b", image=None, question="Text?", answer="Only."),
        row("c", image=["good.png", "good.png"], question="<image> <image>\nSame?", answer="Yes: [0.1, 0.2, 0.3, 0.4]"),
        row("d", question="No tag?"),
    ]
    code, lines = check(tmp_path, images, rows, capsys)
    assert code == 0
    assert lines == [f"{tmp_path / 'data.json'}: 4 rows, 1 of them text only; 0 rows with faults"]


def test_duplicates_and_the_clean_file(tmp_path, images, capsys):
    rows = [row("a"), row("b"), row("a", answer="Necrosis."), row("x", "absent.png"), row("a", answer="Adipose.")]
    clean = tmp_path / "clean.json"
    code, lines = check(tmp_path, images, rows, capsys, "--write-clean", str(clean))
    assert code == 1
    assert [line.split()[1:3] for line in lines if "duplicate row" in line and line.startswith("row")] == [["1", "b"]]
    assert [line.split()[1] for line in lines if "duplicate id" in line and line.startswith("row")] == ["2", "4"]
    kept = json.loads(clean.read_text())
    assert [one["id"] for one in kept] == ["a", "a-2", "a-3"]
    assert [one["conversations"][1]["value"] for one in kept] == ["A gland.", "Necrosis.", "Adipose."]
    assert main([str(clean), "--images", str(images)]) == 0


def test_jsonl_and_unreadable_files(tmp_path, images, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [row("a"), row("b", "absent.png")]))
    assert main([str(path), "--images", str(images)]) == 1
    assert "row 1 " in capsys.readouterr().out
    (tmp_path / "map.json").write_text("{}")
    with pytest.raises(DataError, match="expected a JSON list"):
        main([str(tmp_path / "map.json"), "--images", str(images)])
    with pytest.raises(DataError, match="no such folder"):
        main([str(path), "--images", str(tmp_path / "nowhere")])


def test_one_file_with_every_fault_once(tmp_path, images, capsys):
    """The table counts one row for each fault, and the clean file holds what was never at fault."""
    from medllava.model.tiny import tiny_checkpoint

    tokenizer = tiny_checkpoint(tmp_path / "tokenizer")
    good = [row(f"good-{number}", answer=f"A gland, number {number}.") for number in range(3)]
    seeded = {
        "missing image": row("a", "absent.png"),
        "empty image": row("b", "empty.png"),
        "bad image": row("c", "cut.png"),
        "malformed": row("d") | {"conversations": "What?"},
        "turn order": row("e") | {"conversations": [{"from": "human", "value": "<image>\nWhat?"}]},
        "<image> count": row("f", image=None),
        "empty question": row("g", question="<image>"),
        "empty answer": row("h", answer=" "),
        "box out of range": row("i", answer="At [120, 40, 310, 90]."),
        "duplicate row": row("j", answer="A gland, number 0."),
        "duplicate id": row("good-1", image=["good.png", "good.png"], question="<image><image>Same?"),
        "too long": row("l", answer="necrosis " * 200),
    }
    rows = [good[0], *seeded.values(), *good[1:]]
    # The first row with the id "good-1" must come before the seeded one.
    rows = [good[1], *rows[:-2], good[2]]
    where = {kind: rows.index(one) for kind, one in seeded.items()}
    faults, clean = tmp_path / "faults.jsonl", tmp_path / "clean.json"
    code, lines = check(
        tmp_path, images, rows, capsys, "--tokenizer", str(tokenizer), "--max-length", "120",
        "--faults", str(faults), "--write-clean", str(clean),
    )
    assert code == 1
    assert {one["kind"]: one["row"] for one in map(json.loads, faults.read_text().splitlines())} == where
    assert len(faults.read_text().splitlines()) == len(seeded)
    at = next(number for number, line in enumerate(lines) if line.startswith("fault "))
    table = {line[:34].strip(): line[34:].split() for line in lines[at + 1 : at + 1 + len(seeded)]}
    assert table == {kind: ["1", str(number)] for kind, number in where.items()}
    assert [one["id"] for one in json.loads(clean.read_text())] == ["good-1", "good-0", "good-1-2", "good-2"]


def test_the_published_layout_passes(tmp_path, images, capsys):
    """QUILT-LLaVA-Instruct: bare names that begin with the video's id, <image> before or after the question, ids that
    name the picture and so occur once per kind."""
    name = "_KJZm1orOvU_roi_2b1c.jpg"
    Image.new("RGB", (512, 512), "orchid").save(images / name)
    rows = [
        row("2b1c", name, "What can be seen?\n<image>", "Sheets of cells."),
        row("2b1c", name, "<image>\nWhat do the clues suggest?", "A proliferative process."),
        row("77", None, "What is mitosis?", "A division of the nucleus."),
        row("78", "", "What is necrosis?", "The death of cells."),
        row("79", [name], "Which organ? <image>", "Skin."),
    ]
    clean = tmp_path / "clean.json"
    code, lines = check(tmp_path, images, rows, capsys, "--write-clean", str(clean))
    assert code == 0
    assert [line.split()[1] for line in lines if line.startswith("row ")] == ["1"]
    assert any(line.startswith("duplicate id, same image (note)") for line in lines)
    assert [one["id"] for one in json.loads(clean.read_text())] == ["2b1c", "2b1c-2", "77", "78", "79"]


def test_windows_and_absolute_names(tmp_path, images, capsys):
    (images / "frames").mkdir()
    Image.new("RGB", (40, 30), "pink").save(images / "frames" / "one.png")
    rows = [
        row("windows", "frames\\one.png"), row("absolute", str(images / "good.png")),
        row("elsewhere", "C:\\slides\\one.png"), row("address", "https://example.org/one.png"),
    ]
    clean = tmp_path / "clean.json"
    code, lines = check(tmp_path, images, rows, capsys, "--write-clean", str(clean))
    assert code == 1
    reports = [line for line in lines if line.startswith("row ")]
    assert [line.split()[1] for line in reports] == ["2", "3"]
    assert "absolute Windows path" in reports[0]
    assert "pictures must be files" in reports[1]
    assert [one["image"] for one in json.loads(clean.read_text())] == ["frames/one.png", str(images / "good.png")]


def test_images_are_opened_once(tmp_path, images, capsys, monkeypatch, kept_facts):
    rows = [row("a"), row("b", "cut.png")]
    first = check(tmp_path, images, rows, capsys)
    assert kept_facts.is_file()
    opened = []
    real = image_index.load_image
    monkeypatch.setattr(image_index, "load_image", lambda path: opened.append(path.name) or real(path))
    assert check(tmp_path, images, rows, capsys) == first
    assert opened == []
    Image.new("RGB", (44, 33), "pink").save(images / "cut.png")  # mended: another size and time
    assert check(tmp_path, images, rows, capsys)[0] == 0
    assert opened == ["cut.png"]
    check(tmp_path, images, rows, capsys, "--no-cache")
    assert sorted(opened) == ["cut.png", "cut.png", "good.png"]


def test_a_cache_that_cannot_be_used_is_no_fault(tmp_path, images, capsys, kept_facts):
    kept_facts.parent.mkdir(parents=True)
    kept_facts.write_text("This is no database. " * 100)
    assert check(tmp_path, images, [row("a")], capsys)[0] == 0


@pytest.mark.parametrize(("spare", "left"), [(0, 4), (-1, 2)])
def test_a_long_row_is_cut_by_whole_exchanges(tmp_path, images, capsys, spare, left):
    from medllava.conversation import sample_from_llava
    from medllava.model.lengths import open_prompts
    from medllava.model.tiny import tiny_checkpoint

    tokenizer = tiny_checkpoint(tmp_path / "tokenizer")
    long = row("long")
    long["conversations"] += [{"from": "human", "value": "And where?"}, {"from": "gpt", "value": "In the upper left."}]
    whole = open_prompts(tokenizer).sample(sample_from_llava(long).turns, "row")
    assert whole is not None
    limit, clean = len(whole.input_ids) + spare, tmp_path / "clean.json"
    code, lines = check(
        tmp_path, images, [long], capsys, "--tokenizer", str(tokenizer), "--max-length", str(limit),
        "--write-clean", str(clean),
    )
    assert code == (0 if left == 4 else 1)
    assert len(json.loads(clean.read_text())[0]["conversations"]) == left
    if left == 2:
        report = next(line for line in lines if line.startswith("row 0"))
        assert f"{limit + 1} tokens, limit {limit}: its last 2 turns would be cut off" in report


def test_a_format_that_supervises_nothing(tmp_path, images, capsys):
    from medllava.model.tiny import tiny_checkpoint

    tokenizer = tiny_checkpoint(tmp_path / "tokenizer")
    two = row("two")
    two["conversations"] += [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "No."}]
    code, lines = check(
        tmp_path, images, [row("one"), two], capsys, "--tokenizer", str(tokenizer), "--chat-format", "plain"
    )
    assert code == 1
    assert [line.split()[1] for line in lines if line.startswith("row ") and "chat format" in line] == ["1"]


LEAKS = ("leak: video", "leak: image", "near-duplicate image")


def tissue(seed, side=96):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(60, 240, (12, 12, 3), dtype=np.uint8))
    return small.resize((side, side), Image.Resampling.BICUBIC)


def test_leaks_between_two_files(tmp_path, images, capsys):
    for name, seed in {"a.png": 1, "b.png": 2, "c.png": 3, "d.png": 4, "e.png": 5}.items():
        tissue(seed).save(images / name)
    (images / "copy.png").write_bytes((images / "b.png").read_bytes())
    tissue(3, 128).save(images / "like-c.jpg", quality=70)
    train = [
        row("t0", "a.png", provenance={"video": "talk1.mp4"}), row("t1", "b.png", provenance={"video": "talk2.mp4"}),
        row("t2", "c.png", provenance={"video": "talk3.mp4"}), row("t3", None, "Q?", provenance={"video": "talk4.mp4"}),
    ]
    (tmp_path / "train.json").write_text(json.dumps(train))
    val = [
        row("v0", "d.png", provenance={"video": "talk1.mp4"}), row("v1", "copy.png", provenance={"video": "talk8.mp4"}),
        row("v2", "like-c.jpg", provenance={"video": "talk9.mp4"}),
        row("v3", "e.png", provenance={"video": "talk7.mp4"}),
    ]
    clean = tmp_path / "clean.json"
    code, lines = check(
        tmp_path, images, val, capsys, "--against", str(tmp_path / "train.json"), "--write-clean", str(clean)
    )
    assert code == 1
    reports = [line for line in lines if line.startswith("row ")]
    assert [(line.split()[1], kind) for line in reports for kind in LEAKS if kind in line] == [
        ("0", "leak: video"), ("1", "leak: image"), ("2", "near-duplicate image")
    ]
    assert "talk1, also of row 0" in reports[0]
    assert "copy.png shows what b.png of row 1 shows" in reports[1]
    assert "like-c.jpg looks like c.png of row 2" in reports[2]
    assert [one["id"] for one in json.loads(clean.read_text())] == ["v2", "v3"]
    (tmp_path / "rest.json").write_text(json.dumps(train[3:]))
    assert check(tmp_path, images, val, capsys, "--against", str(tmp_path / "rest.json"))[0] == 0


def test_flags_that_need_one_another(tmp_path, images, capsys):
    with pytest.raises(ConfigError, match="need --tokenizer"):
        check(tmp_path, images, [row("a")], capsys, "--max-length", "100")
    with pytest.raises(CheckpointError, match="no such folder"):
        check(tmp_path, images, [row("a")], capsys, "--tokenizer", str(tmp_path / "nowhere"))
