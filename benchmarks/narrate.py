"""Benchmark of ``narrate``: how right it is on videos with known truth, and what it costs, beside the papers' way.

    python benchmarks/narrate.py [--clips DIR] [--quick] [--videos 8] [--seed 900] [--out FILE]

The videos are phantoms, one of them once more as video sites encode, and, with --clips, those of a folder of NAME.mp4,
NAME.words.json and NAME.truth.json. The papers' way is benchmarks/naive.py on the same files. CPU seconds and peak
memory are those of whole processes with one worker each. The cost over decoding, which no reader can avoid, is CPU time
(user and system, one thread) against PyAV decoding every frame of the same files, in one process, in turns, medians;
sound, pictures and records are part of it, start-up is not. Its target is for the clips or, without them, for the
phantom as video sites encode; every kind of material has a row of its own.
Long videos are a phantom's packets over and over. --quick takes a minute of small video and tests the benchmark itself.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import av
from material import as_sites_encode, repeated
from record import Cost, arguments, cost_of, cpu_s, finish, paired, row
from truth import figures

NAIVE = "the papers' way"
DECODING = "PyAV decodes every frame"
MIB = 400
"""Most memory that narrate may take, whatever the length of a video."""


def main() -> int:
    parser = arguments(__doc__, "narrate")
    parser.add_argument("--clips", type=Path, help="folder of clips with known truth, measured as well")
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--seed", type=int, default=900)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = _measure(Path(name), given)
    return finish(given.out, rows)


def _measure(folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    phantoms, large = folder / "phantoms", folder / "large"
    size = ["--videos", 2, "--fields", 3] if given.quick else ["--videos", given.videos]
    _phantoms(phantoms, given.seed, *size)
    materials = {"phantoms, 320x240 at 8 fps": sorted(phantoms.glob("*.mp4"))}
    rows, costs = _beside("phantoms", phantoms, folder / "a")
    headline = "phantoms, 320x240 at 8 fps"
    if not given.quick:
        _phantoms(large, given.seed, "--videos", 1, "--fields", 4, "--width", 1280, "--height", 720, "--fps", 30)
        (phantom,) = large.glob("*.mp4")
        headline = "a phantom as video sites encode, 1280x720 at 30 fps"
        materials["a phantom, 1280x720 at 30 fps"] = [phantom]
        materials[headline] = [as_sites_encode(phantom, folder / "site")]
        found, costs = _beside("1280x720 at 30 fps", folder / "site", folder / "c")
        rows += [each for each in found if each["unit"] in {"s", "MiB"}]
    if given.clips is not None:
        found, costs = _beside("clips", given.clips, folder / "b")
        rows += found
        clips = sorted(given.clips.glob("*.mp4"))
        by_size = defaultdict(list)
        for clip in clips:
            by_size[_size(clip)].append(clip)
        materials |= {f"clips, {size}": by_size[size] for size in sorted(by_size)}
        headline = f"all {len(clips)} clips"
        materials[headline] = clips
    speedup = costs[1].cpu_s / costs[0].cpu_s
    rows.append(
        row(
            "narrate.speedup_over_straightforward", speedup, "x", baseline=f"{NAIVE}, CPU on {headline}",
            baseline_value=1.0, least=None if given.quick else 5,
        )
    )
    rows += _long(folder, (sorted(phantoms.glob("*.mp4")) if given.quick else [phantom])[0], given.quick)
    for number, (material, files) in enumerate(materials.items()):
        ours, decoding = _against_decoding(files, folder / f"cost{number}", rounds=1 if given.quick else 7)
        for figure, most in ((f"cost over decoding: {material}", None), ("narrate.cost_over_decode", 1.3)):
            if most is None or material == headline:
                rows.append(
                    row(
                        figure, ours / decoding, "x decoding", baseline=f"{DECODING} of {material}", baseline_value=1.0,
                        most=None if given.quick else most,
                    )
                )
        length_s = sum(_length_s(file) for file in files)
        rows.append(
            row(
                f"speed: {material}", length_s / ours, "x realtime", baseline=DECODING,
                baseline_value=length_s / decoding,
            )
        )
    return rows


def _beside(name: str, videos: Path, out: Path) -> tuple[list[dict[str, Any]], tuple[Cost, Cost]]:
    """Figures of narrate on a folder of videos and of the papers' way, and what both cost."""
    ours = _narrate(videos, out / "ours")
    naive = cost_of((Path(__file__).with_name("naive.py"), "--videos", videos, "--out", out / "naive"), quiet=True)
    rows = []
    for (figure, value, unit, way, target), (_, other, *_) in zip(
        figures(videos, out / "ours"), figures(videos, out / "naive"), strict=True
    ):
        rows.append(
            row(
                f"{name}: {figure}", value, unit, baseline=NAIVE, baseline_value=other,
                least=target if way == "min" else None, most=target if way == "max" else None,
            )
        )
    rows.append(row(f"{name}: CPU", ours.cpu_s, "s", baseline=NAIVE, baseline_value=naive.cpu_s))
    rows.append(
        row(f"{name}: peak memory", ours.peak_mib, "MiB", baseline=NAIVE, baseline_value=naive.peak_mib, most=MIB)
    )
    return rows, (ours, naive)


