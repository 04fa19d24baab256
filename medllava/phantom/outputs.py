"""The files of one case: video, transcripts, and the truth about all of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from medllava.errors import ConfigError
from medllava.geometry import box_from_pixels
from medllava.jsonl import atomic_write, read_json, write_json
from medllava.phantom.cursor import track
from medllava.phantom.session import Line, Session, Settings, plan_session, video_name
from medllava.phantom.transcript import to_srt, to_words
from medllava.processes import end_with_parent


def is_done(out: Path, seed: int, index: int, settings: Settings) -> bool:
    """Whether a case is finished. Raises ConfigError if it was made with other settings."""
    path = out / f"{video_name(seed, index)}.truth.json"
    if not path.exists():
        return False
    made_with = read_json(path).get("settings")
    # A case made before an option existed was made without it.
    if made_with is None or {**asdict(Settings()), **made_with} != asdict(settings):
        raise ConfigError(
            f"{path}: was made with {made_with}, now asked for {asdict(settings)}; choose another --out or --seed"
        )
    return True


def start_worker(parent: int) -> None:
    """Set up a worker process: its drawing library on one core, as the workers share the others, and its end with the
    end of ``parent``."""
    import cv2

    end_with_parent(parent)
    cv2.setNumThreads(1)


def make_case(out: Path, seed: int, index: int, settings: Settings) -> str:
    """Plan, render and write one case; the truth comes last, so its presence means that the case is whole. If that
    fails (a full disk), nothing of the case is left.

    Returns the video's file name.
    """
    # Imported here because it needs the 'gen' extra; a plan and its truth do not.
    from medllava.phantom.render import render_frames
    from medllava.phantom.video import write_h264

    session = plan_session(seed, index, settings)
    temporary = out / f".{session.name}.mp4.part"
    video, cues, words = (out / f"{session.name}{ending}" for ending in (".mp4", ".srt", ".words.json"))
    try:
        write_h264(temporary, render_frames(session), settings.width, settings.height, settings.fps)
        temporary.replace(video)
        with atomic_write(cues) as file:
            file.write(to_srt(session.lines))
        write_json(words, to_words(session.lines))
        write_json(out / f"{session.name}.truth.json", describe_truth(session))
    except BaseException:
        for path in (temporary, video, cues, words):
            path.unlink(missing_ok=True)
        raise
    return video.name


def describe_truth(session: Session) -> dict[str, Any]:
    """Everything known about a case. Times in seconds, boxes 0..1 of the frame, ``_px`` in pixels of the frame."""
    settings, fps = session.settings, session.settings.fps
    spans = [(d.start / fps, d.end / fps) for d in session.dwells]
    return {
        "video": f"{session.name}.mp4",
        "seed": session.seed,
        "index": session.index,
        "settings": asdict(settings),
        **({"questions": [asdict(asked) for asked in session.asked]} if settings.questions else {}),
        "fps": fps,
        "frames": session.frames,
        "width": settings.width,
        "height": settings.height,
        "cursor": session.cursor,
        "cursor_size_px": session.cursor_size_px,
        "webcam_px": list(session.webcam_px) if session.webcam_px else None,
        "diagnosis": session.diagnosis,
        "clues": [
            {"kind": line.finding.kind, "text": line.text, "time_s": line.start_s}
            for line in session.lines
            if line.role == "clue" and line.finding
        ],
        "static": [[0.0, spans[0][0], "title"], *([*span, "tissue"] for span in spans)],
        "fields": [
            {
                "start_s": span[0],
                "end_s": span[1],
                "magnification": dwell.magnification,
                "findings": [{"kind": f.kind, "box": _box(f.box_px, settings)} for f in dwell.findings],
            }
            for dwell, span in zip(session.dwells, spans, strict=True)
        ],
        "utterances": [_utterance(line, settings) for line in session.lines],
        "cursor_xy_px": [list(p) if p else None for p in track(session.gestures, session.frames, fps)],
    }


def _utterance(line: Line, settings: Settings) -> dict[str, Any]:
    return {
        "start": line.start_s,
        "end": line.end_s,
        "text": line.text,
        "grounded": line.finding is not None,
        "box": _box(line.finding.box_px, settings) if line.finding else None,
        "kind": line.finding.kind if line.finding else None,
        "role": line.role,
    }


def _box(box_px: tuple[float, float, float, float], settings: Settings) -> list[float]:
    box = box_from_pixels(*box_px, settings.width, settings.height)
    assert box is not None, "sample_field keeps findings inside the field"
    return [round(v, 5) for v in box.as_tuple()]
