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
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from pydantic import ValidationError

from medllava.conversation import IMAGE_TAG, Turn, as_text
from medllava.errors import ConfigError, MedllavaError, run_cli
from medllava.geometry import Box, Point, parse_boxes
from medllava.images import draw_boxes, load_image
from medllava.jsonl import atomic_write, describe, write_json
from medllava.regions import around, with_region
from medllava.serve.faults import refusal

if TYPE_CHECKING:
    from medllava.model.answerer import Answerer
    from medllava.model.decoding import Completion

HELP = """\
/image PATH            look at another image (starts a new conversation)
/box x1 y1 x2 y2       ask the next questions about this box (0..1 of the image, origin top left); /box alone forgets it
/point x y             the same with a small box around a point
/reset                 start a new conversation about the same image
/save FILE             write the conversation as JSON; FILE.png and other pictures get the boxes of the last answer
/help                  this list
/quit                  end (also Ctrl-D)"""

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"}


@dataclass
class Chat:
    """A conversation about at most one image, and the region that the next questions are about."""

    answerer: Answerer
    options: dict[str, Any]
    image: Image.Image | None = None
    box: Box | None = None
    turns: list[Turn] = field(default_factory=list)

    def look_at(self, path: str | Path) -> None:
        """Raises DataError if the file is no picture; the chat then stays as it is."""
        self.image = load_image(Path(path))
        self.box = None
        self.turns = []

    def ask(self, text: str, *, show: bool) -> Completion:
        """Answer ``text``, printing the pieces as they come if ``show``. A question that fails leaves no trace.

        Raises MedllavaError."""
        text = as_text(with_region(text, self.box))
        first = not self.turns and self.image is not None
        turns = [*self.turns, Turn(role="user", text=f"{IMAGE_TAG}\n{text}" if first else text)]
        stream = self.answerer.stream([self.image] if self.image else [], turns, **self.options)
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
            fault = refusal(error)
            if fault.code == "internal_error":
                raise
            raise ConfigError(fault.message) from error
        finally:
            stream.close()
            if show:
                print(flush=True)
        self.turns = [*turns, Turn(role="assistant", text=answer.text)]
        return answer

    def save(self, path: Path) -> None:
        """Write the conversation as JSON, or the last answer's boxes on the image. Raises ConfigError."""
        if path.suffix.lower() in PICTURES:
            save_boxes(self.image, self.turns[-1].text if self.turns else "", path)
            return
        turns = [turn.model_dump() | {"boxes": boxes_of(turn.text)} for turn in self.turns]
        size = list(self.image.size) if self.image else None
        write_json(path, {"model": self.answerer.model_id, "image_size": size, "turns": turns})


def boxes_of(text: str) -> list[list[float]]:
    return [list(box.as_tuple()) for box in parse_boxes(text)]


def save_boxes(image: Image.Image | None, text: str, path: Path) -> None:
    """Draw the boxes written in ``text`` on the image and save it. Raises ConfigError if there is no image or the file
    name is of no picture format."""
    if image is None:
        raise ConfigError("no image to draw boxes on; name one with --image-file or /image")
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise ConfigError(f"{path}: not the name of a picture file; try {path.with_suffix('.png')}")
    boxes = parse_boxes(text)
    with atomic_write(path, "wb") as file:
        draw_boxes(image, boxes, [str(number) for number in range(1, len(boxes) + 1)]).save(file, kind)


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


