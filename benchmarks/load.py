"""From picture files and conversations to batches: samples per second of one core.

    python benchmarks/load.py [--quick]

The baseline is the loader that is usually written: PIL opens each picture, pads it to a square, resizes it bicubically,
and the array is scaled and normalised in float32 as torchvision's ToTensor and Normalize do; the text is tokenized each
time and the batch padded to its longest sample. Both make the same pixels of the same files (checked). "cached" takes
the frozen encoder's features from memory or from disk instead. The limit of loading pictures is opening and resizing
them with PIL and nothing else.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from record import arguments, finish, row

from medllava.conversation import InstructionSample, Provenance, Turn
from medllava.model.prompt import PromptBuilder
from medllava.model.tiny import TokenizerSizes, VisionSizes, build_processor, build_tokenizer
from medllava.train.dataset import Examples, Order, Pictures, Steps, micro_batches
from medllava.train.features import FeatureStore

SIDE, PATCH = 336, 14
TOKENS = (SIDE // PATCH) ** 2
SAID = "the gland in the upper left field shows dense stroma and pale nuclei with a mitosis near its vessel"
BATCH = 16


def main() -> int:
    given = arguments(__doc__, "load").parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        return finish(given.out, _measure(Path(name), quick=given.quick))


def _measure(folder: Path, *, quick: bool) -> list[dict[str, Any]]:
    count, width = (16, 16) if quick else (96, 1024)
    vision = VisionSizes(image_size=SIDE, patch_size=PATCH)
    tokenizer = build_tokenizer([SAID], TokenizerSizes(vocab_size=300, coordinate_tokens=False))
    processor = build_processor(tokenizer, vision)
    samples = _samples(folder, count)
    prompts = PromptBuilder(tokenizer, "medllava", tokens_per_image=TOKENS)
    examples = Examples(samples, prompts, max_length=4096)
    live = Pictures(folder, processor.image_processor)

    def batches(pictures: Pictures) -> Steps:
        make = micro_batches(
            examples, pictures, accumulate=1, flip_seed=None, pad_id=tokenizer.pad_token_id,
            image_token_id=prompts.image_token_id,
        )
        return Steps(Order(count, BATCH, seed=0), count // BATCH, make)

    def all_of(steps: Steps) -> Callable[[], object]:
        return lambda: [steps[step] for step in range(len(steps))]

    usual = Usual(folder, samples, prompts, vision, tokenizer.pad_token_id)
    apart = max(
        float((live.pixels(sample.images[0]) - usual.pixels(sample.images[0])).abs().max()) for sample in samples[:8]
    )
    encode = _encoder(width)
    names = [sample.images[0] for sample in samples]
    memory, disk = (Pictures(folder, processor.image_processor) for _ in range(2))
    memory.cache(names, (0,), encode)
    disk.cache_on_disk(FeatureStore(folder / "features", "key"), names, (0,), encode)
    speed = _rates(count, 1 if quick else 5, {
        "live": all_of(batches(live)), "usual": usual.all, "memory": all_of(batches(memory)),
        "disk": all_of(batches(disk)), "least": usual.open_all,
        "pictures": lambda: [live.pixels(name) for name in names],
        "usual pictures": lambda: [usual.pixels(name) for name in names],
    })
    first = time.process_time()
    Examples(samples, prompts, max_length=4096)
    tokenizing = count / (time.process_time() - first)
    baseline = {"baseline": "PIL and torchvision's way", "baseline_value": speed["usual"]}
    return [
        row("load.samples_per_s", speed["live"], "per core and s", limit=speed["least"], **baseline),
        row(
            "load.live_over_usual", speed["live"] / speed["usual"], "times", baseline="PIL and torchvision's way",
            baseline_value=1.0, limit=speed["least"] / speed["usual"], least=None if quick else 1.0,
        ),
        row(
            "load.pictures_per_s", speed["pictures"], "per core and s", baseline="PIL and torchvision's way",
            baseline_value=speed["usual pictures"], limit=speed["least"],
        ),
        row("load.cached_in_memory_samples_per_s", speed["memory"], "per core and s", baseline="live",
            baseline_value=speed["live"]),
        row("load.cached_on_disk_samples_per_s", speed["disk"], "per core and s", baseline="live",
            baseline_value=speed["live"]),
        row("load.tokenized_samples_per_s", tokenizing, "per core and s"),
        row("load.largest_difference_of_a_pixel", apart, "normalised units", most=1e-4),
    ]


def _rates(count: int, rounds: int, work: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Samples per CPU second of each, medians of rounds in which all take turns."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, do in work.items():
            began = time.process_time()
            do()
            found[name].append(count / (time.process_time() - began))
    return {name: statistics.median(values) for name, values in found.items()}


def _samples(folder: Path, count: int) -> list[InstructionSample]:
    """Conversations about JPEG pictures of a video frame's size."""
    dice = random.Random(0)
    made = []
    for number in range(count):
        noise = Image.effect_noise((320, 180), 60).resize((1280, 720), Image.Resampling.BICUBIC)
        noise.convert("RGB").save(folder / f"{number}.jpg", quality=90)
        said = " ".join(dice.choices(SAID.split(), k=dice.randint(20, 200)))
        turns = (Turn(role="user", text=f"<image>\n{said}"), Turn(role="assistant", text=said))
        made.append(InstructionSample(
            id=str(number), kind="conversation", images=(f"{number}.jpg",), turns=turns, provenance=Provenance()
        ))
    return made


