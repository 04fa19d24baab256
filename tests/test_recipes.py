"""Every file a person may choose in the four top-level folders loads as what it is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from medllava.config import load_recipe
from medllava.errors import ConfigError
from medllava.eval.benchmarks import load_benchmark, read_questions
from medllava.eval.encoder_sets import load_set
from medllava.eval.harness import lmms_tasks
from medllava.eval.judge import request as judge_request
from medllava.eval.judge_pairs import Pair
from medllava.eval.judge_pairs import request as pair_request
from medllava.eval.records import Question
from medllava.images import load_image
from medllava.instruct_gen.concepts import Vocabulary
from medllava.instruct_gen.frame_filter import Prompts
from medllava.instruct_gen.kinds import load_prompts
from medllava.instruct_gen.prompts import load_prompt
from medllava.instruct_gen.recipe import GenerateRecipe
from medllava.jsonl import read_json
from medllava.train.config import load_training_recipe

REPOSITORY = Path(__file__).resolve().parents[1]
KINDS = {
    "train/recipes": "training", "train/deepspeed": "deepspeed", "train/launch": "launch file",
    "instruct_gen": "frame filter",
    "instruct_gen/recipes": "generation", "instruct_gen/prompts": "prompt",
    "instruct_gen/vocabulary": "vocabulary",
    "eval/benchmarks": "benchmark", "eval/benchmarks/encoder": "encoder set", "eval/prompts": "judge",
    "eval/general": "general questions", "eval/general/pictures": "drawing",
    "eval": "script", "eval/harness/lmms_eval": "lmms-eval task", "serve": "deployment",
}
"""Which folder holds what. A file elsewhere must be named here before it is added."""

FILES = sorted(
    path
    for folder in ("instruct_gen", "train", "serve", "eval")
    for path in (REPOSITORY / folder).rglob("*")
    if path.is_file() and path.name != "README.md"
)


def test_every_kind_was_found() -> None:
    found = {path.parent.relative_to(REPOSITORY).as_posix() for path in FILES}
    assert found == KINDS.keys()
    counts = {folder: sum(path.parent == REPOSITORY / folder for path in FILES) for folder in KINDS}
    assert counts["train/recipes"] >= 11
    assert counts["train/deepspeed"] == 2
    assert counts["instruct_gen/recipes"] >= 2
    assert counts["eval/benchmarks"] >= 5


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_it_loads_as_what_it_is(path: Path) -> None:
    kind = KINDS[path.parent.relative_to(REPOSITORY).as_posix()]
    if kind == "training":
        assert load_training_recipe(path, []).seed >= 0
    elif kind == "deepspeed":
        settings = read_json(path)
        assert settings["zero_optimization"]["stage"] == int(path.stem.removeprefix("zero"))
    elif kind == "frame filter":
        assert load_recipe(path, Prompts).domains
    elif kind == "generation":
        recipe = load_recipe(path, GenerateRecipe)
        recipe = recipe.model_copy(update={"prompts": path.parent / recipe.prompts})
        assert recipe.plans
        assert load_prompts(recipe)
    elif kind == "prompt":
        assert load_prompt(path.parent, path.stem).hash
    elif kind == "vocabulary":
        assert Vocabulary.read(path).concepts
    elif kind == "benchmark" or path.name == "general.yaml":
        assert load_benchmark(str(path)).name == path.stem
    elif kind == "encoder set":
        assert load_set(str(path)).name == path.stem
    elif kind == "general questions":
        assert read_questions(path)
    elif kind == "drawing":
        assert load_image(path).size == (192, 192)
    elif kind == "lmms-eval task":
        assert path.read_text() == lmms_tasks()[path.name], "make it again: medllava eval harness --to lmms-eval"
    elif path.name == "hostfile":
        assert all(re.fullmatch(r"\S+ slots=[1-9]\d*", line) for line in path.read_text().splitlines())
    elif kind in {"script", "launch file"}:
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    elif kind == "deployment":
        _check_flags(path.read_text())
    else:
        question = Question(
            id="1", image=None, question="What is the odd-word-q?", kind="open", answer="odd-word-r", group="1"
        )
        template = path.read_text()
        pair = Pair(question, "real", "odd-word-a", "odd-word-b")
        asked = (
            judge_request(question, "odd-word-a", "judge", template) if "{answer}" in template
            else pair_request(pair, "judge", template, swapped=False, with_reference=True)
        )
        text = str(asked.messages)
        assert all(word in text for word in ("odd-word-q", "odd-word-r", "odd-word-a"))


def _check_flags(text: str) -> None:
    """Every command of ours in a deployment file exists and knows the flags it is given."""
    commands = re.findall(r"medllava\.serve\.(worker|web)\b([^`\n]*)", text.replace("\\\n", " "))
    for name, arguments in commands:
        shown = subprocess.run(
            [sys.executable, "-m", f"medllava.serve.{name}", "--help"], capture_output=True, text=True, check=True
        ).stdout
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", arguments):
            assert flag in shown, f"{name} has no {flag}"


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.suffix == ".yaml" and path.parent.name not in {"lmms_eval", "serve"}],
    ids=lambda path: path.stem,
)
def test_a_misspelt_key_is_refused_with_a_suggestion(path: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    key = max((key for key in values if key != "stage"), key=len)
    values[f"{key}x"] = values.pop(key)
    wrong = tmp_path / path.name
    wrong.write_text(yaml.safe_dump(values))
    kind = KINDS[path.parent.relative_to(REPOSITORY).as_posix()]
    with pytest.raises(ConfigError, match=f'unknown key "{key}x"; did you mean "{key}"'):
        if kind == "training":
            load_training_recipe(wrong, [])
        elif kind == "generation":
            load_recipe(wrong, GenerateRecipe)
        elif kind == "frame filter":
            load_recipe(wrong, Prompts)
        elif kind == "encoder set":
            load_set(str(wrong))
        else:
            load_benchmark(str(wrong))
