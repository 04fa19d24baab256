"""What the commands of instruct_gen cost beside their real work, at the size of Quilt: thousands of finished videos
that are looked through and put together again, 107,131 samples that are checked, counted, compared and exported.

    python benchmarks/bookkeeping.py [--quick]

Nothing here was ever seen or said: records and pictures (32 x 24 pixels) are made up, so reading pictures costs next to
nothing. Real ones cost what ``load.py`` measures per picture. ``generate.py`` has the same figures for generate.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from record import arguments, cost_of, cpu_s, finish, row
from synthetic import sentence

from medllava.jsonl import to_item, to_line, write_json_list, write_records

VIDEOS, CHUNKS = 4149, 105
"""Videos of Quilt-1M, and stable chunks in each: 435,645 pictures; Quilt-1M has 437,878."""

POINTS = 60
"""Cursor points of a chunk: eight a second while it is seen."""

SAMPLES = 107_131
"""Samples of Quilt-Instruct."""

VAL_EVERY = 20


def main() -> int:
    parser = arguments(__doc__, "bookkeeping")
    parser.add_argument("--videos", type=int, default=VIDEOS)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    given = parser.parse_args()
    videos, samples = (30, 600) if given.quick else (given.videos, given.samples)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = _rates(folder / "one", 2 if given.quick else 8)
        rows += _narrate(folder / "all", videos) + _samples(folder / "some", samples)
    return finish(given.out, rows)


def _rates(folder: Path, fields: int) -> list[dict[str, Any]]:
    """What a second of video costs and leaves behind, and what a picture costs that is opened; docs/scale.md multiplies
    these. The video is rendered, 1280x720 at 30 frames a second."""
    from medllava.instruct_gen.image_index import look_at
    from medllava.instruct_gen.narrator import narrate

    videos = folder / "videos"
    subprocess.run([
        sys.executable, "-m", "medllava.phantom", "--out", videos, "--videos", "1", "--seed", "5", "--fields",
        str(fields), "--width", "1280", "--height", "720", "--fps", "30",
    ], check=True, stderr=subprocess.DEVNULL)
    (video,) = videos.glob("*.mp4")
    made = []

    def work() -> None:
        result = narrate(video, video.with_suffix(".srt"), folder)
        made.append((result.video, list(result.records)))

    taken_s = cpu_s(work)
    ((probed, records),) = made
    seconds, pictures = probed.duration_s, [one.image for one, _ in records]
    opened_s = cpu_s(lambda: look_at(pictures, folder, cache=False))
    sizes = [(folder / picture).stat().st_size for picture in pictures]
    written = sum(len(to_line(one)) for pair in records for one in pair if one is not None)
    return [
        row("bookkeeping.narrate_cpu_per_s", taken_s / seconds, "s per s of video"),
        row("bookkeeping.records_per_s", written / seconds, "bytes per s of video"),
        row("bookkeeping.picture_size", sum(sizes) / len(sizes) / 2**20, "MiB"),
        row("bookkeeping.picture_opened_cpu", 1000 * opened_s / len(pictures), "ms"),
    ]


def _narrate(folder: Path, videos: int) -> list[dict[str, Any]]:
    """A finished run of narrate, given again: every video is looked up, every result read and written anew."""
    write_narrated(folder, videos * CHUNKS, pictures=0)
    cost = cost_of([
        "-m", "medllava.instruct_gen", "narrate", "--videos", folder / "videos", "--out", folder, "--workers", 2,
    ], quiet=True)
    made = json.loads((folder / "narrate.json").read_text())
    size = (folder / "narratives.jsonl").stat().st_size / 2**20
    assert (made["videos"], made["narratives"]) == (videos, videos * CHUNKS), made
    return [
        row("bookkeeping.narrate_videos", videos, "videos"),
        row("bookkeeping.narrate_chunks", videos * CHUNKS, "chunks"),
        row("bookkeeping.narratives_on_disk", size, "MiB"),
        row("bookkeeping.narrate_resumed_wall", cost.wall_s, "s"),
        row("bookkeeping.narrate_resumed_cpu", cost.cpu_s, "s"),
        row("bookkeeping.narrate_peak_memory", cost.peak_mib, "MiB", most=1024),
    ]


def _samples(folder: Path, samples: int) -> list[dict[str, Any]]:
    write_narrated(folder, samples, pictures=samples)
    write_samples(folder, samples)
    step = ["-m", "medllava.instruct_gen"]
    train, val = folder / "train.json", folder / "val.json"
    export = [*step, "export", "--narrated", folder]
    commands = {
        "check": [*step, "check", train, "--images", folder, "--no-cache"],
        "leaks": [*step, "check", val, "--images", folder, "--against", train, "--no-cache"],
        "card": [*step, "card", "--data", folder, "--narrated", folder, "--out", folder / "card", "--no-cache"],
        "export_localized": [*export, "--format", "localized-narratives", "--out", folder / "localized.jsonl"],
        "export_medical": [*export, "--format", "medical-narratives", "--out", folder / "medical.jsonl"],
        "export_webdataset": [*export, "--format", "webdataset", "--out", folder / "shards"],
    }
    rows = []
    for name, command in commands.items():
        cost = cost_of(command, quiet=True)
        # An export's own work is to write millions of cursor points or pictures: that takes what it takes.
        bound = samples >= SAMPLES and not name.startswith("export")
        rows += [
            row(f"bookkeeping.{name}_wall", cost.wall_s, "s"),
            row(f"bookkeeping.{name}_cpu", cost.cpu_s, "s", most=60 if bound else None),
            row(f"bookkeeping.{name}_peak_memory", cost.peak_mib, "MiB", most=1024),
        ]
    return rows


def write_narrated(folder: Path, chunks: int, *, pictures: int) -> None:
    """What narrate leaves behind of videos that show ``chunks`` stable chunks: all its files, and files that stand for
    the videos. The first ``pictures`` frames differ from one another."""
    from medllava.instruct_gen.narrator import Options, fingerprint

    for name in ("videos", "parts", "frames"):
        (folder / name).mkdir(parents=True)
    blank = folder / "blank.png"
    Image.new("RGB", (32, 24)).save(blank)
    with (folder / "narratives.jsonl").open("w") as narratives, (folder / "captions.jsonl").open("w") as captions:
        for number in range(-(-chunks // CHUNKS)):
            stem = f"lecture-{number:05}"
            video, transcript = folder / "videos" / f"{stem}.mp4", folder / "videos" / f"{stem}.srt"
            video.write_bytes(stem.encode() * 1000)
            transcript.write_text(stem)
            records = [_chunk(stem, place) for place in range(min(CHUNKS, chunks - number * CHUNKS))]
            about = {"name": video.name, "width": 1280, "height": 720, "fps": 30.0, "duration_s": 20.0 * CHUNKS}
            part = {
                "fingerprint": fingerprint(Options(), video, transcript),
                "video": about | {"domain": None, "domain_score": None}, "no_box": {"rests": 3},
                "left_out": {"not histology": 7}, "warnings": [],
            }
            finished = [{"narrative": narrative, "caption": caption} for narrative, caption in records]
            write_records(folder / "parts" / f"{video.name}.jsonl", [*finished, part])
            for place, (narrative, caption) in enumerate(records):
                narratives.write(to_line(narrative))
                captions.write(to_line(caption))
                picture = folder / narrative["image"]
                if number * CHUNKS + place < pictures:
                    noise = np.random.default_rng((number, place)).integers(0, 256, (24, 32, 3), np.uint8)
                    Image.fromarray(noise).save(picture, compress_level=1)
                else:
                    picture.write_bytes(blank.read_bytes())


def _chunk(stem: str, place: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A narrative and its caption, as lines of narratives.jsonl and captions.jsonl."""
    dice = random.Random(f"{stem} {place}")
    began = 20.0 * place
    common = {
        "id": f"{stem}-{place:03}", "video": f"{stem}.mp4", "image": f"frames/{stem}-{place:03}.png",
        "crop_px": [0, 0, 1280, 720],
    }
    trace = [
        [round(began + 0.125 * point, 3), round(dice.random(), 4), round(dice.random(), 4), 0.999]
        for point in range(POINTS)
    ]
    said = [
        {"start_s": began + 3 * n, "end_s": began + 3 * n + 2.5, "text": sentence(dice), "words": []}
        for n in range(3)
    ]
    narrative = common | {
        "start_s": began, "end_s": began + 9.0, "trace": trace, "utterances": said, "same_view_as": None, "mpp": None,
        "mpp_confidence": None, "magnification": None, "magnification_from": None,
    }
    caption = common | {"phrases": [
        {"text": one["text"], "start_s": one["start_s"], "end_s": one["end_s"], "box": [0.1, 0.2, 0.4, 0.6],
         "confidence": 0.9} for one in said
    ]}
    return narrative, caption


