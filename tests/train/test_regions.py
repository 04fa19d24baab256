from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from medllava.conversation import InstructionSample, Turn
from medllava.geometry import Box
from medllava.model.manifest import read_manifest
from medllava.model.tiny import tiny_checkpoint
from medllava.regions import draw_mark, named_mark
from medllava.train.__main__ import main
from medllava.train.dataset import open_picture, show_regions

RECIPES = Path(__file__).parents[2] / "train" / "recipes"
BOX = Box(x1=0.1, y1=0.2, x2=0.5, y2=0.6)


def sample(*texts: str, images: tuple[str, ...] = ("a.png",), id: str = "s") -> InstructionSample:
    turns = tuple(Turn(role="assistant" if n % 2 else "user", text=text) for n, text in enumerate(texts))
    return InstructionSample(id=id, images=images, turns=turns)


def test_a_region_becomes_a_mark_and_its_question_speaks_of_it() -> None:
    asked = sample(
        "<image>\nWhat is in the region [0.10, 0.20, 0.50, 0.60]?", "A gland.",
        "Describe the region [0.10, 0.20, 0.50, 0.60].", "Round.", "Is it large?", "Yes.",
    )
    (marked,) = show_regions([asked], ("mark",))
    assert named_mark(marked.images[0]) == ("a.png", BOX)
    assert [turn.text for turn in marked.turns] == [
        "<image>\nWhat is in the region marked in red?", "A gland.", "Describe the region marked in red.", "Round.",
        "Is it large?", "Yes.",
    ]
    assert show_regions([asked], ("text",)) == [asked]


@pytest.mark.parametrize("other", [
    sample("<image>\nWhere is the gland?", "In the upper left.", "What is in [0.1, 0.2, 0.5, 0.6]?", "A gland."),
    sample("<image>\nGive the box of the gland in [0.1, 0.2, 0.5, 0.6].", "[0.1, 0.2, 0.4, 0.5]"),
    sample("<image>\nIs [0.1, 0.2, 0.5, 0.6] like [0.5, 0.5, 0.9, 0.9]?", "Yes."),
    sample("<image><image>\nWhat is in [0.1, 0.2, 0.5, 0.6]?", "A gland.", images=("a.png", "b.png")),
    sample("What is [0.1, 0.2, 0.5, 0.6]?", "A box.", images=()),
])
def test_what_a_mark_would_give_away_or_cannot_say_stays_text(other: InstructionSample) -> None:
    assert show_regions([other], ("mark",)) == [other]


def test_both_ways_are_half_and_half_and_the_same_each_time() -> None:
    asked = [sample("<image>\nDescribe the region [0.1, 0.2, 0.5, 0.6].", "A gland.", id=f"s{n}") for n in range(400)]
    shown = show_regions(asked, ("text", "mark"))
    assert 160 < sum(one != other for one, other in zip(asked, shown, strict=True)) < 240
    assert show_regions(asked, ("text", "mark")) == shown


@pytest.mark.parametrize("cache", ["auto", "disk", "false"])
def test_a_run_with_marks_says_so_in_its_manifest(data: Any, tmp_path: Path, cache: str) -> None:
    start = tiny_checkpoint(tmp_path / "start")
    command = ["--config", str(RECIPES / "demo_stage2.yaml"), *data.arguments, "--init-from", str(start)]
    command += ["--out", str(tmp_path / "out"), "optim.steps=2", "optim.batch_size=8", f"cache_features={cache}"]
    assert main([*command, "regions=mark"]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None and manifest.regions == ("mark",)


def test_marked_pictures_are_other_pictures_in_the_feature_cache(data: Any, tmp_path: Path) -> None:
    start = tiny_checkpoint(tmp_path / "start")
    losses = {}
    for cache in ("false", "disk"):
        out = tmp_path / cache
        command = ["--config", str(RECIPES / "demo_stage2.yaml"), *data.arguments, "--init-from", str(start)]
        command += ["--out", str(out), "optim.steps=2", "optim.batch_size=8", "log_every=1", "regions=mark"]
        assert main([*command, f"cache_features={cache}"]) == 0
        losses[cache] = [json.loads(line)["loss"] for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert losses["false"] == pytest.approx(losses["disk"], rel=1e-4)


def test_preview_shows_marks(data: Any, tmp_path: Path) -> None:
    rows = [
        {"id": "m", "image": "1.png", "kind": "grounding", "conversations": [
            {"from": "human", "value": "<image>\nWhat does the box [0.10, 0.20, 0.50, 0.60] show?"},
            {"from": "gpt", "value": "A gland."},
        ]},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    start = tiny_checkpoint(tmp_path / "start")
    out = tmp_path / "seen.jsonl"
    command = ["preview", "--tokenizer", str(start), "--chat-format", "medllava", "--data", str(tmp_path / "rows.json")]
    assert main([*command, "--out", str(out), "--regions", "mark", "--images", str(data.images)]) == 0
    seen = json.loads(out.read_text())
    assert "What does the region marked in red show?" in seen["prompt"] and "0.10" not in seen["prompt"]
    assert seen["mark"] == [0.1, 0.2, 0.5, 0.6]
    with Image.open(seen["marked_picture"]) as drawn:
        wanted = draw_mark(Image.open(data.images / "1.png").convert("RGB"), BOX)
        assert ImageChops.difference(drawn.convert("RGB"), wanted).getbbox() is None


def test_opening_a_marked_name_draws_the_mark(data: Any) -> None:
    plain, marked = (open_picture(data.images, name) for name in ("1.png", "1.png#ellipse=[0.10, 0.20, 0.50, 0.60]"))
    assert ImageChops.difference(draw_mark(plain, BOX), marked).getbbox() is None
    assert ImageChops.difference(plain, marked).getbbox() is not None
