"""Numbers of the original LLaVA code, made by running it, against ours.

They are looked for in ``shared/parity`` beside the repository, or where MEDLLAVA_PARITY says.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medllava.jsonl import read_rows

Run = Callable[..., subprocess.CompletedProcess[str]]
Row = dict[str, Any]

ORIGINAL_IMAGE = -200

DIFFERENT = {
    "special_literals", "flag_image_no_tag", "truncation", "truncation_exact",
    "image_in_answer", "multi_two_images", "two_images_one_message", "tag_no_flag", "empty_answer", "space_answer",
    "gpt_first", "plain_edge", "role_errors",
}
"""Categories in which some rows differ on purpose: docs/training-format.md says which and why."""


@pytest.fixture(scope="module")
def parity(repository: Path) -> Path:
    folder = Path(os.environ.get("MEDLLAVA_PARITY") or repository.parent / "shared" / "parity")
    if not (folder / "labels.jsonl").is_file():
        pytest.skip(f"no fixtures in {folder}; MEDLLAVA_PARITY may name another folder")
    return folder


@pytest.fixture(scope="module")
def labelled(parity: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Row, Row, Row]]:
    """(fixture, the original's result, ours) of every row, ours by the command ``train preview``."""
    folder = tmp_path_factory.mktemp("labels")
    fixtures = [row for _, row in read_rows(parity / "labels.jsonl")]
    ours: dict[str, Row] = {}
    for version, chat_format in (("v1", "vicuna_v1"), ("plain", "plain")):
        rows = [
            {"id": row["id"], "conversations": row["conversations"]} | ({"image": "a.png"} if row["image"] else {})
            for row in fixtures if row["version"] == version
        ]
        data, out = folder / f"{version}.json", folder / f"{version}.jsonl"
        data.write_text(json.dumps(rows))
        done = run(
            "train", "preview", "--tokenizer", parity / "tokenizer", "--chat-format", chat_format, "--data", data,
            "--out", out,
        )
        assert done.returncode == 0, done.stderr
        ours |= {row["id"]: row for _, row in read_rows(out)}
    return [(row, _original(row), ours[row["id"]]) for row in fixtures]


def _original(row: Row) -> Row:
    expected: Row = row["expected"]["quilt_tf431"]
    return row["expected"][expected["same_as"]] if "same_as" in expected else expected


def _ids(row: Row) -> list[int] | None:
    ids = row["input_ids"]
    return ids and [ORIGINAL_IMAGE if id == row["image_token_id"] else id for id in ids]


def test_ids_and_labels_are_the_originals(labelled: list[tuple[Row, Row, Row]]) -> None:
    compared = 0
    for fixture, original, ours in labelled:
        wiped = bool(original.get("warnings")) or "error" in original
        if fixture["category"] in DIFFERENT or wiped:
            continue
        assert _ids(ours) == original["input_ids"], (fixture["id"], fixture["category"])
        assert ours["labels"] == original["labels"], (fixture["id"], fixture["category"])
        compared += 1
    assert compared >= 35


def test_what_the_original_wipes_is_supervised(labelled: list[tuple[Row, Row, Row]]) -> None:
    """Its warning "tokenization mismatch" means that a whole sample is masked; ours keep ids and supervise answers."""
    wiped = [
        (original, ours) for fixture, original, ours in labelled
        if original.get("warnings") and fixture["category"] in {"assistant_inside", "empty_question", "odd_turns"}
    ]
    assert len(wiped) >= 3
    for original, ours in wiped:
        assert _ids(ours) == original["input_ids"]
        assert any(label != -100 for label in ours["labels"])
        assert all(label in (-100, id) for id, label in zip(ours["input_ids"], ours["labels"], strict=True))


def test_what_is_refused_says_why(labelled: list[tuple[Row, Row, Row]]) -> None:
    refused = {fixture["category"]: ours["error"] for fixture, _, ours in labelled if ours["input_ids"] is None}
    assert refused.keys() <= DIFFERENT | {"plain_error"}
    assert "tags for 1 images" in refused["two_images_one_message"]
    assert "is empty" in refused["empty_answer"]
    assert "stands in an answer" in refused["image_in_answer"]
