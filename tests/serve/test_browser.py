"""The web chat in a real browser: headless Chromium, driven with the mouse and the keyboard.

The picture of the README is made with a trained model:

    MEDLLAVA_SCREENSHOT=docs/web-chat.png MEDLLAVA_SCREENSHOT_MODEL=demo-out/stage2 pytest tests/serve -k picture_for
"""

from __future__ import annotations

import base64
import gc
import io
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from medllava.geometry import Box
from medllava.images import draw_boxes, load_image, to_data_uri
from medllava.model.answerer import Answerer
from medllava.phantom.tissue import Finding, render_tissue, sample_field, sample_stain
from medllava.serve.session import Picture

Wait = Callable[..., None]
Serve = Callable[..., str]


@pytest.fixture
def serve(serve_page: Serve) -> Serve:
    return serve_page


@pytest.fixture
def examples(tmp_path: Path) -> tuple[Path, ...]:
    paths = []
    for number in range(6):
        rng = np.random.default_rng(number)
        paths.append(tmp_path / f"example-{number}.png")
        field = sample_field(rng, 320, 240)
        Image.fromarray(render_tissue(rng, 320, 240, field, sample_stain(rng))).save(paths[-1])
    return tuple(paths)


def open_image(tab: Page, path: Path) -> None:
    tab.set_input_files("#viewer input[type=file]", path)
    expect(tab.locator("#viewer .marks[data-ready=yes]")).to_be_visible()


def shown_picture(tab: Page, width: int, height: int) -> tuple[float, float, float]:
    """(x, y, scale) of the picture on the page: it is fitted into the canvas and centred."""
    canvas = tab.locator("#viewer .marks").bounding_box()
    assert canvas is not None
    scale = min(canvas["width"] / width, canvas["height"] / height)
    x = canvas["x"] + (canvas["width"] - width * scale) / 2
    y = canvas["y"] + (canvas["height"] - height * scale) / 2
    return x, y, scale


