"""What narrate made, in layouts that others read.

localized-narratives  one JSONL file: caption, words with times, cursor traces
medical-narratives    one JSONL file: the same with boxes and the keys of the MedicalNarratives data card
webdataset            a folder of tar shards of image-text pairs
datasets              a folder of image-text pairs for Hugging Face datasets ("imagefolder")

Stable chunks without speech are left out. The same input gives the same bytes.

Example:
  python -m medllava.instruct_gen export --narrated out --format webdataset --crops --out shards
"""

from __future__ import annotations

import argparse
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medllava.errors import ConfigError, DataError

if TYPE_CHECKING:
    from medllava.instruct_gen.records import GroundedCaption, Narrative

HELP = "narratives -> Localized Narratives, MedicalNarratives, WebDataset shards, a datasets folder"

FORMATS = ("localized-narratives", "medical-narratives", "webdataset", "datasets")

DOMAINS = (
    "CT", "MRI", "X-ray", "ultrasound", "surgery", "endoscopy", "dermatology", "dental", "ophthalmology", "mammography",
    "histopathology", "general medical illustration",
)
"""The imaging domains of MedicalNarratives."""

NOTE = "export.json"
"""What was exported lies beside the pairs; its presence says that a folder may be written anew."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--narrated", type=Path, required=True, help="folder that narrate wrote")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="file (narratives) or folder (pairs) to write")
    parser.add_argument("--crops", action="store_true", help="also one pair for each region that a phrase speaks of")
    parser.add_argument(
        "--min-confidence", type=float, default=0.0, metavar="C", help="leave out boxes of less confidence, 0..1"
    )
    parser.add_argument("--shard-size", type=int, default=1000, metavar="N", help="pairs in a shard (default: 1000)")
    parser.add_argument("--image-format", choices=("png", "jpg"), default="png", help="of pairs (default: png)")
    parser.add_argument(
        "--domain", choices=DOMAINS, default="histopathology",
        help="of medical-narratives, for videos whose domain narrate did not tell (default: histopathology)",
    )
    parser.add_argument("--dataset-id", default="medllava", help="of localized-narratives (default: medllava)")


def run(args: argparse.Namespace) -> int:
    if not 0 <= args.min_confidence <= 1:
        raise ConfigError(f"--min-confidence {args.min_confidence}: expected 0 to 1")
    if args.shard_size < 1:
        raise ConfigError(f"--shard-size {args.shard_size}: expected 1 or more")
    narrated = Narrated(args.narrated)
    if args.format in ("webdataset", "datasets"):
        return _write_pairs(narrated, args)
    if args.crops:
        raise ConfigError(f"--crops: image-text pairs only; --format {args.format} has its regions in the records")
    return _write_narratives(narrated, args)


class Narrated:
    """What narrate wrote into a folder, a video at a time: memory holds those records of one of them.

    ``videos``: what is known of each, by name. Raises DataError if it is not there or nothing was said in it.
    """

    def __init__(self, folder: Path) -> None:
        from medllava.instruct_gen.captions import CaptionFile
        from medllava.instruct_gen.records import Video
        from medllava.jsonl import read_records

        self.narratives = folder / "narratives.jsonl"
        if not self.narratives.is_file():
            raise DataError(f"{folder}: holds no narratives.jsonl; expected a folder that narrate wrote")
        if (folder / "captions.jsonl").is_file() and not (folder / "captions.jsonl").stat().st_size:
            raise _nothing_said(folder)
        self.captions = CaptionFile(folder / "captions.jsonl")
        listed = folder / "videos.jsonl"
        self.videos = {video.name: video for video in read_records(listed, Video)} if listed.is_file() else {}

    def spoken(self) -> Iterator[list[tuple[Narrative, GroundedCaption]]]:
        """For each video in which something was said: its chunks with speech, in the file's order."""
        from medllava.instruct_gen.records import Narrative
        from medllava.jsonl import read_records

        nothing = True
        seen: set[str] = set()
        told = set(self.captions.videos)
        for video, chunks in groupby(read_records(self.narratives, Narrative), key=lambda chunk: chunk.video):
            if video in seen:
                raise DataError(f"{self.narratives}: rows of {video} must follow one another, as narrate writes them")
            seen.add(video)
            captions = {caption.id: caption for caption in self.captions.of_video(video)} if video in told else {}
            if pairs := [(chunk, captions[chunk.id]) for chunk in chunks if chunk.id in captions]:
                nothing = False
                yield pairs
        if nothing:
            raise _nothing_said(self.narratives.parent)


def _nothing_said(folder: Path) -> DataError:
    return DataError(f"{folder}: nothing was said in any stable chunk, so there is nothing to export")


def _write_narratives(narrated: Narrated, args: argparse.Namespace) -> int:
    from medllava.instruct_gen.localized import localized_narrative, medical_narrative
    from medllava.instruct_gen.pairs import is_sure
    from medllava.jsonl import write_records

    if args.out.is_dir():
        raise ConfigError(f"--out {args.out}: is a folder; expected the name of a .jsonl file to write")
    utterances = spread = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal utterances, spread
        number = 0
        for narrator, pairs in enumerate(narrated.spoken()):
            siblings = [narrative for narrative, _ in pairs]
            video = narrated.videos.get(siblings[0].video)
            domain = video.domain if video is not None and video.domain else args.domain
            for narrative, caption in pairs:
                utterances += len(narrative.utterances)
                spread += sum(not utterance.words for utterance in narrative.utterances)
                if args.format == "localized-narratives":
                    yield localized_narrative(narrative, args.dataset_id, narrator)
                else:
                    phrases = tuple(
                        phrase if is_sure(phrase, args.min_confidence) else phrase.model_copy(update={"box": None})
                        for phrase in caption.phrases
                    )
                    sure = caption.model_copy(update={"phrases": phrases})
                    yield {"index": number} | medical_narrative(narrative, sure, video, siblings, domain)
                number += 1

    count = write_records(args.out, rows())
    print(f"{count} narratives with {utterances} utterances -> {args.out}")
    if spread:
        print(f"{spread} utterances have no word times in their transcript: their words are spread evenly over them")
    return 0


def _write_pairs(narrated: Narrated, args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from medllava.instruct_gen.pairs import Pair, read_pairs, write_folder, write_shards
    from medllava.jsonl import write_json

    captions = (caption for pairs in narrated.spoken() for _, caption in pairs)
    parts: Counter[str] = Counter()

    def pairs() -> Iterator[Pair]:
        shown = tqdm(captions, desc="export", unit="image", total=len(narrated.captions))
        options = {"crops": args.crops, "least": args.min_confidence, "kind": args.image_format}
        for pair in read_pairs(shown, args.narrated, **options):
            parts[pair.about["part"]] += 1
            yield pair

    with _new_folder(args.out) as folder:
        note: dict[str, Any] = {"format": args.format, "crops": args.crops, "min_confidence": args.min_confidence}
        if args.format == "webdataset":
            note["shards"] = write_shards(pairs(), folder, args.shard_size, args.image_format)
        else:
            write_folder(pairs(), folder, args.image_format)
        write_json(folder / NOTE, note | {"pairs": dict(parts)})
    what = f" in {len(note['shards'])} shards" if "shards" in note else ""
    print(f"{parts['image']} images and {parts['region']} regions with their text{what} -> {args.out}")
    return 0


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that takes ``out``'s place once all is written. Raises ConfigError if something else lies there."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / NOTE).is_file()):
        raise ConfigError(f"--out {out}: is there already and was not written by export; choose another or delete it")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    if out.is_dir():
        shutil.rmtree(out)
    part.rename(out)
