"""``python -m medllava.model inspect | merge | export | convert | assemble | tiny``: formats in and out.

example: python -m medllava.model merge demo-out/stage2 demo-out/merged
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from medllava.errors import CheckpointError, run_cli


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="medllava model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    inspect = steps.add_parser(
        "inspect", help="what a checkpoint folder is: kind, parts, parameters, files",
        epilog="example: medllava model inspect demo-out/stage2",
    )
    inspect.add_argument("source", metavar="SRC", type=Path, help="checkpoint folder")
    for name, text, example in (
        (
            "merge", "fold a LoRA or projector checkpoint into its base: a full checkpoint that answers the same",
            "demo-out/stage2 merged",
        ),
        ("export", "write a stock Hugging Face folder that answers the same", "demo-out/stage2 exported"),
        ("convert", "read an original LLaVA folder", "quilt-llava quilt-llava-hf --vision-tower clip-336"),
    ):
        step = steps.add_parser(name, help=text, epilog=f"example: medllava model {name} {example}")
        step.add_argument("source", metavar="SRC", type=Path, help="folder to read")
        step.add_argument("target", metavar="DST", type=Path, help="new folder to write")
        if name == "convert":
            add = step.add_argument
            add("--base", metavar="DIR", type=Path, help="language model of a LoRA or projector folder")
            add("--vision-tower", metavar="DIR", type=Path, help="image encoder, if not where it is named")
            add("--padding", choices=["square", "none"], help="of pictures (default: as its image_aspect_ratio says)")
            add("--chat-format", default="vicuna_v1", help="how it was trained to chat (default: %(default)s)")
    assemble = steps.add_parser(
        "assemble", help="join an image encoder and a language model: what stage 1 starts from",
        epilog="example: medllava model assemble --vision-tower siglip2 --language qwen3-8b start",
    )
    assemble.add_argument("target", metavar="DST", type=Path, help="new folder to write")
    assemble.add_argument(
        "--vision-tower", metavar="DIR", required=True, help="CLIP, SigLIP, DINOv2, DINOv3, ViT, ...: folder or hub id"
    )
    assemble.add_argument("--language", metavar="DIR", required=True, help="language model: folder or hub id")
    assemble.add_argument("--chat-format", help="default: template (the language model's own), if it has one")
    assemble.add_argument("--feature-layer", type=int, default=-2, help="of the encoder (default: %(default)s)")
    assemble.add_argument("--seed", type=int, default=0, help="of the untrained projector (default: %(default)s)")
    tiny = steps.add_parser(
        "tiny", help="a checkpoint with random weights, for trying the other commands",
        epilog="example: medllava model tiny tiny-checkpoint",
    )
    tiny.add_argument("target", metavar="DST", type=Path, help="new folder to write")
    tiny.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.step == "inspect":
        return _inspect(arguments.source)
    if arguments.step == "tiny":
        from medllava.model.tiny import tiny_checkpoint

        _refuse_existing(arguments.target)
        tiny_checkpoint(arguments.target, seed=arguments.seed)
    elif arguments.step == "assemble":
        from medllava.model.assemble import assemble as join

        _refuse_existing(arguments.target)
        join(
            arguments.vision_tower, arguments.language, arguments.target, chat_format=arguments.chat_format,
            feature_layer=arguments.feature_layer, seed=arguments.seed,
        )
    elif arguments.step == "convert":
        from medllava.model.convert import convert

        _refuse_existing(arguments.target)
        convert(
            arguments.source, arguments.target, base=arguments.base, vision_tower=arguments.vision_tower,
            chat_format=arguments.chat_format, padding=arguments.padding,
        )
    else:
        difference = _merge(arguments.source, arguments.target)
        print(f"read back: the same greedy tokens as {arguments.source}, logits within {difference:.2g}")
    print(f"wrote {arguments.target}")
    return 0


def _inspect(source: Path) -> int:
    from medllava.model import checkpoint

    loaded = checkpoint.load(source, device="cpu")
    model = loaded.model.model
    parts = {
        "vision tower": model.vision_tower,
        "projector": model.multi_modal_projector,
        "language model": model.language_model,
        "output head": loaded.model.lm_head,
    }
    print(f"{source}: kind {loaded.manifest.kind}" + (f", on base {loaded.base}" if loaded.base else ""))
    for name, part in parts.items():
        print(f"  {name:<16}{type(part).__name__:<28}{sum(p.numel() for p in part.parameters()):>16,} parameters")
    print(json.dumps(loaded.manifest.model_dump(mode="json"), indent=1))
    for file in sorted(source.iterdir()):
        if file.is_file():
            print(f"  {file.name:<32}{file.stat().st_size:>16,} bytes")
    return 0


def _merge(source: Path, target: Path) -> float:
    """Write SRC, with everything folded in, as a full checkpoint that stock classes open, and read it back: it must
    compute what SRC computes with its adapters on their base. Returns the largest difference of a logit."""
    from medllava.model import checkpoint
    from medllava.model.same import check_same, trace

    _refuse_existing(target)
    loaded = checkpoint.load(source, device="cpu", merge=False)
    wanted = trace(loaded)
    manifest = loaded.manifest
    facts = manifest.model_dump(
        include={"single_exchange", "training_mpp", "regions", "box_format", "data_sha256", "recipe", "figures"}
    )
    model = loaded.model.merge_and_unload() if manifest.kind == "lora" else loaded.model
    checkpoint.save_full(target, model, loaded.processor, chat_format=manifest.chat_format, **facts)
    del loaded, model  # one model in memory at a time
    try:
        return check_same(wanted, trace(checkpoint.load(target, device="cpu")))
    except CheckpointError as error:
        shutil.rmtree(target)
        raise CheckpointError(f"{target}: does not compute what {source} does, and was removed: {error}") from error


def _refuse_existing(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: already exists; choose another destination")


if __name__ == "__main__":
    sys.exit(run_cli(main))
