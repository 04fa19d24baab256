"""Make narrated microscopy videos whose findings, boxes, cursor and words are known.

    python -m medllava.phantom --out videos --videos 4 --seed 0

writes phantom-0-0001.mp4 with .srt, .words.json and .truth.json, and so on. A run that was stopped goes on where it
was; a video depends on its seed and number only.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from medllava.errors import ConfigError, MissingExtraError, run_cli
from medllava.processes import usable_cores

if TYPE_CHECKING:
    from medllava.phantom.session import Settings


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="medllava phantom", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the videos")
    parser.add_argument("--videos", type=int, required=True, metavar="N", help="how many")
    parser.add_argument("--seed", type=int, required=True, help="number from which everything is drawn")
    parser.add_argument("--first", type=int, default=1, metavar="I", help="number of the first video (default 1)")
    parser.add_argument("--fields", type=int, default=12, help="fields shown in each video (default 12)")
    parser.add_argument("--width", type=int, default=320, help="frame width in pixels, even (default 320)")
    parser.add_argument("--height", type=int, default=240, help="frame height in pixels, even (default 240)")
    parser.add_argument("--fps", type=int, default=8, help="frames a second (default 8)")
    parser.add_argument("--noise", type=float, default=0.0, help="sensor noise in grey levels (default 0)")
    parser.add_argument(
        "--webcam", action=argparse.BooleanOptionalAction, default=None,
        help="a talking head in a corner of every video, or of none (default: of one in eight)",
    )
    parser.add_argument(
        "--questions", action="store_true", help="the narrator asks questions, and answers most of them (default: no)"
    )
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes (default: one a core)")
    arguments = parser.parse_args(argv)
    _check(arguments)
    _require("cv2", "av")

    from medllava.phantom.outputs import is_done
    from medllava.phantom.session import Settings

    settings = Settings(
        fields=arguments.fields, width=arguments.width, height=arguments.height, fps=arguments.fps,
        webcam=arguments.webcam, noise=arguments.noise, questions=arguments.questions,
    )
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    wanted = range(arguments.first, arguments.first + arguments.videos)
    missing = [index for index in wanted if not is_done(out, arguments.seed, index, settings)]
    _make(out, arguments.seed, missing, len(wanted), settings, arguments.workers)
    print(f"{len(wanted)} videos in {out} ({len(missing)} new)")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for name, least in (("videos", 1), ("first", 0), ("seed", 0), ("fields", 1), ("fps", 4), ("workers", 1)):
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name} {getattr(arguments, name)}: must be at least {least}")
    for name, least in (("width", 160), ("height", 120)):
        value = getattr(arguments, name)
        if value < least or value % 2:
            raise ConfigError(f"--{name} {value}: must be even (H.264 4:2:0) and at least {least}")
    if arguments.noise < 0:
        raise ConfigError(f"--noise {arguments.noise}: must not be negative")


def _require(*packages: str) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingExtraError(package, "gen", error) from error


def _make(out: Path, seed: int, missing: list[int], total: int, settings: Settings, workers: int) -> None:
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    from tqdm import tqdm

    from medllava.phantom.outputs import make_case, start_worker

    with tqdm(total=total, initial=total - len(missing), desc="videos", unit="video", disable=None) as progress:
        if min(workers, len(missing)) <= 1:
            for index in missing:
                make_case(out, seed, index, settings)
                progress.update()
            return
        # Fresh processes: a fork would copy the state of the drawing and encoding libraries' threads.
        with ProcessPoolExecutor(
            min(workers, len(missing)), get_context("spawn"), start_worker, (os.getpid(),)
        ) as pool:
            jobs = [pool.submit(make_case, out, seed, index, settings) for index in missing]
            try:
                for job in as_completed(jobs):
                    job.result()
                    progress.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


if __name__ == "__main__":
    sys.exit(run_cli(main))
