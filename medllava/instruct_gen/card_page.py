"""A data card's figures as an HTML page, as Markdown with a Hugging Face header, and as JSON.

Everything that comes from the data is escaped: a transcript may hold anything.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from medllava.errors import DataError, MissingExtraError
from medllava.geometry import Box, parse_boxes
from medllava.images import load_image, to_data_uri
from medllava.instruct_gen.card_figures import PARTS, Boxes, Example, Figures, Spread, name_of, plain_time
from medllava.instruct_gen.card_plots import (
    CAPTION_COLOUR,
    SAMPLE_COLOUR,
    TRACE_COLOUR,
    bars,
    heat_map,
    histogram,
    overlay,
)

MOST_VIDEOS = 500
"""Videos named on the page; all of them are in datacard.json."""

_THUMBNAIL = 480
_LEAKS = {
    "leak: video": "a video", "leak: image": "a picture (same pixels)",
    "near-duplicate image": "a picture that looks the same",
}
_WHO = {"user": "Question", "assistant": "Answer", "system": "System"}
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def as_html(figures: Figures, title: str, images: Path | None) -> str:
    """The whole page: style and pictures are inside it, it has no script and asks nothing of any network."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("jinja2", "gen", error) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )
    return environment.get_template("datacard.html").render(
        title=title, tiles=_tiles(figures), kind_rows=_kind_rows(figures), kind_notes=_notes(figures),
        label_tables=_label_plots(figures),
        video_rows=_video_rows(figures), most_videos=MOST_VIDEOS, length_rows=_length_rows(figures),
        length_plots=[
            ("Questions", histogram(figures.question_words, "Words per question", "words per question")),
            ("Answers", histogram(figures.answer_words, "Words per answer", "words per answer")),
        ],
        box_notes=_box_notes(figures), box_plots=_box_plots(figures), drop_rows=_drop_rows(figures),
        price_rows=_price_rows(figures), split_rows=_split_rows(figures), leak_rows=_leak_rows(figures),
        leak_free=_leak_free(figures), verdict=_verdict(figures), split_note=_split_note(figures),
        cards=[_card(example, images, words=not figures.unredacted) for example in figures.examples],
        made_rows=_made_rows(figures), colours=(CAPTION_COLOUR, SAMPLE_COLOUR, TRACE_COLOUR),
    )


def as_markdown(figures: Figures, title: str, license_name: str) -> str:
    """The card as the Hugging Face Hub shows it: a YAML header, then the same tables."""
    lines = ["---", yaml.safe_dump(_header(figures, title, license_name), sort_keys=False, allow_unicode=True).strip()]
    lines += ["---", "", f"# {_md(title)}", ""]
    lines += [
        "Instruction data made from narrated videos by medllava. The same figures with plots and"
        f" {len(figures.examples)} samples with their pictures are in [datacard.html](datacard.html).", "",
    ]
    lines += [f"- {number} {name}" for number, name in _tiles(figures)] + [""]
    lines += _table(
        "Samples by kind",
        ("kind", "samples", "train", "val", "images", "exchanges", "words per question", "words per answer"),
        _kind_rows(figures),
    )
    notes = _notes(figures)
    lines += [*(f"- {_md(note)}" for note in notes), ""] if notes else []
    for heading, counts in figures.labels.items():
        what, _, key = heading.partition(" by ")
        lines += _table(heading.capitalize(), (key, what), _shortened(counts))
    rows = _video_rows(figures)
    lines += _table("Videos", ("video", "samples", "images", "part"), rows[:50])
    if len(rows) > 50:
        lines += [f"{len(rows) - 50:,} more are in datacard.json.", ""]
    lines += _table(
        "Lengths in words", ("of", "number", "mean", "median", "90th percentile", "longest"), _length_rows(figures)
    )
    lines += ["## Boxes", "", *(f"- {_md(note)}" for note in _box_notes(figures)), ""]
    for heading, boxes in _box_sets(figures):
        if boxes.n:
            lines += _table(f"Area of the boxes in {heading}", ("part of the picture", "boxes"), _bins(boxes.area), 3)
    drops = _drop_rows(figures)
    lines += _table("What was dropped", ("reason", "number", "of all", "the first one"), drops) if drops else [
        "## What was dropped", "", "Nothing.", ""
    ]
    lines += _table("Price and tokens", ("", ""), _price_rows(figures)) if figures.summary else []
    if figures.split:
        lines += _table("Split", ("part", "samples", "images", "videos"), _split_rows(figures))
        lines += [f"**{_verdict(figures)}**", ""]
        note = _split_note(figures)
        lines += [note, ""] if note else []
        leaks = _leak_rows(figures)
        lines += _table("Shared by train and val", ("what", "rows of val", "the first one"), leaks, 3)
    lines += ["## Three samples", ""]
    for example in figures.examples[:3]:
        lines += [_fenced(json.dumps(example.sample.to_llava(), ensure_ascii=False, indent=1)), ""]
    lines += _table("How it was made", ("", ""), _made_rows(figures))
    return "\n".join(lines).rstrip() + "\n"


