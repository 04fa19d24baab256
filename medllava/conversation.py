"""Turns, conversations and instruction samples, and the LLaVA JSON that the field's trainers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medllava.errors import DataError
from medllava.jsonl import describe, read_json

IMAGE_TAG = "<image>"
LITERAL_TAG = "\ufdd0image\ufdd1"
"""Stands in a turn for the text ``<image>`` that a person typed, which is no picture; see :func:`as_text`."""

Role = Literal["system", "user", "assistant"]
_FROM_LLAVA: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"
}
_TO_LLAVA = {"user": "human", "assistant": "gpt", "system": "system"}

Kind = Literal[
    "conversation", "description", "complex_reasoning", "iterative_abduction", "grounding", "caption", "question",
    "vqa", "other",
]


_OPTIONAL = ("answer_type", "image_dependent")
"""Keys of a row that are there only where they are known."""


class Turn(BaseModel):
    """One message. ``text`` may hold ``<image>`` tags in user turns, one per picture."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    role: Role
    text: str


def as_text(typed: str) -> str:
    """What a person typed, as text of a turn: an ``<image>`` in it stays the word that it is and calls for no picture.

    The two characters that mark it are no characters of Unicode's; where someone sends them, they are dropped.
    """
    return typed.replace("\ufdd0", "").replace("\ufdd1", "").replace(IMAGE_TAG, LITERAL_TAG)


class Provenance(BaseModel):
    """Where a sample came from: enough to find the seconds of video and the prompt that made it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    video: str | None = None
    chunk: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    prompt_hash: str | None = None
    teacher: str | None = None
    quote: str | None = None
    """The words of the talk that answer the question, where a sample is one of the narrator's own questions."""


class InstructionSample(BaseModel):
    """One training sample: images, a conversation, its kind and its provenance.

    ``answer_type``: closed where yes or no answers the question; ``image_dependent``: whether the image is needed to
    answer. Both are None where nobody has looked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str
    kind: Kind = "other"
    images: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = Field(min_length=1)
    answer_type: Literal["open", "closed"] | None = None
    image_dependent: bool | None = None
    provenance: Provenance = Provenance()

    def to_llava(self) -> dict[str, Any]:
        """The sample as a row of LLaVA JSON: ``image`` is a string for one picture, a list for several."""
        row: dict[str, Any] = {"id": self.id}
        if self.images:
            row["image"] = self.images[0] if len(self.images) == 1 else list(self.images)
        row["conversations"] = [{"from": _TO_LLAVA[turn.role], "value": turn.text} for turn in self.turns]
        row["kind"] = self.kind
        row |= {key: getattr(self, key) for key in _OPTIONAL if getattr(self, key) is not None}
        row["provenance"] = self.provenance.model_dump(mode="json", exclude_none=True)
        return row


def _labels(row: dict[str, Any]) -> dict[str, Any]:
    """The optional keys of a row as far as they are ours; Quilt-VQA's rows write OPEN and CLOSED."""
    kind, dependent = str(row.get("answer_type")).lower(), row.get("image_dependent")
    return {
        "answer_type": kind if kind in {"open", "closed"} else None,
        "image_dependent": dependent if isinstance(dependent, bool) else None,
    }


def read_llava(path: Path) -> list[dict[str, Any]]:
    """The rows of a LLaVA JSON file as they are. Raises DataError if it is not a list of objects."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of samples (LLaVA JSON), got {type(rows).__name__}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number}: expected an object, got {type(row).__name__}")
    return rows


def sample_from_llava(row: dict[str, Any], where: str = "row") -> InstructionSample:
    """Read a row of LLaVA JSON (also one without ``kind`` and ``provenance``).

    The number of ``<image>`` tags must equal the number of images; one missing tag for one image is put at the front
    of the first user turn, as LLaVA does. Windows separators in image names become "/". Raises DataError that starts
    with ``where``.
    """
    if not isinstance(row.get("conversations"), list) or not row["conversations"]:
        raise DataError(f"{where}: no 'conversations' list")
    turns: list[Turn] = []
    for number, message in enumerate(row["conversations"]):
        role = _FROM_LLAVA.get(str(message.get("from"))) if isinstance(message, dict) else None
        if role is None or not isinstance(message.get("value"), str):
            raise DataError(f"{where}: turn {number} needs 'from' (human, gpt or system) and a text 'value'")
        turns.append(Turn(role=role, text=message["value"]))
    image = row.get("image")
    if not (image is None or isinstance(image, str | list)):
        raise DataError(f"{where}: 'image' must be a text or a list of texts, got {type(image).__name__}")
    images = () if image in (None, "", []) else (image,) if isinstance(image, str) else tuple(image)
    images = tuple(name.replace("\\", "/") if isinstance(name, str) else name for name in images)
    if len(images) == 1 and not any(IMAGE_TAG in turn.text for turn in turns):
        first = next((n for n, turn in enumerate(turns) if turn.role == "user"), None)
        if first is not None:
            turns[first] = Turn(role="user", text=f"{IMAGE_TAG}\n{turns[first].text}")
    tags = sum(turn.text.count(IMAGE_TAG) for turn in turns)
    if tags != len(images):
        raise DataError(f"{where}: {tags} {IMAGE_TAG} tags for {len(images)} images; they must be equal")
    try:
        return InstructionSample(
            id=str(row.get("id", where)), kind=row.get("kind", "other"), images=images, turns=tuple(turns),
            provenance=Provenance.model_validate(row.get("provenance", {})), **_labels(row),
        )
    except ValidationError as error:
        raise DataError(f"{where}: {describe(error)}") from error
