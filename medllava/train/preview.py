"""What training would supervise, sample by sample, for reading before a run is paid for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medllava.conversation import InstructionSample, read_llava, sample_from_llava
from medllava.errors import DataError
from medllava.jsonl import write_records
from medllava.model.lengths import open_prompts
from medllava.model.prompt import IGNORE
from medllava.regions import Way, named_mark
from medllava.train.dataset import open_picture, show_regions

MOST_DRAWN = 20
"""Marked pictures that are written out; the marks of all samples are in the lines."""


def preview(
    tokenizer_folder: Path, chat_format: str, data: Path, out: Path, *, tokens_per_image: int | None = None,
    max_length: int | None = None, ways: Sequence[Way] = ("text",), images: Path | None = None,
) -> tuple[int, int]:
    """Write a line per sample: ``id``, ``input_ids``, ``labels``, ``image_token_id``, ``prompt`` (decoded, a picture's
    tokens shown as one), ``supervised`` (decoded labels), ``dropped_turns``; where regions are marked on pictures
    (``ways``, as the recipe's ``regions``), ``mark``: the box. With ``images``, the first marked pictures are written
    into the folder ``<out>.marked``. A sample that training would refuse, or
    that does not fit ``max_length``, has ids null and says why in ``error``.

    Returns (samples, how many of them have no ids). Raises CheckpointError if there is no tokenizer, DataError for a
    file that is no list of rows.
    """
    prompts = open_prompts(tokenizer_folder, chat_format, tokens_per_image)
    tokenizer = prompts.tokenizer
    image_text = tokenizer.convert_ids_to_tokens(prompts.image_token_id)
    refused = drawn = 0

    def seen(row: Any, where: str) -> dict[str, Any]:
        (sample,) = show_regions([sample_from_llava(row, where)], ways)
        prompt = prompts.sample(sample.turns, where, max_length=max_length)
        if prompt is None:
            raise DataError(f"{where}: longer than {max_length} tokens even without its later turns")
        text = tokenizer.decode(prompt.input_ids)
        return {
            "input_ids": prompt.input_ids, "labels": prompt.labels, "image_token_id": prompts.image_token_id,
            "prompt": text.replace(image_text * prompts.tokens_per_image, image_text),
            "supervised": tokenizer.decode([label for label in prompt.labels if label != IGNORE]),
            "dropped_turns": prompt.dropped_turns,
            **mark(sample),
        }

    def mark(sample: InstructionSample) -> dict[str, Any]:
        nonlocal drawn
        box = named_mark(sample.images[0])[1] if sample.images else None
        if box is None:
            return {}
        shown: dict[str, Any] = {"mark": list(box.as_tuple())}
        if images is not None and drawn < MOST_DRAWN:
            file = out.with_name(f"{out.name}.marked") / f"{drawn:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            open_picture(images, sample.images[0]).save(file)
            drawn += 1
            shown["marked_picture"] = str(file)
        return shown

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