def as_json(figures: Figures) -> dict[str, Any]:
    """The figures for programs; pictures and examples are left out."""
    split = figures.split
    return {
        "samples": figures.samples, "exchanges": figures.exchanges, "images": figures.images,
        "videos": {
            name: {"samples": count.samples, "images": len(count.images), "part": count.part or None}
            for name, count in figures.videos.items()
        },
        "kinds": {
            kind: {
                "samples": count.samples, "train": count.train, "val": count.val, "images": len(count.images),
                "exchanges": count.exchanges,
            }
            for kind, count in figures.kinds.items()
        },
        "labels": {key: dict(_ranked(counts)) for key, counts in figures.labels.items()},
        "question_words": vars(figures.question_words), "answer_words": vars(figures.answer_words),
        "boxes": {
            heading: {"n": boxes.n, "of": boxes.of, "area": vars(boxes.area), "heat": boxes.heat}
            for heading, boxes in _box_sets(figures)
        },
        "no_box": figures.no_box, "left_out": figures.left_out, "answers": figures.answers, "case_facts": figures.facts,
        "dropped": {name: count for name, (count, _) in figures.dropped.items()},
        "summary": figures.summary,
        "teachers": dict(_ranked(figures.teachers)),
        "split": split and {
            "rows": split.rows, "images": split.images, "videos": split.videos,
            "unreadable_images": split.unreadable_images,
            "leaks": [vars(leak) for leak in split.leaks],
        },
        "examples": [example.sample.id for example in figures.examples],
    }


# -- rows of tables, as text


def _tiles(figures: Figures) -> list[tuple[str, str]]:
    usd = figures.summary.get("usd")
    tiles = [
        (f"{figures.samples:,}", "samples"), (f"{figures.exchanges:,}", "questions with answers"),
        (f"{figures.images:,}", "images"), (f"{len(figures.videos):,}", "videos"),
    ]
    if figures.caption_boxes:
        tiles.append((f"{figures.caption_boxes.n:,}", "boxes pointed at"))
    dropped = sum(count for count, _ in figures.dropped.values())
    tiles.append((f"{dropped:,}", "dropped"))
    if usd is not None:
        tiles.append((f"${usd:,.2f}", "paid"))
    return tiles


def _kind_rows(figures: Figures) -> list[tuple[str, ...]]:
    rows = []
    for kind, count in figures.kinds.items():
        asked, told = _mean(count.question_words), _mean(count.answer_words)
        numbers = (count.samples, count.train, count.val, len(count.images), count.exchanges)
        rows.append((name_of(kind), *(f"{number:,}" for number in numbers), asked, told))
    return rows


def _notes(figures: Figures) -> list[str]:
    """What samples and case facts say of themselves, where they do."""
    notes = []
    for key, what in (("answers", "Answers of single questions"), ("image", "The image for these answers")):
        if figures.answers[key]:
            counted = ", ".join(f"{count:,} {name}" for name, count in _ranked(figures.answers[key]))
            notes.append(f"{what}: {counted}.")
    if figures.left_out:
        why = ", ".join(f"{count:,} {reason}" for reason, count in _ranked(Counter(figures.left_out)))
        notes.append(f"Chunks of video that were left out: {why}.")
    facts = figures.facts
    if facts:
        told = f"{facts['with a diagnosis']:,} say a diagnosis, {facts['of a single case']:,} are of a single case"
        notes.append(f"Case facts of {facts['videos']:,} videos: {told}; {facts['clues']:,} clues.")
    return notes


def _mean(values: Sequence[int]) -> str:
    return f"{sum(values) / len(values):.1f}" if values else ""


def _video_rows(figures: Figures) -> list[tuple[str, str, str, str]]:
    return [
        (name, f"{count.samples:,}", f"{len(count.images):,}", count.part or "\N{EN DASH}")
        for name, count in figures.videos.items()
    ]


def _length_rows(figures: Figures) -> list[tuple[str, ...]]:
    from medllava.instruct_gen.card_figures import spread

    rows = [_length_row("all questions", figures.question_words), _length_row("all answers", figures.answer_words)]
    for kind, count in figures.kinds.items():
        rows.append(_length_row(f"{name_of(kind)}: questions", spread(count.question_words)))
        rows.append(_length_row(f"{name_of(kind)}: answers", spread(count.answer_words)))
    return rows


