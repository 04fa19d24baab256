"""Training on samples of mixed lengths: packed rows against rows padded to the longest, and what the loader takes.

    python benchmarks/train_step.py [--quick]

The lengths are those of the mix that Quilt-LLaVA's weights were tuned on (see MIX; 576 tokens for each picture), all of
them a quarter as long. "padded" is LLaVA's scheme on the same model, the same samples and the same weights: 16 samples
in a batch, padded to the longest of them, an attention mask, the output head on every token. Useful tokens are those
that are not padding. Times are CPU seconds of one thread, taken in turns. A GPU's figures are those of gpu_train.py.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import arguments, finish, row
from torch.nn import functional

from medllava.train.batch import Batch, Example, collate, lay_out
from medllava.train.forward import VisionLanguageLoss, attend_apart, embeddings, hidden_states

MIX = {
    # name: (thousands of samples, has a picture, median tokens of text, spread of their logarithm)
    "LLaVA conversation": (58, True, 390, 0.45),
    "LLaVA description": (23, True, 186, 0.3),
    "LLaVA reasoning": (77, True, 218, 0.3),
    "ShareGPT": (40, False, 1050, 0.93),
    "VQAv2": (83, True, 160, 0.3),
    "GQA": (72, True, 330, 0.4),
    "OKVQA": (9, True, 75, 0.15),
    "OCR-VQA": (80, True, 163, 0.2),
    "A-OKVQA": (66, True, 95, 0.15),
    "TextCaps": (22, True, 130, 0.3),
    "RefCOCO": (48, True, 300, 0.5),
    "Visual Genome": (86, True, 590, 0.2),
    "Quilt-Instruct": (107, True, 209, 0.4),
}
"""The two sets that Quilt-LLaVA's weights were tuned on, one after the other: LLaVA 1.5's mix (Liu et al. 2023,
arXiv 2310.03744, appendix: its parts and their counts, questions about one picture merged, ten regions of a picture in
Visual Genome, fewer than ten in RefCOCO, text cut at 2048 tokens) and Quilt-Instruct.

