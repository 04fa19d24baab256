"""Numbers of the original LLaVA code, made by running it, against ours.

They are looked for in ``shared/parity`` beside the repository, or where MEDLLAVA_PARITY says.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medllava.conversation import Turn, sample_from_llava
from medllava.jsonl import read_rows
from medllava.model.convert import convert
from medllava.model.lengths import open_prompts

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


def _original(row: Row, stack: str = "quilt_tf431") -> Row:
    expected: Row = row["expected"][stack]
    return _original(row, expected["same_as"]) if "same_as" in expected else expected


def _ids(row: Row) -> list[int] | None:
    ids = row["input_ids"]
    return ids and [ORIGINAL_IMAGE if id == row["image_token_id"] else id for id in ids]


def test_ids_and_labels_are_the_originals(labelled: list[tuple[Row, Row, Row]]) -> None:
    compared = 0
    for fixture, original, ours in labelled:
        if _differs(fixture, original):
            continue
        assert _ids(ours) == original["input_ids"], (fixture["id"], fixture["category"])
        assert ours["labels"] == original["labels"], (fixture["id"], fixture["category"])
        compared += 1
    assert compared > len(labelled) / 2


def _differs(fixture: Row, original: Row) -> bool:
    return fixture["category"] in DIFFERENT or bool(original.get("warnings")) or "error" in original


def test_a_tokenizer_that_calls_itself_legacy_keeps_the_space_after_an_answer(parity: Path) -> None:
    prompts = {
        version: open_prompts(parity / "tokenizer-legacy-true", chat_format)
        for version, chat_format in (("v1", "vicuna_v1"), ("plain", "plain"))
    }
    compared = 0
    for _, row in read_rows(parity / "labels.jsonl"):
        original = _original(row, "legacy_true")
        if _differs(row, original):
            continue
        builder = prompts[row["version"]]
        sample = sample_from_llava(row | {"image": "a.png" if row["image"] else None})
        ours = builder.sample(sample.turns, row["id"])
        assert ours is not None
        assert _flat(ours.input_ids, builder.image_token_id, 1) == original["input_ids"], row["id"]
        assert ours.labels == original["labels"], row["id"]
        compared += original["input_ids"] != _original(row).get("input_ids")
    assert compared, "rows of several turns, in which the flag shows"


def test_a_converted_folder_keeps_that_its_tokenizer_is_legacy(parity: Path, tmp_path: Path) -> None:
    turns = [Turn(role="user", text="Q"), Turn(role="assistant", text="A"), Turn(role="user", text="And?")]
    found = []
    for number, name in enumerate(("tokenizer", "tokenizer-legacy-true")):
        folder = tmp_path / "checkpoints" / str(number)
        shutil.copytree(parity / "checkpoints" / "tiny-llava-v1.5-full", folder)
        shutil.copy(parity / name / "tokenizer_config.json", folder)
        convert(folder, tmp_path / name, vision_tower=parity / "checkpoints" / "tiny-clip")
        given = open_prompts(parity / name, "vicuna_v1").question(turns)
        assert open_prompts(tmp_path / name).question(turns) == given
        found.append(given)
    assert found[0] != found[1]


def test_a_typed_mark_for_a_space_is_a_space(parity: Path) -> None:
    """Transformers 4.31 puts a space in its place before it tokenizes."""
    builder = open_prompts(parity / "tokenizer", "plain")
    tag = Turn(role="user", text="<image>")
    typed, meant = (builder.sample([tag, Turn(role="assistant", text=f"{one}gland")], "row") for one in ("\u2581", " "))
    assert typed == meant


def test_what_the_original_wipes_is_supervised(labelled: list[tuple[Row, Row, Row]]) -> None:
    """Its warning "tokenization mismatch" means that a whole sample is masked; ours keep ids and supervise answers."""
    wiped = [
        (original, ours) for fixture, original, ours in labelled
        if original.get("warnings") and fixture["category"] in {"assistant_inside", "empty_question", "odd_turns"}
    ]
    assert wiped
    for original, ours in wiped:
        assert _ids(ours) == original["input_ids"]
        assert any(label != -100 for label in ours["labels"])
        assert all(label in (-100, id) for id, label in zip(ours["input_ids"], ours["labels"], strict=True))


def test_what_is_refused_says_why(labelled: list[tuple[Row, Row, Row]]) -> None:
    refused = {fixture["category"]: ours["error"] for fixture, _, ours in labelled if ours["input_ids"] is None}
    assert refused.keys() <= DIFFERENT | {"plain_error"}
    told = {
        "two_images_one_message": "tags for 1 images", "empty_answer": "is empty",
        "image_in_answer": "stands in an answer",
    }
    assert refused.keys() & told.keys()
    for category in refused.keys() & told.keys():
        assert told[category] in refused[category]


KINDS = ("full", "lora", "pretrain")


@pytest.fixture(scope="module")
def converted(parity: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each original checkpoint after ``model convert``, under a name that says nothing."""
    folder = tmp_path_factory.mktemp("converted")
    for number, kind in enumerate(KINDS):
        source = parity / "checkpoints" / f"tiny-llava-v1.5-{kind}"
        done = run("model", "convert", source, folder / f"{number:02d}")
        assert done.returncode == 0, done.stderr
    return {kind: folder / f"{number:02d}" for number, kind in enumerate(KINDS)}


