"""The plan of one narrated case: which fields are shown when, what is said, and where the pointer goes.

A plan is made from (seed, index) alone and holds no pixels; :mod:`medllava.phantom.render` draws it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from medllava.geometry import Point
from medllava.phantom import narration
from medllava.phantom.cursor import STYLES, Gesture, Rest, sample_pointing, sample_size
from medllava.phantom.grammar import DIAGNOSES, FINDINGS
from medllava.phantom.tissue import Finding, sample_field

FIELDS_PER_SLIDE = 12
"""A longer case goes on to a next slide, so that memory does not grow with the length of the video."""
SLIDE_FIELD_WIDTH = 640
"""Widest field in slide pixels; larger frames show it enlarged, as a screen recording of a viewer does."""
SHORTEST_DWELL_S = 3.2

_GAP = 1.12
"""Pitch of the fields on the slide in field sizes: two windows never share tissue."""
_OBJECTIVE = 20
_ZOOMS = (1.0, 1.0, 1.0, 1.5)
_ASIDE_SHARE = 0.15
_LEAD_S = 0.3
"""The pointer is at a finding this long before its name is spoken."""

_QUESTION_SHARE = 0.6
"""Of the fields of a case with questions, the share in which one is asked."""

Role = Literal["title", "finding", "clue", "aside", "diagnosis", "question", "answer"]


@dataclass(frozen=True)
class Settings:
    """What a person chooses about the videos. ``webcam`` None: about one video in eight has a talking head.
    ``questions``: the narrator asks questions, and answers most of them."""

    fields: int = 12
    width: int = 320
    height: int = 240
    fps: int = 8
    webcam: bool | None = None
    noise: float = 0.0
    questions: bool = False


@dataclass(frozen=True)
class Line:
    """One utterance. ``finding`` is what the pointer shows meanwhile, in frame pixels; None: nothing on screen."""

    start_s: float
    end_s: float
    text: str
    role: Role
    finding: Finding | None = None


@dataclass(frozen=True)
class Asked:
    """A question of the narrator and the sentence that answers it, or None if nothing does."""

    question: str
    answer: str | None
    type: Literal["open", "closed"]
    image_dependent: bool
    time_s: float


@dataclass(frozen=True)
class Dwell:
    """The slide held still. Frames ``start`` to ``end`` (exclusive); ``window`` (x, y, w, h) in slide pixels;
    ``findings`` in frame pixels."""

    start: int
    end: int
    slide: int
    window: tuple[int, int, int, int]
    magnification: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Session:
    """A whole case. ``slides`` holds the size of each slide in pixels; frames before the first dwell show the title."""

    name: str
    seed: int
    index: int
    settings: Settings
    diagnosis: str
    slides: tuple[tuple[int, int], ...]
    dwells: tuple[Dwell, ...]
    lines: tuple[Line, ...]
    asked: tuple[Asked, ...]
    gestures: tuple[Gesture, ...]
    cursor: str
    cursor_size_px: int
    webcam_px: tuple[int, int, int, int] | None

    @property
    def frames(self) -> int:
        return self.dwells[-1].end


def video_name(seed: int, index: int) -> str:
    """Name of a video's files without their ending."""
    return f"phantom-{seed}-{index:04d}"


def plan_session(seed: int, index: int, settings: Settings) -> Session:
    """The case ``index`` of ``seed``: the same for the same numbers and settings, whatever else is made."""
    rng = np.random.default_rng([seed, index])
    diagnosis = narration.pick(rng, tuple(DIAGNOSES))
    has_webcam = rng.random() < 0.125 if settings.webcam is None else settings.webcam
    webcam_px = _sample_webcam(rng, settings) if has_webcam else None
    fields = [
        sample_field(rng, settings.width, settings.height, keep_out=webcam_px) for _ in range(settings.fields)
    ]
    fields = _with_clues(rng, fields, DIAGNOSES[diagnosis])
    slides, windows = _lay_out(rng, settings)
    style = narration.pick(rng, STYLES)
    # Questions have their own draws: with and without them a case has the same fields.
    curious = np.random.default_rng([seed, index, 1]) if settings.questions else None
    speaker = _Speaker(rng, settings, webcam_px, curious)
    speaker.open()
    clues = _choose_clues(rng, fields, DIAGNOSES[diagnosis])
    dwells: list[Dwell] = []
    for number, (findings, (slide, window)) in enumerate(zip(fields, windows, strict=True)):
        if dwells and dwells[-1].slide == slide:
            speaker.pan()
        start = speaker.frame
        last = number == len(fields) - 1
        speaker.dwell(findings, [f for n, f in clues if n == number], diagnosis if last else None)
        zoom = round(_slide_field(settings)[0] / window[2], 1)
        magnification = f"{_OBJECTIVE * zoom:g}x"
        dwells.append(Dwell(start, speaker.frame, slide, window, magnification, tuple(findings)))
    return Session(
        name=video_name(seed, index), seed=seed, index=index, settings=settings, diagnosis=diagnosis,
        slides=slides, dwells=tuple(dwells), lines=tuple(speaker.lines), asked=tuple(speaker.asked),
        gestures=tuple(speaker.gestures), cursor=style, cursor_size_px=sample_size(rng, style, settings.height),
        webcam_px=webcam_px,
    )


