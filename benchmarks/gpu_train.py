"""Stages 1 and 2 at the size of the paper's model (Vicuna-7B, CLIP-L/336) with random weights: speed, memory, and
whether the fast paths compute what the plain one does. Nothing is downloaded.

    python benchmarks/gpu_train.py --work DIR [--cases stage1,stage2_lora_packed,...] [--steps 8]
    python benchmarks/gpu_train.py --self-test        # tiny shapes on a CPU: that the script works, no figures of speed

Each case is a run of the recipe that ships, by the command that trains, in a process of its own; only the saves are
left out. Its figures are read from the run's log, without the first stretch. DIR keeps the start checkpoint (15 GB) and
the finished cases, so that a second call goes on with the rest.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import row, write_result
from medllava.jsonl import read_json, read_rows, write_json
from medllava.processes import usable_cores

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "gpu_train.json"
WORDS = (
    "the", "a", "in", "of", "and", "with", "upper", "lower", "left", "right", "field", "shows", "gland", "vessel",
    "stroma", "nuclei", "mitosis", "necrosis", "keratin", "lymphocytes", "adipose", "dense", "pale", "pink", "round",
    "atypical", "cells", "surround", "an", "area", "where", "this", "is", "seen", "at", "high", "power",
)
SAMPLES = {"stage 1": 723_000, "stage 2": 107_000}
"""Samples of the paper's two stages, one epoch each."""


@dataclass(frozen=True)
class Case:
    """A recipe with overrides. ``group``: what its figures are called in the table."""

    group: str
    recipe: str
    data: str
    overrides: tuple[str, ...] = ()


