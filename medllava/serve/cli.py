"""Chat with a model in the terminal, or ask it one question.

    python -m medllava.serve.cli --model-path demo-out/stage2 --image-file tissue.png
    python -m medllava.serve.cli --model-path demo-out/stage2 --image-file tissue.png --prompt "What is here?" --json
    python -m medllava.serve.cli --model-path demo-out/stage2 < questions.txt

With --prompt it answers and ends. Without, it reads one question a line, from the keyboard or a pipe, in one
conversation; a line that starts with / is a command (/help lists them). Boxes are x1,y1,x2,y2 in 0..1 of the image,
origin top left. Exit code: 0 all answered, 1 something cannot be used (one line says what), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from pydantic import ValidationError

from medllava.conversation import IMAGE_TAG, Turn, as_text
from medllava.errors import ConfigError, MedllavaError, run_cli
from medllava.geometry import Box, Point, parse_boxes
from medllava.images import draw_boxes, draw_heat
from medllava.jsonl import atomic_write, describe, write_json
from medllava.regions import Region, asked, bounds, parse_ways
from medllava.serve.faults import refusal
from medllava.serve.opened import Opened, SlideView, as_marked, boxes_on, open_file
from medllava.serve.session import WHOLE

if TYPE_CHECKING:
    from medllava.model.answerer import Answerer
    from medllava.model.decoding import Completion
    from medllava.model.looking import Looking

HELP = """\
/image PATH            look at a further image or whole slide; the next questions are about it
/view x1 y1 x2 y2      of a slide: the field to look at (0..1 of the slide); /view alone is the whole
/box x1 y1 x2 y2       ask the next questions about this box (0..1 of the image, origin top left); /box alone forgets it
/point x y             the same with a point
/look [FILE.png]       what the last answer depends on: covers the image part by part; FILE.png gets the heat map
/reset                 start a new conversation about the same image
/save FILE             write the conversation as JSON, or FILE.md to read; FILE.png gets the boxes of the last answer
/help                  this list
/quit                  end (also Ctrl-D)"""

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Exchange:
    """One question and its answer. ``pictures``: those that came with it, as the model was shown them. ``about``: which
    of the chat's images it is about, None for none; ``image`` is what it showed, without a mark, and ``frame`` which
    part of a slide that was. ``region`` is in 0..1 of the whole, boxes in ``turn`` and ``answer`` of ``frame``."""

    typed: str
    region: Region | None
    about: int | None
    image: Image.Image | None
    frame: Box
    pictures: list[Image.Image]
    turn: Turn
    answer: str = ""

    def boxes(self) -> list[list[float]]:
        """The boxes of the answer, in 0..1 of the whole."""
        return boxes_on(self.answer, self.frame)


@dataclass
class Chat:
    """A conversation about images, and the region of the last one that the next questions are about.

    ``ways``: how the model takes regions, see :mod:`medllava.regions`.
    """

    answerer: Answerer
    options: dict[str, Any]
    images: list[Opened] = field(default_factory=list)
    region: Region | None = None
    ways: Sequence[str] = ("text",)
    exchanges: list[Exchange] = field(default_factory=list)
    sent: int = 0
    """So many of the images are in the conversation."""

    @property
    def image(self) -> Opened | None:
        return self.images[-1] if self.images else None

    @property
    def shown(self) -> Image.Image | None:
        """What the last question showed; before one, what the next will."""
        if self.exchanges and self.exchanges[-1].image:
            return self.exchanges[-1].image
        return self.image.image if self.image else None

    def open(self, path: str) -> Opened:
        """Raises DataError if the file is no picture; the chat then stays as it is."""
        image = open_file(path)
        image.for_model(self.answerer.manifest.training_mpp)
        self.images.append(image)
        self.region = None
        return image

    def view(self, box: Box) -> Opened:
        """Look at a part of the slide. Raises ConfigError if it is none."""
        if self.image is None:
            raise ConfigError("no slide to look at a part of; open one with /image")
        self.image.look_at(box)
        self.region = None
        return self.image

    def ask(self, text: str, *, show: bool) -> Completion:
        """Answer ``text``, printing the pieces as they come if ``show``. A question that fails leaves no trace.

        Raises MedllavaError."""
        exchange = self._question(text)
        exchanges = [*self.exchanges, exchange]
        stream = self.answerer.stream(pictures_of(exchanges), turns_of(exchanges), **self.options)
        try:
            while True:
                piece = next(stream)
                if show:
                    print(piece, end="", flush=True)
        except StopIteration as end:
            answer: Completion = end.value
        except MedllavaError:
            raise
        except (RuntimeError, MemoryError) as error:
            raise told(error) from error
        finally:
            stream.close()
            if show:
                print(flush=True)
        self.exchanges.append(replace(exchange, answer=answer.text))
        self.sent = len(self.images)
        return answer

    def _question(self, text: str) -> Exchange:
        """The question with the pictures that it brings along: new ones, and the last one again where it now has a
        mark, or no mark any more."""
        opened, region = self.image, self.region
        aimed = opened.aim(region) if opened else region
        image = opened.image if opened else None
        shown, words = asked(image, text, aimed, self.ways)
        pictures = [one.image for one in self.images[self.sent : -1]]
        before = pictures_of(self.exchanges)
        if shown is not None and not (before and before[-1] is shown and self.sent == len(self.images)):
            pictures = [*pictures, shown]
        turn = Turn(role="user", text=f"{IMAGE_TAG}\n" * len(pictures) + as_text(words))
        if opened is None:
            return Exchange(text, None, None, None, WHOLE, pictures, turn)
        return Exchange(text, region, len(self.images) - 1, image, opened.frame, pictures, turn)

    def where(self) -> Looking:
        """What the last answer depends on. Raises ConfigError if there is none, or no image."""
        answer = self.exchanges[-1].answer if self.exchanges else ""
        if not answer or not pictures_of(self.exchanges):
            raise ConfigError("no answer about an image to look into; ask a question about one first")
        looker, turns = self.answerer.looker, turns_of(self.exchanges)
        try:
            return looker.look(looker.prepare(pictures_of(self.exchanges), turns[:-1], as_text(answer)))
        except (RuntimeError, MemoryError) as error:
            raise told(error) from error

    def reset(self) -> None:
        self.images, self.exchanges, self.sent, self.region = self.images[-1:], [], 0, None

    def save(self, path: Path) -> None:
        """Write the conversation as JSON or Markdown, or the last answer's boxes on the image. Raises ConfigError."""
        if path.suffix.lower() in PICTURES:
            save_boxes(self.shown, self.exchanges[-1].answer if self.exchanges else "", path)
        elif path.suffix.lower() in {".md", ".markdown"}:
            with atomic_write(path) as file:
                file.write(self._markdown())
        else:
            write_json(path, self._json())

    def _json(self) -> dict[str, Any]:
        turns: list[dict[str, Any]] = []
        for one in self.exchanges:
            turns.append(one.turn.model_dump() | {
                "boxes": boxes_on(one.turn.text, one.frame), "typed": one.typed, "image": one.about,
                "region": region_json(one.region),
            } | ({} if one.frame == WHOLE else {"field": one.frame.model_dump()}))
            turns.append({"role": "assistant", "text": one.answer, "boxes": one.boxes()})
        return {
            "model": self.answerer.model_id, "image_size": list(self.image.size) if self.image else None,
            "image_sizes": [list(image.size) for image in self.images], "turns": turns,
        }

    def _markdown(self) -> str:
        from medllava.serve import export, session

        pictures: Any = self.images  # of which only the size is read
        whole = session.Session(pictures=pictures)
        for one in self.exchanges:
            region = None if one.region is None else as_marked(one.region)
            whole.exchanges.append(session.Exchange(
                one.about, one.typed, region, session.Sight("", one.frame) if one.about is not None else None,
                asked=one.turn.text.replace(IMAGE_TAG, "").strip(), answer=one.answer, state="done",
                model=self.answerer.model_id,
            ))
        return export.as_markdown(whole)