def _encoder(width: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda pixels: torch.zeros(len(pixels), TOKENS, width, dtype=torch.bfloat16)


class Usual:
    """The baseline: a map-style data set and a collate function as in many a training script."""

    def __init__(
        self, folder: Path, samples: list[InstructionSample], prompts: PromptBuilder, vision: VisionSizes, pad_id: int
    ) -> None:
        self._folder, self._samples, self._prompts, self._pad_id = folder, samples, prompts, pad_id
        self._mean = torch.tensor(vision.image_mean)[:, None, None]
        self._std = torch.tensor(vision.image_std)[:, None, None]
        self._colour = tuple(int(255 * value) for value in vision.image_mean)

    def opened(self, name: str) -> Image.Image:
        """Padded to a square in the mean colour, as LLaVA's expand2square does, and resized."""
        image = Image.open(self._folder / name).convert("RGB")
        side = max(image.size)
        square = Image.new("RGB", (side, side), self._colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)

    def pixels(self, name: str) -> torch.Tensor:
        image = self.opened(name)
        array = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3)
        scaled = array.permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        return scaled.sub_(self._mean).div_(self._std)

    def item(self, number: int) -> dict[str, torch.Tensor]:
        sample = self._samples[number]
        prompt = self._prompts.sample(list(sample.turns), sample.id)
        assert prompt is not None
        return {
            "input_ids": torch.tensor(prompt.input_ids), "labels": torch.tensor(prompt.labels),
            "pixels": self.pixels(sample.images[0]),
        }

    def batch(self, numbers: list[int]) -> dict[str, torch.Tensor]:
        items = [self.item(number) for number in numbers]
        pad = torch.nn.utils.rnn.pad_sequence
        input_ids = pad([item["input_ids"] for item in items], batch_first=True, padding_value=self._pad_id)
        labels = pad([item["labels"] for item in items], batch_first=True, padding_value=-100)
        pixels = torch.stack([item["pixels"] for item in items])
        return {"input_ids": input_ids, "labels": labels, "pixels": pixels, "mask": input_ids != self._pad_id}

    def all(self) -> None:
        numbers = list(range(len(self._samples)))
        for start in range(0, len(numbers), BATCH):
            self.batch(numbers[start : start + BATCH])

    def open_all(self) -> None:
        for sample in self._samples:
            Image.open(self._folder / sample.images[0]).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    sys.exit(main())
