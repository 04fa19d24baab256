"""Narrated videos to narratives and grounded captions.

Each video's stable parts, the cursor's path in them and what was said meanwhile become one line of narratives.jsonl
each; every phrase with the box the narrator pointed at (or null) goes to captions.jsonl, pictures to frames/. The
transcript lies beside its video: STEM.words.json or .json (WhisperX, whisper), .json3 (YouTube), .srt or .vtt; --asr
makes one for videos that have none.

A video that cannot be used is named in failed.jsonl and the rest goes on; what was mended or left out in the others is
in warnings.jsonl. Run again to go on after a stop: finished videos are not done twice. Speech in silence is dropped.

Example:
  python -m medllava.instruct_gen narrate --videos lectures/ --out work/narrated --workers 8
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from medllava.errors import ConfigError, DataError
from medllava.jsonl import atomic_write, read_rows, to_line, write_json, write_records
from medllava.processes import end_with_parent, usable_cores

if TYPE_CHECKING:
    from medllava.instruct_gen.narrator import Options

HELP = "narrated videos + transcripts -> narratives.jsonl, captions.jsonl, frames/"

ENDINGS = frozenset(
    {".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"}
)
"""Files taken for videos in a folder."""


@dataclass(frozen=True)
class Task:
    """One video to be worked on."""

    video: Path
    transcripts: Path | None
    out: Path
    options: Options

    @property
    def part(self) -> Path:
        """Where the video's result is kept until all are put together, and for the next run: a line for each narrative
        with its caption, then one with the rest. Neither writing nor reading it takes memory for more than a line."""
        return self.out / "parts" / f"{self.video.name}.jsonl"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--videos", type=Path, required=True, help="folder of videos, or one video")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--workers", type=int, metavar="N",
        help="videos worked on at once, each by one process (default: as many as there are cores)",
    )
    parser.add_argument(
        "--ray", metavar="ADDRESS",
        help="share the videos out over a Ray cluster: HOST:PORT of its head, auto for the one on this machine,"
        " local to start one here; every node must see --videos and --out at the same paths",
    )
    parser.add_argument("--transcripts", type=Path, help="folder of the transcripts (default: beside the videos)")
    parser.add_argument(
        "--asr", nargs="?", const="faster-whisper:small", metavar="BACKEND:MODEL",
        help="transcribe videos without a transcript into OUT/transcripts: faster-whisper:MODEL_OR_DIR (a name is"
        " downloaded; without a value: faster-whisper:small) or transformers:DIR",
    )
    parser.add_argument(
        "--grounding", choices=("pointing", "paper"), default="pointing",
        help="how phrases get boxes: from the pointing during each, or by the clustering published with Quilt-LLaVA",
    )
    parser.add_argument(
        "--frame-filter", type=Path, metavar="MODEL_DIR",
        help="tell histology, and each video's medical domain, by a CLIP or SigLIP folder (default: by the stain)",
    )
    parser.add_argument(
        "--frame-prompts", type=Path, default=Path("instruct_gen/frame_filter.yaml"), metavar="YAML",
        help="sentences that --frame-filter compares pictures with (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="for --grounding paper, which is drawn by lot (default: 0)")


def run(args: argparse.Namespace) -> int:
    from medllava.instruct_gen.narrator import Options

    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: expected 1 or more")
    if args.transcripts is not None and not args.transcripts.is_dir():
        raise ConfigError(f"--transcripts {args.transcripts}: no such folder")
    videos = find_videos(args.videos)
    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"--seed {args.seed}: expected 0 to {2**32 - 1}")
    options = Options(grounding=args.grounding, seed=args.seed)
    if args.frame_filter is not None:
        from medllava.instruct_gen.frame_filter import load_filter

        options = replace(options, frame_filter=str(args.frame_filter), frame_prompts=str(args.frame_prompts))
        load_filter(options.frame_filter, options.frame_prompts)  # Its faults are no video's.
    tasks = [Task(video, args.transcripts, args.out, options) for video in videos]
    failures: dict[str, str] = {}
    if args.asr:
        from medllava.instruct_gen.asr import transcribe_missing

        failures = transcribe_missing(videos, args.transcripts, args.out / "transcripts", args.asr)
    usable = [task for task in tasks if task.video.name not in failures]
    failures = dict(sorted((failures | _work(usable, args)).items()))
    done = [task for task in tasks if task.video.name not in failures]
    if not done:
        first = next(iter(failures.values()))
        more = f" (and {len(failures) - 1} more, see {args.out / 'failed.jsonl'})" if len(failures) > 1 else ""
        _write_failures(args.out, failures)
        raise DataError(f"no video could be used: {first}{more}")
    counts, no_box, left_out = _assemble(args.out, done)
    _write_failures(args.out, failures)
    print(
        f"{len(done)} of {len(tasks)} videos: {counts['narratives']} narratives,"
        f" {counts['phrases']} phrases, {counts['boxes']} with a box -> {args.out}"
    )
    if left_out:
        print("pictures left out: " + ", ".join(f"{count} {reason}" for reason, count in left_out.most_common()))
    if counts["same_views"]:
        print(f"{counts['same_views']} narratives show a view that their video showed before (same_view_as)")
    if len(tasks) == 1 and (args.workers or usable_cores()) > 1:
        print("one video is worked on by one process; several would be shared out")
    if no_box:
        print("without a box: " + ", ".join(f"{count} {reason}" for reason, count in no_box.most_common()))
    write_json(
        args.out / "narrate.json",
        {"options": asdict(options), "videos": len(done), "failed": len(failures)} | counts
        | {"no_box": no_box, "left_out": left_out},
    )
    if counts["warnings"]:
        print(f"warning: {counts['warnings']} remarks on what was used, see {args.out / 'warnings.jsonl'}")
        for _, row in islice(read_rows(args.out / "warnings.jsonl"), 5):
            print(f"  {row['warning']}")
    if failures:
        print(f"warning: {len(failures)} of {len(tasks)} videos failed, see {args.out / 'failed.jsonl'}")
        for reason in list(failures.values())[:5]:
            print(f"  {reason}")
    return 0


def find_videos(where: Path) -> list[Path]:
    """The videos in a folder by name, or the one video given. Raises DataError if there is none."""
    if where.is_file():
        return [where]
    if not where.is_dir():
        raise DataError(f"{where}: no such file or folder")
    found = sorted(path for path in where.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())
    if not found:
        raise DataError(f"{where}: holds no video (looked for {', '.join(sorted(ENDINGS))})")
    stems = [path.stem for path in found]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice is not None:
        raise DataError(f"{where}: two videos are named {twice}; ids are made from the name, so rename one")
    return found


def _work(tasks: list[Task], args: argparse.Namespace) -> dict[str, str]:
    """Why videos failed, by name; results of the others are on disk."""
    from tqdm import tqdm

    # The largest first: a long one begun last would keep one worker busy while the others wait.
    sizes = {task: task.video.stat().st_size for task in tasks}
    tasks = sorted(tasks, key=lambda task: -sizes[task])
    failures: dict[str, str] = {}
    with tqdm(
        total=sum(sizes.values()), desc="narrate", unit="B", unit_scale=True, unit_divisor=1024, smoothing=0.05
    ) as progress:
        for done, (task, reason) in enumerate(_results(tasks, args), start=1):
            if reason is not None:
                failures[task.video.name] = reason
            progress.set_postfix_str(f"{done:,} of {len(tasks):,} videos", refresh=False)
            progress.update(sizes[task])
    _remove_torn(args.out)
    return failures


def _results(tasks: list[Task], args: argparse.Namespace) -> Iterator[tuple[Task, str | None]]:
    """What :func:`narrate_one` returned of each task, as they come, from wherever they are worked on."""
    if args.ray is not None:
        from medllava.instruct_gen.on_ray import work_on_ray

        yield from work_on_ray(tasks, narrate_one, args.out, args.ray, args.workers)
        return
    workers = min(args.workers or usable_cores(), len(tasks))
    if workers <= 1:
        for task in tasks:
            yield task, narrate_one(task)
        return
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), end_with_parent, (os.getpid(),)
    ) as pool:
        running = {pool.submit(narrate_one, task): task for task in tasks}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        except BrokenProcessPool as error:
            raise ConfigError(
                f"a worker process was ended from outside (out of memory?); finished videos are kept: run the"
                f" same command again with fewer than --workers {workers}"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _remove_torn(out: Path) -> None:
    """Remove what workers that were killed had half written; nobody writes any more."""
    for folder in (out / "parts", out / "frames"):
        with suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") and entry.name.endswith(".part"):
                    Path(entry).unlink(missing_ok=True)


def narrate_one(task: Task) -> str | None:
    """Work on one video unless its result is there already. Returns the reason if it cannot be used."""
    from medllava.instruct_gen.narrator import fingerprint, narrate
    from medllava.instruct_gen.speech import find_transcript
    from medllava.instruct_gen.video import VideoReader

    try:
        try:
            made_here = task.out / "transcripts"
            transcript = find_transcript(task.video, task.transcripts or task.video.parent, made_here)
        except DataError:
            VideoReader(task.video)  # Of a damaged video without a transcript, the damage is what to hear of.
            raise
        model, prompts = task.options.frame_filter, task.options.frame_prompts
        stamp = fingerprint(
            task.options, task.video, transcript, *([Path(model, "config.json"), Path(prompts)] if model else [])
        )
        if _is_done(task, stamp):
            return None
        result = narrate(task.video, transcript, task.out, task.options)
    except DataError as error:
        task.part.unlink(missing_ok=True)
        return str(error)
    with atomic_write(task.part) as file:
        for narrative, caption in result.records:
            file.write(
                to_line({
                    "narrative": narrative.model_dump(mode="json"),
                    "caption": caption.model_dump(mode="json") if caption is not None else None,
                })
            )
        file.write(
            to_line({
                "fingerprint": stamp,
                "video": result.video.model_dump(mode="json"),
                "no_box": result.no_box,
                "left_out": result.left_out,
                "warnings": list(result.warnings),
            })
        )
    return None


def _is_done(task: Task, stamp: str) -> bool:
    if not task.part.is_file():
        return False
    try:
        for _, row in read_rows(task.part):
            if "fingerprint" in row:
                return bool(row["fingerprint"] == stamp)
            if not (task.out / row["narrative"]["image"]).is_file():
                return False
        return False
    except (DataError, KeyError, TypeError):
        return False


def _assemble(out: Path, done: list[Task]) -> tuple[dict[str, int], Counter[str], Counter[str]]:
    """Put the videos' results together, in order of name and time; memory holds one narrative at a time.

    Returns counts of what there is, of why phrases have no box and of why pictures were left out.
    """
    counts = dict.fromkeys(("narratives", "phrases", "boxes", "warnings", "same_views"), 0)
    no_box: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    with ExitStack() as stack:
        narratives, captions, warnings, videos = (
            stack.enter_context(atomic_write(out / f"{name}.jsonl"))
            for name in ("narratives", "captions", "warnings", "videos")
        )
        for task in done:
            for _, row in read_rows(task.part):
                if "fingerprint" in row:
                    warnings.writelines(to_line({"video": task.video.name, "warning": one}) for one in row["warnings"])
                    videos.write(to_line(row["video"]))
                    counts["warnings"] += len(row["warnings"])
                    no_box.update(row["no_box"])
                    left_out.update(row["left_out"])
                    continue
                narratives.write(to_line(row["narrative"]))
                counts["narratives"] += 1
                counts["same_views"] += row["narrative"]["same_view_as"] is not None
                if row["caption"] is not None:
                    captions.write(to_line(row["caption"]))
                    counts["phrases"] += len(row["caption"]["phrases"])
                    counts["boxes"] += sum(phrase["box"] is not None for phrase in row["caption"]["phrases"])
    return counts, no_box, left_out


def _write_failures(out: Path, failures: dict[str, str]) -> None:
    write_records(out / "failed.jsonl", ({"video": name, "reason": reason} for name, reason in failures.items()))