def pictures_of(exchanges: Sequence[Exchange]) -> list[Image.Image]:
    return [picture for one in exchanges for picture in one.pictures]


def turns_of(exchanges: Sequence[Exchange]) -> list[Turn]:
    """The conversation; a question without an answer yet comes last."""
    turns: list[Turn] = []
    for one in exchanges:
        turns.append(one.turn)
        if one is not exchanges[-1] or one.answer:
            turns.append(Turn(role="assistant", text=one.answer))
    return turns


def told(error: RuntimeError | MemoryError) -> Exception:
    """What to say of a fault of the model; a defect stays what it is."""
    fault = refusal(error)
    return error if fault.code == "internal_error" else ConfigError(fault.message)


def region_json(region: Region | None) -> dict[str, list[float]] | None:
    if region is None:
        return None
    return {"point": [region.x, region.y]} if isinstance(region, Point) else {"box": list(bounds(region).as_tuple())}


def looking_told(looked: Looking) -> str:
    """The result in a line."""
    total = looked.log_likelihood - looked.blank
    most = max(value for row in looked.drops for value in row)
    where = ", ".join(f"{value:.2f}" for value in looked.peak().as_tuple())
    if most <= 0:
        return f"no part of the image makes this answer likelier (the whole image: {total:+.2f} nats)"
    return f"depends most on [{where}]: covered, {most:.2f} nats less likely (the whole image: {total:+.2f} nats)"


