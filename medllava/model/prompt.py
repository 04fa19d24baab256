"""The one prompt builder: turns to token ids, and to the labels that training supervises.

A conversation is rendered to text once and tokenized once (each stretch between pictures in one call). The tokens whose
characters lie inside an assistant's answer or its end token are supervised; all others are labelled ``IGNORE``. No
piece is tokenized a second time to find out where it ends.

Labels are aligned with the ids: ``labels[i]`` is ``input_ids[i]`` or ``IGNORE``. Whoever computes the loss shifts them
by one (Hugging Face models do it themselves when they are given ``labels``; so does :mod:`medllava.train.forward`).

Chat formats:

- ``plain``      stage 1: the picture, then the caption and a line break, all of it supervised; no questions.
- ``vicuna_v1``  the format of Vicuna and LLaVA v1.5.
- ``medllava``   one special token before each turn: short, for the demo's small model.
- ``template``   the chat template in the checkpoint's folder (Llama-3, Mistral, Qwen, Phi, ...).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from medllava.conversation import IMAGE_TAG, LITERAL_TAG, Turn
from medllava.errors import CheckpointError, ConfigError, DataError, PromptTooLong

CHARACTERS_PER_TOKEN = 16
"""More than any text has on average; English has four."""
IGNORE = -100
"""Label of a token that is not supervised."""

_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# Templates take a turn's content as one string, or as the list of parts that OpenAI-style callers send.
_CONTENT = (
    "{% macro content(turn) %}{% if turn['content'] is string %}{{ turn['content'] }}{% else %}"
    "{% for part in turn['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)

TEMPLATES = {
    "medllava": _CONTENT + (
        "{{ bos_token }}{% for turn in messages %}{% if turn['role'] == 'assistant' %}"
        "{{ '<|assistant|>' }}{% generation %}{{ content(turn) + eos_token }}{% endgeneration %}"
        "{% elif turn['role'] == 'system' %}{{ content(turn) }}"
        "{% else %}{{ '<|user|>' + content(turn) }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    "vicuna_v1": _CONTENT + (
        "{% if messages[0]['role'] == 'system' %}{% set system = content(messages[0]) %}{% else %}"
        "{% set system = \"" + _SYSTEM + "\" %}{% endif %}"
        "{{ bos_token + system + ' ' }}{% for turn in messages %}{% if turn['role'] == 'assistant' %}"
        "{{ 'ASSISTANT:' }}{% generation %}{{ ' ' + content(turn) + eos_token }}{% endgeneration %}"
        "{% elif turn['role'] == 'user' %}{% set said = content(turn) %}{{ 'USER:' }}"
        "{% if said %}{{ ' ' + said + ' ' }}{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
}
"""Built-in chat formats as Jinja templates; they are copied into the checkpoints that use them."""

_SPACE = "\u2581"
"""How SentencePiece writes a space."""

CHAT_FORMATS = ("plain", *TEMPLATES, "template")


@dataclass(frozen=True)
class Prompt:
    """Token ids and labels of equal length. ``dropped_turns``: trailing turns left out to fit ``max_length``."""

    input_ids: list[int]
    labels: list[int]
    dropped_turns: int = 0


class PromptBuilder:
    """Builds prompts for one tokenizer and chat format. ``tokens_per_image``: length of a picture in the prompt."""

    def __init__(
        self, tokenizer: Any, chat_format: str, *, tokens_per_image: int, image_token: str = IMAGE_TAG,
        template: str | None = None,
    ) -> None:
        if chat_format not in CHAT_FORMATS:
            raise ConfigError(f"unknown chat format {chat_format!r}; choose one of: {', '.join(CHAT_FORMATS)}")
        self.tokenizer = tokenizer
        self.chat_format = chat_format
        self.tokens_per_image = tokens_per_image
        self.image_token_id = int(tokenizer.convert_tokens_to_ids(image_token))
        if self.image_token_id == tokenizer.unk_token_id or self.image_token_id < 0:
            raise CheckpointError(f"the tokenizer has no token {image_token!r} for pictures")
        self._template = TEMPLATES.get(chat_format) or template or tokenizer.chat_template
        if chat_format != "plain" and not self._template:
            raise CheckpointError(
                "the checkpoint's folder holds no chat template (chat_template.jinja); set chat_format to one of: "
                + ", ".join(CHAT_FORMATS[:-1])
            )
        # SentencePiece models of the Llama family put a space in front of every stretch they are given.
        first = tokenizer.tokenize("a")
        self._space = bool(first) and first[0].startswith(_SPACE)
        # Transformers may open a folder as a general class, which only knows what the folder's file says.
        self._keeps_space = bool(getattr(tokenizer, "legacy", tokenizer.init_kwargs.get("legacy")))
        special = {str(token) for token in tokenizer.all_special_tokens}
        special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        ends = sorted(special - {image_token}, key=len, reverse=True)
        self._special = sorted((special | {image_token}) - {IMAGE_TAG}, key=len, reverse=True)
        self._end = re.compile(r"\s*(" + "|".join(re.escape(token) for token in ends) + ")") if ends else None
        self._marks = chat_format == "template" and bool(re.search(r"\{%-?\s*generation\s*-?%\}", self._template))
        self._parts = chat_format == "template" and self._takes_parts()

    @property
    def end_token_id(self) -> int | None:
        """The token that ends an answer in this format; None if there is none."""
        if self.chat_format == "plain":
            return None
        try:
            text, spans = self._chat([Turn(role="user", text="a"), Turn(role="assistant", text="b")], "end token")
        except (ConfigError, DataError):
            return None
        end = self._end.search(text, spans[0][0], spans[0][1]) if self._end else None
        return int(self.tokenizer.convert_tokens_to_ids(end[1])) if end else None

    def question(self, turns: Sequence[Turn]) -> list[int]:
        """Ids of the conversation so far, ending where the assistant is to speak. The last turn is the user's.

        What the turns say stays text: a special token's name in them (``</s>``, ``<|im_end|>``) is spelled out, it ends
        no turn and begins none.
        """
        turns, spelled = self._without_special(turns)
        if self.chat_format == "plain":
            text = self._bos() + "".join(turn.text for turn in turns)
        else:
            text = self._render(turns, generation_prompt=True)
        return self._encode_spelled(text, spelled)[0]

    def answered(self, turns: Sequence[Turn], answer: str) -> Prompt:
        """Ids of the conversation with its answer, of which the labels are the answer's (and its end token's) alone:
        what :meth:`question` asks and the model then says. Raises DataError on an empty answer."""
        turns, spelled = self._without_special([*turns, Turn(role="assistant", text=answer)])
        where = "the answer"
        text, spans = self._plain(turns, where) if self.chat_format == "plain" else self._chat(turns, where)
        ids, labels = self._encode_spelled(text, spelled, spans[-1:])
        return Prompt(ids, labels)

    def sample(self, turns: Sequence[Turn], where: str, *, max_length: int | None = None) -> Prompt | None:
        """Ids and labels of a training sample; ``where`` names it in errors.

        If it is longer than ``max_length`` (pictures counted in full), whole trailing exchanges are dropped; None if
        not even the first one fits. Raises DataError if no token is supervised or the turns do not fit the format.
        """
        kept = list(turns)
        while len(kept) > 1 and kept[0].role == "assistant":  # it answers nothing; LLaVA leaves it out, too
            kept = kept[1:]
        if any(IMAGE_TAG in turn.text for turn in kept if turn.role == "assistant"):
            raise DataError(f"{where}: {IMAGE_TAG} stands in an answer; pictures belong to the user's turns")
        while True:
            text, spans = self._plain(kept, where) if self.chat_format == "plain" else self._chat(kept, where)
            input_ids, labels = self._encode(text, spans, where)
            if all(label == IGNORE for label in labels):
                raise DataError(f"{where}: no token is supervised; each sample needs a non-empty assistant turn")
            if max_length is None or len(input_ids) <= max_length:
                return Prompt(input_ids, labels, len(turns) - len(kept))
            answers = [number for number, turn in enumerate(kept) if turn.role == "assistant"]
            if len(answers) < 2:
                return None
            kept = kept[: answers[-2] + 1]

    def _without_special(self, turns: Sequence[Turn]) -> tuple[Sequence[Turn], dict[str, str]]:
        """The turns with one unused character for each special token that they name, and which stands for which."""
        said = "".join(turn.text for turn in turns)
        found = [name for name in (LITERAL_TAG, *self._special) if name in said]
        unused = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in said)
        spelled = {next(unused): name for name in found}
        if not spelled:
            return turns, {}
        replaced = []
        for turn in turns:
            text = turn.text
            for mark, name in spelled.items():
                text = text.replace(name, mark)
            replaced.append(Turn(role=turn.role, text=text))
        return replaced, {mark: IMAGE_TAG if name == LITERAL_TAG else name for mark, name in spelled.items()}

    def _plain(self, turns: Sequence[Turn], where: str) -> tuple[str, list[tuple[int, int]]]:
        """Stage 1's text: pictures, then the caption and a line break; only the latter two are supervised."""
        answers = [turn.text for turn in turns if turn.role == "assistant"]
        if len(answers) != 1:
            raise DataError(f"{where}: chat format 'plain' takes exactly one assistant turn, got {len(answers)}")
        if not answers[0].strip():
            raise DataError(f"{where}: no token is supervised; the caption is empty")
        pictures = sum(turn.text.count(IMAGE_TAG) for turn in turns if turn.role == "user")
        head = self._bos() + IMAGE_TAG * pictures
        text = head + answers[0] + "\n"
        return text, [(len(head), len(text))]

    def _chat(self, turns: Sequence[Turn], where: str) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation and the character ranges of its answers with their end tokens.

        Every answer must stand where the model will be asked for it: behind the very prompt that :meth:`question` makes
        of the turns before it. Some templates write the last answer in another way than those before (Qwen3 puts an
        empty thought in front of it); there, all are written as they are once another question has followed.
        """
        if turns[0].role == "assistant":
            raise DataError(f"{where}: the first turn is the assistant's; a conversation starts with the user's")
        for number, turn in enumerate(turns):
            if turn.role == "assistant" and not turn.text.strip():
                raise DataError(f"{where}: assistant turn {number} is empty")
        try:
            whole, marks = self._marked(turns)
            spans = self._locate(turns, whole, marks)
            if isinstance(spans, int) and turns[-1].role == "assistant":
                whole, marks = self._marked([*turns, Turn(role="user", text="And?")])
                later = self._locate(turns, whole, marks)
                if not isinstance(later, int):
                    return whole[: later[-1][1]], later
        except TemplateError as error:
            raise DataError(f"{where}: the chat template refuses this conversation: {error}") from error
        if isinstance(spans, int):
            raise DataError(
                f"{where}: the chat template does not continue its own prompt at turn {spans}, so the answer"
                " cannot be located; use a template that keeps earlier turns as they were, or set chat_format to"
                f" one of: {', '.join(TEMPLATES)}"
            )
        return whole, spans

    def _locate(
        self, turns: Sequence[Turn], whole: str, marks: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]] | int:
        """Ranges of the answers with their end tokens; or the number of a turn that is not where it is asked for.

        marks: what the template itself marks as generated, if it marks every answer; a range then begins there.
        """
        answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        marked = len(marks) == len(answers)
        spans: list[tuple[int, int]] = []
        for place, number in enumerate(answers):
            head = self._render(turns[:number], generation_prompt=True)
            answer = turns[number].text.strip()
            start, limit = marks[place] if marked else (len(head), len(whole))
            start = max(start, len(head))
            at = whole.find(answer, start, limit)
            between = whole[len(head) : start] if marked else whole[start : max(at, 0)]
            if at < 0 or not whole.startswith(head) or between.strip():
                return number
            end = self._end.match(whole, at + len(answer)) if self._end else None
            if end is None:
                raise ConfigError("the chat template puts no end token after answers; a model would not learn to stop")
            spans.append((start, end.end()))
        return spans

    def _marked(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation, and the ranges that a chat template with {% generation %} marks in it."""
        if not self._marks:
            return self._render(turns, generation_prompt=False), []
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, marks = render_jinja_template(
            [self._messages(turns)], chat_template=self._template, return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return str(texts[0]), [(int(start), int(end)) for start, end in marks[0]]

    def _render(self, turns: Sequence[Turn], *, generation_prompt: bool) -> str:
        if self.chat_format == "vicuna_v1":
            turns = [_image_first(turn) for turn in turns]
        text: str = self.tokenizer.apply_chat_template(
            self._messages(turns), chat_template=self._template, tokenize=False,
            add_generation_prompt=generation_prompt,
        )
        return text

    def _messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        return [{"role": turn.role, "content": _parts(turn.text) if self._parts else turn.text} for turn in turns]

    def _takes_parts(self) -> bool:
        """Whether the template reads a turn only as the list of parts that callers of OpenAI's kind send."""
        self._parts = False
        try:
            return "probe" not in self._render([Turn(role="user", text="probe")], generation_prompt=False)
        except (TemplateError, TypeError):
            return True

    def _encode(
        self, text: str, spans: Sequence[tuple[int, int]] = (), where: str = "prompt"
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of a text; here, and only here, a picture's tag becomes its tokens."""
        input_ids: list[int] = []
        labels: list[int] = []
        position = 0
        if self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token):
            input_ids.append(self.tokenizer.bos_token_id)
            labels.append(IGNORE)
            position = len(self.tokenizer.bos_token)
        for number, stretch in enumerate(text[position:].split(IMAGE_TAG)):
            if number:
                input_ids += [self.image_token_id] * self.tokens_per_image
                labels += [IGNORE] * self.tokens_per_image
                position += len(IMAGE_TAG)
            for token, start, end in self._tokens(stretch):
                input_ids.append(token)
                labels.append(token if _inside(position + start, position + end, spans, where) else IGNORE)
            position += len(stretch)
        return input_ids, labels

    def _encode_spelled(
        self, text: str, spelled: dict[str, str], spans: Sequence[tuple[int, int]] = ()
    ) -> tuple[list[int], list[int]]:
        """:meth:`_encode` of a text in which single characters stand for names that are to be spelled out."""
        if not spelled:
            return self._encode(text, spans)
        input_ids: list[int] = []
        labels: list[int] = []
        at = 0
        for stretch in re.split(f"([{''.join(spelled)}])", text):
            if stretch in spelled:
                name = spelled[stretch]
                ids = self.tokenizer(name, add_special_tokens=False, split_special_tokens=True)["input_ids"]
                inside = any(first <= at < last for first, last in spans)
                named = ids if inside else [IGNORE] * len(ids)
            else:
                cut = [(first - at, last - at) for first, last in spans]
                within = [(max(first, 0), min(last, len(stretch))) for first, last in cut]
                ids, named = self._encode(stretch, [(first, last) for first, last in within if first < last])
            input_ids += ids
            labels += named
            at += len(stretch)
        return input_ids, labels

    def _tokens(self, stretch: str) -> Iterator[tuple[int, int, int]]:
        """(id, start, end) of each token of a text without pictures.

        In LLaVA's own formats a SentencePiece vocabulary is used as the released weights were trained with it
        (transformers 4.31): a space goes in front of the stretch even where one is there, and what follows ``</s>`` is
        tokenized as if alone, but loses that space (``US`` ``ER``, where later versions give ``USER``) unless the
        tokenizer's files say ``legacy``.
        """
        if not self._space or self.chat_format not in ("plain", "vicuna_v1"):
            yield from self._offsets(stretch)
            return
        end_token = self.tokenizer.eos_token
        at = 0
        for number, piece in enumerate(re.split(f"(?<={re.escape(end_token)})", stretch)):
            added = int(piece.startswith((" ", _SPACE)))
            for place, (token, start, end) in enumerate(self._offsets(" " * added + piece)):
                if number and not added and not place and not self._keeps_space:
                    token = self._without_space(token)
                yield token, at + max(start - added, 0), at + max(end - added, 0)
            at += len(piece)

    def _offsets(self, text: str) -> Iterator[tuple[int, int, int]]:
        if text:
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            for token, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
                yield token, start, end

    def _without_space(self, token: int) -> int:
        piece = self.tokenizer.convert_ids_to_tokens(token)
        bare = self.tokenizer.convert_tokens_to_ids(piece[1:]) if len(piece) > 1 and piece[0] == _SPACE else None
        return token if bare is None or bare == self.tokenizer.unk_token_id else int(bare)

    def _bos(self) -> str:
        return self.tokenizer.bos_token or ""


def _parts(text: str) -> list[dict[str, str]]:
    """A turn's text as parts: the pictures' tags apart from what stands between them."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE_TAG)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
    return parts


def check_length(texts: Iterable[str], context: int) -> None:
    """Raises PromptTooLong for texts that cannot fit into ``context`` tokens, before they are tokenized: of many
    megabytes, that takes minutes and gigabytes."""
    characters, most = sum(len(text) for text in texts), CHARACTERS_PER_TOKEN * context
    if characters > most:
        raise PromptTooLong(
            f"the question has {characters:,} characters; the model's context of {context} tokens holds a fraction of"
            " them: shorten it or start a new conversation"
        )


def with_image_tag(turns: Sequence[Turn], images: int) -> list[Turn]:
    """The turns with a tag for each of ``images`` pictures: if there is none, they go in front of the first user turn.

    Raises DataError if the number of tags does not equal the number of pictures.
    """
    tags = sum(turn.text.count(IMAGE_TAG) for turn in turns)
    placed = list(turns)
    if images and not tags:
        first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
        if first is not None:
            text = f"{IMAGE_TAG}\n" * images + turns[first].text
            placed[first] = Turn(role="user", text=text)
            tags = images
    if tags != images:
        raise DataError(f"{tags} {IMAGE_TAG} tags for {images} images; they must be equal")
    return placed


def _image_first(turn: Turn) -> Turn:
    """A user turn with one picture as LLaVA trains on it: the picture's tag, a line break, the rest without the spaces
    around it."""
    if turn.role != "user" or turn.text.count(IMAGE_TAG) != 1:
        return turn
    return Turn(role="user", text=f"{IMAGE_TAG}\n{turn.text.replace(IMAGE_TAG, '').strip()}".strip())


def without_history(turns: Sequence[Turn]) -> list[Turn]:
    """The system's and the last user's turn, the latter without tags: for models trained on single exchanges."""
    system = [turn for turn in turns[:1] if turn.role == "system"]
    return [*system, Turn(role="user", text=turns[-1].text.replace(IMAGE_TAG, "").strip())]


def _inside(start: int, end: int, spans: Sequence[tuple[int, int]], where: str) -> bool:
    for first, last in spans:
        if start < last and end > first:
            if start < first or end > last:
                raise DataError(
                    f"{where}: a token crosses the border of an answer; this tokenizer and chat format do not fit"
                )
            return True
        # A tokenizer may give an empty range to a token made of spaces; it belongs to where it stands.
        if start == end and first < start <= last:
            return True
    return False
