"""The first half of the street on narrated clips that another renderer made, with known truth.

They are looked for in ``shared/clips`` beside the repository, or where MEDLLAVA_CLIPS says.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medllava.images import load_image
from medllava.instruct_gen.records import GroundedCaption, Narrative
from medllava.jsonl import read_json, read_records

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def clips(repository: Path) -> Path:
    folder = Path(os.environ.get("MEDLLAVA_CLIPS") or repository.parent / "shared" / "clips")
    if not any(folder.glob("*.mp4")):
        pytest.skip(f"no clips in {folder}; MEDLLAVA_CLIPS may name another folder")
    return folder


@pytest.fixture(scope="module")
def out(clips: Path, run: Run, teacher: str, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What narrate and then generate make of all clips."""
    folder = tmp_path_factory.mktemp("clips")
    done = run("instruct_gen", "narrate", "--videos", clips, "--out", folder)
    assert done.returncode == 0, done.stderr
    done = run(
        "instruct_gen", "generate", "--captions", folder / "captions.jsonl", "--out", folder, "--base-url", teacher,
        "--config", repository / "instruct_gen" / "recipes" / "demo.yaml",
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_clip_becomes_narratives_and_captions(clips: Path, out: Path) -> None:
    narratives = list(read_records(out / "narratives.jsonl", Narrative))
    captions = {caption.id: caption for caption in read_records(out / "captions.jsonl", GroundedCaption)}
    assert {narrative.video for narrative in narratives} == {path.name for path in clips.glob("*.mp4")}
    assert not (out / "failed.jsonl").read_text()
    for narrative in narratives:
        x0, y0, x1, y1 = narrative.crop_px
        assert load_image(out / narrative.image).size == (x1 - x0, y1 - y0)
        assert narrative.end_s - narrative.start_s >= 3
    assert captions
    for caption in captions.values():
        assert caption.phrases
        assert all(phrase.text.strip() for phrase in caption.phrases)


def test_the_samples_are_data_that_can_be_trained_on(out: Path, run: Run) -> None:
    samples = (out / "samples.jsonl").read_text().splitlines()
    rows = read_json(out / "llava.json")
    assert len(samples) == len(rows) > 20
    assert {json.loads(line)["kind"] for line in samples} >= {"caption", "conversation", "grounding"}
    for name in ("llava.json", "train.json", "val.json"):
        done = run("instruct_gen", "check", out / name, "--images", out)
        assert done.returncode == 0, done.stdout
    assert len(read_json(out / "train.json")) + len(read_json(out / "val.json")) == len(rows)


def test_chunks_and_cursor_agree_with_the_truth(clips: Path, out: Path) -> None:
    script = clips / "score.py"
    if not script.is_file():
        pytest.skip(f"{script}: no such file; nothing to score with")
    spec = importlib.util.spec_from_file_location("score", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    figures: dict[str, Any] = module.score(str(clips), str(out))
    assert figures["static_precision"] >= 0.97
    assert figures["static_recall"] >= 0.97
    assert figures["cursor_recall_2pct"] >= 0.90
    assert figures["phrase_box_mean_iou"] >= 0.50
    assert figures["asides_given_a_box"] <= 0.15
