"""What a row of training data becomes for a model: how many tokens, and whether any of them is supervised."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medllava.conversation import IMAGE_TAG, Turn
from medllava.errors import CheckpointError, DataError, first_line
from medllava.model.manifest import read_manifest
from medllava.model.prompt import PromptBuilder


def open_tokenizer(folder: Path) -> tuple[Any, int]:
    """(tokenizer, tokens per image) of a checkpoint's or a tokenizer's folder; one token per image if it is not known.

    A tokenizer without a picture token is given one, as training would. Raises CheckpointError.
    """
    from transformers import AutoProcessor, AutoTokenizer

    from medllava.model.pixels import tokens_per_image

    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if (folder / "processor_config.json").is_file():
        processor = AutoProcessor.from_pretrained(folder, backend="pil")
        return processor.tokenizer, tokens_per_image(processor)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: no tokenizer in it ({first_line(error)})") from error
    if tokenizer.convert_tokens_to_ids(IMAGE_TAG) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TAG]})
    return tokenizer, 1


def open_prompts(folder: Path, chat_format: str | None = None, tokens_per_image: int | None = None) -> PromptBuilder:
    """The prompt builder that training on ``folder`` would use; by default with the folder's own chat format."""
    tokenizer, found = open_tokenizer(folder)
    if chat_format is None:
        manifest = read_manifest(folder)
        chat_format = manifest.chat_format if manifest else "template"
    return PromptBuilder(tokenizer, chat_format, tokens_per_image=tokens_per_image or found)


def context_length(folder: Path) -> int | None:
    """Most tokens that the model in ``folder`` takes, if its files say so."""
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        try:
            values = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for place in (values.get("text_config") or {}, values):
            length = place.get(key)
            if isinstance(length, int | float) and 0 < length < 10_000_000:
                return int(length)
    return None


def row_fault(
    prompts: PromptBuilder, turns: Sequence[Turn], max_length: int | None
) -> tuple[str, str, int] | None:
    """(kind, detail, turns that fit) of a row that training would refuse, leave out or cut; None if it is whole.

    Kinds: "too long", "nothing supervised", "chat format" (the turns do not fit the format).
    """
    try:
        whole = prompts.sample(turns, "row")
        if whole is None or max_length is None or len(whole.input_ids) <= max_length:
            return None
        length = len(whole.input_ids)
        cut = prompts.sample(turns, "row", max_length=max_length)
    except DataError as error:
        detail = str(error).removeprefix("row: ")
        return ("nothing supervised" if "supervised" in detail else "chat format"), detail, 0
    if cut is None:
        return "too long", f"{length:,} tokens, limit {max_length:,}: not even its first exchange fits", 0
    dropped = cut.dropped_turns
    detail = f"{length:,} tokens, limit {max_length:,}: its last {dropped} turns would be cut off"
    return "too long", detail, len(turns) - dropped
