"""Training on samples of mixed lengths: packed rows against rows padded to the longest, and what the loader takes.

    python benchmarks/train_step.py [--quick]

The lengths are those of the mix that Quilt-LLaVA's weights were tuned on (see MIX; 576 tokens for each picture), all of
them a quarter as long. "padded" is LLaVA's scheme on the same model, the same samples and the same weights: 16 samples
in a batch, padded to the longest of them, an attention mask, the output head on every token.

"packed" is what the recipes of stage 2 do: samples of one picture come together, up to four in a step, and share its
tokens. Useful tokens are those of the samples, each in full: the same number for all schemes, whether a picture's are
computed once or for each of its samples. ``free_order`` leaves the order to chance and shares nothing, as the padded
schemes do; ``pictures_per_step`` says what the order costs: a step of 128 samples holds fewer pictures.

Times are CPU seconds of one thread, taken in turns. A GPU's figures are those of gpu_train.py.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import arguments, finish, row
from torch.nn import functional

from medllava.train.batch import Batch, Example, collate
from medllava.train.dataset import Order, micro_batches
from medllava.train.forward import VisionLanguageLoss, attend_apart, embeddings, hidden_states

MIX = {
    # name: (thousands of samples, pictures, median tokens of text, spread of their logarithm)
    "LLaVA conversation": (58, "COCO", 390, 0.45),
    "LLaVA description": (23, "COCO", 186, 0.3),
    "LLaVA reasoning": (77, "COCO", 218, 0.3),
    "ShareGPT": (40, None, 1050, 0.93),
    "VQAv2": (83, "COCO", 160, 0.3),
    "GQA": (72, "own", 330, 0.4),
    "OKVQA": (9, "COCO", 75, 0.15),
    "OCR-VQA": (80, "own", 163, 0.2),
    "A-OKVQA": (66, "COCO", 95, 0.15),
    "TextCaps": (22, "own", 130, 0.3),
    "RefCOCO": (48, "COCO", 300, 0.5),
    "Visual Genome": (86, "own", 590, 0.2),
    "Quilt-Instruct": (107, "own", 209, 0.4),
}
"""The two sets that Quilt-LLaVA's weights were tuned on, one after the other: LLaVA 1.5's mix (Liu et al. 2023,
arXiv 2310.03744, appendix: its parts and their counts, questions about one picture merged, ten regions of a picture in
Visual Genome, fewer than ten in RefCOCO, text cut at 2048 tokens) and Quilt-Instruct.

No paper gives lengths in tokens. They are worked out at 4.5 characters or 0.75 words to a token, 40 tokens for the
system prompt and 10 for the names of the roles in an exchange, from: LLaVA-Instruct's file sizes (126, 20.5, 79.6 MB);
ShareGPT's 3.5 exchanges of 94 and 348 tokens (Zhao et al. 2024, WildChat, table 1; the spread from theirs); questions
to a picture in VQAv2 (5.4), GQA (13) and OCR-VQA (4.8); boxes of 26 tokens; Quilt-Instruct's 16.5 words a question and
101 an answer. The other spreads are assumed.