@pytest.mark.parametrize("kind", KINDS)
def test_converted_checkpoints_compute_what_the_original_does(
    kind: str, converted: dict[str, Path], parity: Path
) -> None:
    import numpy as np
    import torch

    from medllava.conversation import Turn
    from medllava.images import load_image
    from medllava.model import checkpoint
    from medllava.model.pixels import pixel_values, square_padding, tokens_per_image
    from medllava.model.prompt import PromptBuilder
    from medllava.train.forward import vision_features

    loaded = checkpoint.load(converted[kind], device="cpu", dtype="float32")
    prompts = PromptBuilder(
        loaded.tokenizer, loaded.manifest.chat_format, tokens_per_image=tokens_per_image(loaded.processor)
    )
    expected = json.loads((parity / "checkpoints" / "expected" / f"tiny-llava-v1.5-{kind}.json").read_text())
    arrays = np.load(parity / "checkpoints" / "expected" / f"tiny-llava-v1.5-{kind}.npz")
    assert loaded.manifest.padding == ("none" if kind == "pretrain" else "square")
    compared = 0
    for row in expected["rows"]:
        if row["path"] not in ("pad", "vqa"):
            continue
        processor = loaded.image_processor
        if row["path"] != ("pad" if loaded.manifest.padding == "square" else "vqa"):
            if row["path"] != "pad":
                continue
            processor = square_padding(processor)  # the original's command line pads whatever the config says
        picture = load_image(parity / "checkpoints" / "images" / row["image"])
        pixels = pixel_values(processor, [picture])
        name = f"p{row['pair']:02d}.{row['path']}"
        assert np.abs(pixels[0].numpy() - arrays[f"{name}.pixel_values"]).max() <= 1e-5
        ids = prompts.question([Turn(role="user", text=f"<image>\n{row['prompt']}")])
        flat = _flat(ids, prompts.image_token_id, prompts.tokens_per_image)
        given = row["input_ids"]
        assert flat == (json.loads(given) if isinstance(given, str) else given)
        with torch.no_grad():
            features = vision_features(loaded.model, pixels)
            projected = loaded.model.model.multi_modal_projector(features)
            logits = loaded.model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1]
            made = loaded.model.generate(
                input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                pixel_values=pixels, do_sample=False, min_new_tokens=32, max_new_tokens=32,
            )[0, len(ids) :]
        assert np.abs(projected[0].numpy() - arrays[f"{name}.image_features"]).max() <= 1e-4
        last = arrays[f"{name}.last_logits"]
        assert np.abs(logits[: len(last)].numpy() - last).max() <= 1e-4
        assert int(logits.argmax()) < len(last), "the picture's own token must never be said"
        safe = row["safe_len_32"]
        assert made.tolist()[:safe] == row["generated_ids_32"][:safe]
        compared += 1
    assert compared >= 6


def _flat(ids: list[int], image_id: int, count: int) -> list[int]:
    """A picture's run of tokens as the one mark that the original has."""
    found: list[int] = []
    skip = 0
    for id in ids:
        if skip:
            skip -= 1
        elif id == image_id:
            found.append(ORIGINAL_IMAGE)
            skip = count - 1
        else:
            found.append(id)
    return found
