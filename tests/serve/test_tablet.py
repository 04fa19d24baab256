"""The page on a tablet held upright, and its note on a second picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

Serve = Callable[..., str]


@pytest.fixture
def upright(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 768, "height": 1024}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.set_default_timeout(60_000)
    yield page
    context.close()


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """In a folder of their own, to be offered as examples."""
    (tmp_path / "examples").mkdir()
    paths = [tmp_path / "examples" / f"{name}.png" for name in ("one", "two")]
    for path in paths:
        Image.effect_noise((320, 240), 60).convert("RGB").save(path)
    return paths


def test_an_answer_is_in_sight_on_a_tablet(
    worker: Any, serve_page: Serve, upright: Page, pictures: list[Path]
) -> None:
    upright.goto(serve_page(worker.url, examples=pictures))
    expect(upright.locator("#examples button").first).to_be_in_viewport()
    upright.locator("#examples button").first.tap()
    expect(upright.locator("#viewer .size")).to_have_text("320 × 240 px")
    upright.fill("#question textarea", "Where is the gland?")
    upright.tap("#ask")
    answer = upright.locator("#chat .message.bot")
    expect(answer).to_contain_text("[0.10, 0.20, 0.40, 0.60]")
    expect(upright.locator("#chat .chat[data-busy=no]")).to_be_attached()
    shown, composer = answer.bounding_box(), upright.locator("#composer").bounding_box()
    assert shown is not None and composer is not None
    assert shown["y"] > 0 and shown["y"] + shown["height"] < composer["y"]
    assert upright.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    # Fingers are no mouse pointers.
    sizes = upright.locator("#chat .tools button:visible").evaluate_all(
        "all => all.map(one => Math.min(one.offsetWidth, one.offsetHeight))"
    )
    assert sizes and min(sizes) >= 36


@pytest.mark.parametrize("alone", [True, False])
def test_a_second_picture_where_the_model_sees_one(
    start_worker: Any, serve_page: Serve, tab: Page, pictures: list[Path], alone: bool
) -> None:
    worker = start_worker()
    worker.answerer.manifest.single_exchange = alone
    tab.goto(serve_page(worker.url))
    expect(tab.locator("#head")).to_contain_text("scripted")
    note = tab.get_by_text("cannot compare it with another")
    tab.set_input_files("#viewer input[type=file]", pictures[0])
    expect(tab.locator("#viewer .size")).to_have_text("320 × 240 px")
    expect(note).to_have_count(0)
    tab.set_input_files("#viewer input[type=file]", pictures[1])
    expect(tab.get_by_role("button", name="Picture 2")).to_be_visible()
    expect(note).to_have_count(int(alone))