CASES = {
    "stage1": Case("stage 1, no packing", "stage1_projector", "captions", ("packing=false",)),
    "stage1_packed": Case("stage 1, packing", "stage1_projector", "captions", ("packing=true",)),
    "stage2_lora": Case("stage 2 LoRA, no packing", "stage2_lora", "instructions", ("packing=false",)),
    "stage2_lora_packed": Case("stage 2 LoRA, packing", "stage2_lora", "instructions", ("packing=true",)),
    "stage2_qlora": Case("stage 2 QLoRA (4-bit), packing", "stage2_qlora", "instructions", ("packing=true",)),
    "stage2_full": Case("stage 2 full, packing", "stage2_full", "instructions", ("packing=true",)),
}
QUICK = ("stage1_packed", "stage2_lora_packed")
PLAIN = ("packing=false", "liger=false", "compile=false")
CHECKS = {
    "plain": (PLAIN, ""),
    "packing": (("packing=true", "liger=false"), ""),
    "flash-attn": (PLAIN, "flash_attn"),
    "flash-attn with packing": (("packing=true", "liger=false"), "flash_attn"),
    "liger": (("packing=false", "liger=true"), "liger_kernel"),
    "compile": (("packing=false", "liger=false", "compile=true"), ""),
    "QLoRA": ((*PLAIN, "quantize=nf4"), "bitsandbytes"),
}
"""Paths that are compared with the plain one on a short model: overrides, and the package that they need."""
TOLERANCE = {"QLoRA": (0.05, 0.5)}
"""Largest relative difference of the first step's loss and of its gradient's norm; else (0.005, 0.03) in bfloat16."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the start checkpoint and finished cases")
    parser.add_argument("--cases", help="default: all; for --self-test " + ", ".join(QUICK))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--no-checks", action="store_true", help="leave out the comparison with the plain path")
    parser.add_argument("--self-test", action="store_true", help="tiny shapes, on a CPU")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--child", nargs=2, metavar=("ARGUMENTS", "RESULT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return _child(Path(given.child[0]), Path(given.child[1]))
    import torch

    if not given.self_test and not torch.cuda.is_available():
        print("no CUDA device: nothing measured; --self-test tries the script itself", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        rows, notes = _measure(given, work)
        rows += [] if given.no_checks else _compare(given, work, notes)
    if given.self_test:
        notes.insert(0, "Self-test with tiny shapes; not run on a GPU: the figures say nothing about speed")
    else:
        notes.insert(0, f"{torch.cuda.get_device_name()}, random weights")
    write_result(given.out, rows, ". ".join(notes))
    return int(any(row["holds"] is False for row in rows))


def _measure(given: argparse.Namespace, work: Path) -> tuple[list[dict[str, Any]], list[str]]:
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    start = _start(work / "start", tiny=given.self_test, layers=32)
    pace: dict[str, float] = {}
    chosen = given.cases.split(",") if given.cases else QUICK if given.self_test else tuple(CASES)
    if unknown := sorted(set(chosen) - CASES.keys()):
        raise SystemExit(f"--cases {unknown[0]}: choose from {', '.join(CASES)}")
    for name in chosen:
        case = CASES[name]
        if "qlora" in name and importlib.util.find_spec("bitsandbytes") is None:
            notes.append(f"{case.group}: not run (bitsandbytes is not installed)")
            continue
        data = _data(work / case.data, case.data, count=given.steps * given.batch_size, tiny=given.self_test)
        found = _run(work, name, case.recipe, start, data, (
            f"optim.steps={given.steps}", f"optim.batch_size={given.batch_size}",
            f"optim.accumulate={given.accumulate}", "log_every=2", *case.overrides,
        ), tiny=given.self_test)
        if "error" in found:
            notes.append(f"{case.group}: failed ({found['error']})")
            continue
        later = found["log"][1:]
        stage = case.group[:7]
        speed = statistics.median(row["samples_per_s"] for row in later)
        rows.append(row(f"{case.group}: speed", speed, "samples/s"))
        tokens = statistics.median(row["tokens_per_s"] for row in later)
        rows.append(row(f"{case.group}: speed, tokens", tokens, "tokens/s"))
        rows.append(row(f"{case.group}: peak memory", found["peak_gb"], "GB"))
        used = [row["mfu"] for row in later if row["mfu"] is not None]
        if used:
            target = 0.5 if name == "stage2_lora_packed" else None
            rows.append(row(f"{case.group}: MFU", statistics.median(used), "share", least=target))
        if name in ("stage1_packed", "stage2_lora_packed"):
            pace[stage] = speed
    if len(pace) == 2 and not given.self_test:
        hours = sum(SAMPLES[stage] / speed / 3600 for stage, speed in pace.items())
        rows.append(row("both stages of the paper, projected", hours, "GPU-hours", most=12))
    return rows, notes


def _compare(given: argparse.Namespace, work: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The first step of each path beside the plain one's, on two layers."""
    rows = []
    start = _start(work / "start-short", tiny=given.self_test, layers=2)
    data = _data(work / "check", "instructions", count=16, tiny=given.self_test)
    plain: dict[str, Any] = {}
    for name, (overrides, package) in CHECKS.items():
        if given.self_test and name.startswith(("flash-attn", "liger", "compile")):
            notes.append(f"{name}: not compared (needs a GPU)")
            continue
        if package and importlib.util.find_spec(package) is None:
            notes.append(f"{name}: not compared ({package} is not installed)")
            continue
        # All 16 samples in one step, so that every path takes the same.
        steps = ("optim.steps=2", "optim.batch_size=16", "optim.accumulate=1", "log_every=1", "length_grouping=false")
        found = _run(
            work, f"check-{name}", "stage2_lora", start, data, (*steps, "lora.dropout=0", *overrides),
            tiny=given.self_test, plain_attention="flash" not in name,
        )
        if "error" in found:
            notes.append(f"{name}: failed ({found['error']})")
            rows.append(row(f"{name} beside the plain path: runs", 0.0, "yes or no", least=1.0))
            continue
        first = found["log"][0]
        plain = plain or first
        if name == "plain":
            continue
        bounds = TOLERANCE.get(name, (1e-4, 1e-3) if given.self_test else (0.005, 0.03))
        for key, label, most in zip(("loss", "grad_norm"), ("loss", "gradient norm"), bounds, strict=True):
            apart = abs(first[key] - plain[key]) / abs(plain[key])
            rows.append(row(f"{name} beside the plain path: {label}", apart, "relative", most=most))
    return rows