def save_heat(image: Image.Image | None, looked: Looking, title: str, path: Path) -> None:
    """Write the heat map over the image. Raises ConfigError if the file name is of no picture format."""
    assert image is not None, "an answer that was looked into has an image"
    save_picture(draw_heat(image, looked.drops, title=f"{title} {looked.answer}"[:120]), path)


def save_boxes(image: Image.Image | None, text: str, path: Path) -> None:
    """Draw the boxes written in ``text`` on the image and save it. Raises ConfigError if there is no image or the file
    name is of no picture format."""
    if image is None:
        raise ConfigError("no image to draw boxes on; name one with --image-file or /image")
    boxes = parse_boxes(text)
    if not boxes:
        print(f"the answer names no box: {path} is the picture as it was", file=sys.stderr)
    save_picture(draw_boxes(image, boxes, [str(number) for number in range(1, len(boxes) + 1)]), path)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Raises ConfigError if the file name is of no picture format."""
    kind = picture_format(path)
    with atomic_write(path, "wb") as file:
        picture.save(file, kind)


def picture_format(path: Path) -> str:
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise ConfigError(f"{path}: not the name of a picture file; try {path.with_suffix('.png')}")
    return kind


def parse_box(text: str) -> Box:
    """A Box from ``x1,y1,x2,y2`` (spaces do as well). Raises ConfigError."""
    try:
        return Box.model_validate([float(number) for number in text.replace(",", " ").split()])
    except ValidationError as error:
        raise ConfigError(f"box {text!r}: {describe(error)}") from error
    except ValueError as error:
        raise ConfigError(f"box {text!r}: expected four numbers x1,y1,x2,y2 in 0..1") from error


def parse_point(text: str) -> Point:
    """A Point from ``x,y`` or ``x y``. Raises ConfigError."""
    try:
        return Point.model_validate([float(number) for number in text.replace(",", " ").split()])
    except ValidationError as error:
        raise ConfigError(f"point {text!r}: {describe(error)}") from error
    except ValueError as error:
        raise ConfigError(f"point {text!r}: expected two numbers x,y in 0..1") from error


def obey(chat: Chat, line: str, *, as_json: bool) -> str:
    """Carry out a command line; returns what to tell the user. Raises MedllavaError."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command == "/image" and rest:
        path = rest.strip("'\"")  # as terminals write a dropped file
        return f"looking at {path}, {chat.open(path).told()}"
    if command == "/view":
        return chat.view(parse_box(rest) if rest else WHOLE).told()
    if command in {"/box", "/point"}:
        chat.region = None if not rest else parse_box(rest) if command == "/box" else parse_point(rest)
        return f"asking about {chat.region.model_dump()}" if chat.region else "asking about the whole image"
    if command == "/look":
        if rest:
            picture_format(Path(rest))
        looked = chat.where()
        if rest:
            save_heat(chat.shown, looked, chat.exchanges[-1].typed, Path(rest))
        if as_json:
            return json.dumps({"looking": looking_json(looked)})
        return looking_told(looked) + (f"; saved {rest}" if rest else "")
    if command == "/reset":
        chat.reset()
        return "new conversation"
    if command == "/save" and rest:
        chat.save(Path(rest))
        return f"saved {rest}"
    if command == "/help":
        return HELP
    raise ConfigError(f"no command {line!r}; /help lists them")


