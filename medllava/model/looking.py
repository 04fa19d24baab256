"""Where did it look? Which parts of a picture an answer depends on.

The check is by occlusion (Zeiler & Fergus 2014): parts of the picture are covered one after the other, and each time
the log-likelihood of the very same answer is computed again (teacher forcing). Where covering makes the answer less
likely, the model took something from there. It says what the answer depends on, not whether that is right.

Coverings are squares of two sizes that slide over a grid: of 2 x 2 cells, which find what no single cell holds, and of
one cell. A cell's drop is the mean over the squares of a size that cover it, and the mean of both sizes.

The attention of the answer's tokens to the picture's is given beside it as weak evidence: attention says what was read,
not what mattered (Jain & Wallace 2019), and in deep layers a patch's token holds more than its patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image, ImageFilter, ImageStat

from medllava.conversation import Turn
from medllava.errors import DataError, PromptTooLong, is_out_of_memory
from medllava.geometry import Box
from medllava.model.decoding import Completion
from medllava.model.prompt import IGNORE, check_length

if TYPE_CHECKING:
    from medllava.model.answerer import Answerer

Fill = Literal["mean", "blur"]
Grid = tuple[tuple[float, ...], ...]
"""Rows of numbers, from the top of the picture to its bottom, each from left to right."""

CELLS = 7
MOST_CELLS = 16
SIZES = (2, 1)
"""Sides of the covering squares, in cells."""
PICTURES_AT_ONCE = 16
LAST_LAYERS = 4
"""Layers of the language model whose attention is averaged."""
_BLUR = 0.1
"""Radius of ``blur``, in 0..1 of the longer side."""


@dataclass(frozen=True)
class Looking:
    """What an answer depended on.

    drops: by how much (in nats) the answer's log-likelihood falls where the picture is covered; a negative number is a
        place whose covering makes the answer likelier. log_likelihood: of the answer with the picture as it is. blank:
        the same with the whole picture covered; the difference is all that the picture did for the answer.
    attention: the share of each cell in the attention to this picture, weak evidence; None where it cannot be read.
    tokens: of the answer, its end included. fill: what covered: the picture's mean colour, or the picture blurred.
    """

    answer: str
    tokens: int
    log_likelihood: float
    blank: float
    drops: Grid
    attention: Grid | None
    fill: Fill = "mean"

    def peak(self) -> Box:
        """The cell with the largest drop."""
        cells = len(self.drops)
        row, column = max(
            ((row, column) for row in range(cells) for column in range(cells)),
            key=lambda place: self.drops[place[0]][place[1]],
        )
        return _square(row, column, 1, cells)


@dataclass(frozen=True)
class LookingQuestion:
    """What :meth:`Looker.prepare` made: a conversation with its answer, and the picture that is covered.

    ids, labels: as of :class:`medllava.model.prompt.Prompt`. before, after: pixels of the pictures around it.
    """

    answer: str
    ids: list[int]
    labels: list[int]
    picture: Image.Image
    before: torch.Tensor
    after: torch.Tensor
    cells: int
    fill: Fill
    attention: bool


class Looker:
    """Looks where a model looked. To the worker's engine it is a model whose answers are :class:`Looking`: questions
    join a :meth:`batch`, and each step is one pass of the model, so that others' answers go on in between."""

    def __init__(
        self, answerer: Answerer, model: Any, prompt: Callable[[Sequence[Turn], int, str], tuple[list[int], list[int]]],
        image_token_id: int, context: int, activate: Callable[[], None],
    ) -> None:
        self._answerer, self._model, self._prompt = answerer, model, prompt
        self._image_token_id, self._context, self._activate = image_token_id, context, activate

    def prepare(
        self, images: Sequence[Image.Image], turns: Sequence[Turn], answer: str, *, picture: int = -1,
        cells: int = CELLS, fill: Fill = "mean", attention: bool = True,
    ) -> LookingQuestion:
        """``turns``: the conversation up to the question. ``picture``: the place, among the pictures that the model is
        shown, of the one that is covered. ``cells``: on each side of the grid. Any thread may call it.

        Raises DataError (no such picture, no answer), PromptTooLong.
        """
        if not answer.strip():
            raise DataError("an empty answer depends on nothing; give the answer whose source is asked for")
        if not 2 <= cells <= MOST_CELLS:
            raise DataError(f"{cells} cells: the grid takes 2 to {MOST_CELLS} on each side")
        images, turns = self._answerer.shown(images, turns)
        count = len(images)
        if not -count <= picture < count:
            raise DataError(f"picture {picture}: the question shows {count} pictures" if count else "no picture")
        picture %= count
        check_length([*(turn.text for turn in turns), answer], self._context)
        ids, labels = self._prompt(turns, count, answer)
        if len(ids) > self._context:
            raise PromptTooLong(
                f"question and answer take {len(ids)} tokens, pictures included; the model's context holds"
                f" {self._context}: shorten them"
            )
        return LookingQuestion(
            answer, ids, labels, self._small(images[picture]), self._pixels(images[:picture]),
            self._pixels(images[picture + 1 :]), cells, fill, attention,
        )

    def batch(self) -> LookingBatch:
        """An empty batch, see :class:`LookingBatch`."""
        return LookingBatch(self)

    def look(self, question: LookingQuestion) -> Looking:
        """The whole of it, at once."""
        batch = self.batch()
        (row,) = batch.join([question])
        while batch.rows:
            batch.step()
        return row.result()

    def likelihoods(self, question: LookingQuestion, pictures: Sequence[Image.Image]) -> list[float]:
        """The answer's log-likelihood with each of ``pictures`` in the place of the covered one, computed together."""
        labels = torch.tensor(question.labels)
        told = (labels != IGNORE).nonzero()[:, 0]
        kept = len(labels) - int(told[0]) + 1
        pixels = torch.cat([
            torch.cat([question.before, self._pixels([picture]), question.after]) for picture in pictures
        ])
        logits = self._forward(question, pixels, len(pictures), logits_to_keep=kept).logits
        scores = logits.float().log_softmax(-1).cpu()[:, told - 1 - (len(labels) - kept)]
        wanted = labels[told][None, :, None].expand(len(pictures), -1, 1)
        return [float(value) for value in scores.gather(2, wanted)[..., 0].double().sum(1)]

    def attention(self, question: LookingQuestion) -> Grid | None:
        """The attention of the answer's tokens to the picture's: mean over them, over heads and the last layers."""
        model = getattr(self._model, "get_base_model", lambda: self._model)()
        language = getattr(model.model, "language_model", None)
        layers = [layer.self_attn for layer in getattr(language, "layers", [])[-LAST_LAYERS:]]
        ids = torch.tensor(question.ids)
        tokens = self._answerer.num_image_tokens
        if not layers:
            return None
        side = math.isqrt(tokens)
        end = (len(question.before) + 1) * tokens
        # Some encoders put registers before the patches.
        patches = (ids == self._image_token_id).nonzero()[end - side * side : end, 0]
        asking = (torch.tensor(question.labels) != IGNORE).nonzero()[:, 0] - 1
        found: list[torch.Tensor] = []

        def note(_module: Any, _inputs: Any, output: Any) -> None:
            if isinstance(output, tuple) and len(output) > 1 and output[1] is not None:
                weights = output[1][0].float().mean(0).cpu()
                found.append(weights[asking][:, patches].mean(0))

        pixels = torch.cat([question.before, self._pixels([question.picture]), question.after])
        hooks = [layer.register_forward_hook(note) for layer in layers]
        try:
            with _eager(language):
                self._forward(question, pixels, 1, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        if not found:
            return None
        return self._on_picture(torch.stack(found).mean(0).view(side, side), question)

    def _on_picture(self, patches: torch.Tensor, question: LookingQuestion) -> Grid:
        """Patches of the encoder's square as cells of the picture, as shares of their sum."""
        width, height = question.picture.size
        side, steps = len(patches), 4
        cells = torch.zeros(question.cells, question.cells)
        long = max(width, height) if self._answerer.manifest.padding == "square" else min(width, height)
        for row in range(question.cells):
            for column in range(question.cells):
                for step in range(steps * steps):
                    x = (column + (step % steps + 0.5) / steps) / question.cells
                    y = (row + (step // steps + 0.5) / steps) / question.cells
                    # The square is centred on the picture, whether it was padded or cut.
                    i, j = ((y - 0.5) * height / long + 0.5) * side, ((x - 0.5) * width / long + 0.5) * side
                    if 0 <= i < side and 0 <= j < side:
                        cells[row, column] += patches[int(i), int(j)] / steps**2
        return _rows(cells / cells.sum().clamp(min=1e-12))

    def _forward(self, question: LookingQuestion, pixels: torch.Tensor, count: int, **options: Any) -> Any:
        self._activate()
        device = self._model.device
        ids = torch.tensor([question.ids], device=device).expand(count, -1)
        with torch.inference_mode():
            return self._model(
                input_ids=ids, pixel_values=pixels.to(device, self._model.dtype), use_cache=False, **options
            )

    def _pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        if not images:
            side = self._answerer.manifest.image_size
            return torch.zeros(0, 3, side, side)
        return self._answerer.pixels(images)

    def _small(self, picture: Image.Image) -> Image.Image:
        """A copy of at most twice the encoder's side: it is resized once for each covering."""
        small = picture.convert("RGB")
        most = 2 * self._answerer.manifest.image_size
        if max(small.size) > most:
            small = small.copy() if small is picture else small
            small.thumbnail((most, most), Image.Resampling.LANCZOS)
        return small


class LookingRow:
    """The progress of one question; for the engine, an answer without text."""

    logprobs: tuple[()] = ()

    def __init__(self, looker: Looker, question: LookingQuestion) -> None:
        self._looker, self.question = looker, question
        self._covered = covered(question.picture, question.fill)
        self._coverings = [None, _square(0, 0, 1, 1), *coverings(question.cells)]
        self._values: list[float] = []
        self._at_once = PICTURES_AT_ONCE
        self._attention: Grid | None = None
        self.finished = False

    def step(self) -> None:
        """One pass of the model: some coverings, or at last the attention."""
        if len(self._values) < len(self._coverings):
            part = self._coverings[len(self._values) : len(self._values) + self._at_once]
            try:
                pictures = [self._with(box) for box in part]
                self._values += self._looker.likelihoods(self.question, pictures)
            except RuntimeError as error:
                if not is_out_of_memory(error) or self._at_once == 1:
                    raise
                self._at_once //= 2
            if len(self._values) < len(self._coverings) or self.question.attention:
                return
        elif self.question.attention:
            self._attention = self._looker.attention(self.question)
        self.finished = True

    def result(self) -> Looking:
        whole, blank, *rest = self._values
        heat = torch.zeros(self.question.cells, self.question.cells, dtype=torch.float64)
        for size in SIZES:
            total, times = torch.zeros_like(heat), torch.zeros_like(heat)
            for box, value in zip(coverings(self.question.cells, (size,)), rest, strict=False):
                rows, columns = _cells(box.y1, box.y2, len(heat)), _cells(box.x1, box.x2, len(heat))
                total[rows, columns] += whole - value
                times[rows, columns] += 1
            rest = rest[(self.question.cells - size + 1) ** 2 :]
            heat += total / times / len(SIZES)
        tokens = sum(label != IGNORE for label in self.question.labels)
        return Looking(
            self.question.answer, tokens, whole, blank, _rows(heat), self._attention, self.question.fill
        )

    def ready(self) -> str:
        return ""

    def completion(self) -> Completion:
        return Completion("", "stop", len(self.question.ids), 0)

    def _with(self, box: Box | None) -> Image.Image:
        if box is None:
            return self.question.picture
        picture = self.question.picture.copy()
        x0, y0, x1, y1 = (round(value) for value in box.to_pixels(*picture.size))
        picture.paste(self._covered.crop((x0, y0, x1, y1)), (x0, y0))
        return picture


class LookingBatch:
    """The questions that are being looked into; see :class:`medllava.model.decoding.Batch`, whose methods it has."""

    def __init__(self, looker: Looker) -> None:
        self._looker = looker
        self.rows: list[LookingRow] = []

    def join(self, questions: Sequence[LookingQuestion]) -> list[LookingRow]:
        rows = [LookingRow(self._looker, question) for question in questions]
        self.rows += rows
        return rows

    def step(self) -> None:
        """One pass for each question. A question whose pass fails stays in the batch."""
        for row in self.rows:
            row.step()
        self.rows = [row for row in self.rows if not row.finished]

    def remove(self, rows: Sequence[LookingRow]) -> None:
        self.rows = [row for row in self.rows if row not in rows]


def coverings(cells: int, sizes: Sequence[int] = SIZES) -> list[Box]:
    """The squares that cover the picture one after the other."""
    return [
        _square(row, column, size, cells)
        for size in sizes for row in range(cells - size + 1) for column in range(cells - size + 1)
    ]


def covered(picture: Image.Image, fill: Fill) -> Image.Image:
    """The picture with all of it covered: in its mean colour, or blurred beyond recognition."""
    if fill == "blur":
        return picture.filter(ImageFilter.GaussianBlur(_BLUR * max(picture.size)))
    mean = tuple(round(value) for value in ImageStat.Stat(picture).mean)
    return Image.new("RGB", picture.size, mean)


def _square(row: int, column: int, size: int, cells: int) -> Box:
    return Box(x1=column / cells, y1=row / cells, x2=(column + size) / cells, y2=(row + size) / cells)


def _cells(low: float, high: float, cells: int) -> slice:
    return slice(round(low * cells), round(high * cells))


def _rows(grid: torch.Tensor) -> Grid:
    return tuple(tuple(round(float(value), 6) for value in row) for row in grid)


@contextmanager
def _eager(language: Any) -> Iterator[None]:
    """Compute attention by plain matrices meanwhile; the fast ways do not tell its weights."""
    before = language.config._attn_implementation
    language.config._attn_implementation = "eager"
    try:
        yield
    finally:
        language.config._attn_implementation = before