def _run(
    work: Path, name: str, recipe: str, start: Path, data: Path, overrides: tuple[str, ...], *, tiny: bool,
    plain_attention: bool = False,
) -> dict[str, Any]:
    """A training run in its own process; its log and peak memory, or ``error``."""
    result = work / f"{name}.json"
    if result.is_file():
        return dict(read_json(result))
    out = work / f"run-{name}"
    subprocess.run(["rm", "-rf", str(out)], check=True)
    settings = ["optim.epochs=null", f"workers={0 if tiny else min(8, usable_cores())}", "save_every=1000000"]
    settings += ["picture_group=1"]  # the set has 32 pictures, so nearly every sample could share one
    if tiny:
        settings += ["precision=float32", "lora.r=8"]
    command = [
        "--config", str(ROOT / "train" / "recipes" / f"{recipe}.yaml"), "--data", str(data / "data.json"),
        "--images", str(data), "--init-from", str(start), "--out", str(out), *settings, *overrides,
    ]
    arguments = work / f"{name}.arguments.json"
    write_json(arguments, {"command": command, "plain_attention": plain_attention})
    child = [sys.executable, __file__, "--child", str(arguments), str(result)]
    done = subprocess.run(child, capture_output=True, text=True, check=False)
    if done.returncode or not result.is_file():
        lines = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()]
        (work / f"{name}.stderr").write_text(done.stderr)
        return {"error": (lines or [f"exit code {done.returncode}"])[-1][:200]}
    return dict(read_json(result))


def _child(arguments: Path, result: Path) -> int:
    import resource

    import torch

    from medllava.model import checkpoint
    from medllava.train import saves
    from medllava.train.__main__ import main as train

    given = read_json(arguments)
    # What is measured is the steps: a 7B model's saves would take more time and disk than they.
    for name in ("save_full", "save_lora", "save_projector"):
        setattr(checkpoint, name, lambda path, *_, **__: Path(path).mkdir(parents=True, exist_ok=True))
    for name in ("trial", "check_room"):
        setattr(saves.Saves, name, lambda *_, **__: None)
    if given["plain_attention"]:
        checkpoint._attention = lambda *_: "sdpa"  # type: ignore[assignment]
    command = given["command"]
    code = train(command)
    out = Path(command[command.index("--out") + 1])
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    )
    write_json(result, {"log": [row for _, row in read_rows(out / "train_log.jsonl")], "peak_gb": peak})
    return code


def _start(folder: Path, *, tiny: bool, layers: int) -> Path:
    """A LLaVA checkpoint with the shapes of CLIP-L/336 and Vicuna-7B (or tiny ones) and random weights."""
    if (folder / "medllava.json").is_file():
        return folder
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from medllava.model import checkpoint
    from medllava.model import tiny as small

    tokenizer = small.build_tokenizer([" ".join(WORDS)] * 4, small.TokenizerSizes(vocab_size=400))
    if tiny:
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision |= {"image_size": 56, "patch_size": 14}
        text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        rows, kind, device = len(tokenizer), torch.float32, "cpu"
    else:
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        vision |= {"image_size": 336, "patch_size": 14}
        text = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": layers}
        rows, kind, device = 32064, torch.bfloat16, "cuda"
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text, **special, vocab_size=rows, max_position_embeddings=4096),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-2,
        vision_feature_select_strategy="default", tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    sizes = small.VisionSizes(image_size=vision["image_size"], patch_size=14)
    checkpoint.save_full(folder, model, small.build_processor(tokenizer, sizes), chat_format="vicuna_v1")
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return folder


def _data(folder: Path, kind: str, *, count: int, tiny: bool) -> Path:
    """Pictures of noise, and captions (about 50 words) or conversations (2 to 4 exchanges, answers of 20 to 150)."""
    rng = random.Random(kind)
    if not (folder / "data.json").is_file() or len(read_json(folder / "data.json")) < count:
        from PIL import Image

        folder.mkdir(parents=True, exist_ok=True)
        for number in range(32):
            Image.effect_noise((64, 64) if tiny else (672, 504), 60).convert("RGB").save(folder / f"{number}.jpg")
        shrink = 8 if tiny else 1

        def words(low: int, high: int) -> str:
            return " ".join(rng.choices(WORDS, k=max(2, rng.randint(low, high) // shrink)))

        rows = []
        for number in range(count):
            if kind == "captions":
                turns = ["<image>", words(15, 85)]
            else:
                turns = [part for _ in range(rng.randint(2, 4)) for part in (words(8, 25), words(20, 150))]
                turns[0] = f"<image>\n{turns[0]}"
            sides = ("human", "gpt")
            messages = [{"from": sides[place % 2], "value": text} for place, text in enumerate(turns)]
            rows.append({"id": str(number), "image": f"{number % 32}.jpg", "conversations": messages})
        (folder / "data.json").write_text(json.dumps(rows))
    return folder


if __name__ == "__main__":
    sys.exit(main())