def converse(chat: Chat, *, as_json: bool, interactive: bool) -> None:
    """Read questions and commands to the end. A fault ends a piped run; at the keyboard it is shown and forgotten."""
    while True:
        try:
            line = input("you> " if interactive else "").strip()
        except EOFError:
            return
        if line in {"/quit", "/exit"}:
            return
        try:
            if line.startswith("/"):
                reply = obey(chat, line, as_json=as_json)
                if interactive or line.split()[0] == "/look":
                    print(reply, flush=True)
            elif line:
                answer = chat.ask(line, show=not as_json)
                tell(chat, answer, as_json=as_json)
        except MedllavaError as error:
            if not interactive:
                raise
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("(stopped)")


def tell(chat: Chat, answer: Completion, looked: Looking | None = None, *, as_json: bool) -> None:
    """What was not streamed: the answer as JSON, or where its boxes are on the slide."""
    last = chat.exchanges[-1]
    if not as_json:
        if last.frame != WHOLE and last.boxes():
            print(f"on the slide: {[[round(side, 4) for side in box] for box in last.boxes()]}", file=sys.stderr)
        return
    usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
    result = {
        "text": answer.text, "boxes": last.boxes(), "finish_reason": answer.finish_reason, "usage": usage,
        "model": chat.answerer.model_id,
    }
    if isinstance(chat.image, SlideView):
        result["field"] = {"box": list(last.frame.as_tuple()), "mpp": chat.image.mpp}
    if looked:
        result["looking"] = looking_json(looked)
    print(json.dumps(result, ensure_ascii=False), flush=True)


def looking_json(looked: Looking) -> dict[str, Any]:
    return {
        "drops": looked.drops, "peak": list(looked.peak().as_tuple()), "log_likelihood": looked.log_likelihood,
        "blank": looked.blank, "attention": looked.attention,
    }


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="medllava serve.cli", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model-path", required=True, help="checkpoint folder or hub id")
    options.add_argument("--model-base", help="full model under a LoRA or projector folder, if not the one it names")
    options.add_argument("--conv-mode", help="chat format, which the checkpoint knows: checked only")
    options.add_argument(
        "--image-file", action="append", help="picture or whole slide; repeat for several; none: text only"
    )
    options.add_argument("--view", help="of a slide: x1,y1,x2,y2 in 0..1 of it: the field to look at (default: all)")
    options.add_argument("--prompt", help="ask this and end")
    options.add_argument("--box", help="x1,y1,x2,y2 in 0..1: the region the question is about")
    options.add_argument("--point", help="x,y in 0..1: the place the question is about")
    options.add_argument(
        "--regions", choices=["text", "mark"],
        help="show regions as coordinates or as a red mark on the picture (default: as the checkpoint was trained)",
    )
    options.add_argument("--look", type=Path, metavar="OUT.png", help="with --prompt: what the answer depends on")
    options.add_argument("--json", action="store_true", help="print one JSON object per answer, nothing else")
    options.add_argument("--save-boxes", type=Path, metavar="OUT.png", help="with --prompt: draw the answer's boxes")
    options.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    options.add_argument("--top-p", type=float, default=1.0, help="sample among tokens of this share (default 1: all)")
    options.add_argument("--seed", type=int, help="makes sampling repeatable")
    options.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default %(default)s)")
    options.add_argument("--device", help="cuda, cuda:1, mps, cpu, or auto: all cards together (default: the best one)")
    options.add_argument("--debug", action="store_true", help="log more on stderr")
    quantised = options.add_mutually_exclusive_group()
    quantised.add_argument("--load-4bit", action="store_true", help="language model in 4 bits (bitsandbytes)")
    quantised.add_argument("--load-8bit", action="store_true", help="language model in 8 bits (bitsandbytes)")
    return options