def drag(tab: Page, start: tuple[float, float], end: tuple[float, float]) -> None:
    tab.mouse.move(*start)
    tab.mouse.down()
    tab.mouse.move((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, steps=3)
    tab.mouse.move(*end, steps=3)
    tab.mouse.up()


def ask(tab: Page, text: str) -> None:
    tab.fill("#question textarea", text)
    tab.click("#ask")


def last_answer(tab: Page) -> Any:
    return tab.locator("#chat .message.bot").last


def region(tab: Page) -> Any:
    """The exact region that the page holds, from what it would send."""
    return tab.locator("#viewer .region")


def test_open_draw_ask_and_see_the_answer_drawn(
    worker: Any, serve: Serve, tab: Page, tissue: Path, examples: tuple[Path, ...]
) -> None:
    tab.goto(serve(worker.url, examples=examples))
    expect(tab.locator(".worker")).to_contain_text("scripted ready")
    open_image(tab, tissue)
    expect(tab.locator("#viewer .size")).to_have_text("1200 × 600 px")

    # A box, drawn with the mouse: what the model is asked is that rectangle of the original.
    x, y, scale = shown_picture(tab, 1200, 600)
    drag(tab, (x + 0.55 * 1200 * scale, y + 0.2 * 600 * scale), (x + 0.9 * 1200 * scale, y + 0.7 * 600 * scale))
    expect(region(tab)).to_have_text("box [0.55, 0.20, 0.90, 0.70]")
    tab.click("#questions button >> nth=0")
    expect(last_answer(tab)).to_have_text("The region [0.55, 0.20, 0.90, 0.70] holds a vessel.")
    images, turns, _ = worker.answerer.asked[-1]
    assert turns[0].text == "<image>\nWhat is in the region [0.55, 0.20, 0.90, 0.70]?"
    assert images[0].tobytes() == load_image(tissue).tobytes()
    expect(last_answer(tab).locator(".phrase")).to_have_text("The region [0.55, 0.20, 0.90, 0.70]")

    # A second question streams in; its box appears in the viewer and in the drawn picture.
    tab.click("#viewer .whole")
    ask(tab, "Where is the gland?")
    expect(last_answer(tab)).to_have_text(re.compile("^A( gland)?"))
    expect(last_answer(tab)).to_have_text("A gland. [0.10, 0.20, 0.40, 0.60]")
    assert [turn.role for turn in worker.answerer.asked[-1][1]] == ["user", "assistant", "user"]
    expect(last_answer(tab).locator(".phrase")).to_have_text("A gland. [0.10, 0.20, 0.40, 0.60]")
    tab.click("#chat .menu summary")
    with tab.expect_download() as download:
        tab.click("#chat [data-kind=image]")
    saved = load_image(download.value.path())
    expected = draw_boxes(load_image(tissue), [Box(x1=0.1, y1=0.2, x2=0.4, y2=0.6)], ["1"])
    assert saved.size == (1200, 600)
    assert np.abs(np.asarray(saved, int) - np.asarray(expected, int)).mean() < 4  # JPEG
    red = np.all(np.abs(pixels_of_canvas(tab) - (230, 25, 75)) < 8, axis=-1)
    rows, columns = np.nonzero(red)
    box_on_page = [columns.min(), columns.max(), rows.max()]
    canvas = tab.locator("#viewer .marks").bounding_box()
    assert canvas is not None
    left, top = x - canvas["x"], y - canvas["y"]
    meant = [left + 0.1 * 1200 * scale, left + 0.4 * 1200 * scale, top + 0.6 * 600 * scale]
    assert np.allclose(box_on_page, meant, atol=3)


def pixels_of_canvas(tab: Page) -> Any:
    uri = tab.evaluate("document.querySelector('#viewer .marks').toDataURL('image/png')")
    return np.asarray(load_image(uri), int)


@pytest.mark.parametrize("size", [(300, 900), (5000, 1800), (40, 30)])
def test_a_drawn_box_is_exact_in_the_original(
    worker: Any, serve: Serve, tab: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    marked: list[Any] = []
    monkeypatch.setattr("medllava.serve.page.region_of", lambda value: marked.append(value))
    width, height = size
    Image.linear_gradient("L").resize(size).convert("RGB").save(tmp_path / "image.jpg")
    tab.goto(serve(worker.url))
    open_image(tab, tmp_path / "image.jpg")
    x, y, scale = shown_picture(tab, width, height)
    start = (round(x + 0.2 * width * scale), round(y + 0.3 * height * scale))
    end = (round(x + 0.7 * width * scale), round(y + 0.8 * height * scale))
    drag(tab, end, start)  # from the lower right to the upper left
    ask(tab, "What do you see?")
    expect(last_answer(tab)).to_contain_text("A gland.")
    expect(tab.locator("#chat .phrase")).to_have_count(1)  # the end of the answer
    drawn = [v * side for v, side in zip(marked[-1]["box"], (width, height) * 2, strict=True)]
    meant = [(start[0] - x) / scale, (start[1] - y) / scale, (end[0] - x) / scale, (end[1] - y) / scale]
    assert np.allclose(drawn, meant, atol=1.0)  # pixels of the original

    # Zoomed in, the same place of the page is another place of the picture, still exactly known.
    tab.mouse.move(*start)
    tab.mouse.wheel(0, -300)
    tab.mouse.click(*start)
    ask(tab, "And here?")
    expect(tab.locator("#chat .message.bot")).to_have_count(2)
    expect(last_answer(tab)).to_contain_text("A gland.")
    point = [v * side for v, side in zip(marked[-1]["point"], (width, height), strict=True)]
    assert np.allclose(point, meant[:2], atol=1.0)


def test_a_point_an_example_and_a_tiff(worker: Any, serve: Serve, tab: Page, tissue: Path, tmp_path: Path) -> None:
    tab.goto(serve(worker.url, examples=(tissue,)))
    tab.click("#questions button >> nth=0")
    expect(tab.get_by_text("Draw a box on the image or click a point first.")).to_be_visible()
    tab.click("#examples button >> nth=0")
    expect(tab.locator("#viewer .marks[data-ready=yes]")).to_be_visible()
    x, y, scale = shown_picture(tab, 1200, 600)
    tab.mouse.click(x + 0.3 * 1200 * scale, y + 0.5 * 600 * scale)
    expect(region(tab)).to_have_text("around the point [0.22, 0.42, 0.38, 0.58]")
    tab.click("#ask")
    expect(last_answer(tab)).to_have_text("The region [0.22, 0.42, 0.38, 0.58] holds a vessel.")
    # The region is still marked; an offered question about the whole image goes without it.
    tab.get_by_role("button", name="Where is the gland?").click()
    expect(tab.locator("#chat .message")).to_have_count(4)
    expect(last_answer(tab)).to_have_text("A gland. [0.10, 0.20, 0.40, 0.60]")
    assert worker.answerer.asked[-1][1][-1].text == "Where is the gland?"
    expect(region(tab)).to_have_text("around the point [0.22, 0.42, 0.38, 0.58]")

    Image.fromarray((np.random.default_rng(0).random((90, 260)) * 60_000).astype(np.uint16)).save(tmp_path / "deep.tif")
    tab.set_input_files("#viewer input[type=file]", tmp_path / "deep.tif")
    expect(tab.locator("#viewer .size")).to_have_text("260 × 90 px")
    expect(region(tab)).to_have_text("whole image")
    expect(tab.locator("#chat .message")).to_have_count(4)  # another picture of the same conversation
    expect(tab.locator("#tray .pictures button")).to_have_count(2)


def test_each_fault_has_its_own_message(
    start_worker: Any, worker: Any, serve: Serve, tab: Page, tissue: Path, tmp_path: Path
) -> None:
    tab.goto(serve(worker.url))
    (tmp_path / "notes.png").write_text("not a picture")
    tab.set_input_files("#viewer input[type=file]", tmp_path / "notes.png")
    expect(tab.get_by_text("This picture cannot be opened: not an image in a known format")).to_be_visible()
    open_image(tab, tissue)
    messages = []
    for question, told in [
        ("too much memory", "ran out of memory.*--load-4bit"),
        ("too many words", "9000 tokens.*4096"),
        ("divide by zero", "ZeroDivisionError"),
    ]:
        ask(tab, question)
        expect(last_answer(tab)).to_have_text(re.compile(told))
        messages.append(last_answer(tab).inner_text())
        expect(tab.locator("#question textarea")).to_have_value(question)  # to be sent again
    worker.stop()
    ask(tab, "anyone there?")
    expect(last_answer(tab)).to_contain_text(f"No worker can be reached at {worker.url}")
    expect(tab.locator(".dot.unreachable")).to_be_visible()
    messages.append(last_answer(tab).inner_text())

    loaded = threading.Event()
    slow = start_worker(until=loaded)
    tab.goto(serve(slow.url))
    ask(tab, "hello")
    expect(last_answer(tab)).to_contain_text("still loading")
    messages.append(last_answer(tab).inner_text())
    assert len(set(messages)) == 5
    assert not any("traffic" in message.lower() for message in messages)
    loaded.set()
    expect(tab.locator(".dot.ready")).to_be_visible()
    ask(tab, "and now?")
    expect(last_answer(tab)).to_contain_text("A gland.")


def test_a_slow_worker_still_answers(
    worker: Any, serve: Serve, tab: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token comes after the stream has started with heartbeats."""
    monkeypatch.setattr("medllava.serve.app.FIRST_PIECE_S", 0.2)
    monkeypatch.setattr("medllava.serve.app.HEARTBEAT_S", 0.2)
    worker.answerer.think_s = 4.0
    tab.goto(serve(worker.url))
    ask(tab, "think first")
    expect(tab.locator(".worker")).to_contain_text("answering")
    expect(last_answer(tab)).to_contain_text("A gland.")


def test_stop_and_leaving_end_the_generation(
    worker: Any, serve: Serve, tab: Page, browser: Browser, within: Wait
) -> None:
    address = serve(worker.url)
    tab.goto(address)

    def tell(page: Page) -> None:
        expect(page.locator("#chat .chat[data-busy=no]")).to_be_attached()
        worker.answerer.stopped_at.clear()
        ask(page, "tell a long story")
        expect(last_answer(page)).to_contain_text("and then and then")

    def stop() -> None:
        tell(tab)
        tab.click("#stop")

    within(2, stop, lambda: bool(worker.answerer.stopped_at))
    expect(last_answer(tab)).to_contain_text("(stopped)")
    ask(tab, "What is here?")
    expect(last_answer(tab)).to_contain_text("A gland.")

    def leave() -> None:
        other = browser.new_page()
        other.goto(address)
        tell(other)
        other.close()

    within(2, leave, lambda: bool(worker.answerer.stopped_at))


def test_two_workers_come_and_go(start_worker: Any, serve: Serve, tab: Page, wait: Wait) -> None:
    first, second = start_worker(), start_worker()
    tab.goto(serve(first.url, second.url))
    expect(tab.locator("#model option")).to_have_text([f"scripted ({first.url})", f"scripted ({second.url})"])
    tab.get_by_label("Model").select_option(label=f"scripted ({second.url})")
    ask(tab, "hello")
    expect(last_answer(tab)).to_contain_text("A gland.")
    assert (len(first.answerer.asked), len(second.answerer.asked)) == (0, 1)
    second.stop()
    expect(tab.locator(".worker b")).to_have_text("scripted")  # nothing left to choose
    ask(tab, "hello again")
    wait(lambda: len(first.answerer.asked) == 1)


def test_behind_a_proxy_that_serves_it_under_a_path(
    worker: Any, serve: Serve, tab: Page, tissue: Path, proxy: Callable[[str], str]
) -> None:
    address = proxy(serve(worker.url, root_path="/chat"))
    requested: list[str] = []
    tab.on("request", lambda request: requested.append(request.url))
    tab.goto(f"{address}/chat/")
    open_image(tab, tissue)
    ask(tab, "Where is the gland?")
    expect(last_answer(tab)).to_have_text("A gland. [0.10, 0.20, 0.40, 0.60]")
    assert all(url.startswith((f"{address}/chat", "data:")) for url in requested)
    tab.goto("about:blank")  # before the proxy ends and breaks off what the page listens to


def test_nothing_of_a_chat_is_left_behind(
    worker: Any, serve: Serve, tab: Page, tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holding: Any
) -> None:
    """After a chat no file of this process's folders holds the picture, its name or the question."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    roots = [Path("/tmp"), Path("/dev/shm"), Path.home() / ".cache", Path.home() / ".gradio"]
    began = time.time()
    tab.goto(serve(worker.url))
    open_image(tab, tissue)
    ask(tab, "Where is Mrs Miller's gland?")
    expect(last_answer(tab)).to_contain_text("A gland.")
    expect(tab.locator("#chat .phrase")).to_have_count(1)
    bytes_of_image = base64.b64decode(to_data_uri(load_image(tissue)).partition(",")[2])
    signs = [b"Mrs Miller", b"patient-4711", b"PATIENT-4711", bytes_of_image[2000:2100], tissue.read_bytes()[2000:2100]]
    found = holding(signs, roots, began) - {tissue}
    # Without the test's own browser.
    assert [path for path in found if "playwright" not in str(path) and "chromium" not in str(path)] == []
    shutil.copy(tissue, elsewhere / "leak.png")  # the search finds what it looks for
    assert holding(signs, [elsewhere], began) == {elsewhere / "leak.png"}
    sent = worker.answerer.asked[-1][0][0]
    buffer = io.BytesIO()
    sent.save(buffer, "PNG")
    assert sent.info == {} and b"4711" not in buffer.getvalue()


def test_a_closed_page_is_forgotten(worker: Any, serve: Serve, browser: Browser, tissue: Path, wait: Wait) -> None:
    def pictures() -> list[Picture]:
        gc.collect()
        return [thing for thing in gc.get_objects() if type(thing) is Picture]

    def new() -> int:
        return sum(all(one is not old for old in before) for one in pictures())

    before = pictures()  # of other tests' pages, which may close at any moment
    tab = browser.new_page()
    tab.goto(serve(worker.url))
    open_image(tab, tissue)
    ask(tab, "Where is the gland?")
    expect(tab.locator("#chat .phrase")).to_have_count(1)
    assert new() == 1
    tab.close()
    wait(lambda: new() == 0)


@pytest.mark.skipif("MEDLLAVA_SCREENSHOT_MODEL" not in os.environ, reason="for the README: see the top of this file")
def test_picture_for_the_readme(
    start_worker: Any, serve: Serve, tab: Page, examples: tuple[Path, ...], tmp_path: Path
) -> None:
    """Saves the page with what a trained model answers to MEDLLAVA_SCREENSHOT; asserts nothing of the answers."""
    rng = np.random.default_rng(3)
    field = [
        Finding("gland", (70, 50, 250, 220)), Finding("blood vessel", (390, 270, 570, 430)),
        Finding("psammoma body", (420, 50, 560, 180)),
    ]
    path = tmp_path / "field.png"
    Image.fromarray(render_tissue(rng, 640, 480, field, sample_stain(rng), scale=2.0)).save(path)
    model = Answerer.load(os.environ["MEDLLAVA_SCREENSHOT_MODEL"])
    tab.goto(serve(start_worker(load=lambda: model).url, examples=examples))
    open_image(tab, path)
    x, y, scale = shown_picture(tab, 640, 480)
    boxes = [((70, 50), (250, 220)), None, ((420, 50), (560, 180))]
    questions = ["What is in this region?", "Mark the blood vessel in this image.", "What is in this region?"]
    for number, (question, box) in enumerate(zip(questions, boxes, strict=True), start=1):
        if box:
            drag(tab, *[(x + px * scale, y + py * scale) for px, py in box])
        else:
            tab.click("#viewer .whole")
        ask(tab, question)
        expect(tab.locator("article[data-state=done]")).to_have_count(number)
    # The region of the last question and the box of the answer before it, which is clicked.
    tab.locator("#chat .phrase").last.click()
    expect(tab.locator("#viewer .marks[data-flash]")).to_be_attached()
    expect(tab.locator("#viewer .marks[data-flash]")).to_have_count(0)
    tab.mouse.move(5, 5)
    tab.screenshot(path=os.environ["MEDLLAVA_SCREENSHOT"])


def test_the_real_model_answers_in_the_page(
    start_worker: Any, serve: Serve, tab: Page, tiny: Path, tissue: Path
) -> None:
    model = Answerer.load(tiny)
    worker = start_worker(load=lambda: model)
    tab.goto(serve(worker.url))
    open_image(tab, tissue)
    ask(tab, "Where is the gland?")
    expect(tab.locator("#chat .message.bot")).to_have_count(1)
    expect(last_answer(tab)).not_to_have_text("…", timeout=60_000)
    tab.wait_for_timeout(500)
    assert "Not answered" not in last_answer(tab).inner_text()
