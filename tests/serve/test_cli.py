from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from medllava.errors import MedllavaError
from medllava.geometry import Box, Point
from medllava.images import load_image
from medllava.model.answerer import Answerer
from medllava.model.checkpoint import load, save_full, save_projector
from medllava.model.hub import display_name, local_folder
from medllava.model.tiny import TextSizes, tiny_model
from medllava.regions import draw_mark
from medllava.serve.cli import main


@pytest.fixture
def model(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
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


def test_an_answer_without_boxes_is_told(
    model: Any, photograph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("medllava.serve.cli.parse_boxes", lambda text: [])
    drawn = tmp_path / "drawn.png"
    arguments = ["--model-path", "m", "--image-file", str(photograph), "--prompt", "Where?"]
    assert main([*arguments, "--save-boxes", str(drawn)]) == 0
    assert f"the answer names no box: {drawn} is the picture as it was" in capsys.readouterr().err
    assert drawn.is_file()


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
        (["--image-file", "https://host/view.jpg", "--prompt", "x"], "https://host/view.jpg: an address.*download it"),
        (["--max-new-tokens", "0", "--prompt", "x"], "--max-new-tokens is 1 or more"),
        (["--temperature", "-1", "--prompt", "x"], "--temperature 0 or more"),
        (["--view", "0,0,1,1", "--prompt", "x"], "--view needs a whole slide"),
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
    done = subprocess.run([*command, "--prompt", "x"], capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {empty}: the image is empty (0 bytes)\n"


def test_the_real_model_answers_a_photograph_of_odd_shape(tiny: Path, tmp_path: Path) -> None:
    Image.effect_noise((1203, 77), 60).save(tmp_path / "strip.jpg")
    command = [sys.executable, "-m", "medllava.serve.cli", "--model-path", str(tiny), "--max-new-tokens", "5", "--json"]
    command += ["--image-file", str(tmp_path / "strip.jpg")]
    runs = [
        subprocess.run(command, input="What is here?\n", capture_output=True, text=True, timeout=600, check=True).stdout
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


def asked_pictures(model: Any) -> list[list[tuple[int, int]]]:
    return [[image.size for image in images] for images, _, _ in model.asked]


def test_several_images_in_one_conversation(
    model: Any, photograph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (40, 30), "pink").save(tmp_path / "other.png")
    pipe(
        monkeypatch,
        f"/image {photograph}\nWhere?\nSure?\n/image {tmp_path / 'other.png'}\nAnd here?\n/reset\nAlone?\n",
    )
    assert main(["--model-path", "m"]) == 0
    assert asked_pictures(model) == [[(900, 300)], [(900, 300)], [(900, 300), (40, 30)], [(40, 30)]]
    turns = model.asked[2][1]
    assert [turn.text.count("<image>") for turn in turns if turn.role == "user"] == [1, 0, 1]
    assert model.asked[3][1][0].text == "<image>\nAlone?"


def test_two_image_files_come_with_one_question(model: Any, photograph: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "pink").save(tmp_path / "other.png")
    arguments = ["--model-path", "m", "--image-file", str(photograph), "--image-file", str(tmp_path / "other.png")]
    assert main([*arguments, "--prompt", "Which is a gland?"]) == 0
    assert asked_pictures(model) == [[(900, 300), (40, 30)]]
    assert model.asked[0][1][0].text == "<image>\n<image>\nWhich is a gland?"


@pytest.mark.parametrize("flag", [True, False])
def test_a_checkpoint_of_marks_gets_marks(
    model: Any, photograph: Path, monkeypatch: pytest.MonkeyPatch, flag: bool
) -> None:
    if not flag:
        model.manifest.regions = ("mark",)
    pipe(monkeypatch, "/box 0.5 0.5 0.8 0.9\nWhat is in this region?\n/box\nAnd in all?\n/point 0.2 0.2\nHere?\n")
    arguments = ["--model-path", "m", "--image-file", str(photograph)]
    assert main([*arguments, *(["--regions", "mark"] if flag else [])]) == 0
    plain = load_image(photograph)
    images, turns, _ = model.asked[2]
    assert [turn.text for turn in turns if turn.role == "user"] == [
        "<image>\nWhat is in the region marked in red?", "<image>\nAnd in all?",
        "<image>\nHere? The question is about the region marked in red.",
    ]
    assert images[0].tobytes() == draw_mark(plain, Box(x1=0.5, y1=0.5, x2=0.8, y2=0.9)).tobytes()
    assert images[1].tobytes() == plain.tobytes()
    assert images[2].tobytes() == draw_mark(plain, Point(x=0.2, y=0.2)).tobytes()


def test_a_checkpoint_of_marks_can_be_asked_in_text(model: Any, photograph: Path) -> None:
    model.manifest.regions = ("mark",)
    arguments = ["--model-path", "m", "--image-file", str(photograph), "--point", "0.5,0.5", "--regions", "text"]
    assert main([*arguments, "--prompt", "What is in this region?"]) == 0
    assert model.asked[0][1][0].text == "<image>\nWhat is in the region [0.42, 0.42, 0.58, 0.58]?"


def test_saved_conversations_hold_the_regions(
    model: Any, photograph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, page = tmp_path / "chat.json", tmp_path / "chat.md"
    pipe(
        monkeypatch,
        "Where?\n/box 0.1 0.2 0.3 0.4\nWhat is this?\n/point 0.5 0.5\nHere?\n" + f"/save {kept}\n/save {page}\n",
    )
    assert main(["--model-path", "m", "--image-file", str(photograph)]) == 0
    turns = json.loads(kept.read_text())["turns"]
    assert [turn["region"] for turn in turns if turn["role"] == "user"] == [
        None, {"box": [0.1, 0.2, 0.3, 0.4]}, {"point": [0.5, 0.5]}
    ]
    assert turns[2]["typed"] == "What is this?" and "[0.10, 0.20, 0.30, 0.40]" in turns[2]["text"]
    text = page.read_text()
    assert "Picture 1: 900 x 300 pixels" in text and text.count("## Question") == 3
    assert "Region (box): `[0.10, 0.20, 0.30, 0.40]`" in text and "Region (point)" in text


def test_looking_in_a_chat_and_in_one_shot(
    model: Any, photograph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, f"Where is the gland?\n/look\n/look {tmp_path / 'one.png'}\n")
    arguments = ["--model-path", "m", "--image-file", str(photograph)]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "depends most on [0.86, 0.00, 1.00, 0.14]: covered, 2.50 nats less likely (the whole image:" \
        " +3.50 nats)"
    assert lines[2].endswith(f"saved {tmp_path / 'one.png'}")
    _, turns, answer, _ = model.looker.asked[0]
    assert answer == "A gland. [0.10, 0.20, 0.40, 0.60]" and turns[-1].text == "<image>\nWhere is the gland?"
    assert load_image(tmp_path / "one.png").size[0] == 900

    assert main([*arguments, "--prompt", "Where?", "--json", "--look", str(tmp_path / "two.png")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["looking"]["peak"] == pytest.approx([6 / 7, 0, 1, 1 / 7]) and (tmp_path / "two.png").is_file()


@pytest.mark.parametrize("lines", ["/look", "Hello\n/look", "/look out.xyz"])
def test_nothing_to_look_into(model: Any, monkeypatch: pytest.MonkeyPatch, lines: str) -> None:
    pipe(monkeypatch, lines + "\n")
    with pytest.raises(MedllavaError, match="no answer about an image|not the name of a picture"):
        main(["--model-path", "m"])


def test_the_python_interface_marks_or_writes_the_region(tiny: Path, photograph: Path) -> None:
    loaded = Answerer.load(tiny, device="cpu")
    box = Box(x1=0.1, y1=0.2, x2=0.4, y2=0.6)
    in_text = loaded.ask("What is in this region?", photograph, region=box, max_new_tokens=4)
    typed = loaded.ask("What is in the region [0.10, 0.20, 0.40, 0.60]?", photograph, max_new_tokens=4)
    assert in_text == typed
    assert loaded.ask("What is in this region?", photograph, region=(0.1, 0.2, 0.4, 0.6), max_new_tokens=4) == typed
    point, numbers = (
        loaded.ask("What is here?", photograph, photograph, region=place, max_new_tokens=4)
        for place in (Point(x=0.5, y=0.5), [0.5, 0.5])
    )
    assert numbers == point != typed
    for wrong in ((0.4, 0.2, 0.1, 0.6), (1, 2, 3, 4), (0.1, 0.2, 0.3), ()):
        with pytest.raises(MedllavaError, match="region"):
            loaded.ask("What is in this region?", photograph, region=wrong)
    loaded.manifest = loaded.manifest.model_copy(update={"regions": ("mark",)})
    marked = loaded.ask("What is in this region?", photograph, region=box, max_new_tokens=4)
    assert marked.prompt_tokens < typed.prompt_tokens
    assert loaded.ask("What is in the region marked in red?", draw_mark(load_image(photograph), box),
                      max_new_tokens=4) == marked


@pytest.fixture
def hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub id whose snapshot is in the cache; the hub itself is out of reach."""
    snapshot = tmp_path / "hub" / "models--lab--tissue-chat" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(tiny, snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return "lab/tissue-chat"


def test_a_hub_id_in_place_of_a_folder(hub: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model-path", hub, "--prompt", "Hello", "--json", "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "tissue-chat"
    with pytest.raises(MedllavaError, match="lab/other: no such checkpoint folder, and not to be had from the hub"):
        main(["--model-path", "lab/other", "--prompt", "Hello"])


def test_the_worker_takes_a_hub_id_too(hub: str) -> None:
    from medllava.serve import worker

    with pytest.raises(MedllavaError, match="lab/other: no such checkpoint folder") as caught:
        worker.main(["--model-path", "lab/other", "--port", "0"])
    assert "\n" not in str(caught.value)
    assert display_name(local_folder(hub)) == "tissue-chat"


def test_the_base_of_an_adapter_can_be_named(tiny: Path, tmp_path: Path) -> None:
    moved, wider = tmp_path / "moved" / "base", tmp_path / "wider"
    shutil.copytree(tiny, moved)
    loaded = load(tiny, device="cpu")
    with torch.no_grad():
        for value in loaded.model.model.multi_modal_projector.parameters():
            value.add_(0.5)
    save_projector(tmp_path / "part", loaded.model, loaded.processor, base=tiny, chat_format="medllava")
    manifest = json.loads((tmp_path / "part" / "medllava.json").read_text()) | {"base": "../gone"}
    (tmp_path / "part" / "medllava.json").write_text(json.dumps(manifest))
    question = ["--model-path", str(tmp_path / "part"), "--prompt", "Hello", "--max-new-tokens", "2"]
    with pytest.raises(MedllavaError, match="its base model is not at"):
        main(question)
    assert main([*question, "--model-base", str(moved)]) == 0
    texts = ["Where is the gland? In the upper left."]
    other, processor = tiny_model(texts, text=TextSizes(hidden_size=64, intermediate_size=64))
    save_full(wider, other, processor, chat_format="medllava")
    with pytest.raises(MedllavaError, match="belongs to another base"):
        main([*question, "--model-base", str(wider)])


@pytest.mark.parametrize("file", ["non_lora_trainables.bin", "mm_projector.bin", "pytorch_model.bin"])
def test_folders_of_llavas_own_format_are_told_how_to_convert(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "llava-v1.5-7b-lora"
    folder.mkdir()
    (folder / file).touch()
    (folder / "config.json").write_text('{"mm_vision_tower": "clip", "model_type": "llava"}')
    with pytest.raises(MedllavaError, match="python -m medllava.model convert .*llava-v1.5-7b-lora-hf") as caught:
        main(["--model-path", str(folder), "--model-base", "lmsys/vicuna", "--prompt", "x"])
    assert ("--base" in str(caught.value)) == (file != "pytorch_model.bin")
