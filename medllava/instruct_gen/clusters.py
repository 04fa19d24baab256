"""Boxes the way Quilt-LLaVA made them: K-means over a chunk's whole cursor trace, clusters matched to speech by time.

This is the published rule in effect, weak points included, for comparison with our own (:mod:`.grounding`):

1. Features of a point are ``(x e^-0.2t, y e^-0.2t)``, t in seconds from the video's start: late points shrink together.
2. The number of clusters follows from the number of words of the caption: up to 10, 40, 60 and more give 1, 2, 3 and 4.
3. In each cluster, points beyond 1.5 interquartile ranges (in whole pixels) go, first in x, then in y of what is left;
   the box spans the rest. A box below 2 % or above 70 % of the image is dropped with its cluster.
4. An utterance belongs to the cluster whose mean time is nearest to the utterance's end.
5. A cluster of at most three words joins the one nearest to it in mean time, whose box stays as it is.
6. Without a cluster, the caption has no box. Coordinates are cut to 0..1 and written with two decimals.

Three inputs that stop the original with an error are given what the rule means: fewer points than clusters (as many
clusters as points), no utterance (no box) and clusters that are all too small (the last one is left as it is).
The original draws its starts unseeded; here a seed decides them, so that a run can be repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medllava.errors import MissingExtraError

Floats = npt.NDArray[np.float64]
Corners = tuple[float, float, float, float]

DECAY = 0.2
"""Rate, per second, at which coordinates shrink."""

WORDS = (10, 40, 60)
"""Captions with more words than each of these get one more cluster."""

SMALLEST_AREA, LARGEST_AREA = 0.02, 0.7
"""Share of the image that a cluster's box may cover."""

FEW_WORDS = 3
"""Clusters of at most this many words join another."""


@dataclass(frozen=True)
class Run:
    """Utterances in a row that share a cluster: numbers of the utterances, and the corners (x1, y1, x2, y2) in 0..1
    with two decimals. ``corners`` is None where the whole trace gave no cluster."""

    utterances: tuple[int, ...]
    corners: Corners | None


def published_runs(
    points: Floats, ends_s: Sequence[float], words: Sequence[int], size: tuple[int, int], *,
    caption_words: int | None = None, seed: int = 0, starts: int | None = None,
) -> list[Run]:
    """Utterances with the boxes of the published rule.

    ``points``: (points, 3), of t in seconds and x, y in 0..1 (values outside are allowed). ``ends_s`` and ``words``:
    end and number of words of each utterance, in order of time. ``size``: width and height of the image in pixels.
    ``caption_words``: words of the caption if it is not the utterances' own text. ``starts``: starts of K-means, of
    which the best counts (default, as published: as many as there are clusters). Raises MissingExtraError without
    scikit-learn.
    """
    if not len(ends_s):
        return []
    clusters = number_of_clusters(sum(words) if caption_words is None else caption_words)
    kept = _clusters(points, clusters, size, seed, starts) if len(points) else []
    if not kept:
        return [Run(tuple(range(len(ends_s))), None)]
    mean_s = np.array([mean for mean, _ in kept])
    member = [int(np.argmin(np.abs(mean_s - end_s))) for end_s in ends_s]
    _merge_few_words(member, words, mean_s)
    firsts = [n for n in range(len(member)) if n == 0 or member[n] != member[n - 1]]
    return [
        Run(tuple(range(first, last)), kept[member[first]][1])
        for first, last in zip(firsts, [*firsts[1:], len(member)], strict=True)
    ]


def number_of_clusters(words: int) -> int:
    """Clusters for a caption of so many words: 1 to 4."""
    return 1 + sum(words > limit for limit in WORDS)


def inline_text(runs: Sequence[Run], utterances: Sequence[str], caption: str | None = None) -> str:
    """The caption with its boxes as published: ``text [x1, y1, x2, y2], text [x1, y1, x2, y2]``.

    ``caption``: what to write where there is no box at all (default: the utterances).
    """
    if caption is not None and all(run.corners is None for run in runs):
        return caption
    pieces = []
    for run in runs:
        text = " ".join(utterances[number] for number in run.utterances)
        pieces.append(text if run.corners is None else f"{text} {list(run.corners)}")
    return ", ".join(pieces)


def published_text(row: Mapping[str, Any], *, seed: int = 0, starts: int | None = None) -> str:
    """The caption with boxes of one row in the layout that the published code reads: ``image_size`` [width, height],
    ``traces`` [{x, y, t}], ``utterances`` [{end_time, utterance}], ``caption``."""
    points = np.array([(p["t"], p["x"], p["y"]) for p in row["traces"]], np.float64).reshape(-1, 3)
    said = [str(utterance["utterance"]) for utterance in row["utterances"]]
    runs = published_runs(
        points, [utterance["end_time"] for utterance in row["utterances"]], [len(text.split()) for text in said],
        tuple(row["image_size"]), caption_words=len(row["caption"].split()), seed=seed, starts=starts,
    )
    return inline_text(runs, said, row["caption"])


def _clusters(
    points: Floats, wanted: int, size: tuple[int, int], seed: int, starts: int | None
) -> list[tuple[float, Corners]]:
    """(mean time, corners) of each cluster whose box is neither too small nor too large."""
    t_s, xy = points[:, 0], points[:, 1:]
    labels = _labels(xy * np.exp(-DECAY * t_s)[:, None], wanted, seed, starts)
    kept = []
    for label in range(labels.max() + 1):
        mine = labels == label
        if not mine.any():
            continue
        pixels = (xy * size).astype(np.int64)
        usual = np.flatnonzero(mine)
        for axis in (0, 1):
            usual = usual[_is_usual(pixels[usual, axis])]
        area = float(np.prod(np.ptp(pixels[usual], axis=0))) / (size[0] * size[1])
        if SMALLEST_AREA <= area <= LARGEST_AREA:
            corners = np.clip(np.concatenate([xy[usual].min(0), xy[usual].max(0)]), 0.0, 1.0)
            # NumPy's rounding, not Python's: they differ where a value is just above a half.
            x1, y1, x2, y2 = np.round(corners, 2).tolist()
            kept.append((float(t_s[mine].mean()), (x1, y1, x2, y2)))
    return kept


def _labels(features: Floats, wanted: int, seed: int, starts: int | None) -> npt.NDArray[np.int64]:
    try:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "gen", error) from error
    clusters = min(wanted, len(np.unique(features, axis=0)))
    # One thread: a few hundred points are too few to share, and sums in another order could differ.
    with threadpool_limits(1):
        means = KMeans(clusters, n_init=starts or clusters, random_state=seed)
        return np.asarray(means.fit_predict(features), dtype=np.int64)


def _is_usual(values: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    low, high = np.quantile(values, (0.25, 0.75))
    reach = 1.5 * (high - low)
    return np.asarray((values >= low - reach) & (values <= high + reach))


def _merge_few_words(member: list[int], words: Sequence[int], mean_s: Floats) -> None:
    """Change ``member`` (cluster of each utterance): clusters of few words join the nearest other, in order of time."""
    left = set(range(len(mean_s)))
    for cluster in np.argsort(mean_s, kind="stable").tolist():
        said = sum(count for count, whose in zip(words, member, strict=True) if whose == cluster)
        if not 0 < said <= FEW_WORDS or left == {cluster}:
            continue
        left.discard(cluster)
        target = min(left, key=lambda other: abs(mean_s[other] - mean_s[cluster]))
        member[:] = [target if whose == cluster else whose for whose in member]
