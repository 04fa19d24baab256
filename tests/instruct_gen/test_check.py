from __future__ import annotations

import argparse
import json

import pytest
from PIL import Image

from medllava.errors import DataError
from medllava.instruct_gen import check as step


def main(argv):
    parser = argparse.ArgumentParser()
    step.configure(parser)
    return step.run(parser.parse_args(argv))


def row(id, image="good.png", question="<image>\nWhat?", answer="A gland.", **more):
    conversations = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": id, **({"image": image} if image else {}), "conversations": conversations, **more}


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