class _Speaker:
    """Keeps the clock of a case while lines and gestures are added one after another."""

    def __init__(
        self, rng: np.random.Generator, settings: Settings, webcam_px: tuple[int, int, int, int] | None,
        curious: np.random.Generator | None = None,
    ) -> None:
        self.rng, self.settings, self.webcam_px, self.curious = rng, settings, webcam_px, curious
        self.asked: list[Asked] = []
        self.frame = 0
        self.lines: list[Line] = []
        self.gestures: list[Gesture] = []
        self.hides_when_moving = rng.random() < 0.5

    def open(self) -> None:
        """The title slide, with a word of welcome and no pointer."""
        end = self._say(0.3, narration.welcome(self.rng), "title")
        self._advance(end + self.rng.uniform(0.2, 0.6))
        self.gestures.append(Rest(0.0, self._now(), None))

    def pan(self) -> None:
        start = self._now()
        self._advance(start + self.rng.uniform(0.45, 0.75))
        if self.hides_when_moving:
            self.gestures.append(Rest(start, self._now(), None))

    def dwell(self, findings: list[Finding], clues: list[Finding], diagnosis: str | None) -> None:
        """Name every finding once, in any order, with an aside here and there; then the diagnosis if it is given."""
        start = self._now()
        t = start + self.rng.uniform(_LEAD_S + 0.05, 0.55)
        order = [findings[i] for i in self.rng.permutation(len(findings))]
        aside_before = int(self.rng.integers(len(order) + 1)) if self.rng.random() < _ASIDE_SHARE else -1
        sort = self._sort_of_question()
        for number, finding in enumerate(order):
            if number == aside_before:
                t = self._digress(t, findings)
            if number == 0 and sort == "place":
                t = self._ask_place(t, finding)
            t = self._show(t, finding, finding in clues)
            if number == 0 and self.asked and self.asked[-1].answer == "":
                self.asked[-1] = replace(self.asked[-1], answer=self.lines[-1].text)
        if aside_before == len(order):
            t = self._digress(t, findings)
        t = self._ask(t, sort, findings)
        if diagnosis is not None:
            t = self._say(t, narration.tell_diagnosis(self.rng, diagnosis), "diagnosis") + self._pause()
        end = self.lines[-1].end_s + self.rng.uniform(0.1, 0.3)
        self._advance(max(end, start + SHORTEST_DWELL_S))

    def _show(self, t: float, finding: Finding, is_clue: bool) -> float:
        quadrant = _quadrant(finding, self.settings)
        text = (
            narration.name_clue(self.rng, finding.kind)
            if is_clue
            else narration.name_finding(self.rng, finding.kind, quadrant)
        )
        end = self._say(t, text, "clue" if is_clue else "finding", finding)
        stop = end + self.rng.uniform(-0.1, 0.0)
        self.gestures.append(sample_pointing(self.rng, t - _LEAD_S, stop, finding.box_px))
        return end + self._pause()

    def _sort_of_question(self) -> str | None:
        """Which sort of question is asked in a field; None: none."""
        if self.curious is None or self.curious.random() >= _QUESTION_SHARE:
            return None
        return narration.pick(self.curious, ("place", "place", "presence", "presence", "general", "in vain"))

    def _ask_place(self, t: float, finding: Finding) -> float:
        """Ask what lies somewhere; the finding that is named next is the answer."""
        assert self.curious is not None
        text = narration.ask_place(self.curious, _quadrant(finding, self.settings))
        self.asked.append(Asked(text, "", "open", True, round(t, 3)))
        return self._say(t, text, "question") + self._pause()

    def _ask(self, t: float, sort: str | None, findings: list[Finding]) -> float:
        """Ask what can be answered in words, while the pointer stays where it is."""
        if self.curious is None or sort in (None, "place"):
            return t
        if sort == "in vain":
            self.asked.append(Asked(text := narration.ask_in_vain(self.curious), None, "open", False, round(t, 3)))
            return self._say(t, text, "question") + self._pause()
        if sort == "general":
            text, answer = narration.ask_general(self.curious)
        else:
            here = tuple(dict.fromkeys(finding.kind for finding in findings))
            absent = tuple(kind for kind in FINDINGS if kind not in here)
            present = bool(self.curious.random() < 0.5)
            kind = narration.pick(self.curious, here if present else absent)
            text, answer = narration.ask_presence(self.curious, kind, present)
        closed = answer.startswith(("Yes, ", "No, "))
        self.asked.append(Asked(text, answer, "closed" if closed else "open", sort == "presence", round(t, 3)))
        t = self._say(t, text, "question") + self._pause()
        return self._say(t, answer, "answer") + self._pause()

    def _digress(self, t: float, findings: list[Finding]) -> float:
        end = self._say(t, narration.say_aside(self.rng), "aside", shortest=1.4)
        # The pointer stays where it was, is put aside, or leaves the screen.
        manner = self.rng.integers(3)
        if manner:
            xy = self._free_place(findings) if manner == 1 else None
            self.gestures.append(Rest(t - _LEAD_S / 2, end, xy))
        return end + self._pause()

    def _say(self, t: float, text: str, role: Role, finding: Finding | None = None, shortest: float = 2.0) -> float:
        end = t + narration.speaking_s(self.rng, text, shortest)
        self.lines.append(Line(round(t, 3), round(end, 3), text, role, finding))
        return end

    def _pause(self) -> float:
        return float(self.rng.uniform(0.45, 0.6))

    def _free_place(self, findings: list[Finding]) -> tuple[float, float] | None:
        """A place to put the pointer that covers no finding and no inset, or None if none was found."""
        boxes = [f.box_px for f in findings] + ([self.webcam_px] if self.webcam_px else [])
        for _ in range(20):
            x, y = (float(self.rng.uniform(0.05, 0.95)) * side for side in (self.settings.width, self.settings.height))
            if not any(box[0] <= x <= box[2] and box[1] <= y <= box[3] for box in boxes):
                return x, y
        return None

    def _now(self) -> float:
        return self.frame / self.settings.fps

    def _advance(self, t_s: float) -> None:
        """Move the clock to the first frame at or after ``t_s``."""
        self.frame = max(self.frame + 1, math.ceil(t_s * self.settings.fps))


