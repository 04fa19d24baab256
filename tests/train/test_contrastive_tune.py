from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medllava.errors import ConfigError, DataError
from medllava.jsonl import read_rows
from medllava.model import tiny
from medllava.model.embeddings import ImageTextEncoder, load_encoder
from medllava.model.image_text import ImageText, read_image_texts
from medllava.train import loop
from medllava.train.__main__ import main
from medllava.train.contrastive_tune import PairLoss, pair_batches

RECIPE = Path(__file__).parents[2] / "train" / "recipes" / "stage0_contrastive.yaml"
SMALL = [
    "optim.epochs=null", "optim.steps=6", "optim.batch_size=8", "optim.accumulate=1", "optim.learning_rate=1e-3",
    "workers=0", "precision=float32", "log_every=1", "eval_every=100",
]


@pytest.fixture(scope="module")
def siglip(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP of few random weights with the tokenizer of ``clip``."""
    from transformers import AutoTokenizer, SiglipConfig, SiglipImageProcessor, SiglipModel

    folder = tmp_path_factory.mktemp("encoders") / "siglip"
    tokenizer = AutoTokenizer.from_pretrained(clip)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = size | {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "pad_token_id": 0, "eos_token_id": 3}
    config = SiglipConfig(text_config=text, vision_config=size | {"image_size": 48, "patch_size": 24})
    SiglipModel(config).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 48, "width": 48}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def arguments(data: Any, start: Path, out: Path, *rest: str) -> list[str]:
    return ["--config", str(RECIPE), *data.arguments, "--init-from", str(start), "--out", str(out), *SMALL, *rest]


def losses(out: Path) -> list[float]:
    return [row["loss"] for _, row in read_rows(out / "train_log.jsonl")]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_it_learns_and_leaves_a_stock_folder(
    data: Any, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    start = request.getfixturevalue(kind)
    out = tmp_path / "out"
    command = arguments(data, start, out, "optim.steps=40", "--eval-data", str(data.file))
    assert main([*command, "--plan"]) == 0
    assert not out.exists()
    assert main(command) == 0
    found = losses(out)
    assert sum(found[-5:]) < 0.85 * sum(found[:5])
    encoder = load_encoder(out)
    assert encoder.kind == kind
    assert 0 <= encoder.model.logit_scale.item() <= math.log(100) + 1e-6
    before, after = load_encoder(start).model.state_dict(), encoder.model.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("q_proj.weight"))
    about = json.loads((out / "medllava_encoder.json").read_text())
    assert about["recipe"]["stage"] == "contrastive"
    assert about["figures"]["eval_loss"] > 0
    assert (out / about["base"]).resolve() == start.resolve()
    assert {"recipe.yaml", "run.json", "finished.json", "loss.png"} <= {path.name for path in out.iterdir()}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_two_processes_and_pieces_learn_what_one_does(
    data: Any, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    start = request.getfixturevalue(kind)
    assert main(arguments(data, start, tmp_path / "one")) == 0
    assert main(arguments(data, start, tmp_path / "pieces", "optim.accumulate=4")) == 0
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
        "medllava.train", *arguments(data, start, tmp_path / "two", "optim.accumulate=2"),
    ]
    subprocess.run(command, check=True, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    one = weights(tmp_path / "one")
    for other in ("pieces", "two"):
        assert losses(tmp_path / other) == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
        found = weights(tmp_path / other)
        # Equal but for the order of sums, which the first steps of Adam make visible.
        assert max(float((one[name] - found[name]).abs().max()) for name in one) < 2e-3


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_pieces_have_the_gradients_of_the_whole(data: Any, kind: str, request: pytest.FixtureRequest) -> None:
    encoder = load_encoder(request.getfixturevalue(kind), device="cpu")
    pairs = read_image_texts(data.file, data.images)
    (batch,) = pair_batches(pairs, encoder, seed=0, flip=False)(0, list(range(12)))
    found = []
    for pieces in (1, 3):
        encoder.model.zero_grad()
        loss = PairLoss(encoder, pieces=pieces)(batch)
        loss.backward()
        found.append({name: value.grad.clone() for name, value in encoder.model.named_parameters()} | {"": loss})
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=1e-5, rtol=1e-4), name


def test_the_loss_is_the_models_own(data: Any, clip: Path, siglip: Path) -> None:
    """On distinct captions ours is what transformers computes with return_loss."""
    for folder in (clip, siglip):
        encoder = load_encoder(folder, device="cpu")
        source = read_image_texts(data.file, data.images)[:6]
        pairs = [ImageText(one.name, [f"{number} gland"], one.group, one.where) for number, one in enumerate(source)]
        (batch,) = pair_batches(pairs, encoder, seed=0, flip=False)(0, list(range(6)))
        wanted = encoder.model(pixel_values=batch.pixels, **batch.texts, return_loss=True).loss
        assert float(PairLoss(encoder)(batch)) / 6 == pytest.approx(float(wanted), abs=1e-5)


def test_a_stopped_run_goes_on_as_if_nothing_had_been(
    data: Any, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["save_every=2", "flip=true", "optim.steps=7"]
    assert main(arguments(data, clip, tmp_path / "whole", *settings)) == 0
    real, calls = loop._step, 0

    def stop_once(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(loop, "_step", stop_once)
    command = [*arguments(data, clip, tmp_path / "killed", *settings), "--resume"]
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert load_encoder(tmp_path / "killed" / "step-000004").kind == "clip"
    assert main(command) == 0
    assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_every_layout_gives_the_same_pairs(data: Any, clip: Path, tmp_path: Path) -> None:
    pairs = read_image_texts(data.file, data.images)
    folder, shards = tmp_path / "folder", tmp_path / "shards"
    (folder / "train").mkdir(parents=True)
    shards.mkdir()
    rows = []
    with tarfile.open(shards / "shard-000000.tar", "w") as archive:
        for number, pair in enumerate(pairs):
            content = pair.where[0].read_bytes()
            (folder / "train" / f"{number}.png").write_bytes(content)
            rows.append({"file_name": f"{number}.png", "text": pair.texts[0], "video": "v"})
            about = json.dumps({"video": "v"}).encode()
            for ending, part in (("png", content), ("txt", pair.texts[0].encode()), ("json", about)):
                entry = tarfile.TarInfo(f"{number}.{ending}")
                entry.size = len(part)
                archive.addfile(entry, io.BytesIO(part))
    (folder / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for layout in (folder, shards):
        found = read_image_texts(layout)
        assert [pair.texts for pair in found] == [pair.texts for pair in pairs]
        assert {pair.group for pair in found} == {"v"}
        assert all(one.load().tobytes() == other.load().tobytes() for one, other in zip(found, pairs, strict=True))
        command = ["--config", str(RECIPE), "--data", str(layout), "--init-from", str(clip)]
        assert main([*command, "--out", str(tmp_path / f"from-{layout.name}"), *SMALL, "optim.steps=2"]) == 0
    assert losses(tmp_path / "from-folder") == pytest.approx(losses(tmp_path / "from-shards"))


def test_one_of_several_captions_is_drawn_by_seed(data: Any, clip: Path) -> None:
    encoder = load_encoder(clip, device="cpu")
    source = read_image_texts(data.file, data.images)[0]
    pairs = [ImageText(source.name, ["gland", "vessel"], "", source.where)]
    drawn = [
        [int(make(epoch, [0])[0].classes) for epoch in range(20)]
        for make in (pair_batches(pairs, encoder, seed=seed, flip=False) for seed in (0, 0, 1))
    ]
    assert len(set(drawn[0])) == 2
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_end_token_that_clip_reads_is_appended(clip: Path) -> None:
    encoder: ImageTextEncoder = load_encoder(clip, device="cpu")
    ids = encoder.tokens(["gland", "gland " * 200])["input_ids"]
    end = encoder.tokenizer.eos_token_id
    assert ids.shape[1] == encoder.longest
    assert (ids == end).sum(1).tolist() == [1, 1]
    assert encoder.tokenizer.eos_token == tiny.EOS


def test_mistakes_are_told_before_training(data: Any, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="40 pictures with captions; lower it"):
        main(arguments(data, clip, tmp_path / "out", "optim.batch_size=64"))
    with pytest.raises(DataError, match="no sample of kind reasoning"):
        main(arguments(data, clip, tmp_path / "out", "kinds=[reasoning]"))
    with pytest.raises(ConfigError, match="name it with --images"):
        main(["--config", str(RECIPE), "--data", str(data.file), "--init-from", str(clip), "--out", "x"])
    assert list(tmp_path.iterdir()) == []
