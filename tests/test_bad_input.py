"""Input that cannot be used and a disk that is full: each is one clear line, exit code 1, nothing half-written.

Every command runs as a person runs it, in a process of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

Run = Callable[..., subprocess.CompletedProcess[str]]
SmallDisk = Callable[[str], Path]


def refused(done: subprocess.CompletedProcess[str], *said: str) -> None:
    """The command failed with exactly one line that says ``said``, and no traceback."""
    lines = [line.strip() for line in done.stderr.replace("\r", "\n").splitlines()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert done.returncode == 1, done.stderr
    assert len(errors) == 1, done.stderr
    assert all(text in errors[0] for text in said), errors[0]
    assert "Traceback" not in done.stderr + done.stdout


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def all_whole(folder: Path) -> None:
    """Nothing in ``folder`` is the beginning of something: no temporary file, and each file can be read to its end."""
    for path in folder.rglob("*"):
        assert ".part" not in path.name, path
        if path.suffix == ".jsonl":
            text = path.read_text()
            assert text.endswith("\n") or not text, path
            assert all(isinstance(json.loads(line), dict) for line in text.splitlines()), path
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        elif path.suffix in {".yaml", ".md", ".html", ".svg", ".srt"}:
            assert path.stat().st_size, path


# -- videos and transcripts


@pytest.fixture
def lectures(phantoms: Path, tmp_path: Path) -> Path:
    """A folder with one good video, talk.mp4, and its transcript talk.srt."""
    folder = tmp_path / "lectures"
    folder.mkdir()
    source = sorted(phantoms.glob("*.mp4"))[0]
    shutil.copy(source, folder / "talk.mp4")
    shutil.copy(source.with_suffix(".srt"), folder / "talk.srt")
    return folder


def no_video(folder: Path) -> None:
    (folder / "talk.mp4").write_text("This is a letter, not a video.\n" * 50)


def truncated(folder: Path) -> None:
    whole = (folder / "talk.mp4").read_bytes()
    (folder / "talk.mp4").write_bytes(whole[: len(whole) // 2])


def truncated_behind_its_index(folder: Path) -> None:
    """An MP4 made for streaming has its index in front and still opens when its end is missing."""
    import av

    with av.open(str(folder / "talk.mp4")) as old, av.open(
        str(folder / "front.mp4"), "w", options={"movflags": "faststart"}
    ) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    whole = (folder / "front.mp4").read_bytes()
    assert whole.index(b"moov") < whole.index(b"mdat")
    (folder / "talk.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "front.mp4").unlink()


def empty_video(folder: Path) -> None:
    (folder / "talk.mp4").write_bytes(b"")


def empty_transcript(folder: Path) -> None:
    (folder / "talk.srt").write_bytes(b"")


def transcript_of_another_video(folder: Path) -> None:
    (folder / "talk.srt").write_text("1\n00:59:00,000 --> 00:59:04,000\nThis gland is far behind the end.\n")


def no_transcript(folder: Path) -> None:
    (folder / "talk.srt").unlink()


FAULTS = [
    (no_video, "talk.mp4: not a video that can be read"),
    (truncated, "talk.mp4: not a video that can be read"),
    (truncated_behind_its_index, "talk.mp4: the file is damaged"),
    (empty_video, "talk.mp4: the file is empty (0 bytes)"),
    (empty_transcript, "talk.srt: the transcript is empty"),
    (transcript_of_another_video, "talk.srt: an utterance ends at 3544.0 s, but the video is"),
    (no_transcript, "talk.mp4: no transcript"),
]


@pytest.mark.parametrize(("spoil", "why"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_video_that_cannot_be_used(
    spoil: Callable[[Path], None], why: str, lectures: Path, run: Run, tmp_path: Path
) -> None:
    spoil(lectures)
    out = tmp_path / "out"
    refused(run("instruct_gen", "narrate", "--videos", lectures, "--out", out), why)
    # What failed is on record; there is no result that could be taken for one.
    assert files(out) == {"failed.jsonl"}
    assert why in json.loads((out / "failed.jsonl").read_text())["reason"]


def test_bad_videos_among_good_ones_are_reported_and_the_rest_is_used(
    lectures: Path, phantoms: Path, run: Run, tmp_path: Path
) -> None:
    for number, (spoil, _) in enumerate(FAULTS):
        folder = tmp_path / "one"
        folder.mkdir()
        for ending in (".mp4", ".srt"):
            shutil.copy(lectures / f"talk{ending}", folder)
        spoil(folder)
        for path in folder.iterdir():
            path.rename(lectures / f"bad{number}{path.suffix}")
        folder.rmdir()
    out = tmp_path / "out"
    done = run("instruct_gen", "narrate", "--videos", lectures, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert f"warning: {len(FAULTS)} of {len(FAULTS) + 1} videos failed" in done.stdout
    failed = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    for number, (_, why) in enumerate(FAULTS):
        assert failed[number]["video"] == f"bad{number}.mp4"
        assert why.replace("talk.", f"bad{number}.") in failed[number]["reason"]
    used = {json.loads(line)["video"] for line in (out / "captions.jsonl").read_text().splitlines()}
    assert used == {"talk.mp4"}
    assert {path.name.rpartition("-")[0] for path in (out / "frames").iterdir()} == {"talk"}
    all_whole(out)


# -- images


def test_a_missing_and_an_empty_image_for_the_terminal(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.png"
    empty.touch()
    notes = tmp_path / "notes.png"
    notes.write_text("no picture")
    common = ["serve.cli", "--model-path", checkpoint, "--prompt", "What is here?", "--json"]
    drawn = tmp_path / "drawn.png"
    for path, why in (
        (tmp_path / "absent.png", "no such image file"), (empty, "the image is empty (0 bytes)"),
        (notes, "not an image in a known format"),
    ):
        done = run(*common, "--image-file", path, "--save-boxes", drawn)
        refused(done, f"{path}: {why}")
        assert done.stdout == ""
    assert not drawn.exists()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """LLaVA JSON of four rows; the picture of the third is missing."""
    (tmp_path / "images").mkdir()
    rows: list[dict[str, Any]] = []
    for number in range(4):
        name = f"{number}.png"
        if number != 2:
            Image.new("RGB", (64, 48), (200, 40 * number, 180)).save(tmp_path / "images" / name)
        said = [("human", "<image>\nWhat is here?"), ("gpt", f"A gland, number {number}.")]
        rows.append({
            "id": f"row{number}", "image": name, "kind": "conversation",
            "conversations": [{"from": side, "value": text} for side, text in said],
        })
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(rows))
    return path


def training(repository: Path, data: Path, checkpoint: Path, out: Path, *more: str) -> list[object]:
    recipe = repository / "train" / "recipes" / "demo_stage2.yaml"
    return [
        "train", "--config", recipe, "--data", data, "--images", data.parent / "images", "--init-from", checkpoint,
        "--out", out, "optim.steps=2", "optim.batch_size=2", *more,
    ]


def test_a_missing_and_an_empty_image_in_training_data(
    run: Run, repository: Path, data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refused(run(*training(repository, data, checkpoint, out)), "images/2.png: no such image file")
    (data.parent / "images" / "2.png").touch()
    refused(run(*training(repository, data, checkpoint, out)), "images/2.png: the image is empty (0 bytes")
    assert not out.exists()


def test_check_names_the_row_of_a_missing_and_an_empty_image(run: Run, data: Path) -> None:
    (data.parent / "images" / "3.png").write_bytes(b"")
    done = run("instruct_gen", "check", data, "--images", data.parent / "images")
    assert done.returncode == 1
    faults = [line.split() for line in done.stdout.splitlines() if line.startswith("row ")]
    assert [(fault[1], fault[2], fault[3]) for fault in faults] == [("2", "row2", "missing"), ("3", "row3", "empty")]
    assert "Traceback" not in done.stderr


# -- checkpoints and recipes


@pytest.fixture
def stages(run: Run, repository: Path, data: Path, checkpoint: Path, tmp_path: Path) -> dict[str, Path]:
    """A projector folder and a LoRA folder as training leaves them."""
    Image.new("RGB", (64, 48)).save(data.parent / "images" / "2.png")
    folders = {"projector": tmp_path / "projector", "lora": tmp_path / "lora"}
    for kind, folder in folders.items():
        done = run(*training(repository, data, checkpoint, folder, f"stage={kind}", "lora.r=2"))
        assert done.returncode == 0, done.stderr
    return folders


def test_a_checkpoint_folder_without_its_projector(
    run: Run, repository: Path, data: Path, stages: dict[str, Path], tmp_path: Path
) -> None:
    picture = data.parent / "images" / "0.png"
    for kind, folder in stages.items():
        (folder / "projector.safetensors").unlink()
        why = f"{folder}: projector.safetensors is missing; a {kind} checkpoint cannot be used without it"
        out = tmp_path / f"from-{kind}"
        for command in (
            ["serve.cli", "--model-path", folder, "--image-file", picture, "--prompt", "What is here?"],
            ["serve.worker", "--model-path", folder, "--port", 0],
            ["model", "merge", folder, out],
            training(repository, data, folder, out, "stage=full"),
        ):
            refused(run(*command), why)
            assert not out.exists()


@pytest.mark.parametrize(
    ("stage", "wrong", "right"),
    [
        ("train", "learning_rat", "learning_rate"), ("train", "fliip", "flip"),
        ("instruct_gen", "concurency", "concurrency"),
    ],
)
def test_an_unknown_recipe_key(
    stage: str, wrong: str, right: str, run: Run, repository: Path, data: Path, checkpoint: Path, narrated: Path,
    teacher: str, tmp_path: Path,
) -> None:
    name = {"train": "demo_stage2.yaml", "instruct_gen": "demo.yaml"}[stage]
    recipe = yaml.safe_load((repository / stage / "recipes" / name).read_text())
    place = recipe["optim"] if wrong == "learning_rat" else recipe
    place[wrong] = place.pop(right, 1)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    if stage == "train":
        command = training(repository, data, checkpoint, out)
        command[2] = path
    else:
        command = [
            "instruct_gen", "generate", "--captions", narrated / "captions.jsonl", "--out", out, "--config", path,
            "--base-url", teacher,
        ]
    refused(run(*command), str(path), f'{wrong}"; did you mean "{right}"?')
    assert not out.exists()


# -- a full disk

FULL = ("No space left on device", "free some space or choose another --out")


def test_a_full_disk_for_videos(run: Run, small_disk: SmallDisk) -> None:
    out = small_disk("600k") / "videos"
    refused(run("phantom", "--out", out, "--videos", 4, "--seed", 11, "--fields", 4), *FULL, str(out))
    all_whole(out)
    assert {path.suffix for path in out.iterdir()} <= {".mp4", ".srt", ".json"}
    assert len(list(out.glob("*.mp4"))) == len(list(out.glob("*.truth.json")))


def test_a_full_disk_for_narratives(run: Run, phantoms: Path, small_disk: SmallDisk) -> None:
    out = small_disk("200k") / "narrated"
    refused(run("instruct_gen", "narrate", "--videos", phantoms, "--out", out), *FULL, str(out))
    all_whole(out)
    assert "captions.jsonl" not in files(out)


@pytest.mark.parametrize("size", ["4k", "24k", "100k"])
def test_a_full_disk_for_samples(
    size: str, run: Run, repository: Path, narrated: Path, teacher: str, small_disk: SmallDisk
) -> None:
    out = small_disk(size) / "data"
    recipe = repository / "instruct_gen" / "recipes" / "demo.yaml"
    command = ["generate", "--captions", narrated / "captions.jsonl", "--out", out, "--config", recipe]
    refused(run("instruct_gen", *command, "--base-url", teacher), *FULL, str(out))
    all_whole(out)
    assert "llava.json" not in files(out) or size == "100k"
    # With room again, the same command goes on from the replies that were kept.
    kept = (out / "replies.jsonl").read_text()
    subprocess.run(["mount", "-o", "remount,size=8m", str(out.parent)], check=True)
    done = run("instruct_gen", *command, "--base-url", teacher)
    assert done.returncode == 0, done.stderr
    assert (out / "replies.jsonl").read_text().startswith(kept)


@pytest.mark.parametrize("size", ["8k", "400k"])
def test_a_full_disk_for_training(
    size: str, run: Run, repository: Path, data: Path, checkpoint: Path, small_disk: SmallDisk
) -> None:
    Image.new("RGB", (64, 48)).save(data.parent / "images" / "2.png")
    out = small_disk(size) / "stage"
    done = run(*training(repository, data, checkpoint, out, "stage=full"))
    refused(done, str(out), "are free; free some space, choose another --out, or lower keep")
    all_whole(out)
    assert {"medllava.json", "config.json", "finished.json"}.isdisjoint(files(out))
    assert not list(out.parent.rglob("*.safetensors"))


@pytest.fixture
def questions(run: Run, phantoms: Path, narrated: Path, tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    done = run(
        "phantom.questions", "--videos", phantoms, "--narratives", narrated / "narratives.jsonl", "--out", path,
        "--seed", 0, "--per-kind", 4,
    )
    assert done.returncode == 0, done.stderr
    return path


def test_a_full_disk_for_answers_and_report(
    run: Run, questions: Path, narrated: Path, checkpoint: Path, tmp_path: Path, small_disk: SmallDisk
) -> None:
    out = small_disk("24k") / "report"
    common = ["--benchmark", "phantom", "--questions", questions, "--images", narrated]
    answer = ["eval", "answer", *common, "--model-path", checkpoint]
    refused(run(*answer, "--out", out), *FULL, str(out))
    all_whole(out)
    whole = tmp_path / "whole"
    assert run(*answer, "--out", whole).returncode == 0
    for size in ("4k", "32k"):
        out = small_disk(size) / "report"
        refused(run("eval", "report", *common, "--answers", whole / "answers.jsonl", "--out", out), *FULL, str(out))
        all_whole(out)
