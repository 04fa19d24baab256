"""What training would supervise, sample by sample, for reading before a run is paid for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medllava.errors import CheckpointError
from medllava.jsonl import write_records
from medllava.model.prompt import IGNORE, PromptBuilder
from medllava.train.dataset import read_samples


def preview(
    tokenizer_folder: Path, chat_format: str, data: Path, out: Path, *, tokens_per_image: int | None = None,
    max_length: int | None = None,
) -> int:
    """Write a line per sample: ``id``, ``input_ids``, ``labels``, ``image_token_id``, ``prompt`` (decoded, a picture's
    tokens shown as one), ``supervised`` (decoded labels), ``dropped_turns``. Samples that do not fit have ids null.

    Returns the number of samples. Raises CheckpointError if there is no tokenizer, DataError for a bad sample.
    """
    tokenizer, found = _tokenizer(tokenizer_folder)
    prompts = PromptBuilder(tokenizer, chat_format, tokens_per_image=tokens_per_image or found)
    image_text = tokenizer.convert_ids_to_tokens(prompts.image_token_id)

    def rows() -> Iterator[dict[str, Any]]:
        for sample in read_samples(data):
            prompt = prompts.sample(sample.turns, f"{data}: sample {sample.id}", max_length=max_length)
            if prompt is None:
                yield {"id": sample.id, "input_ids": None, "labels": None, "image_token_id": prompts.image_token_id}
                continue
            text = tokenizer.decode(prompt.input_ids)
            yield {
                "id": sample.id, "input_ids": prompt.input_ids, "labels": prompt.labels,
                "image_token_id": prompts.image_token_id,
                "prompt": text.replace(image_text * prompts.tokens_per_image, image_text),
                "supervised": tokenizer.decode([label for label in prompt.labels if label != IGNORE]),
                "dropped_turns": prompt.dropped_turns,
            }

    return write_records(out, rows())


def _tokenizer(folder: Path) -> tuple[Any, int]:
    """(tokenizer, tokens per image). A tokenizer without a picture token is given one, as training would."""
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
        raise CheckpointError(f"{folder}: no tokenizer in it ({str(error).splitlines()[0]})") from error
    if tokenizer.convert_tokens_to_ids("<image>") in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer, 1
