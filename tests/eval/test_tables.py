"""Tables as programs on Windows and people write them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from medllava.errors import DataError
from medllava.eval.benchmarks import load_benchmark, questions_hash, read_question_set
from medllava.eval.pictures import Pictures
from medllava.eval.records import Question
from medllava.eval.tables import read_table, tell_half_line
from medllava.jsonl import read_json

ROWS = [
    {"image": "\u00fc b.png", "question": "Is it a gland; a vessel, or both?", "answer": "yes", "choices": ""},
    {"image": "a.png", "question": 'What is "it"?\r\nSay.', "answer": "necrosis", "choices": "a gland|necrosis"},
    {"image": "", "question": "\u7ec6\u80de?", "answer": "na\u00efve  cells", "choices": ""},
]


def table(delimiter: str, ending: str, encoding: str) -> bytes:
    held = io.StringIO(newline="")
    writer = csv.DictWriter(held, list(ROWS[0]), delimiter=delimiter, lineterminator=ending)
    writer.writeheader()
    writer.writerows(ROWS)
    held.write(delimiter * 3 + ending)  # as spreadsheets leave empty rows
    return held.getvalue().encode(encoding)


@pytest.mark.parametrize(
    ("delimiter", "ending", "encoding"),
    [(",", "\n", "utf-8"), (",", "\r\n", "utf-8-sig"), (";", "\r\n", "utf-8-sig"), ("\t", "\r\n", "utf-16"),
     ("\t", "\n", "utf-8")],
)
def test_a_table_says_itself_what_parts_its_columns(
    delimiter: str, ending: str, encoding: str, tmp_path: Path
) -> None:
    path = tmp_path / "q.csv"
    path.write_bytes(table(delimiter, ending, encoding))
    assert [row for _, row in read_table(path).rows] == ROWS
    lines = tmp_path / "q.jsonl"
    lines.write_bytes(("\ufeff" + "\r\n".join(map(json.dumps, ROWS)) + "\r\n").encode())
    own = load_benchmark("own")
    found = [questions_hash(read_question_set(each, own).questions) for each in (path, lines)]
    assert found[0] == found[1]


def test_lists_with_the_mark_of_windows(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_bytes(("\ufeff" + json.dumps(ROWS)).encode())
    assert read_json(path) == ROWS and len(read_table(path).rows) == 3


def test_text_in_another_encoding_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_bytes("question,answer\nGefäß?,yes\n".encode("cp1252"))
    with pytest.raises(DataError, match="q.csv: not UTF-8 text .*save it as CSV UTF-8"):
        read_table(path)


def test_half_a_question_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1])[:-5])
    assert len(read_table(path).rows) == 1
    assert f"{path}:2: the last line is half written and was left out" in caplog.text


def test_a_whole_last_line_is_no_half_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for text in ("", "\n", "{}", "{}\n  ", '{"a": "\u00fc"}'):
        (tmp_path / "q.jsonl").write_text(text, encoding="utf-8")
        tell_half_line(tmp_path / "q.jsonl")
    assert not caplog.records


def test_a_fault_in_a_table_is_told_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text('id,question,answer\n1,"Is it\nso?",yes\n\n1,Is it?,no\n')
    with pytest.raises(DataError, match=r"q\.csv:5: question id '1' occurs a second time, after .*q\.csv:3;"):
        read_question_set(path)


def test_pictures_by_absolute_and_windows_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "sub" / "a.png")
    pictures = Pictures(tmp_path, [])
    for name in ("sub/a.png", "a.png", "a", str(tmp_path / "sub" / "a.png"), "sub\\a.png", "C:\\my pictures\\a.png"):
        assert pictures.path(name) == tmp_path / "sub" / "a.png"


def test_no_question_is_mismatched_with_a_picture_that_is_gone(tmp_path: Path) -> None:
    """One missing picture takes its own questions with it and no others."""
    for name in "ab":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    questions = [
        Question(id=f"{name}{n}", image=f"{name}.png", question="?", kind="open", answer="x", group=name)
        for name in ("a", "b", "gone", "lost") for n in range(5)
    ]
    pictures = Pictures(tmp_path, questions)
    for question in questions[:10]:
        assert pictures.show(question, "mismatched") is not None
