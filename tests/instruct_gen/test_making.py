"""The same bytes by one process and by several; none of them outlives the one that asked for it."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from medllava.geometry import QUADRANTS, Box
from medllava.instruct_gen import making
from medllava.instruct_gen.asking import Plan, Trouble, read_facts
from medllava.instruct_gen.assemble import write_results
from medllava.instruct_gen.captions import CaptionFile
from medllava.instruct_gen.kinds import UnusableReplyError, load_prompts
from medllava.instruct_gen.recipe import GenerateRecipe
from medllava.instruct_gen.records import GroundedCaption, Phrase
from medllava.jsonl import write_records
from medllava.llm.base import Reply
from medllava.llm.cache import ReplyCache
from medllava.phantom import grammar
from medllava.phantom.replies import reply_to

ROOT = Path(__file__).parents[2]
KINDS = {
    "caption": {"per_caption": 3},
    "conversation": {},
    "complex_reasoning": {},
    "iterative_abduction": {},
    "grounding": {},
    "question": {},
}
ENDLESS = """
import itertools, multiprocessing, signal, sys
from pathlib import Path
from medllava.instruct_gen import making
from medllava.instruct_gen.asking import Plan
from medllava.instruct_gen.captions import CaptionFile
from medllava.instruct_gen.kinds import load_prompts
from medllava.instruct_gen.recipe import GenerateRecipe
from medllava.llm.cache import KeptReplies
if __name__ == "__main__":
    # Tests that a script starts in the background are given an ignored SIGINT, and hand that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    making.MANY, making._BATCH, making.usable_cores = 1, 5, lambda: 2
    folder = Path(sys.argv[1])
    recipe = GenerateRecipe.model_validate_json((folder / "recipe.json").read_text())
    plan = Plan(CaptionFile(folder / "captions.jsonl"), recipe, load_prompts(recipe))
    tasks = itertools.cycle(plan.tasks({}))
    try:
        for number, _ in enumerate(making.Maker(recipe, plan.prompts, KeptReplies(folder / "no", {})).make_all(tasks)):
            if number == 0:
                print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    except KeyboardInterrupt:
        sys.exit(f"stopped, {len(multiprocessing.active_children())} left")
"""


@pytest.fixture
def plan(tmp_path):
    """Of four videos, three of which say a diagnosis."""
    rng, captions = random.Random(3), []
    for number in range(20):
        video, phrases = number // 5, []
        for at, kind in enumerate(rng.sample(list(grammar.FINDINGS), 3)):
            place = rng.choice(QUADRANTS)
            x, y = 0.1 + 0.5 * ("right" in place), 0.1 + 0.5 * ("lower" in place)
            text = f"In the {place} there is {grammar.article(rng.choice(grammar.FINDINGS[kind]))}."
            box = Box(x1=x, y1=y, x2=x + 0.2, y2=y + 0.2)
            phrases.append(Phrase(text=text, start_s=10 * number + at, end_s=10 * number + at + 1, box=box))
        if video < 3:
            said = f"Is this {list(grammar.DIAGNOSES)[video]}? Yes, this is {list(grammar.DIAGNOSES)[video]}."
            phrases.append(Phrase(text=said, start_s=10 * number + 5, end_s=10 * number + 6))
        captions.append(
            GroundedCaption(
                id=f"v{video}-{number}",
                video=f"v{video}.mp4",
                image=f"frames/{number}.png",
                crop_px=(0, 0, 320, 240),
                phrases=tuple(phrases),
            )
        )
    write_records(tmp_path / "captions.jsonl", captions)
    recipe = GenerateRecipe(model="m", prompts=ROOT / "instruct_gen/prompts", kinds=KINDS, val_fraction=0.4)
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    return Plan(CaptionFile(tmp_path / "captions.jsonl"), recipe, load_prompts(recipe))


def reply_text(request):
    if request.schema_name != "NarratorReply":
        return reply_to(request.messages)
    name = re.search(r"Is this ([^?]+)\?", request.messages[-1]["content"])[1]
    said = {"question": f"Is this {name}?", "answer": f"Yes, this is {name}.", "quote": f"Yes, this is {name}."}
    return json.dumps(said | {"type": "closed", "image_dependent": "a" in name})


def answer(plan, cache):
    """Keep replies: some requests get none, some one that is of no use."""
    dice = random.Random(1)

    def drive(steps):
        try:
            request = next(steps)
            while dice.random() > 0.05:
                text = "{}" if dice.random() < 0.05 else reply_text(request)
                reply = Reply(text=text, model="m", prompt_tokens=1)
                cache.put(request.key(), reply)
                request = steps.send(reply)
        except (StopIteration, UnusableReplyError):
            pass

    for _, steps in plan.facts_by_video():
        drive(steps)
    for task in plan.tasks({video: facts for video, facts in read_facts(plan, cache) if facts}):
        drive(plan.steps(task))


def test_processes_change_no_byte(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "usable_cores", lambda: 2)
    monkeypatch.setattr(making, "_BATCH", 7)
    written = []
    with ReplyCache(tmp_path / "replies.jsonl") as cache:
        answer(plan, cache)
        for many in (10**6, 1):
            monkeypatch.setattr(making, "MANY", many)
            summary = write_results(plan, cache, Trouble(stopped="enough"), tmp_path / str(many))
            written.append({path.name: path.read_bytes() for path in (tmp_path / str(many)).iterdir()})
    assert written[0] == written[1]
    assert all(summary["kept"].values()), "every kind is there"
    assert {"malformed", "near-duplicate", "not asked"} <= summary["dropped"].keys()
    assert written[0]["questions.jsonl"] or written[0]["questions_general.jsonl"]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "XZ"
    except (FileNotFoundError, ProcessLookupError):  # the latter if it ends between opening and reading
        return False


def gone(pids):
    until = time.monotonic() + 60
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(alive, pids))


@pytest.fixture
def endless(plan, tmp_path):
    """A process of a group of its own that makes samples for ever, with its workers' process ids."""
    if sys.platform != "linux":
        pytest.skip("looks at Linux's processes")
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, tmp_path],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2 and all(map(alive, pids))
    yield process, pids
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_killed_parent_leaves_no_worker(endless):
    process, pids = endless
    process.kill()
    assert gone(pids)


def test_ctrl_c_ends_workers_without_a_word(endless):
    process, pids = endless
    os.killpg(process.pid, signal.SIGINT)  # As a terminal does: to all of them.
    assert process.communicate(timeout=120)[1] == "stopped, 0 left\n"
    assert gone(pids)


def test_one_core_or_few_samples_need_no_process(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "ProcessPoolExecutor", None)
    with ReplyCache(tmp_path / "replies.jsonl") as cache:
        for cores, many in (1, 1), (8, 10**6):
            monkeypatch.setattr(making, "usable_cores", lambda cores=cores: cores)
            monkeypatch.setattr(making, "MANY", many)
            summary = write_results(plan, cache, Trouble(stopped="enough"), tmp_path / "out")
            assert summary["dropped"]["not asked"] > 60