def _quadrant(finding: Finding, settings: Settings) -> str:
    x0, y0, x1, y1 = finding.box_px
    return Point(x=(x0 + x1) / 2 / settings.width, y=(y0 + y1) / 2 / settings.height).quadrant()


def _sample_webcam(rng: np.random.Generator, settings: Settings) -> tuple[int, int, int, int]:
    """An inset in a corner, on even pixels (chroma has half the resolution)."""
    w, h = (round(share * size / 2) * 2 for share, size in ((0.18, settings.width), (0.2, settings.height)))
    x = 0 if rng.random() < 0.5 else settings.width - w
    y = 0 if rng.random() < 0.5 else settings.height - h
    return x, y, x + w, y + h


def _with_clues(
    rng: np.random.Generator, fields: list[list[Finding]], clues: tuple[str, ...]
) -> list[list[Finding]]:
    """The fields with every clue somewhere: a clue that chance left out takes the place of another finding.

    In a case of a dozen fields chance leaves one out about once in fifty cases, so fields stay next to uniform. A
    case too short to hold all clues holds as many as fit.
    """
    fields = [list(findings) for findings in fields]
    for clue in clues:
        if any(f.kind == clue for findings in fields for f in findings):
            continue
        places = [(n, i) for n, findings in enumerate(fields) for i, f in enumerate(findings) if f.kind not in clues]
        if places:
            n, i = narration.pick(rng, places)
            fields[n][i] = Finding(clue, fields[n][i].box_px)
    return fields


def _choose_clues(
    rng: np.random.Generator, fields: list[list[Finding]], clues: tuple[str, ...]
) -> list[tuple[int, Finding]]:
    """For each clue the one (field number, finding) at which the narrator calls it a clue."""
    chosen = []
    for clue in clues:
        places = [(n, f) for n, findings in enumerate(fields) for f in findings if f.kind == clue]
        if places:
            chosen.append(narration.pick(rng, places))
    return chosen


def _slide_field(settings: Settings) -> tuple[float, float]:
    """Size in slide pixels of a field at the objective's own magnification."""
    width = min(settings.width, SLIDE_FIELD_WIDTH)
    return width, width * settings.height / settings.width


def _lay_out(
    rng: np.random.Generator, settings: Settings
) -> tuple[tuple[tuple[int, int], ...], list[tuple[int, tuple[int, int, int, int]]]]:
    """Slide sizes, and for each field its slide and window: rows read like a meander, so pans are short."""
    field_width, field_height = _slide_field(settings)
    slides: list[tuple[int, int]] = []
    windows: list[tuple[int, tuple[int, int, int, int]]] = []
    for first in range(0, settings.fields, FIELDS_PER_SLIDE):
        count = min(FIELDS_PER_SLIDE, settings.fields - first)
        columns = math.ceil(math.sqrt(count))
        rows = math.ceil(count / columns)
        for number in range(count):
            row, column = divmod(number, columns)
            column = columns - 1 - column if row % 2 else column
            zoom = narration.pick(rng, _ZOOMS)
            w, h = round(field_width / zoom), round(field_height / zoom)
            # A zoomed window lies anywhere in its cell.
            x = column * _GAP * field_width + rng.random() * (field_width - w)
            y = row * _GAP * field_height + rng.random() * (field_height - h)
            windows.append((len(slides), (int(x), int(y), w, h)))
        slides.append((
            math.ceil((1 + (columns - 1) * _GAP) * field_width), math.ceil((1 + (rows - 1) * _GAP) * field_height)
        ))
    return tuple(slides), windows