def _long(folder: Path, phantom: Path, quick: bool) -> list[dict[str, Any]]:
    """The same at two lengths: memory must be that of a window of frames, not of the video."""
    short, long = (1, 4) if quick else (5, 60)
    costs = []
    for minutes in (short, long):
        video = repeated(phantom, folder / f"{minutes}-minutes" / "lecture.mp4", 60 * minutes)
        costs.append(_narrate(video.parent, folder / f"out-{minutes}-minutes"))
    about = f"{_size(phantom)}, {short} minutes"
    return [
        row(
            f"peak memory, {long} minutes", costs[1].peak_mib, "MiB", baseline=about, baseline_value=costs[0].peak_mib,
            most=MIB,
        ),
        row(
            f"CPU a minute of video, {long} minutes", costs[1].cpu_s / long, "s", baseline=f"{about}, with start-up",
            baseline_value=costs[0].cpu_s / short,
        ),
    ]


def _narrate(videos: Path, out: Path) -> Cost:
    command = ("-m", "medllava", "instruct_gen", "narrate", "--workers", 1, "--videos", videos, "--out", out)
    return cost_of(command, quiet=True)


def _phantoms(out: Path, seed: int, *options: object) -> None:
    command = ["phantom", "--out", out, "--seed", seed, *options]
    subprocess.run([sys.executable, "-m", "medllava", *map(str, command)], check=True, stdout=subprocess.DEVNULL)


def _against_decoding(files: list[Path], out: Path, rounds: int) -> tuple[float, float]:
    """CPU seconds of narrate on all files, and of decoding every frame of them."""
    from medllava.instruct_gen.narrator import narrate

    def decode(file: Path) -> None:
        with av.open(str(file)) as container:
            container.streams.video[0].thread_type = "NONE"
            for _ in container.decode(video=0):
                pass

    def ours(file: Path) -> None:
        for _ in narrate(file, file.with_suffix(".words.json"), out).records:
            pass

    (out / "frames").mkdir(parents=True)
    ours(files[0])  # What is loaded on first use is start-up.
    pairs = []
    for file in files:
        pairs.append(
            paired(
                lambda file=file: cpu_s(lambda: ours(file)),  # type: ignore[misc]
                lambda file=file: cpu_s(lambda: decode(file)),  # type: ignore[misc]
                rounds,
            )
        )
    return sum(one for one, _ in pairs), sum(decoding for _, decoding in pairs)


def _size(video: Path) -> str:
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        return f"{stream.width}x{stream.height} at {float(stream.average_rate or 0):g} fps"


def _length_s(video: Path) -> float:
    with av.open(str(video)) as container:
        return float((container.duration or 0) / av.time_base)


if __name__ == "__main__":
    sys.exit(main())
