from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from medllava.model import checkpoint
from medllava.model.prompt import IGNORE
from medllava.model.tiny import tiny_checkpoint

LINEAR = r"model\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def lora(tiny: Path) -> Path:
    """Adapters with visible effect and a changed projector, on ``tiny``."""
    loaded = checkpoint.load(tiny, device="cpu")
    model = get_peft_model(loaded.model, LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "multi_modal_projector" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    path = tiny.parent / "adapters"
    checkpoint.save_lora(path, model, loaded.processor, base=tiny, chat_format="medllava")
    return path


@pytest.fixture(scope="session")
def projector(tiny: Path) -> Path:
    loaded = checkpoint.load(tiny, device="cpu")
    with torch.no_grad():
        loaded.model.model.multi_modal_projector.linear_1.bias.add_(1.0)
    path = tiny.parent / "aligned"
    checkpoint.save_projector(path, loaded.model, loaded.processor, base=tiny, chat_format="medllava")
    return path


def supervised(tokenizer: Any, labels: list[int]) -> list[str]:
    """The decoded text of each run of supervised tokens."""
    runs: list[list[int]] = []
    for before, label in zip([IGNORE, *labels], labels, strict=False):
        if label != IGNORE:
            runs.append([label]) if before == IGNORE else runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs]
