"""The chat templates of the common bases: what is supervised is each answer with its end token, where it is asked for.

``templates/`` holds one for each family, in the form that its documentation describes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken

from medllava.conversation import Turn
from medllava.errors import ConfigError, DataError
from medllava.model.prompt import IGNORE, PromptBuilder
from medllava.model.tiny import TokenizerSizes, build_tokenizer

from .conftest import supervised

TEMPLATES = Path(__file__).parent / "templates"
SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end|>", "<|system|>",
    "<start_of_turn>", "<end_of_turn>", "<|endoftext|>", "[INST]", "[/INST]", "<|User|>", "<|Assistant|>",
]
TURNS = [
    Turn(role="user", text="<image>\n<image>\nCompare the two."),
    Turn(role="assistant", text="Yes."),
    Turn(role="user", text="And here? <image>"),
    Turn(role="assistant", text="Yes."),
    Turn(role="user", text="Where is it?"),
    Turn(role="assistant", text="In the upper left:\n- gland\n- µ-necrosis, 0.35 mm"),
]
ANSWERS = [turn.text for turn in TURNS if turn.role == "assistant"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = build_tokenizer([turn.text for turn in TURNS], TokenizerSizes())
    # Special, but not among the few that a tokenizer has names for, as Phi's <|end|>.
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return made


def builder(tokenizer: Any, name: str) -> PromptBuilder:
    template = (TEMPLATES / f"{name}.jinja").read_text()
    return PromptBuilder(tokenizer, "template", tokens_per_image=3, template=template)


ENDS = {
    "llama2": " </s>", "llama3": "<|eot_id|>", "llama31": "<|eot_id|>", "mistral": "</s>", "mistral_v3": "</s>",
    "qwen25": "<|im_end|>", "qwen3": "<|im_end|>", "phi3": "<|end|>", "gemma2": "<end_of_turn>", "zephyr": "</s>",
    "marked_chatml": "<|im_end|>", "parts": "<|im_end|>",
}
LEADS = {"llama2": " ", "mistral_v3": " ", "zephyr": "\n", "marked_chatml": "<think>\n\n</think>\n\n"}


def test_every_template_is_tried() -> None:
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == {*ENDS, "reasoner"}


@pytest.mark.parametrize("turns", [TURNS, TURNS[:2]], ids=["three", "one"])
@pytest.mark.parametrize("name", ENDS)
def test_answers_and_their_end_tokens_are_supervised(tokenizer: Any, name: str, turns: list[Turn]) -> None:
    made = builder(tokenizer, name)
    prompt = made.sample(turns, "s")
    assert prompt is not None
    answers = ANSWERS[: len(turns) // 2]
    assert supervised(tokenizer, prompt.labels) == [LEADS.get(name, "") + answer + ENDS[name] for answer in answers]
    assert prompt.input_ids.count(made.image_token_id) == 3 * (3 if len(turns) > 2 else 2)
    # Asked with the turns so far, the model stands exactly where training supervised the answer, at every turn.
    for number in range(1, len(turns), 2):
        question = made.question(turns[:number])
        assert prompt.input_ids[: len(question)] == question
        assert prompt.labels[len(question)] != IGNORE
    assert made.end_token_id == tokenizer.convert_tokens_to_ids(ENDS[name].strip())


def test_a_last_answer_with_an_empty_thought_is_learned_without_it(tokenizer: Any) -> None:
    made = builder(tokenizer, "qwen3")
    prompt = made.sample(TURNS, "s")
    assert prompt is not None
    assert "think" not in tokenizer.decode(prompt.input_ids)
    stock = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.text} for turn in TURNS], tokenize=False,
        chat_template=(TEMPLATES / "qwen3.jinja").read_text(),
    )
    assert "<think>" in stock


def test_a_template_that_opens_a_thought_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="sample 7: the chat template does not continue its own prompt at turn 1"):
        builder(tokenizer, "reasoner").sample(TURNS, "sample 7")


def test_what_a_template_refuses_is_told_with_the_sample(tokenizer: Any) -> None:
    turns = [Turn(role="system", text="Be brief."), *TURNS]
    with pytest.raises(DataError, match="sample 8: the chat template refuses this conversation: System role not sup"):
        builder(tokenizer, "gemma2").sample(turns, "sample 8")
    prompt = builder(tokenizer, "llama31").sample(turns, "s")
    assert prompt is not None
    assert "Be brief." in tokenizer.decode(prompt.input_ids)


def test_marks_without_an_end_token_are_refused(tokenizer: Any) -> None:
    template = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + ' ' }}"
    template += "{% endgeneration %}{% else %}{{ 'USER: ' + m.content + ' ASSISTANT: ' }}{% endif %}{% endfor %}"
    made = PromptBuilder(tokenizer, "template", tokens_per_image=1, template=template)
    with pytest.raises(ConfigError, match="no end token"):
        made.sample(TURNS, "s")
    assert made.end_token_id is None


@pytest.mark.parametrize("name", ["qwen3", "marked_chatml", "llama3"])
def test_limits_drop_whole_exchanges_and_never_cut_a_picture(tokenizer: Any, name: str) -> None:
    made = builder(tokenizer, name)
    lengths = [len(made.sample(TURNS[:number], "s").input_ids) for number in (2, 4, 6)]  # type: ignore[union-attr]
    for limit, expected, dropped, pictures in (
        (lengths[2] + 1, lengths[2], 0, 3), (lengths[2], lengths[2], 0, 3), (lengths[2] - 1, lengths[1], 2, 3),
        (lengths[1] - 1, lengths[0], 4, 2), (lengths[0] + 1, lengths[0], 4, 2), (lengths[0], lengths[0], 4, 2),
    ):
        prompt = made.sample(TURNS, "s", max_length=limit)
        assert prompt is not None
        assert (len(prompt.input_ids), prompt.dropped_turns) == (expected, dropped)
        assert prompt.input_ids.count(made.image_token_id) == 3 * pictures
    assert made.sample(TURNS, "s", max_length=lengths[0] - 1) is None