def check_original_flags(answerer: Answerer, path: str, base: str | None, conv_mode: str | None) -> None:
    """The flags of LLaVA's own command, as far as a checkpoint here knows better: warn where they differ."""
    manifest = answerer.manifest
    if base is not None and manifest.base is None:
        print(f"warning: --model-base {base} is not used; {path} is a whole model", file=sys.stderr)
    wanted = {"v1": "vicuna_v1", "llava_v1": "vicuna_v1"}.get(conv_mode or "", conv_mode)
    if wanted is not None and wanted != manifest.chat_format:
        print(
            f"warning: --conv-mode {conv_mode} is not used; {path} was trained with {manifest.chat_format}",
            file=sys.stderr,
        )


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    files: list[str] = options.image_file or []
    for flag, given in (("--save-boxes", options.save_boxes), ("--look", options.look)):
        if given and (options.prompt is None or not files):
            raise ConfigError(f"{flag} needs --prompt and --image-file")
    if options.box and options.point:
        raise ConfigError("choose one of --box and --point")
    if options.max_new_tokens < 1 or options.temperature < 0 or not 0 < options.top_p <= 1:
        raise ConfigError("--max-new-tokens is 1 or more, --temperature 0 or more, --top-p more than 0 and at most 1")
    # Everything that can be wrong is looked at before the model is loaded.
    images = [open_file(file) for file in files]
    view = parse_box(options.view) if options.view else None
    if view and not any(isinstance(image, SlideView) for image in images[-1:]):
        raise ConfigError("--view needs a whole slide as the last --image-file")
    for path in (options.save_boxes, options.look):
        if path:
            picture_format(path)
    region: Region | None = parse_box(options.box) if options.box else None
    if options.point:
        region = parse_point(options.point)
    if options.debug:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")

    from medllava.model.answerer import Answerer

    answerer = Answerer.load(
        options.model_path, device=options.device, load_4bit=options.load_4bit, load_8bit=options.load_8bit,
        base=options.model_base,
    )
    check_original_flags(answerer, options.model_path, options.model_base, options.conv_mode)
    sampling = {
        "max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "top_p": options.top_p,
        "seed": options.seed,
    }
    ways = parse_ways(options.regions) if options.regions else answerer.manifest.regions
    for image in images:
        image.for_model(answerer.manifest.training_mpp)
    chat = Chat(answerer, sampling, images, ways=ways)
    if view:
        chat.view(view)
    chat.region = region
    if isinstance(chat.image, SlideView):
        print(f"{files[-1]}: {chat.image.told()}", file=sys.stderr)
    if options.prompt is None:
        interactive = sys.stdin.isatty() and not options.json
        if interactive:
            import readline  # noqa: F401 - gives input() its line editing and history

            print(f"{answerer.model_id} is ready; /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends")
        converse(chat, as_json=options.json, interactive=interactive)
        return 0
    answer = chat.ask(options.prompt, show=not options.json)
    looked = chat.where() if options.look else None
    tell(chat, answer, looked, as_json=options.json)
    if looked and not options.json:
        print(looking_told(looked), file=sys.stderr)
    if looked:
        save_heat(chat.shown, looked, options.prompt, options.look)
    if options.save_boxes:
        save_boxes(chat.shown, answer.text, options.save_boxes)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
