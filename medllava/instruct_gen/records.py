"""What flows through instruct_gen: videos, stable chunks, cursor traces, narratives, grounded captions.

Times end in ``_s`` and are seconds from the start of the video. Places are 0..1 of the record's own image, which is
the rectangle ``crop_px`` of the video frame (viewer frames and black bars are cut away).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from medllava.geometry import Box


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Video(_Record):
    """One video file as probed: ``name`` is the file name; sizes are of the picture as a player shows it, in pixels.

    ``domain`` (one of MedicalNarratives' twelve) and its score are known only if an encoder was given.
    """

    name: str
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    fps: float = Field(gt=0)
    duration_s: float = Field(gt=0)
    domain: str | None = None
    domain_score: float | None = Field(default=None, ge=0, le=1)


class TracePoint(_Record):
    """Cursor position at a time; ``confidence`` 0..1. On disk ``[t_s, x, y, confidence]``. No point: not visible."""

    t_s: float
    x: float = Field(ge=0, le=1)
    y: float = Field(ge=0, le=1)
    confidence: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return dict(zip(("t_s", "x", "y", "confidence"), value, strict=False))
        return value

    @model_serializer
    def _to_list(self) -> list[float]:
        return [round(self.t_s, 3), round(self.x, 4), round(self.y, 4), round(self.confidence, 3)]


class Word(_Record):
    """One spoken word with its times. ``confidence`` 0..1 is the recogniser's, where it gives one."""

    start_s: float = Field(ge=0)
    end_s: float
    text: str = Field(min_length=1)
    confidence: float | None = Field(default=None, ge=0, le=1)


class Utterance(_Record):
    """A spoken sentence or phrase with its times; ``words`` only where the transcript times every one of them."""

    start_s: float = Field(ge=0)
    end_s: float
    text: str = Field(min_length=1)
    words: tuple[Word, ...] = ()


class Narrative(_Record):
    """A stable chunk with its background image, cursor trace and what was said during it (one line of
    ``narratives.jsonl``).

    ``same_view_as``: id of the video's first chunk with the same view, if it is not this one. ``mpp``: micrometres per
    pixel of the image as its nuclei suggest, with a confidence 0..1; ``magnification``: the objective that the
    narrator names ("transcript") or that fits the nuclei ("nuclei").
    """

    id: str
    video: str
    start_s: float
    end_s: float
    image: str
    crop_px: tuple[int, int, int, int]
    trace: tuple[TracePoint, ...] = ()
    utterances: tuple[Utterance, ...] = ()
    same_view_as: str | None = None
    mpp: float | None = Field(default=None, gt=0)
    mpp_confidence: float | None = Field(default=None, ge=0, le=1)
    magnification: str | None = None
    magnification_from: Literal["transcript", "nuclei"] | None = None


class Phrase(_Record):
    """A piece of a caption and the region of interest it speaks of, if the cursor showed one; ``confidence`` 0..1 in
    its box, where the rule that drew it knows one."""

    text: str
    start_s: float
    end_s: float
    box: Box | None = None
    confidence: float | None = Field(default=None, ge=0, le=1)


class GroundedCaption(_Record):
    """A narrative's text with boxes (one line of ``captions.jsonl``). ``id`` equals the narrative's."""

    id: str
    video: str
    image: str
    crop_px: tuple[int, int, int, int]
    phrases: tuple[Phrase, ...]


class Clue(_Record):
    """A remark that supports a case's diagnosis, when in the video it was made, and in which words."""

    text: str
    time_s: float
    quote: str | None = None


class CaseFacts(_Record):
    """What a whole video says about its case (one line of ``case_facts.jsonl``). ``diagnosis`` is None where none is
    said; ``single_case`` is False where the video speaks of several patients or specimens. ``rejected``: what the model
    told and the talk does not bear out, each as a reason to drop it."""

    video: str
    diagnosis: str | None = None
    single_case: bool = True
    clues: tuple[Clue, ...] = ()
    rejected: tuple[str, ...] = ()
    prompt_hash: str | None = None
    teacher: str | None = None


class Dropped(_Record):
    """Something that did not become a sample: where it came from, why, and the teacher's reply as it came."""

    id: str
    reason: str
    raw: str | None = None