Pictures: the 364,100 samples of the seven parts on COCO have at most 118,287 between them, those of the folder
train2017 that LLaVA's README asks for (counts of samples and of files: github.com/haotian-liu/LLaVA, issues 657 and
702). Each part is taken to have one sample of a picture, and to have drawn its pictures from all of these at random.
That understates what is shared rather than overstating it: VQAv2 has one sample for each of the 82,783 of COCO's
train2014, LLaVA's own parts were made from that split as well (issue 151), and several samples of A-OKVQA and RefCOCO
have the same picture. The other parts are in folders of their own and have their questions about a picture merged; of
Quilt-Instruct, how many pictures it has is not known: one to a sample is taken for all of these."""
COCO_PICTURES = 118.287
"""Thousands."""
TOGETHER = 4
"""``picture_group`` of the recipes of stage 2."""
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
    examples = [_example(number, *shape, model) for number, shape in enumerate(_samples(count))]
    pictures, texts = ([each for each in examples if bool(each.images) == wanted] for wanted in (True, False))
    orders = [_order(examples, together) for together in (TOGETHER, 1)]
    cases = [
        Case("packed", _packed(examples, orders[0], model, shared=True)),
        Case("packed, free order", _packed(examples, orders[1], model, shared=False)),
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
    computed = {case.name: sum(batch.computed for batch in case.batches) for case in cases}
    share = {
        case.name: computed[case.name] / sum(batch.input_ids.numel() for batch in case.batches) for case in cases
    }
    apart = max(_largest_difference(model, case, cases[2], examples) for case in cases[:2])
    sure = not given.quick
    rows = [
        row(
            "train_step.packed_tokens_per_s", speed["packed"], "tokens/s", baseline="padded to the longest",
            baseline_value=speed["padded"],
        ),
        row(
            "train_step.packed_over_padded", speed["packed"] / speed["padded"], "times",
            baseline="padded to the longest", baseline_value=1.0, least=2.0 if sure else None,
            limit=_limit(speed, share) * useful / computed["packed"],
        ),
        row(
            "train_step.packed_over_padded_free_order", speed["packed, free order"] / speed["padded"], "times",
            baseline="padded to the longest", baseline_value=1.0, limit=_limit(speed, share),
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
            "train_step.computed_of_useful_packed", computed["packed"] / useful, "share",
            baseline="each sample with its own picture", baseline_value=1.0,
        ),
        row(
            "train_step.pictures_per_step", _pictures_per_step(TOGETHER), "in 128 samples",
            baseline="samples drawn at random", baseline_value=_pictures_per_step(1),
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


def _samples(count: int) -> list[tuple[str | None, int]]:
    """(picture, tokens of text) of each sample, in an order drawn at random. Kinds and lengths are not drawn but
    in the mix's proportions, as few long texts decide how much is padded."""
    total = sum(kind[0] for kind in MIX.values())
    dice = random.Random(1)
    coco = range(max(round(COCO_PICTURES / total * count), 1))
    found: list[tuple[str | None, int]] = []
    began = 0
    for name, (thousands, source, median, spread) in MIX.items():
        until = began + thousands
        size = round(until / total * count) - round(began / total * count)
        shown = dice.sample(coco, size) if source == "COCO" else range(size)
        for place in range(size):
            far = statistics.NormalDist().inv_cdf((place + 0.5) / size)
            text = min(LONGEST - PICTURE * bool(source), max(24, round(median * math.exp(spread * far))))
            picture = f"{'COCO' if source == 'COCO' else name} {shown[place]}" if source else None
            found.append((picture, text // SHRINK))
        began = until
    random.Random(0).shuffle(found)
    return found


def _expected_share() -> float:
    """Useful tokens of the padded scheme over so many batches that chance no longer matters."""
    lengths = [text + PICTURE // SHRINK * bool(picture) for picture, text in _samples(64_000)]
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


def _example(number: int, picture: str | None, text: int, module: VisionLanguageLoss) -> Example:
    """A sample whose second half is supervised, with the tokens of its picture at the beginning."""
    dice = torch.Generator().manual_seed(number)
    image = module.model.config.image_token_index
    words = torch.randint(image + 1, module.model.config.text_config.vocab_size, (text,), generator=dice)
    tokens = torch.full((PICTURE // SHRINK * bool(picture),), image)
    labels = torch.cat([tokens, words])
    labels[: len(tokens) + text // 2] = -100
    return Example(str(number), torch.cat([tokens, words]), labels, (picture,) if picture else ())


class _Mix:
    """The samples as training has them."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.samples = examples
        self.lengths = [len(each.input_ids) for each in examples]

    def __len__(self) -> int:
        return len(self.samples)

    def get(self, index: int, variant: int = 0) -> Example:
        return self.samples[index]


class _Features:
    """Features in place of pictures, as from a cache."""

    def __init__(self, width: int) -> None:
        self._width = width

    def stack(self, wanted: Sequence[tuple[str, int]]) -> dict[str, torch.Tensor]:
        dice = [torch.Generator().manual_seed(zlib.crc32(name.encode())) for name, _ in wanted]
        shape = (PICTURE // SHRINK, self._width)
        return {"features": torch.stack([torch.randn(shape, generator=each) for each in dice] or [torch.zeros(shape)])}


def _order(examples: Sequence[Example], together: int) -> list[list[int]]:
    """Steps of 128 samples, as the recipes'."""
    pictures = tuple(each.images[0] if each.images else None for each in examples)
    return Order(len(examples), 128, seed=0, pictures=pictures, together=together).epoch(0)


def _pictures_per_step(together: int) -> float:
    """Different pictures in a step, on average over a set so large that few meet by chance."""
    names = tuple(name for name, _ in _samples(64_000))
    order = Order(len(names), 128, seed=0, pictures=names, together=together).epoch(0)
    return statistics.mean(len({names[index] for index in step} - {None}) for step in order)


def _packed(
    examples: Sequence[Example], order: Sequence[list[int]], module: VisionLanguageLoss, *, shared: bool
) -> list[Batch]:
    """Each step in 8 pieces."""
    make = micro_batches(
        _Mix(examples), _Features(module.model.config.vision_config.hidden_size), accumulate=8, flip_seed=None,
        pad_id=0, image_token_id=module.model.config.image_token_index, row_length=LONGEST // SHRINK, shared=shared,
    )
    return [batch for step in order for batch in make(0, step)]


def _padded(examples: Sequence[Example], module: VisionLanguageLoss) -> list[Batch]:
    config = module.model.config
    made = []
    for start in range(0, len(examples), 16):
        part = examples[start : start + 16]
        features = _Features(config.vision_config.hidden_size).stack(
            [(name, 0) for each in part for name in each.images]
        )
        rows = [[each] for each in part]
        made.append(collate(rows, pad_id=0, image_token_id=config.image_token_index, **features))
    return made


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
def _largest_difference(module: VisionLanguageLoss, one: Case, other: Case, examples: Sequence[Example]) -> float:
    """Largest relative difference of a sample's loss between two layouts."""
    first, second = (_losses(module, case, examples) for case in (one, other))
    assert first.keys() == second.keys() and len(first) == len(examples)
    return max(abs(first[name] - second[name]) / abs(second[name]) for name in first)


def _losses(module: VisionLanguageLoss, case: Case, examples: Sequence[Example]) -> dict[str, float]:
    """The loss of each sample, whose targets stand together, in the order of ids."""
    count = {each.id: int((each.labels[1:] != -100).sum()) for each in examples}
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
        parts = each.split([count[name] for name in batch.ids])
        found |= {name: float(part.sum()) for name, part in zip(batch.ids, parts, strict=True)}
    return found


def _loader(*, quick: bool) -> list[dict[str, Any]]:
    """What a model that takes no time of the CPU waits for its batches, at the paper's sizes."""
    from PIL import Image

    from medllava.conversation import InstructionSample, Provenance, Turn
    from medllava.model.prompt import PromptBuilder
    from medllava.model.tiny import TokenizerSizes, VisionSizes, build_processor, build_tokenizer
    from medllava.train.dataset import Examples, Pictures, Steps
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
        for number, (picture, text) in enumerate(_samples(count)):
            said = " ".join(dice.choices(words, k=max(2, text * SHRINK // 2)))
            asked = Turn(role="user", text="<image>\n" * bool(picture) + said)
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
