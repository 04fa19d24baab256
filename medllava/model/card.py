"""The model card of a checkpoint: ``README.md`` with the header that the Hugging Face hub reads."""

from __future__ import annotations

from typing import Any

import yaml

from medllava.model.manifest import Manifest

FILE = "README.md"

_WHAT = {
    "full": "A whole vision-language model; stock `LlavaForConditionalGeneration` and `AutoProcessor` open it.",
    "projector": "A projector alone, between the image encoder and the language model of its base.",
    "lora": "LoRA adapters for the language model of its base, and the projector that was trained with them.",
}
_WAYS = {"text": "coordinates in the text", "mark": "a red mark on the picture"}
_USE = """\
## Use

```bash
python -m medllava.serve.cli --model-path THIS_FOLDER --image-file tissue.png --prompt "What is in this field?"
```

Meant for research on medical vision-language models: on questions about histopathology fields, and on how such models
are made and judged. Answers may be wrong, and are given with the same confidence when they are.

**Not meant for** diagnosis, treatment, or any decision about a patient; not a medical device; not tested on people,
stains, scanners or organs other than those of its training data. Every answer must be checked by somebody who could
have given it.
"""


def model_card(manifest: Manifest) -> str:
    """The card as Markdown. It says what the manifest says, and nothing that nobody measured."""
    stage = manifest.recipe.get("stage")
    header: dict[str, Any] = {
        "library_name": "peft" if manifest.kind == "lora" else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["medllava", "histopathology", "vision-language-model", "llava"],
    }
    # The header may name a model of the hub only; a folder's path means nothing there.
    if manifest.base and not manifest.base.startswith((".", "/")):
        header["base_model"] = manifest.base
    lines = ["---", yaml.safe_dump(header, sort_keys=False).strip(), "---", ""]
    lines += [f"# medllava checkpoint ({manifest.kind})", "", _WHAT[manifest.kind]]
    if manifest.tower_trained:
        lines.append("Layers of the image encoder were trained too and are in `vision_tower.safetensors`.")
    mpp = manifest.training_mpp
    facts = {
        "base": manifest.base and f"`{manifest.base}`" + (f" at {manifest.revision}" if manifest.revision else ""),
        "stage": stage,
        "training data": manifest.data_sha256 and f"sha256 `{manifest.data_sha256}`",
        "chat format": f"`{manifest.chat_format}`"
        + (" (asked without earlier turns)" if manifest.single_exchange else ""),
        "image": f"{manifest.image_size} x {manifest.image_size} pixels, "
        + ("padded to a square" if manifest.padding == "square" else "cut to a square"),
        "resolution of the training images": mpp and f"{mpp:g} micrometres per pixel",
        "boxes": f"`{manifest.box_format}`",
        "regions of questions": " or ".join(_WAYS[way] for way in manifest.regions),
        "made": manifest.created,
        "code": manifest.versions.get("commit"),
    }
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items() if value]
    if manifest.figures:
        lines += ["", "## Figures", "", "| | |", "|---|---|"]
        lines += [f"| {name.replace('_', ' ')} | {value:.6g} |" for name, value in manifest.figures.items()]
        lines += ["", "Losses are per supervised token; those of `eval` are on samples held out of the training."]
    lines += ["", _USE]
    if manifest.recipe:
        recipe = yaml.safe_dump(manifest.recipe, sort_keys=False, default_flow_style=None, width=110).strip()
        lines += ["## Recipe", "", "```yaml", recipe, "```", ""]
    if manifest.versions:
        told = ", ".join(f"{name} {version}" for name, version in manifest.versions.items() if name != "commit")
        lines += [f"Versions: {told}.", ""]
    return "\n".join(lines)
