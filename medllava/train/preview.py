"""What training would supervise, sample by sample, for reading before a run is paid for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medllava.conversation import read_llava, sample_from_llava
from medllava.errors import DataError
from medllava.jsonl import write_records
from medllava.model.lengths import open_prompts
from medllava.model.prompt import IGNORE


def preview(
    tokenizer_folder: Path, chat_format: str, data: Path, out: Path, *, tokens_per_image: int | None = None,
    max_length: int | None = None,
) -> tuple[int, int]:
    """Write a line per sample: ``id``, ``input_ids``, ``labels``, ``image_token_id``, ``prompt`` (decoded, a picture's
    tokens shown as one), ``supervised`` (decoded labels), ``dropped_turns``. A sample that training would refuse, or
    that does not fit ``max_length``, has ids null and says why in ``error``.

    Returns (samples, how many of them have no ids). Raises CheckpointError if there is no tokenizer, DataError for a
    file that is no list of rows.
    """
    prompts = open_prompts(tokenizer_folder, chat_format, tokens_per_image)
    tokenizer = prompts.tokenizer
    image_text = tokenizer.convert_ids_to_tokens(prompts.image_token_id)
    refused = 0

    def seen(row: Any, where: str) -> dict[str, Any]:
        sample = sample_from_llava(row, where)
        prompt = prompts.sample(sample.turns, where, max_length=max_length)
        if prompt is None:
            raise DataError(f"{where}: longer than {max_length} tokens even without its later turns")
        text = tokenizer.decode(prompt.input_ids)
        return {
            "input_ids": prompt.input_ids, "labels": prompt.labels, "image_token_id": prompts.image_token_id,
            "prompt": text.replace(image_text * prompts.tokens_per_image, image_text),
            "supervised": tokenizer.decode([label for label in prompt.labels if label != IGNORE]),
            "dropped_turns": prompt.dropped_turns,
        }

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal refused
        for number, row in enumerate(read_llava(data)):
            id = str(row.get("id", f"row {number}"))
            try:
                shown = seen(row, f"{data}: sample {id}")
            except DataError as error:
                refused += 1
                shown = {
                    "input_ids": None, "labels": None, "image_token_id": prompts.image_token_id, "error": str(error)
                }
            yield {"id": id, **shown}

    return write_records(out, rows()), refused
