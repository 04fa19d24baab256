"""The tables of docs/scale.md: what data of Quilt's size takes, from the measured rates and the prices below.

    python benchmarks/scale.py            # print the tables
    python benchmarks/scale.py --write    # put them into docs/scale.md
    python benchmarks/scale.py --check    # exit code 1 if docs/scale.md has other ones

Rates are read from results/bookkeeping.json (``python benchmarks/bookkeeping.py``) and, if it is there, generate.json.
Another price, GPU or number of cores is a change of a constant here.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.synthetic import write_captions
from medllava.jsonl import atomic_write, read_json

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "scale.md"
RECIPE = HERE.parent / "instruct_gen" / "recipes" / "quilt_instruct.yaml"

# -- Quilt's size, as published -------------------------------------------------------------------------------------
HOURS, VIDEOS, PICTURES, PAIRS, SAMPLES = 1087, 4149, 437_878, 723_000, 107_131

# -- prices in US dollars, November 2026, on demand; the teacher's are the recipe's ------------------------------------
CORE_HOUR, GPU_HOUR, DISK_GB_MONTH = 0.045, 3.50, 0.08

# -- assumptions ------------------------------------------------------------------------------------------------------
CORES = 64
VIDEO_MBIT_S = 1.5
"""Of 720p lectures as they are published."""
LATENCY_S, CALLS = 6.0, 64
"""Of a teacher's reply, and calls in flight."""
PEAK, MFU = 989e12, 0.4
"""Operations per second of an H200 in bfloat16, and the part of them that training reaches (``medllava train --plan``
assumes the same)."""
LANGUAGE, TOWER, VISION_TOKENS = 6.48e9, 0.30e9, 576
"""Weights in the layers of a 7B language model and of CLIP-L/336; tokens of a picture."""
TRAINED, TRAINED_BYTES = 6.76e9, 18
"""Weights that train in stage ``full``, embeddings and output head among them, and what each takes (``--plan`` has the
same): itself in float32, its copy in bfloat16 for the product, its gradient and AdamW's two means."""
TEXT_TOKENS = {"stage 1": 60, "stage 2": 300}
BATCH_REQUESTS, BATCH_BYTES = 50_000, 200e6
"""Of one file at OpenAI."""
KINDS = ("conversation", "description", "complex_reasoning", "iterative_abduction", "grounding")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    parser.add_argument("--check", action="store_true", help="compare them with docs/scale.md")
    given = parser.parse_args()
    made = tables()
    if not (given.write or given.check):
        print("\n\n".join(f"[{name}]\n{table}" for name, table in made.items()))
        return 0
    old = PAGE.read_text(encoding="utf-8")
    new = filled(old, made)
    if given.write:
        with atomic_write(PAGE) as file:
            file.write(new)
    elif new != old:
        print(f"{PAGE}: not what the results say; run: python benchmarks/scale.py --write")
        return 1
    return 0


def filled(page: str, made: dict[str, str]) -> str:
    """The page with each ``<!-- table NAME -->`` ... ``<!-- end -->`` holding that table."""
    for name, table in made.items():
        pattern = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = pattern.subn(lambda match, text=table: f"{match[1]}{text}\n{match[2]}", page)
        if count != 1:
            raise SystemExit(f"{PAGE}: expected one place for the table {name}, found {count}")
    return page


def tables() -> dict[str, str]:
    rates = _figures("bookkeeping")
    return {
        "narrate": _narrate(rates), "generate": _generate(), "train": _train(), "bookkeeping": _bookkeeping(rates),
    }


def _figures(name: str) -> dict[str, float]:
    path = HERE / "results" / f"{name}.json"
    rows = read_json(path)["rows"] if path.is_file() else []
    return {row["figure"].removeprefix(f"{name}."): row["value"] for row in rows}


