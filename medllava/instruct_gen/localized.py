"""Narratives in two published layouts: Localized Narratives (Pont-Tuset et al. 2020) and MedicalNarratives (Ikezogwo et
al. 2025).

Both hold what was said with times and the trace of the cursor. Times here count from the start of the chunk, places are
0..1 of the chunk's picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from medllava.instruct_gen.records import GroundedCaption, Narrative, TracePoint, Utterance, Video

HIDDEN_S = 0.45
"""A trace with a gap longer than this was interrupted: the cursor was hidden, and a new segment begins."""


def localized_narrative(narrative: Narrative, dataset_id: str, annotator_id: int) -> dict[str, Any]:
    """One line of a Localized Narratives file, with its seven keys and no other (their reader refuses more).

    ``voice_recording`` names the video and the seconds in it as a media fragment: ``talk.mp4#t=12.5,40``.
    """
    return {
        "dataset_id": dataset_id,
        "image_id": narrative.id,
        "annotator_id": annotator_id,
        "caption": " ".join(utterance.text for utterance in narrative.utterances),
        "timed_caption": timed_words(narrative),
        "traces": segments(narrative),
        "voice_recording": f"{narrative.video}#t={narrative.start_s:g},{narrative.end_s:g}",
    }


def medical_narrative(
    narrative: Narrative, caption: GroundedCaption, video: Video | None, siblings: Sequence[Narrative], domain: str
) -> dict[str, Any]:
    """One record with the keys of the MedicalNarratives data card, as far as a narrative knows them, and three of ours:
    ``timed_caption``, ``traces`` and ``boxes``.

    ``siblings``: all narratives of the same video in order, this one among them. Unknown here, so left out:
    ``index`` (position in the whole data set, set by the caller), link and channel of the video.
    """
    words = sum(len(utterance.text.split()) for utterance in narrative.utterances)
    spoken_s = sum(utterance.end_s - utterance.start_s for utterance in narrative.utterances)
    numbers = {sibling.id: number for number, sibling in enumerate(siblings)}
    return {
        "uid": narrative.id,
        "image": narrative.image,
        "text": [utterance.text for utterance in narrative.utterances],
        "clip_name": narrative.video,
        "med_num": len(narrative.utterances),
        "video": True,
        "article": False,
        "sample_index": numbers[narrative.id],
        "domains": str([domain]),
        "sample_uids": numbers,
        "sample_count": len(siblings),
        "multidomain": False,
        "multisample": len(siblings) > 1,
        "video_id": narrative.video.rsplit(".", 1)[0],
        "duration": video.duration_s if video else None,
        "fps": video.fps if video else None,
        "spw": round(spoken_s / max(words, 1), 4),
        "pair_chunk_time": round(narrative.end_s - narrative.start_s, 3),
        "chunk_times": [[sibling.start_s, sibling.end_s] for sibling in siblings],
        "roi_chunk_times": [[phrase.start_s, phrase.end_s] for phrase in caption.phrases if phrase.box],
        "timed_caption": timed_words(narrative),
        "traces": segments(narrative),
        "boxes": [
            {
                "text": phrase.text, "box": phrase.box.model_dump(), "confidence": phrase.confidence,
                "start_time": _since(narrative, phrase.start_s), "end_time": _since(narrative, phrase.end_s),
            }
            for phrase in caption.phrases if phrase.box
        ],
    }


def timed_words(narrative: Narrative) -> list[dict[str, Any]]:
    """Each word as ``{utterance, start_time, end_time}``; where the transcript has no times of words, an utterance's
    time is shared out evenly among its words. Speech before or after the chunk counts as at its start or end."""
    return [
        {"utterance": text, "start_time": _since(narrative, start_s), "end_time": _since(narrative, end_s)}
        for utterance in narrative.utterances
        for text, start_s, end_s in _words(utterance)
    ]


def segments(narrative: Narrative) -> list[list[dict[str, float]]]:
    """The trace as lists of ``{x, y, t}``, a new one after each spell without a cursor."""
    found: list[list[TracePoint]] = [[*narrative.trace[:1]]] if narrative.trace else []
    for before, point in pairwise(narrative.trace):
        if point.t_s - before.t_s > HIDDEN_S:
            found.append([])
        found[-1].append(point)
    return [
        [{"x": round(p.x, 4), "y": round(p.y, 4), "t": _since(narrative, p.t_s)} for p in segment] for segment in found
    ]


def _words(utterance: Utterance) -> list[tuple[str, float, float]]:
    if utterance.words:
        return [(word.text, word.start_s, word.end_s) for word in utterance.words]
    texts = utterance.text.split()
    step = (utterance.end_s - utterance.start_s) / max(len(texts), 1)
    return [
        (text, utterance.start_s + number * step, utterance.start_s + (number + 1) * step)
        for number, text in enumerate(texts)
    ]


def _since(narrative: Narrative, time_s: float) -> float:
    """Seconds from the chunk's start, within the chunk."""
    return round(min(max(time_s, narrative.start_s), narrative.end_s) - narrative.start_s, 3)
