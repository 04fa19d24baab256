"""Figures on held-out samples during training, and the check that they are held out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from medllava.conversation import InstructionSample
from medllava.errors import DataError
from medllava.jsonl import file_sha256
from medllava.model.answerer import Answerer, Question
from medllava.model.checkpoint import Loaded
from medllava.train.batch import Batch
from medllava.train.dataset import open_picture
from medllava.train.forward import embeddings, hidden_states

log = logging.getLogger(__name__)

_ANSWER_BATCH = 8


def check_held_out(training: Sequence[InstructionSample], held_out: Sequence[InstructionSample], images: Path) -> None:
    """Raises DataError if both hold a sample of the same video, or a picture with the same bytes."""
    videos = {sample.provenance.video for sample in training if sample.provenance.video}
    shared = sorted({sample.provenance.video or "" for sample in held_out} & videos)
    if shared:
        raise DataError(
            f"--eval-data: {_some(shared, 'video')} also in the training data; a loss on it says nothing about new"
            " videos: split by video, as instruct_gen generate does"
        )
    names = {name for sample in training for name in sample.images}
    judged = sorted({name for sample in held_out for name in sample.images})
    pairs = {name: name for name in judged if name in names}
    # Only files of equal size can be equal, so that few are read, and each once.
    size = {name: (images / name).stat().st_size for name in names.union(judged)}
    of_training, of_judged = {size[name] for name in names}, {size[name] for name in judged}
    hashes: dict[str, str] = {}
    for name in judged:
        if size[name] in of_training:
            hashes.setdefault(file_sha256(images / name), name)
    for name in sorted(names):
        found = hashes.get(file_sha256(images / name)) if size[name] in of_judged else None
        if found:
            pairs.setdefault(found, name)
    if pairs:
        told = [one if one == two else f"{one} (= {two})" for one, two in pairs.items()]
        raise DataError(
            f"--eval-data: {_some(told, 'picture')} also in the training data; a loss on it says nothing about new"
            " pictures: split by video or case, not by row"
        )


def _some(names: Sequence[str], what: str) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {what}{'s are' if len(names) > 1 else ' is'} ({', '.join(names[:3])}{more})"


@torch.no_grad()
def judge(model: Any, batches: Iterable[Batch], accelerator: Any) -> dict[str, float]:
    """Mean loss per supervised token, and the share of these tokens that the model finds likeliest."""
    total = correct = weight = 0.0
    for batch in batches:
        moved = batch.to(accelerator.device)
        with accelerator.autocast():
            hidden = hidden_states(model, embeddings(model, moved), moved.position_ids)
            logits = model.lm_head(hidden.flatten(0, 1)[moved.predict_positions]).float()
        total += float(functional.cross_entropy(logits, moved.targets, reduction="sum"))
        correct += float((logits.argmax(-1) == moved.targets).sum())
        weight += batch.weight
    return {"eval_loss": total / weight, "eval_token_accuracy": correct / weight}


def exact_match(
    loaded: Loaded, samples: Sequence[InstructionSample], images: Path, accelerator: Any, *, max_new_tokens: int = 256
) -> dict[str, float]:
    """Share of the samples whose first question is answered greedily, by the code that serves, in the very words of the
    sample (case and spaces aside)."""
    answerer = Answerer(loaded, "training")
    questions: list[Question] = []
    wanted = []
    for sample in samples:
        at = next(number for number, turn in enumerate(sample.turns) if turn.role == "assistant")
        asked = sample.turns[:at]
        shown = sample.images[: sum(turn.text.count("<image>") for turn in asked)]
        questions.append(([open_picture(images, name) for name in shown], asked))
        wanted.append(sample.turns[at].text)
    right = 0
    for start in range(0, len(questions), _ANSWER_BATCH):
        part, told = questions[start : start + _ANSWER_BATCH], wanted[start : start + _ANSWER_BATCH]
        # No answer longer than the longest wanted one can be right.
        room = min(max_new_tokens, 8 + max(len(loaded.tokenizer(text)["input_ids"]) for text in told))
        with accelerator.autocast():
            given = answerer.answer_batch(part, max_new_tokens=room)
        right += sum(_same(reply.text, text) for reply, text in zip(given, told, strict=True))
    return {"eval_exact_match": right / len(questions), "eval_answers": len(questions)}


def answerable(samples: Sequence[InstructionSample], count: int) -> list[InstructionSample]:
    """At most ``count`` samples that open with a question, evenly over the file."""
    fit = [
        sample for sample in samples
        if sample.turns[0].role != "assistant" and any(turn.role == "assistant" for turn in sample.turns)
    ]
    step = max(1, len(fit) // count)
    return fit[::step][:count]


def validation(
    model: Any, batches: Callable[[], Iterable[Batch]], accelerator: Any,
    answers: Callable[[], dict[str, float]] | None = None,
) -> Callable[[], dict[str, float]]:
    """A function that computes all figures on ``model`` as it is at that moment, in evaluation mode."""

    def run() -> dict[str, float]:
        model.eval()
        figures = judge(model, batches(), accelerator)
        return figures | answers() if answers else figures

    return run


def _same(one: str, other: str) -> bool:
    return " ".join(one.split()).casefold() == " ".join(other.split()).casefold()