def _narrate(rates: dict[str, float]) -> str:
    seconds = 3600 * HOURS
    core_hours = rates["narrate_cpu_per_s"] * HOURS
    pictures_gb = PICTURES * rates["picture_size"] * 2**20 / 1e9
    videos_gb = seconds * VIDEO_MBIT_S / 8 / 1000
    records_gb = seconds * rates["records_per_s"] / 1e9
    wall_h = core_hours / CORES
    return _table("what", ("arithmetic", "takes"), [
        ("CPU", f"{HOURS:,} h x {_round(rates['narrate_cpu_per_s'])} CPU s per s", f"{_round(core_hours)} core hours"),
        (f"wall time on {CORES} cores", f"{_round(core_hours)} h / {CORES}", _time(wall_h)),
        ("money", f"{_round(core_hours)} core hours x ${CORE_HOUR}", f"${_round(core_hours * CORE_HOUR)}"),
        ("videos on disk", f"{seconds:,} s x {VIDEO_MBIT_S} Mbit/s", f"{_round(videos_gb)} GB"),
        ("pictures on disk", f"{PICTURES:,} x {_round(rates['picture_size'])} MiB", f"{_round(pictures_gb)} GB"),
        ("records on disk, twice (parts)", f"2 x {seconds:,} s x {_round(rates['records_per_s'])} bytes",
         f"{_round(2 * records_gb)} GB"),
        ("read over the network while it runs", f"{_round(videos_gb)} GB / {_time(wall_h)}",
         f"{_round(videos_gb * 1000 / (3600 * wall_h))} MB/s"),
        ("keeping all that", f"{_round(videos_gb + pictures_gb + 2 * records_gb)} GB x ${DISK_GB_MONTH}",
         f"${_round((videos_gb + pictures_gb + 2 * records_gb) * DISK_GB_MONTH)} a month"),
    ])


def _generate() -> str:
    from medllava.config import load_recipe
    from medllava.instruct_gen.asking import Plan
    from medllava.instruct_gen.captions import CaptionFile
    from medllava.instruct_gen.estimate import estimate_run
    from medllava.instruct_gen.kinds import load_prompts
    from medllava.instruct_gen.recipe import GenerateRecipe
    from medllava.llm.cache import ReplyCache

    recipe = load_recipe(RECIPE, GenerateRecipe, [])
    recipe = recipe.model_copy(update={"prompts": RECIPE.parent / recipe.prompts})
    count = 120
    with tempfile.TemporaryDirectory() as name:
        write_captions(Path(name) / "captions.jsonl", count)
        plan = Plan(CaptionFile(Path(name) / "captions.jsonl"), recipe, load_prompts(recipe))
        estimated = estimate_run(plan, ReplyCache(Path(name) / "replies.jsonl"), None)
    asked = [estimated["case facts"], *(estimated[kind] for kind in KINDS)]
    each = 1 / (count * len(KINDS))
    calls, prompt, reply = (
        sum(getattr(one, column) for one in asked) * each for column in ("calls", "prompt_tokens", "completion_tokens")
    )
    price = recipe.usd_per_million
    assert price is not None
    usd = price.usd(round(SAMPLES * prompt), round(SAMPLES * reply))
    share = _figures("generate").get("share_of_limit_64", 0.95)
    hours = SAMPLES * calls * LATENCY_S / CALLS / share / 3600
    size = SAMPLES * calls * (prompt / calls * 4.5 + 600)
    files = max(SAMPLES * calls / BATCH_REQUESTS, size / BATCH_BYTES)
    per_minute = SAMPLES * (prompt + reply) / (60 * hours)
    return _table("what", ("arithmetic", "takes"), [
        ("calls", f"{SAMPLES:,} samples x {calls:.2f}", f"{_round(SAMPLES * calls)}"),
        ("prompt tokens", f"{SAMPLES:,} x {prompt:,.0f}", f"{_round(SAMPLES * prompt / 1e6)} million"),
        ("reply tokens", f"{SAMPLES:,} x {reply:,.0f}", f"{_round(SAMPLES * reply / 1e6)} million"),
        (f"money, {recipe.model}", f"at ${price.input:g} and ${price.output:g} a million", f"${_round(usd)}"),
        ("the same through the batch interface", f"x {price.batch_factor:g}", f"${_round(usd * price.batch_factor)}"),
        (f"wall time, {CALLS} calls in flight", f"{_round(SAMPLES * calls)} x {LATENCY_S:g} s / {CALLS} / {share:.2f}",
         _time(hours)),
        ("tokens a minute meanwhile", "limits of the account", f"{_round(per_minute / 1e6)} million"),
        ("files to upload with `--batch`", f"at most {BATCH_REQUESTS:,} requests and {BATCH_BYTES / 1e6:.0f} MB each",
         f"{_ceil(files)} or more"),
    ])


