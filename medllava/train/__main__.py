"""``python -m medllava.train``: train one stage from a recipe; with ``preview`` first: see what would be supervised.

example: python -m medllava.train --config train/recipes/demo_stage1.yaml --data llava.json --images frames \\
             --init-from demo-out/stage0 --out demo-out/stage1 optim.learning_rate=1e-3
example: python -m medllava.train preview --tokenizer demo-out/stage1 --chat-format medllava --data llava.json \\
             --out seen.jsonl
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

from medllava.errors import run_cli


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["preview"]:
        return _preview(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="medllava train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="recipe (YAML)")
    parser.add_argument(
        "--data", type=Path, required=True,
        help="training data (LLaVA JSON; stage contrastive: also a folder of image-text pairs)",
    )
    parser.add_argument("--images", type=Path, help="folder that image paths in the data start from")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run and its checkpoint")
    parser.add_argument(
        "--init-from", type=Path, help="checkpoint folder or hub id to start from (every stage but foundation)"
    )
    parser.add_argument(
        "--mix", action="append", default=[], metavar="FILE=PART",
        help="LLaVA JSON of other samples, so that what the model could before is kept; 0.1: one for ten of --data",
    )
    parser.add_argument("--eval-data", type=Path, help="validation data (LLaVA JSON, same image folder)")
    parser.add_argument("--captions", type=Path, help="captions.jsonl with boxed phrases, for the foundation stage")
    parser.add_argument("--feature-cache", type=Path, help="folder of cache_features=disk (default: OUT/features)")
    parser.add_argument("--deepspeed", type=Path, help="DeepSpeed configuration, e.g. train/deepspeed/zero2.json")
    parser.add_argument(
        "--timeout", type=float, default=30, metavar="MINUTES",
        help="several processes: how long one waits for the others in a step before all are ended (default: 30)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out; start it if there is none")
    parser.add_argument("--plan", action="store_true", help="say what trains, tokens, steps and memory, and stop")
    parser.add_argument("--gpu", help="with --plan: name of the GPU to plan for, e.g. H200 (default: this machine's)")
    parser.add_argument("--devices", type=int, help="with --plan: how many (default: processes of torchrun, or 1)")
    parser.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases too (nothing is sent without this)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    given = parser.parse_intermixed_args(arguments)
    # A plan is the command's result, all else is progress.
    stream = sys.stdout if given.plan else sys.stderr
    # Of the processes of torchrun one tells how it goes; the others tell what is wrong.
    level = logging.WARNING if int(os.environ.get("RANK", "0")) else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=stream)
    logging.getLogger("medllava").setLevel(level)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # Threads that wait for each other sleep instead of spinning: beside another busy process, spinning makes a step
    # of a small model many times slower. Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    from medllava.errors import ConfigError
    from medllava.train.config import load_training_recipe

    recipe = load_training_recipe(given.config, given.overrides)
    images = given.images or (given.data if given.data.is_dir() else None)
    if images is None:
        raise ConfigError("image paths in the data start from a folder: name it with --images")

    from medllava.model.hub import local_folder
    from medllava.train.loop import STOPPED, Stopped
    from medllava.train.record import Paths
    from medllava.train.run import run

    start = local_folder(given.init_from) if given.init_from else None
    paths = Paths(given.data, images, given.out, start, given.eval_data, given.captions)
    paths = replace(
        paths, mix=tuple(_mix(text) for text in given.mix), feature_cache=given.feature_cache,
        deepspeed=given.deepspeed, gpu=given.gpu, wandb=given.wandb, timeout=given.timeout,
        devices=given.devices or int(os.environ.get("WORLD_SIZE", "1")),
    )
    try:
        run(recipe, paths, resume=given.resume, plan=given.plan)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return STOPPED
    return 0


def _mix(text: str) -> tuple[Path, float]:
    from medllava.errors import ConfigError

    name, _, part = text.rpartition("=")
    try:
        share = float(part.removesuffix("%")) / (100 if part.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not name or share <= 0:
        raise ConfigError(f"--mix {text}: expected FILE=PART, such as general.json=0.1")
    return Path(name), share


def _preview(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="medllava train preview", description="Write ids, labels, prompt and supervised text of every sample.",
        epilog="example: medllava train preview --tokenizer demo-out/stage1 --chat-format medllava --data llava.json"
        " --out seen.jsonl",
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer or a checkpoint")
    parser.add_argument("--chat-format", required=True, help="plain, vicuna_v1, medllava or template (its own)")
    parser.add_argument("--data", type=Path, required=True, help="training data (LLaVA JSON)")
    parser.add_argument("--out", type=Path, required=True, help="JSON Lines to write")
    parser.add_argument("--tokens-per-image", type=int, default=None, help="default: the checkpoint's, else 1")
    parser.add_argument("--max-length", type=int, default=None, help="drop turns beyond so many tokens (default: none)")
    parser.add_argument("--regions", default="text", help="as the recipe's: text, mark or both (default: text)")
    parser.add_argument("--images", type=Path, help="with --regions mark: write the first marked pictures, too")
    given = parser.parse_args(arguments)

    from medllava.regions import parse_ways
    from medllava.train.preview import preview

    count, refused = preview(
        given.tokenizer, given.chat_format, given.data, given.out, tokens_per_image=given.tokens_per_image,
        max_length=given.max_length, ways=parse_ways(given.regions), images=given.images,
    )
    print(f"wrote {count} samples to {given.out}")
    if refused:
        print(f"warning: training would refuse {refused} of them; 'error' in their lines says why", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