def _length_row(name: str, found: Spread) -> tuple[str, ...]:
    return name, f"{found.n:,}", f"{found.mean:.1f}", f"{found.median:g}", f"{found.p90:g}", f"{found.most:g}"


def _box_sets(figures: Figures) -> list[tuple[str, Boxes]]:
    sets = [("captions", figures.caption_boxes), ("samples", figures.sample_boxes)]
    return [(heading, boxes) for heading, boxes in sets if boxes is not None]


def _box_notes(figures: Figures) -> list[str]:
    notes = []
    for heading, boxes in _box_sets(figures):
        if boxes.of:
            told = f"{boxes.n:,} of {boxes.of:,} phrases ({boxes.n / boxes.of:.0%}) have a box that was pointed at."
        else:
            told = f"{boxes.n:,} boxes are written in the {heading}' questions and answers."
        if boxes.n:
            area = boxes.area
            told += f" They cover {area.mean:.0%} of the picture on average (median {area.median:.0%}, nine in ten"
            told += f" {area.p90:.0%} or less)."
        notes.append(told)
    if figures.no_box:
        why = ", ".join(f"{count:,} {reason}" for reason, count in _ranked(Counter(figures.no_box)))
        notes.append(f"Phrases without a box: {why}.")
    return notes


def _box_plots(figures: Figures) -> list[tuple[str, str]]:
    plots = []
    for heading, boxes in _box_sets(figures):
        if boxes.n:
            plots.append((f"Where boxes lie: {heading}", heat_map(boxes, f"Where the boxes in {heading} lie")))
            area = histogram(boxes.area, f"Area of the boxes in {heading}", "part of the picture")
            plots.append((f"How large boxes are: {heading}", area))
    return plots


def _bins(found: Spread) -> list[tuple[str, str]]:
    return [
        (f"{low:g} to {high:g}", f"{count:,}")
        for low, high, count in zip(found.edges, found.edges[1:], found.counts, strict=False)
    ]


def _label_plots(figures: Figures) -> list[tuple[str, str]]:
    return [
        (heading.capitalize(), bars(_shortened(counts), heading.capitalize()))
        for heading, counts in figures.labels.items()
    ]


def _shortened(counts: Counter[str], most: int = 20) -> list[tuple[str, int]]:
    ranked = _ranked(counts)
    rest = sum(count for _, count in ranked[most:])
    return ranked[:most] + ([("all others", rest)] if rest else [])


def _ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _drop_rows(figures: Figures) -> list[tuple[str, str, str, str]]:
    all_of_them = figures.samples + sum(count for count, _ in figures.dropped.values())
    return [
        (name, f"{count:,}", f"{count / all_of_them:.1%}", first[:300])
        for name, (count, first) in figures.dropped.items()
    ]


def _price_rows(figures: Figures) -> list[tuple[str, str]]:
    summary = figures.summary
    if not summary:
        return []
    rows = []
    usd, replies = summary.get("usd"), summary.get("replies")
    if usd is not None:
        each = f", ${1000 * usd / figures.samples:,.2f} per thousand samples" if figures.samples else ""
        rows.append(("paid", f"${usd:,.4f}{each}"))
    else:
        rows.append(("paid", "not known: the recipe names no price"))
    if replies is not None:
        rows.append(("replies", f"{replies:,}"))
    tokens = (
        ("prompt_tokens", "prompt tokens"), ("cached_tokens", "of these from the provider's cache"),
        ("completion_tokens", "reply tokens"),
    )
    for key, name in tokens:
        if summary.get(key):
            rows.append((name, f"{summary[key]:,} ({summary[key] / max(figures.samples, 1):,.0f} per sample)"))
    price = summary.get("recipe", {}).get("usd_per_million")
    if isinstance(price, dict):
        rows.append(("price per million tokens", ", ".join(f"{key} ${value}" for key, value in price.items())))
    return rows


def _split_rows(figures: Figures) -> list[tuple[str, ...]]:
    split = figures.split
    if split is None:
        return []
    return [
        (part, f"{split.rows[part]:,}", f"{split.images[part]:,}", f"{split.videos[part]:,}") for part in PARTS
    ]


def _leak_rows(figures: Figures) -> list[tuple[str, str, str]]:
    rows = []
    for kind, name in _LEAKS.items():
        found = [leak for leak in figures.split.leaks if leak.kind == kind] if figures.split else []
        first = f"row {found[0].row} ({found[0].id}): {found[0].detail}" if found else ""
        rows.append((name, f"{len(found):,}", first))
    return rows


