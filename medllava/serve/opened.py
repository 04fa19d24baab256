"""A picture that the terminal looks at: a photograph, or a field of a whole slide. No Gradio and no web server."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from medllava import regions
from medllava.errors import ConfigError, DataError, MissingExtraError
from medllava.geometry import Box, Point, out_of_frame, parse_boxes
from medllava.images import load_image
from medllava.serve.session import SENT_SIDE, WHOLE
from medllava.serve.session import Region as MarkedRegion
from medllava.slides import SUFFIXES, Slide, frame_of

ALSO_PHOTOGRAPHS = {".tif", ".tiff"}
MPP_OFF = 1.5
"""How many times off the model's own scale a field is told to be; the web's viewer has the same number."""


class Photograph:
    """A picture that is shown to the model as it is."""

    frame = WHOLE
    mpp: float | None = None

    def __init__(self, image: Image.Image) -> None:
        self.image = image
        self.size = image.size

    def for_model(self, mpp: float | None) -> None:
        """A photograph does not tell its scale."""

    def look_at(self, view: Box) -> None:
        raise ConfigError("a view is chosen on a whole slide; of a photograph, mark a box")

    def aim(self, region: regions.Region | None) -> regions.Region | None:
        return region

    def told(self) -> str:
        return f"{self.size[0]} x {self.size[1]} pixels"


class SlideView:
    """A whole slide, of which a part is shown to the model: ``image`` shows ``frame`` (0..1 of the slide) at ``mpp``.

    It has no more than :data:`~medllava.serve.session.SENT_SIDE` pixels a side. ``size``: of the slide.
    Raises DataError.
    """

    def __init__(self, slide: Slide) -> None:
        self.size = slide.size
        self._slide = slide
        self._view = WHOLE
        self.for_model(None)

    def for_model(self, mpp: float | None) -> None:
        """Read at the scale of the model's training pictures, in µm per pixel; None where it is not known."""
        self._model_mpp = mpp
        self._part: Box | None = None
        self._read(self._view)

    def look_at(self, view: Box) -> None:
        """Choose the part that the next questions are about. Raises DataError if the slide is damaged there."""
        self._read(view)
        self._view = view

    def aim(self, region: regions.Region | None) -> regions.Region | None:
        """Show the view, or where the region is not within it, the region and what is around; returns the region in
        0..1 of what is shown. Raises DataError."""
        seen = region is None or (isinstance(region, Point) and self._view.contains(region))
        self._read(self._view if seen or region is None else frame_of(regions.bounds(region), self._view))
        return as_marked(region).within(self.frame) if region else None

    def _read(self, part: Box) -> None:
        if part == self._part:
            return  # the same picture, so that a conversation brings it once
        longest, scale = SENT_SIDE, self._slide.mpp
        if self._model_mpp and scale:
            pixels = max((part.x2 - part.x1) * self.size[0], (part.y2 - part.y1) * self.size[1])
            longest = min(max(round(pixels * scale / self._model_mpp), 1), SENT_SIDE)
        field = self._slide.field(part, longest)
        self.image, self.frame, self.mpp, self._part = field.image, field.box, field.mpp, part

    def told(self) -> str:
        """What is looked at, in a line."""
        width, height = self.size
        scale = "at an unknown scale"
        if self.mpp:
            scale = f"at {self.mpp:.3g} µm per pixel"
            off = self.mpp / self._model_mpp if self._model_mpp else 1.0
            if not 1 / MPP_OFF <= off <= MPP_OFF:
                scale += f" (the model was trained at {self._model_mpp:.3g})"
        shown = "the whole" if self.frame == WHOLE else str(self.frame.model_dump())
        return f"a slide of {width} x {height} pixels; answers concern {shown}, {scale}"


Opened = Photograph | SlideView


def open_file(path: str) -> Opened:
    """Open a photograph or a slide. Raises DataError, MissingExtraError."""
    if path.startswith(("http://", "https://")):
        raise DataError(f"{path}: an address; this command opens files and fetches nothing: download it first")
    file = Path(path).expanduser()
    if file.suffix.lower() in SUFFIXES and file.is_file():
        try:
            slide = Slide(file)
        except (DataError, MissingExtraError):
            if file.suffix.lower() not in ALSO_PHOTOGRAPHS:
                raise
        else:
            # A TIFF of one level is a photograph, unless it is too large for one.
            if file.suffix.lower() not in ALSO_PHOTOGRAPHS or len(slide.levels) > 1:
                return SlideView(slide)
    return Photograph(load_image(file))


def as_marked(region: regions.Region) -> MarkedRegion:
    """A region as the web chat's session holds it."""
    return MarkedRegion(regions.bounds(region), region if isinstance(region, Point) else None)


def boxes_on(text: str, frame: Box) -> list[list[float]]:
    """The boxes in a text, carried from 0..1 of ``frame`` to 0..1 of the whole."""
    return [list(out_of_frame(box, frame).as_tuple()) for box in parse_boxes(text)]
