"""Whether a run of ``generate`` is finished already: by digests of all it was made of and of all it wrote.

OUT/finished.json is written last, and only where no reply is absent. Where everything still has the digest that stands
there, the same command would write the same bytes again, so it need not. A file that was lost or edited, a reply that
came since, another recipe or prompt, and another version of this program each make the run take place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import medllava
from medllava.errors import DataError
from medllava.instruct_gen.asking import Plan
from medllava.jsonl import file_sha256, read_json, write_json

NOTE = "finished.json"
REPLIES = "replies.jsonl"
_JUDGES = ("datasketch", "pydantic", "rapidfuzz")
"""Packages whose version may decide over a sample."""


def write_note(plan: Plan, out: Path, results: Sequence[str]) -> None:
    """Note that ``results``, files of ``out``, are all that there is to be made."""
    digests = {name: file_sha256(out / name) for name in results}
    write_json(out / NOTE, {"made_of": _made_of(plan, out), "results": digests})


def is_finished(plan: Plan, out: Path) -> bool:
    """Whether ``out`` holds what a run would write into it."""
    if not (out / NOTE).is_file():
        return False
    try:
        note = read_json(out / NOTE)
        return bool(
            note["made_of"] == _made_of(plan, out)
            and all(file_sha256(out / name) == digest for name, digest in note["results"].items())
        )
    except (OSError, DataError, KeyError, TypeError, AttributeError):
        return False


def _made_of(plan: Plan, out: Path) -> dict[str, str]:
    captions, program = hashlib.sha256(), hashlib.sha256()
    for caption in plan.captions:  # As the teacher sees them: what was redacted, and how, counts.
        captions.update(caption.model_dump_json().encode() + b"\n")
    package = Path(medllava.__file__).parent
    for pattern in ("*.py", "instruct_gen/*.py", "llm/*.py"):  # Nothing else of it has a say.
        for source in sorted(package.glob(pattern)):
            program.update(source.read_bytes())
    for name in _JUDGES:
        program.update(metadata.version(name).encode())
    # Neither where the prompts lie nor how many calls are in flight changes a sample.
    recipe = plan.recipe.model_dump_json(exclude={"prompts", "concurrency"})
    prompts = "".join(f"{name} {prompt.hash}\n" for name, prompt in plan.prompts.items())
    return {
        "captions": captions.hexdigest(), "recipe": hashlib.sha256((recipe + prompts).encode()).hexdigest(),
        "replies": file_sha256(out / REPLIES), "program": program.hexdigest(),
    }