def _leak_free(figures: Figures) -> bool:
    return figures.split is not None and not figures.split.leaks


def _verdict(figures: Figures) -> str:
    if figures.split is None:
        return ""
    if not figures.split.leaks:
        return "No leak found: train and val share no video and no picture."
    rows = len({leak.row for leak in figures.split.leaks})
    if all(leak.kind == "near-duplicate image" for leak in figures.split.leaks):
        return f"Look at this: {rows:,} rows of val show a picture that looks like one of train."
    return f"Leak: {rows:,} rows of val share a video or a picture with train; scores on val would be too good."


def _split_note(figures: Figures) -> str:
    if figures.split is None:
        return ""
    if not figures.split.rows["val"]:
        return "val is empty: the recipe's val_fraction sets videos aside."
    if figures.split.unreadable_images:
        return (
            f"{figures.split.unreadable_images:,} pictures could not be opened, so only their videos were compared;"
            " give the folder that narrate wrote to --narrated."
        )
    return ""


def _made_rows(figures: Figures) -> list[tuple[str, str]]:
    teachers = ", ".join(f"{name} ({count:,} samples)" for name, count in _ranked(figures.teachers))
    rows = [("teacher", teachers)] if teachers else []
    for key, value in figures.summary.get("recipe", {}).items():
        rows.append((key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    prompts = figures.summary.get("prompts")
    if prompts:
        rows.append(("prompts", json.dumps(prompts, ensure_ascii=False)))
    return rows


def _card(example: Example, images: Path | None, *, words: bool) -> dict[str, Any]:
    sample, caption = example.sample, example.caption
    made = sample.provenance
    times = [plain_time(time) for time in (made.start_s, made.end_s) if time is not None]
    where = " \N{MIDDLE DOT} ".join(
        part for part in (made.video or "", "\N{EN DASH}".join(times), example.part) if part
    )
    phrases: list[tuple[int | None, str, str]] = []
    boxes: list[tuple[int, Box]] = []
    for phrase in caption.phrases if caption else ():
        if phrase.box:
            boxes.append((len(boxes) + 1, phrase.box))
        if words:
            phrases.append((len(boxes) if phrase.box else None, plain_time(phrase.start_s), phrase.text))
    card: dict[str, Any] = {
        "kind": name_of(sample.kind), "id": sample.id, "where": where, "phrases": phrases, "picture": None,
        "turns": [(turn.role, _WHO[turn.role], turn.text.replace("<image>", "").strip()) for turn in sample.turns],
        "alt": f"Picture of {made.chunk or sample.id}, {made.video or 'video unknown'}",
    }
    if not sample.images:
        return card | {"alt": "text only"}
    try:
        image = load_image((images or Path()) / sample.images[0])
    except DataError:
        # The card can be made where the pictures are not; it then shows the words alone.
        return card | {"alt": f"{sample.images[0]}: no such picture here"}
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    trace = example.narrative.trace if example.narrative else ()
    own = [box for turn in sample.turns for box in parse_boxes(turn.text)]
    return card | {
        "picture": to_data_uri(image, "JPEG"), "width": image.width, "height": image.height,
        "overlay": overlay(image.width, image.height, trace, boxes, own),
    }


# -- Markdown


def _header(figures: Figures, title: str, license_name: str) -> dict[str, Any]:
    size = next((name for limit, name in _SIZES if figures.samples < limit), "n>1M")
    header: dict[str, Any] = {
        "pretty_name": title,
        "license": license_name,
        "language": ["en"],
        "task_categories": ["visual-question-answering", "image-text-to-text"],
        "tags": ["medical", "histopathology", "visual-instruction-tuning", "llava", "synthetic"],
        "annotations_creators": ["machine-generated"],
        "size_categories": [size],
    }
    if figures.split:
        files = [{"split": "train", "path": "train.json"}]
        files += [{"split": "validation", "path": "val.json"}] if figures.split.rows["val"] else []
        header["configs"] = [{"config_name": "default", "data_files": files}]
    return header


def _table(
    heading: str, columns: Sequence[str], rows: Sequence[Sequence[object]], level: int = 2
) -> list[str]:
    lines = [f"{'#' * level} {heading}", "", "| " + " | ".join(columns) + " |"]
    lines.append("| --- |" + " ---: |" * (len(columns) - 1) if columns[-1] != "" else "| --- | --- |")
    lines += ["| " + " | ".join(_md(str(cell)) for cell in row) + " |" for row in rows]
    return [*lines, ""]


def _md(text: str) -> str:
    """One line of text that Markdown shows as it is."""
    single = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", escape(single, quote=False))


def _fenced(text: str) -> str:
    """A block that nothing inside can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}json\n{text}\n{fence}"
