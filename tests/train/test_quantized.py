"""QLoRA through bitsandbytes: what is quantized, what trains, what a checkpoint says and where it can be loaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from medllava.conversation import Turn
from medllava.errors import ConfigError
from medllava.jsonl import read_rows
from medllava.model import checkpoint
from medllava.model.__main__ import main as model_main
from medllava.model.answerer import Answerer
from medllava.serve.cli import main as cli_main
from medllava.train.__main__ import main

RECIPE = Path(__file__).parents[2] / "train" / "recipes" / "stage2_qlora.yaml"
KILLED_RUN = Path(__file__).with_name("killed_run.py")
pytestmark = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed (extra: gpu)",
)
SMALL = [
    "optim.epochs=null", "optim.batch_size=8", "optim.accumulate=1", "workers=0", "precision=float32", "lora.r=4",
    "chat_format=medllava", "gradient_checkpointing=false", "log_every=1", "optim.learning_rate=1e-3",
    "projector_learning_rate=1e-3", "liger=false",
]


def arguments(data: Any, out: Path, start: Path, *rest: str) -> list[str]:
    paths = [*data.arguments, "--init-from", str(start), "--out", str(out)]
    return ["--config", str(RECIPE), *paths, *SMALL, *rest]


def losses(out: Path) -> list[float]:
    return [row["loss"] for _, row in read_rows(out / "train_log.jsonl")]


def adapters(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors") | load_file(out / "projector.safetensors")


@pytest.fixture(scope="module")
def trained(data: Any, stage0: Path) -> dict[str, Path]:
    made = {}
    for kind in ("nf4", "int8"):
        made[kind] = stage0.parent / f"qlora-{kind}"
        assert main(arguments(data, made[kind], stage0, "optim.steps=20", f"quantize={kind}")) == 0
    return made


@pytest.mark.parametrize(("kind", "layer"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_only_the_language_models_linear_layers_are_quantized(stage0: Path, kind: str, layer: str) -> None:
    flags = {"load_4bit": kind == "nf4", "load_8bit": kind == "int8"}
    model = checkpoint.load(stage0, device="cpu", **flags).model
    quantized = {name for name, module in model.named_modules() if type(module).__name__ == layer}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert quantized == {name for name in linear if name.startswith("model.language_model.")}
    assert len(quantized) == 21
    rest = [value for name, value in model.named_parameters() if name.removesuffix(".weight") not in quantized]
    assert {value.dtype for value in rest} == {torch.float32}


def test_it_learns_and_says_what_it_was_trained_on(trained: dict[str, Path], stage0: Path) -> None:
    for kind, out in trained.items():
        found = losses(out)
        assert sum(found[-5:]) < sum(found[:5])
        manifest = checkpoint.describe(out)
        assert (manifest.kind, manifest.quantized) == ("lora", kind)
        assert {value.dtype for value in adapters(out).values()} == {torch.float32}
        assert any(value.abs().max() > 0 for name, value in adapters(out).items() if "lora_B" in name)
    assert checkpoint.describe(stage0).quantized is None


def test_a_killed_run_goes_on_as_if_nothing_had_been(data: Any, stage0: Path, trained: Any, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    settings = ["optim.steps=20", "save_every=10", "quantize=nf4"]
    command = [sys.executable, str(KILLED_RUN), "12", *arguments(data, out, stage0, *settings), "--resume"]
    killed = subprocess.run(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL and (out / "step-000010").is_dir()
    assert not (out / "finished.json").exists()
    assert main([*arguments(data, out, stage0, *settings), "--resume"]) == 0
    assert losses(out) == pytest.approx(losses(trained["nf4"]), abs=1e-6)
    whole, resumed = adapters(trained["nf4"]), adapters(out)
    assert max(float((whole[name] - resumed[name]).abs().max()) for name in whole) < 1e-6


def test_full_adapter_and_merged_answer_in_4_and_8_bits_and_as_they_are(
    trained: dict[str, Path], stage0: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "tissue.png"
    Image.effect_noise((80, 96), 60).convert("RGB").save(image)
    merged = tmp_path / "merged"
    assert model_main(["merge", str(trained["nf4"]), str(merged)]) == 0
    for folder in (stage0, trained["nf4"], trained["int8"], merged):
        for flags in ([], ["--load-4bit"], ["--load-8bit"]):
            capsys.readouterr()
            command = ["--model-path", str(folder), "--image-file", str(image), "--prompt", "Where is the gland?"]
            assert cli_main([*command, "--device", "cpu", "--max-new-tokens", "8", *flags]) == 0
            assert capsys.readouterr().out.strip()


def test_on_its_own_quantized_base_it_computes_what_it_computed_in_training(
    trained: dict[str, Path], tmp_path: Path
) -> None:
    """The adapters on a 4-bit base are nearer to the 4-bit model than to the unquantized one."""
    question = [([Image.new("RGB", (96, 96), "#e8b0d8")], [Turn(role="user", text="Where is the gland?")])]
    four, plain = (
        Answerer(checkpoint.load(trained["nf4"], device="cpu", load_4bit=bits), "x") for bits in (True, False)
    )
    assert [part.answer_batch(question, max_new_tokens=4)[0].completion_tokens for part in (four, plain)]
    layers = [type(module).__name__ for module in four._model.modules()]
    assert layers.count("Linear4bit") == 42  # PEFT's layer of the same name around each of 21


def test_a_full_stage_is_not_quantized(data: Any, stage0: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantize needs a frozen language model; use stage lora"):
        main(arguments(data, tmp_path / "out", stage0, "optim.steps=2", "stage=full"))