def obey(chat: Chat, line: str) -> str:
    """Carry out a command line; returns what to tell the user. Raises MedllavaError."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command == "/image" and rest:
        chat.look_at(rest)
        assert chat.image is not None
        return f"looking at {rest}, {chat.image.width} x {chat.image.height} pixels"
    if command in {"/box", "/point"}:
        chat.box = None if not rest else parse_box(rest) if command == "/box" else around(parse_point(rest))
        return f"asking about {chat.box.model_dump()}" if chat.box else "asking about the whole image"
    if command == "/reset":
        chat.turns, chat.box = [], None
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
                told = obey(chat, line)
                if interactive:
                    print(told)
            elif line:
                answer = chat.ask(line, show=not as_json)
                if as_json:
                    print_json(chat.answerer, answer)
        except MedllavaError as error:
            if not interactive:
                raise
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("(stopped)")


def print_json(answerer: Answerer, answer: Completion) -> None:
    usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
    result = {
        "text": answer.text, "boxes": boxes_of(answer.text), "finish_reason": answer.finish_reason, "usage": usage,
        "model": answerer.model_id,
    }
    print(json.dumps(result, ensure_ascii=False), flush=True)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="medllava serve.cli", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model-path", type=Path, required=True, help="checkpoint folder")
    options.add_argument("--model-base", type=Path, help="base of an adapter folder, which names its own: checked only")
    options.add_argument("--conv-mode", help="chat format, which the checkpoint knows: checked only")
    options.add_argument("--image-file", type=Path, help="picture of any size; none asks about text only")
    options.add_argument("--prompt", help="ask this and end")
    options.add_argument("--box", help="x1,y1,x2,y2 in 0..1: the region the question is about")
    options.add_argument("--json", action="store_true", help="print one JSON object per answer, nothing else")
    options.add_argument("--save-boxes", type=Path, metavar="OUT.png", help="with --prompt: draw the answer's boxes")
    options.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    options.add_argument("--top-p", type=float, default=1.0)
    options.add_argument("--seed", type=int, help="makes sampling repeatable")
    options.add_argument("--max-new-tokens", type=int, default=256)
    options.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the best there is)")
    quantised = options.add_mutually_exclusive_group()
    quantised.add_argument("--load-4bit", action="store_true", help="language model in 4 bits (bitsandbytes)")
    quantised.add_argument("--load-8bit", action="store_true", help="language model in 8 bits (bitsandbytes)")
    return options


def check_original_flags(answerer: Answerer, path: Path, base: Path | None, conv_mode: str | None) -> None:
    """The flags of LLaVA's own command say what a checkpoint here knows of itself: warn where they differ."""
    manifest = answerer.manifest
    if base is not None and manifest.base is not None:
        own = Path(manifest.base) if Path(manifest.base).is_absolute() else path / manifest.base
        if own.resolve() != base.resolve() and manifest.base != str(base):
            print(f"warning: --model-base {base} is not used; {path} stands on {manifest.base}", file=sys.stderr)
    wanted = {"v1": "vicuna_v1", "llava_v1": "vicuna_v1"}.get(conv_mode or "", conv_mode)
    if wanted is not None and wanted != manifest.chat_format:
        print(
            f"warning: --conv-mode {conv_mode} is not used; {path} was trained with {manifest.chat_format}",
            file=sys.stderr,
        )


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if options.save_boxes and (options.prompt is None or options.image_file is None):
        raise ConfigError("--save-boxes needs --prompt and --image-file")
    # Everything that can be wrong is looked at before the model is loaded.
    image = load_image(options.image_file) if options.image_file else None
    box = parse_box(options.box) if options.box else None

    from medllava.model.answerer import Answerer

    answerer = Answerer.load(
        options.model_path, device=options.device, load_4bit=options.load_4bit, load_8bit=options.load_8bit
    )
    check_original_flags(answerer, options.model_path, options.model_base, options.conv_mode)
    sampling = {
        "max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "top_p": options.top_p,
        "seed": options.seed,
    }
    chat = Chat(answerer, sampling, image, box)
    if options.prompt is None:
        interactive = sys.stdin.isatty() and not options.json
        if interactive:
            import readline  # noqa: F401 - gives input() its line editing and history

            print(f"{answerer.model_id} is ready; /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends")
        converse(chat, as_json=options.json, interactive=interactive)
        return 0
    answer = chat.ask(options.prompt, show=not options.json)
    if options.json:
        print_json(answerer, answer)
    if options.save_boxes:
        save_boxes(image, answer.text, options.save_boxes)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