def write_samples(folder: Path, samples: int) -> None:
    """``samples`` conversations of two exchanges, one for each picture, as generate writes them; every twentieth video
    is in val.json."""
    with (
        (folder / "samples.jsonl").open("w") as lines, write_json_list(folder / "train.json") as train,
        write_json_list(folder / "val.json") as val,
    ):
        for number in range(samples):
            video, place = divmod(number, CHUNKS)
            stem = f"lecture-{video:05}"
            dice = random.Random(number)
            turns = []
            for exchange in range(2):
                asked = f"What is in [0.10, 0.20, 0.40, 0.60]? {sentence(dice, 8)}"
                turns.append(("user", ("<image>\n" if exchange == 0 else "") + asked))
                turns.append(("assistant", sentence(dice, 30)))
            about = {"video": f"{stem}.mp4", "chunk": f"{stem}-{place:03}", "prompt_hash": None, "teacher": "made up"}
            common = {"id": f"{stem}-{place:03}-conversation-1", "kind": "conversation"}
            images = [f"frames/{stem}-{place:03}.png"]
            lines.write(to_line(common | {
                "images": images, "turns": [{"role": role, "text": text} for role, text in turns], "provenance": about,
            }))
            names = {"user": "human", "assistant": "gpt"}
            (train if video % VAL_EVERY else val)(to_item(common | {
                "image": images[0], "provenance": about,
                "conversations": [{"from": names[role], "value": text} for role, text in turns],
            }))


if __name__ == "__main__":
    raise SystemExit(main())