No paper gives lengths in tokens. They are worked out at 4.5 characters or 0.75 words to a token, 40 tokens for the
system prompt and 10 for the names of the roles in an exchange, from: LLaVA-Instruct's file sizes (126, 20.5, 79.6 MB);
ShareGPT's 3.5 exchanges of 94 and 348 tokens (Zhao et al. 2024, WildChat, table 1; the spread from theirs); questions
to a picture in VQAv2 (5.4), GQA (13) and OCR-VQA (4.8); boxes of 26 tokens; Quilt-Instruct's 16.5 words a question and
101 an answer. The other spreads are assumed."""
SHRINK = 4
PICTURE, LONGEST = 576, 2048
GPU_TOKENS_PER_S = 18_000
"""What the loader has to feed: a LoRA step of 7B takes 28 GFLOP a token, an H100 at half its 989 TFLOP/s."""


@dataclass(frozen=True)
class Case:
    """A way to lay out and compute the samples of a step."""

    name: str
    batches: list[Batch]
    masked: bool = False


def main() -> int:
    parser = arguments(__doc__, "train_step")
    given = parser.parse_args()
    torch.set_num_threads(1)
    count, turns = (32, 1) if given.quick else (384, 6)
    model = _model(given.quick)
    examples = [_example(number, *shape, model) for number, shape in enumerate(_lengths(count))]
    pictures, texts = ([each for each in examples if bool(each.images) == wanted] for wanted in (True, False))
    cases = [
        Case("packed", _packed(examples, model)),
        Case("padded", _padded(examples, model), masked=True),
        Case("padded, LLaVA's order", _padded(pictures, model) + _padded(texts, model), masked=True),
        Case("padded, our loss", _padded(examples, model)),
    ]
    useful = sum(len(example.input_ids) for example in examples)
    spent = {case.name: 0.0 for case in cases}
    for turn in range(turns):
        for case in cases:
            spent[case.name] += _seconds(model, case, case.batches[turn::turns])
    speed = {name: useful / seconds for name, seconds in spent.items()}
    share = {case.name: useful / sum(batch.input_ids.numel() for batch in case.batches) for case in cases}
    apart = _largest_difference(model, cases[0], cases[1])
    sure = not given.quick
    rows = [
        row(
            "train_step.packed_tokens_per_s", speed["packed"], "tokens/s", baseline="padded to the longest",
            baseline_value=speed["padded"],
        ),
        row(
            "train_step.packed_over_padded", speed["packed"] / speed["padded"], "times",
            baseline="padded to the longest", baseline_value=1.0, least=2.0 if sure else None,
            limit=_limit(speed, share),
        ),
        row(
            "train_step.packed_over_padded_by_modality", speed["packed"] / speed["padded, LLaVA's order"], "times",
            baseline="padded, batches with and without pictures apart", baseline_value=1.0,
        ),
        row(
            "train_step.packed_over_padded_same_loss", speed["packed"] / speed["padded, our loss"], "times",
            baseline="padded, without mask, head on supervised tokens only", baseline_value=1.0,
        ),
        row(
            "train_step.useful_share_packed", share["packed"], "share", baseline="padded to the longest",
            baseline_value=share["padded"], limit=1.0,
        ),
        row("train_step.useful_share_padded_expected", _expected_share(), "share"),
        row("train_step.largest_difference_of_a_loss", apart, "relative", most=1e-5),
        *_loader(quick=given.quick),
    ]
    note = "gpu_train.py measures a 7B model on a GPU; not run here: no CUDA device"
    if torch.cuda.is_available():
        note = "A 7B model on this machine's GPU: benchmarks/gpu_train.py"
    return finish(given.out, rows, note)


def _limit(speed: dict[str, float], share: dict[str, float]) -> float:
    """Packed over padded if packed rows were full and computed as fast as padded ones by our loss."""
    return speed["padded, our loss"] / share["padded, our loss"] / speed["padded"]


def _lengths(count: int) -> list[tuple[bool, int]]:
    """(has a picture, tokens of text) of each sample, in an order drawn at random. Kinds and lengths are not drawn but
    in the mix's proportions, as few long texts decide how much is padded."""
    total = sum(kind[0] for kind in MIX.values())
    found = []
    began = 0
    for thousands, picture, median, spread in MIX.values():
        until = began + thousands
        size = round(until / total * count) - round(began / total * count)
        for place in range(size):
            far = statistics.NormalDist().inv_cdf((place + 0.5) / size)
            text = min(LONGEST - PICTURE * picture, max(24, round(median * math.exp(spread * far))))
            found.append((picture, text // SHRINK))
        began = until
    random.Random(0).shuffle(found)
    return found


def _expected_share() -> float:
    """Useful tokens of the padded scheme over so many batches that chance no longer matters."""
    lengths = [text + PICTURE // SHRINK * picture for picture, text in _lengths(64_000)]
    computed = sum(16 * max(lengths[start : start + 16]) for start in range(0, len(lengths), 16))
    return sum(lengths) / computed


def _model(quick: bool) -> VisionLanguageLoss:
    """A LLaVA of random weights whose parts have the proportions of a 7B model: nearly all work is in the layers."""
    from medllava.model.tiny import TextSizes, TokenizerSizes, VisionSizes, tiny_model

    width = 64 if quick else 256
    text = TextSizes(
        hidden_size=width, intermediate_size=width * 11 // 4, layers=2 if quick else 4, heads=width // 32,
        initializer_range=0.02,
    )
    vision = VisionSizes(image_size=96, patch_size=8, hidden_size=64, layers=1)
    tokenizer = TokenizerSizes(vocab_size=600, coordinate_tokens=False)
    model, _ = tiny_model(["What is seen here? A gland."], text=text, vision=vision, tokenizer_sizes=tokenizer)
    model.model.vision_tower.requires_grad_(False)
    attend_apart(model)
    return VisionLanguageLoss(model).train()


def _example(number: int, picture: bool, text: int, module: VisionLanguageLoss) -> Example:
    """A sample whose second half is supervised, with the tokens of its picture at the beginning."""
    dice = torch.Generator().manual_seed(number)
    image = module.model.config.image_token_index
    words = torch.randint(image + 1, module.model.config.text_config.vocab_size, (text,), generator=dice)
    tokens = torch.full((PICTURE // SHRINK * picture,), image)
    labels = torch.cat([tokens, words])
    labels[: len(tokens) + text // 2] = -100
    return Example(str(number), torch.cat([tokens, words]), labels, (f"{number}",) if picture else ())


def _collated(rows: Sequence[Sequence[Example]], module: VisionLanguageLoss) -> Batch:
    """A batch with features in place of pictures, as from a cache."""
    width = module.model.config.vision_config.hidden_size
    names = [name for examples in rows for example in examples for name in example.images]
    made = [
        torch.randn(PICTURE // SHRINK, width, generator=torch.Generator().manual_seed(int(name))) for name in names
    ]
    features = torch.stack(made) if made else torch.zeros(1, PICTURE // SHRINK, width)
    return collate(rows, pad_id=0, image_token_id=module.model.config.image_token_index, features=features)


def _packed(examples: Sequence[Example], module: VisionLanguageLoss) -> list[Batch]:
    """Steps of 128 samples in 8 pieces, as the recipes'."""
    made = []
    for start in range(0, len(examples), 128):
        step = examples[start : start + 128]
        pieces = lay_out([len(each.input_ids) for each in step], accumulate=8, row_length=LONGEST // SHRINK)
        made += [_collated([[step[place] for place in row] for row in rows], module) for rows in pieces]
    return made


def _padded(examples: Sequence[Example], module: VisionLanguageLoss) -> list[Batch]:
    starts = range(0, len(examples), 16)
    return [_collated([[each] for each in examples[start : start + 16]], module) for start in starts]


def _loss(module: VisionLanguageLoss, case: Case, batch: Batch) -> torch.Tensor:
    """Sum over a batch's supervised tokens."""
    if not case.masked:
        return module(batch)
    model = module.model
    real = torch.arange(batch.input_ids.shape[1]) < _row_lengths(batch)[:, None]
    hidden = model.model.language_model(
        inputs_embeds=embeddings(model, batch), attention_mask=real.long(), use_cache=False
    ).last_hidden_state
    logits = model.lm_head(hidden).float()[:, :-1]
    return functional.cross_entropy(
        logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def _row_lengths(batch: Batch) -> torch.Tensor:
    """Tokens of each row, of which the last is supervised in every sample here."""
    places = torch.arange(batch.labels.shape[1]).expand_as(batch.labels)
    return torch.where(batch.labels != -100, places, -1).amax(1) + 1


def _seconds(module: VisionLanguageLoss, case: Case, batches: Sequence[Batch]) -> float:
    began = time.process_time()
    for batch in batches:
        _loss(module, case, batch).backward()
    spent = time.process_time() - began
    module.zero_grad(set_to_none=True)
    return spent


@torch.no_grad()
def _largest_difference(module: VisionLanguageLoss, one: Case, other: Case) -> float:
    """Largest relative difference of a sample's loss between two layouts."""
    first, second = (_losses(module, case) for case in (one, other))
    assert first.keys() == second.keys()
    return max(abs(first[name] - second[name]) / abs(second[name]) for name in first)


def _losses(module: VisionLanguageLoss, case: Case) -> dict[str, float]:
    """The loss of each sample."""
    found: dict[str, float] = {}
    for batch in case.batches:
        if case.masked:
            real = torch.arange(batch.input_ids.shape[1]) < _row_lengths(batch)[:, None]
            hidden = module.model.model.language_model(
                inputs_embeds=embeddings(module.model, batch), attention_mask=real.long(), use_cache=False
            ).last_hidden_state
        else:
            hidden = hidden_states(module.model, embeddings(module.model, batch), batch.position_ids)
        logits = module.model.lm_head(hidden.flatten(0, 1)[batch.predict_positions]).float()
        each = functional.cross_entropy(logits, batch.targets, reduction="none")
        # A sample's targets follow one another; its first predicted place is where supervision begins.
        places = batch.predict_positions
        begins = torch.cat([torch.tensor([True]), places[1:] != places[:-1] + 1])
        owner = begins.long().cumsum(0) - 1
        sums = torch.zeros(len(batch.ids)).index_add(0, owner, each)
        found |= dict(zip(batch.ids, sums.tolist(), strict=True))
    return found


def _loader(*, quick: bool) -> list[dict[str, Any]]:
    """What a model that takes no time of the CPU waits for its batches, at the paper's sizes."""
    from PIL import Image

    from medllava.conversation import InstructionSample, Provenance, Turn
    from medllava.model.prompt import PromptBuilder
    from medllava.model.tiny import TokenizerSizes, VisionSizes, build_processor, build_tokenizer
    from medllava.train.dataset import Examples, Order, Pictures, Steps, micro_batches
    from medllava.train.loop import _load

    count, steps, batch = (16, 2, 8) if quick else (640, 5, 128)
    dice = random.Random(1)
    said = "the gland in the upper left field shows dense stroma and pale nuclei with a mitosis near its vessel"
    words = said.split()
    tokenizer = build_tokenizer([said], TokenizerSizes(vocab_size=300, coordinate_tokens=False))
    vision = VisionSizes(image_size=336, patch_size=14)
    processor = build_processor(tokenizer, vision)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(32):
            Image.effect_noise((672, 504), 60).convert("RGB").save(folder / f"{number}.jpg")
        samples = []
        for number, (picture, text) in enumerate(_lengths(count)):
            said = " ".join(dice.choices(words, k=max(2, text * SHRINK // 2)))
            asked = Turn(role="user", text="<image>\n" * picture + said)
            samples.append(InstructionSample(
                id=str(number), kind="conversation", images=(f"{number % 32}.jpg",) if picture else (),
                turns=(asked, Turn(role="assistant", text=said)), provenance=Provenance(),
            ))
        prompts = PromptBuilder(tokenizer, "medllava", tokens_per_image=PICTURE)
        examples = Examples(samples, prompts, max_length=4096)
        live, cached = Pictures(folder, processor.image_processor), Pictures(folder, processor.image_processor)
        names = sorted({image for sample in samples for image in sample.images})
        cached.cache(names, (0,), lambda pixels: torch.zeros(len(pixels), PICTURE, 1024, dtype=torch.bfloat16))
        rows = []
        for kind, pictures in ("live", live), ("cached", cached):
            make = micro_batches(
                examples, pictures, accumulate=8, flip_seed=None, pad_id=tokenizer.pad_token_id,
                image_token_id=prompts.image_token_id, row_length=4096,
            )
            batches = Steps(Order(len(examples), batch, seed=0), steps, make)
            began = time.process_time()
            for step in range(steps):
                batches[step]
            cpu_s = time.process_time() - began
            waited = taken = 0.0
            clock = time.perf_counter()
            for step, micro in enumerate(_load(batches, 0, steps, 2)):
                # The workers start while a real run still loads its model; the first step is not counted.
                waited += (time.perf_counter() - clock) * (step > 0)
                due = sum(each.tokens for each in micro) / GPU_TOKENS_PER_S
                time.sleep(due)
                taken += due * (step > 0)
                clock = time.perf_counter()
            rows.append(row(
                f"train_step.loader_{kind}_samples_per_s", steps * batch / cpu_s, "per core and s",
                baseline="7B LoRA on an H100 at half its peak", baseline_value=GPU_TOKENS_PER_S * len(examples)
                / sum(examples.lengths),
            ))
            rows.append(row(
                f"train_step.loader_{kind}_wait", waited / (waited + taken), "share of time",
                most=None if quick else 0.02,
            ))
        return rows


if __name__ == "__main__":
    sys.exit(main())
