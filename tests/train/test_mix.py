"""Samples of other files among those of --data, and hub ids as starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medllava.errors import CheckpointError, ConfigError
from medllava.jsonl import read_rows
from medllava.model import checkpoint
from medllava.model.hub import hub_id, local_folder
from medllava.train import forward
from medllava.train.__main__ import main

RECIPE = Path(__file__).parents[2] / "train" / "recipes" / "demo_stage2.yaml"
SMALL = ["lora.r=2", "kinds=[caption]", "optim.batch_size=4", "log_every=1", "split_exchanges=false"]


@pytest.fixture
def general(data: Any, tmp_path: Path) -> Path:
    """20 text-only samples of no kind."""
    turns = [{"from": "human", "value": "What is a gland?"}, {"from": "gpt", "value": "It makes a secretion."}]
    file = tmp_path / "general.json"
    file.write_text(json.dumps([{"id": f"general-{number}", "conversations": turns} for number in range(20)]))
    return file


def arguments(data: Any, start: Path, out: Path, *rest: str) -> list[str]:
    paths = [*data.arguments, "--init-from", str(start), "--out", str(out)]
    return ["--config", str(RECIPE), *paths, *SMALL, *rest]


def test_a_tenth_of_an_epoch_is_replayed_and_the_next_epoch_replays_others(
    data: Any, stage0: Path, general: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = forward.VisionLanguageLoss.forward

    def noting(self: Any, batch: Any) -> Any:
        seen.extend(batch.ids)
        return real(self, batch)

    monkeypatch.setattr(forward.VisionLanguageLoss, "forward", noting)
    mixed = ["--mix", f"{general}=10%", "optim.steps=22"]  # 40 captions and about 4 others: 11 steps an epoch
    assert main(arguments(data, stage0, tmp_path / "out", *mixed)) == 0
    replayed = [name for name in seen if name.startswith("general-")]
    assert 2 <= len(replayed) <= 16
    assert len(set(replayed)) > len(replayed) / 2
    assert len(seen) > 80
    first, seen[:] = list(seen), []
    assert main(arguments(data, stage0, tmp_path / "again", *mixed)) == 0
    assert seen == first


def test_another_mix_is_another_run(data: Any, stage0: Path, general: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(arguments(data, stage0, out, "--mix", f"{general}=0.5", "optim.steps=2")) == 0
    with pytest.raises(ConfigError, match="other settings .*mix"):
        main([*arguments(data, stage0, out, "optim.steps=2"), "--resume"])
    assert main([*arguments(data, stage0, out, "--mix", f"{general}=0.5", "optim.steps=2"), "--resume"]) == 0
    for wrong in ("general.json", "general.json=x", "=0.1", "general.json=0"):
        with pytest.raises(ConfigError, match="expected FILE=PART"):
            main(arguments(data, stage0, tmp_path / "no", "--mix", wrong))


def test_tune_twice_then_load(data: Any, stage0: Path, general: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(arguments(data, stage0, first, "optim.steps=2")) == 0
    assert main(arguments(data, first, second, "optim.steps=2", "--mix", f"{general}=0.5")) == 0
    assert checkpoint.load(second).manifest.kind == "lora"
    assert checkpoint.resolve_base(second, checkpoint.describe(second)) == stage0.resolve()


@pytest.fixture
def cached(stage0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``stage0`` as lab/start in a cache of Hugging Face's, without a network."""
    import huggingface_hub.constants as constants

    revision = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "cache" / "models--lab--start"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    (folder / "snapshots").mkdir()
    (folder / "snapshots" / revision).symlink_to(stage0.resolve(), target_is_directory=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder / "snapshots" / revision


def test_a_hub_id_is_a_start(data: Any, cached: Path, tmp_path: Path) -> None:
    assert local_folder("lab/start") == cached
    assert hub_id(cached) == ("lab/start", cached.name)
    assert checkpoint.load("lab/start").manifest.kind == "full"
    out = tmp_path / "out"
    assert main(arguments(data, Path("lab/start"), out, "optim.steps=2")) == 0
    manifest = checkpoint.describe(out)
    assert (manifest.base, manifest.revision) == ("lab/start", cached.name)
    assert len(list(read_rows(out / "train_log.jsonl"))) == 2


def test_what_is_neither_a_folder_nor_on_the_hub(cached: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="lab/other: no such checkpoint folder, and not to be had from the hub"):
        checkpoint.load("lab/other")
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        checkpoint.load(tmp_path / "nowhere")
    assert local_folder("./lab/other") == Path("lab/other")
