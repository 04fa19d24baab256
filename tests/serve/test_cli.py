from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medllava.errors import MedllavaError
from medllava.images import load_image
from medllava.model.answerer import Answerer
from medllava.serve.cli import main


@pytest.fixture
def model(scripted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The scripted model in the place of whatever folder is named."""
    monkeypatch.setattr(Answerer, "load", classmethod(lambda cls, path, **options: scripted))
    return scripted


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_one_question_streams_text(model: Any, photograph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model-path", "m", "--image-file", str(photograph), "--prompt", "Where is the gland?"]) == 0
    assert capsys.readouterr().out == "A gland. [0.10, 0.20, 0.40, 0.60]\n"
    images, turns, options = model.asked[0]
    assert images[0].size == (900, 300)
    assert turns[0].text == "<image>\nWhere is the gland?"
    assert options == {"max_new_tokens": 256, "temperature": 0.0, "top_p": 1.0, "seed": None}


def test_json_is_one_object_with_the_boxes(model: Any, photograph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model-path", "m", "--image-file", str(photograph), "--prompt", "Where?", "--json"]
    assert main([*arguments, "--max-new-tokens", "6"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["text"] == "A gland. [0.10, 0.20, 0.40, 0.60]"
    assert result["boxes"] == [[0.1, 0.2, 0.4, 0.6]]
    assert (result["model"], result["finish_reason"]) == ("scripted", "stop")
    assert result["usage"] == {"prompt_tokens": 18, "completion_tokens": 6}


def test_a_box_and_the_drawn_answer(model: Any, photograph: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.png"
    arguments = ["--model-path", "m", "--image-file", str(photograph), "--prompt", "What is in this region?"]
    assert main([*arguments, "--box", "0.5,0.5,0.8,0.9", "--save-boxes", str(drawn)]) == 0
    assert model.asked[0][1][0].text == "<image>\nWhat is in the region [0.50, 0.50, 0.80, 0.90]?"
    assert load_image(drawn).size == (900, 300)
    assert load_image(drawn).getpixel((450, 200)) == (0xE6, 0x19, 0x4B)


def test_piped_questions_are_one_conversation(
    model: Any, photograph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = tmp_path / "chat.json"
    pipe(
        monkeypatch,
        f"/image {photograph}\nWhere is the gland?\n\n/box 0.1 0.2 0.3 0.4\nWhat is this?\n"
        f"/point 0.5 0.5\nWhat is here?\n/save {chat}\n/reset\nAnd now?\n",
    )
    assert main(["--model-path", "m"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "A gland. [0.10, 0.20, 0.40, 0.60]",
        "The region [0.10, 0.20, 0.30, 0.40] holds a vessel.",
        "The region [0.42, 0.42, 0.58, 0.58] holds a vessel.",
        "A gland. [0.10, 0.20, 0.40, 0.60]",
    ]
    assert [len(turns) for _, turns, _ in model.asked] == [1, 3, 5, 1]
    assert [turns[0].text.startswith("<image>") for _, turns, _ in model.asked] == [True] * 4
    saved = json.loads(chat.read_text())
    assert (saved["model"], saved["image_size"], len(saved["turns"])) == ("scripted", [900, 300], 6)
    assert saved["turns"][1]["boxes"] == [[0.1, 0.2, 0.4, 0.6]]


def test_piped_questions_as_json_lines(
    model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "one\ntwo\n")
    assert main(["--model-path", "m", "--json"]) == 0
    assert [json.loads(line)["text"][:7] for line in capsys.readouterr().out.splitlines()] == ["A gland"] * 2


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--image-file", "nowhere.png", "--prompt", "x"], "nowhere.png: no such image file"),
        (["--box", "0.5,0.5,0.2,0.2", "--prompt", "x"], "x1 < x2"),
        (["--box", "10,20,30,40", "--prompt", "x"], "less than or equal to 1"),
        (["--box", "a,b,c,d", "--prompt", "x"], "four numbers"),
        (["--save-boxes", "out.png"], "--save-boxes needs"),
        (["--prompt", "too much memory"], "--load-4bit"),
        (["--prompt", "too many words"], "4096"),
    ],
)
def test_what_cannot_be_used_is_one_line(model: Any, arguments: list[str], why: str) -> None:
    with pytest.raises(MedllavaError, match=why) as caught:
        main(["--model-path", "m", *arguments])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["/imagine", "/image nowhere.png", "/box 1 2", "/point 3 4", "/save picture.png"])
def test_a_bad_command_ends_a_piped_run(model: Any, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    pipe(monkeypatch, f"{line}\nhello\n")
    with pytest.raises(MedllavaError):
        main(["--model-path", "m"])
    assert model.asked == []


def test_a_zero_byte_image_stops_before_the_model_is_loaded(tmp_path: Path) -> None:
    empty = tmp_path / "empty.png"
    empty.touch()
    command = [sys.executable, "-m", "medllava.serve.cli", "--model-path", "m", "--image-file", str(empty)]
    done = subprocess.run([*command, "--prompt", "x"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {empty}: the image is empty (0 bytes)\n"


def test_the_real_model_answers_a_photograph_of_odd_shape(tiny: Path, tmp_path: Path) -> None:
    Image.effect_noise((1203, 77), 60).save(tmp_path / "strip.jpg")
    command = [sys.executable, "-m", "medllava.serve.cli", "--model-path", str(tiny), "--max-new-tokens", "5", "--json"]
    command += ["--image-file", str(tmp_path / "strip.jpg")]
    runs = [
        subprocess.run(command, input="What is here?\n", capture_output=True, text=True, timeout=100, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    result = json.loads(runs[0])
    assert result["usage"]["completion_tokens"] <= 5 and result["model"] == tiny.name


def test_the_flags_of_llavas_own_command(tiny: Path, photograph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model-path", str(tiny), "--image-file", str(photograph), "--prompt", "Where?", "--device", "cpu"]
    arguments += ["--temperature", "0.2", "--max-new-tokens", "3"]
    assert main([*arguments, "--conv-mode", "medllava"]) == 0
    assert capsys.readouterr().err.count("warning") == 0
    assert main([*arguments, "--conv-mode", "llava_v1", "--model-base", "elsewhere"]) == 0
    assert "--conv-mode llava_v1 is not used" in capsys.readouterr().err
