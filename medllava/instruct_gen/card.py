"""A data card: what is in a folder of samples, how it was made, and whether it can be trusted.

Counts per kind and video, lengths, where boxes lie, what was dropped and why, tokens and price, the split with a check
that train and val share no video and no picture, and samples drawn at random with their picture, the cursor's path and
the boxes. Written to --out:

  DATACARD.md      for people and for the Hugging Face Hub (it begins with the Hub's header)
  datacard.html    one page with plots and pictures in it; it needs no network
  datacard.json    the same figures for programs

The same input gives the same bytes. The page shows pictures and words of the data, the narrator's too: publish it only
where you may publish those. If the captions were corrected or redacted by a step of its own, give
that file with --captions; of captions that only generate redacted, the card shows no words.

examples:
  python -m medllava.instruct_gen card --data out --narrated narrated
  python -m medllava.instruct_gen card --data out --narrated narrated --captions corrected/captions.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "DATACARD.md and a page with figures, split check and samples drawn at random"


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="folder that generate wrote")
    add("--narrated", type=Path, metavar="DIR", help="folder that narrate wrote (default: --data, if it has pictures)")
    add(
        "--captions", type=Path, metavar="FILE",
        help="captions that generate read, if not narrate's own: corrected or redacted ones",
    )
    add("--out", type=Path, metavar="DIR", help="folder for the card (default: --data)")
    add("--title", help="heading (default: the name of the data's folder)")
    add("--license", default="unknown", metavar="ID", help="the Hub's name of the licence (default: unknown)")
    add("--samples", type=int, default=24, metavar="N", help="samples shown (default: 24)")
    add("--seed", type=int, default=0, metavar="S", help="for the drawing of samples (default: 0)")
    add("--no-cache", action="store_true", help="open every image again, keep nothing")


def run(args: argparse.Namespace) -> int:
    from medllava.errors import ConfigError, DataError
    from medllava.instruct_gen.card_figures import read_figures
    from medllava.instruct_gen.card_page import as_html, as_json, as_markdown
    from medllava.jsonl import atomic_write, write_json

    if args.samples < 0:
        raise ConfigError(f"--samples {args.samples}: expected 0 or more")
    for flag, folder in (("--data", args.data), ("--narrated", args.narrated)):
        if folder is not None and not folder.is_dir():
            raise DataError(f"{flag} {folder}: no such folder")
    narrated = args.narrated or (args.data if (args.data / "frames").is_dir() else None)
    out = args.out or args.data
    figures = read_figures(
        args.data, narrated, examples=args.samples, seed=args.seed, spoken=args.captions, cache=not args.no_cache
    )
    title = args.title or f"Data card: {args.data.resolve().name}"
    pages = {
        "DATACARD.md": as_markdown(figures, title, args.license), "datacard.html": as_html(figures, title, narrated),
    }
    for name, text in pages.items():
        with atomic_write(out / name) as file:
            file.write(text)
    write_json(out / "datacard.json", as_json(figures))
    if figures.unredacted:
        print("note: generate was run with --redact, so the narrator's own words are not shown")
    if narrated is None:
        print("note: no pictures: give the folder that narrate wrote to --narrated")
    leaks = figures.split.leaks if figures.split else ()
    for leak in leaks[:5]:
        print(f"warning: val.json row {leak.row} ({leak.id}): {leak.kind}: {leak.detail}")
    if len(leaks) > 5:
        print(f"warning: {len(leaks) - 5} more of these, see {out / 'datacard.json'}")
    counts = f"{figures.samples:,} samples, {figures.images:,} images, {len(figures.videos):,} videos"
    print(f"{counts} -> {out / 'datacard.html'}")
    return 0
