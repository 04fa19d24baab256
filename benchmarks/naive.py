"""The way the papers went from a narrated video to boxes, as the baseline of ``narrate``'s benchmark.

    python benchmarks/naive.py --videos DIR --out DIR [--seed N]

Every frame is decoded by OpenCV. A frame is stable if the structural similarity of a random 64x64 crop to the frame
before is above 0.98; runs of such frames of 3 s and more are chunks. All their frames are stacked, the median of each
pixel is the background, and the cursor of a frame is the place of its largest difference to it. Boxes come from the
published clustering (``medllava.instruct_gen.clusters``). Files and records are those of ``narrate``.

Published are the similarity, the median, the difference, the maximum and the clustering. The cursor's threshold and the
bridging of short gaps are not; they are chosen here so that the clips with known truth come out well. Memory grows with
the length of a chunk: this is for short clips.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from medllava.instruct_gen.grounding import grounded_phrases
from medllava.instruct_gen.narrate import find_videos
from medllava.instruct_gen.records import GroundedCaption, Narrative, TracePoint
from medllava.instruct_gen.speech import find_transcript, read_transcript
from medllava.jsonl import write_records

Image = npt.NDArray[np.uint8]

CROP, SIMILAR, SHORTEST_S = 64, 0.98, 3.0
"""As published: side of the crop, similarity of frames at rest, shortest chunk."""

BRIDGED_S = 0.5
"""Runs are not ended by frames that differ for at most so long: a cursor that crosses the crop would end them."""

THRESHOLD = 15
"""Difference in grey levels up to which nothing is taken for a cursor."""

BAND = 32
"""Rows of the picture whose median is taken at once: the same values in less memory."""


@dataclass
class Chunk:
    """A stable run: times of its frames, and those that passed the test, kept until their median is known."""

    times_s: list[float] = field(default_factory=list)
    frames: list[Image] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    work(arguments.videos, arguments.out, arguments.seed)
    return 0


def work(videos: Path, out: Path, seed: int = 0) -> None:
    """All videos of a folder into ``out/narratives.jsonl``, ``out/captions.jsonl`` and ``out/frames``."""
    cv2.setNumThreads(1)
    (out / "frames").mkdir(parents=True, exist_ok=True)
    narratives, captions = [], []
    for video in find_videos(videos):
        said = read_transcript(find_transcript(video)).utterances
        for number, chunk in enumerate(stable_chunks(video, random.Random(f"{seed}/{video.name}"))):
            background = median(chunk.frames)
            identity = f"{video.stem}-{number:03d}"
            cv2.imwrite(str(out / "frames" / f"{identity}.png"), background)
            height, width = background.shape[:2]
            common: dict[str, Any] = {
                "id": identity, "video": video.name, "image": f"frames/{identity}.png",
                "crop_px": (0, 0, width, height),
            }
            start_s, end_s = chunk.times_s[0], chunk.times_s[-1]
            trace = list(cursor(chunk, background))
            mine = [
                one for one in said
                if min(one.end_s, end_s) - max(one.start_s, start_s) >= 0.5 * (one.end_s - one.start_s)
            ]
            narratives.append(
                Narrative(start_s=start_s, end_s=end_s, trace=tuple(trace), utterances=tuple(mine), **common)
            )
            phrases, _ = grounded_phrases(mine, trace, (width, height), "paper", seed)
            if phrases:
                captions.append(GroundedCaption(phrases=tuple(phrases), **common))
    write_records(out / "narratives.jsonl", narratives)
    write_records(out / "captions.jsonl", captions)


def stable_chunks(video: Path, rng: random.Random) -> Iterator[Chunk]:
    """Runs of at least SHORTEST_S of frames that are like the one before."""
    reader = cv2.VideoCapture(str(video))
    rate = reader.get(cv2.CAP_PROP_FPS) or 25.0
    before: Image | None = None
    chunk, rest_s, number = Chunk(), -1.0, 0
    while True:
        found, frame = reader.read()
        if not found:
            break
        time_s, number = number / rate, number + 1
        if before is not None and is_alike(before, frame, rng):
            chunk.times_s.append(time_s)
            chunk.frames.append(frame)
            rest_s = time_s
        elif chunk.times_s and time_s - rest_s > BRIDGED_S:
            if chunk.times_s[-1] - chunk.times_s[0] >= SHORTEST_S:
                yield chunk
            chunk = Chunk()
        before = frame
    if chunk.times_s and chunk.times_s[-1] - chunk.times_s[0] >= SHORTEST_S:
        yield chunk
    reader.release()


def is_alike(before: Image, frame: Image, rng: random.Random) -> bool:
    """Structural similarity above SIMILAR on one random crop, its corner in the top-left quadrant as published."""
    height, width = frame.shape[:2]
    y, x = rng.randrange(max(1, (height - CROP) // 2)), rng.randrange(max(1, (width - CROP) // 2))
    a, b = (
        cv2.cvtColor(one[y : y + CROP, x : x + CROP], cv2.COLOR_BGR2GRAY).astype(np.float32) for one in (before, frame)
    )
    return similarity(a, b) > SIMILAR


def similarity(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    """Mean structural similarity (Wang et al. 2004) of two grey pictures in windows of 7 x 7."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b, square_a, square_b, product = (cv2.blur(one, (7, 7)) for one in (a, b, a * a, b * b, a * b))
    var_a, var_b, both = square_a - mean_a**2, square_b - mean_b**2, product - mean_a * mean_b
    top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    inner = (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))[3:-3, 3:-3]
    return float(inner.mean())


def median(frames: list[Image]) -> Image:
    """Median of each pixel over all frames."""
    merged = np.empty_like(frames[0])
    for top in range(0, len(merged), BAND):
        merged[top : top + BAND] = np.median(np.stack([frame[top : top + BAND] for frame in frames]), axis=0)
    return merged


def cursor(chunk: Chunk, background: Image) -> Iterator[TracePoint]:
    """Where each frame differs most from the background; none where it does not differ by more than THRESHOLD."""
    grey = cv2.cvtColor(background, cv2.COLOR_BGR2GRAY)
    height, width = grey.shape
    for time_s, frame in zip(chunk.times_s, chunk.frames, strict=True):
        difference = cv2.absdiff(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), grey)
        _, largest, _, (x, y) = cv2.minMaxLoc(difference)
        if largest > THRESHOLD:
            yield TracePoint(t_s=time_s, x=(x + 0.5) / width, y=(y + 0.5) / height)


if __name__ == "__main__":
    sys.exit(main())