def _train() -> str:
    rows = []
    for stage, samples in (("stage 1", PAIRS), ("stage 2", SAMPLES)):
        tokens = samples * (VISION_TOKENS + TEXT_TOKENS[stage])
        # Forward, and backward through frozen weights: 4 operations a weight and token; the frozen tower forward only.
        operations = 4 * LANGUAGE * tokens + 2 * TOWER * (VISION_TOKENS + 1) * samples
        hours = operations / (PEAK * MFU) / 3600
        what = {"stage 1": "stage 1, projector", "stage 2": "stage 2, LoRA"}[stage]
        rows.append((
            f"{what}, {samples:,} samples", f"{tokens / 1e9:.2f} billion tokens, {operations:.1e} operations",
            f"{_round(hours)} GPU hours, ${_round(hours * GPU_HOUR)}",
        ))
    full = 6 * LANGUAGE * SAMPLES * (VISION_TOKENS + TEXT_TOKENS["stage 2"]) / (PEAK * MFU) / 3600
    taken = f"{_round(full)} GPU hours, ${_round(full * GPU_HOUR)}"
    rows.append(("stage 2, full", "6 operations a weight and token", taken))
    rows.append(("memory, LoRA in bfloat16", "2 bytes a weight, packed rows of 2,048", "one card of 24 GB or more"))
    rows.append(("memory, full with AdamW", f"{TRAINED_BYTES} bytes x {TRAINED / 1e9:.1f} billion",
                 f"{_round(TRAINED_BYTES * TRAINED / 1e9)} GB over the cards (ZeRO-3)"))
    rows.append(("features kept on disk", f"{PAIRS:,} x {VISION_TOKENS} x 1,024 x 2 bytes",
                 f"{_round(PAIRS * VISION_TOKENS * 2048 / 1e9)} GB"))
    return _table("what", ("arithmetic", "takes"), rows)


def _bookkeeping(rates: dict[str, float]) -> str:
    def of(name: str, work: str) -> str:
        return f"{_round(rates[f'{work}_cpu'])} CPU s, {_round(rates[f'{name}_peak_memory'])} MiB"

    rows = [(
        f"`narrate` given again over {rates['narrate_videos']:,.0f} finished videos,"
        f" {rates['narrate_chunks']:,.0f} pictures", of("narrate", "narrate_resumed"),
    )]
    names = {
        "check": "`check` of {n} rows", "leaks": "`check --against`: do val and train share anything", "card": "`card`",
        "export_localized": "`export --format localized-narratives`",
        "export_medical": "`export --format medical-narratives`", "export_webdataset": "`export --format webdataset`",
    }
    rows += [(text.format(n=f"{SAMPLES:,}"), of(name, name)) for name, text in names.items()]
    generate = _figures("generate")
    if generate:
        for what, name in (
            ("`generate`: {n} samples made of the replies that are there", "bookkeeping"),
            ("`generate` given again, all {n} samples finished", "finished"),
        ):
            rows.append((
                what.format(n=f"{generate['resumed_samples']:,.0f}"),
                f"{_round(generate[f'{name}_cpu'])} CPU s, {_round(generate[f'{name}_peak_memory'])} MiB",
            ))
    opened = rates["picture_opened_cpu"] * PICTURES / 1000 / 3600
    rows.append((
        f"opening all {PICTURES:,} pictures once (`check`, `card`), at {_round(rates['picture_opened_cpu'])} ms",
        f"{_round(opened)} core hours",
    ))
    return _table("what", ("takes, on the machine of the results",), rows)


def _table(first: str, others: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    head = [first, *others]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _round(value: float) -> str:
    """Two figures that mean something, no exponent."""
    if value >= 100:
        digits = len(str(int(value)))
        return f"{round(value, 2 - digits):,.0f}"
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _time(hours: float) -> str:
    if hours < 2:
        return f"{_round(hours * 60)} minutes"
    return f"{_round(hours)} hours" if hours < 72 else f"{_round(hours / 24)} days"


def _ceil(value: float) -> int:
    return -int(-value // 1)


if __name__ == "__main__":
    raise SystemExit(main())
