"""The viewer in a real browser: regions by mouse, finger and keys, on photographs and on a slide of a gigapixel.

MEDLLAVA_SCREENSHOT_DIR=FOLDER saves the page at several sizes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from medllava.geometry import Box, parse_boxes
from medllava.images import load_image
from medllava.serve.tiles import ShownSlide
from medllava.slides import Slide

Serve = Callable[..., str]
RED = (200, 30, 40)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the viewer tells Python with each question."""
    from medllava.serve import page

    values: list[Any] = []
    region_of = page.region_of

    def note(value: Any) -> Any:
        values.append(value)
        return region_of(value)

    monkeypatch.setattr("medllava.serve.page.region_of", note)
    return values


@pytest.fixture
def slides(gigapixel: Any) -> list[ShownSlide]:
    return [ShownSlide(Slide(gigapixel.path), 0)]


def shown(tab: Page, width: float, height: float) -> tuple[float, float, float]:
    """(x, y, scale) of a picture that is fitted into the stage."""
    stage = tab.locator("#viewer .stage").bounding_box()
    assert stage is not None
    scale = min(stage["width"] / width, stage["height"] / height)
    return stage["x"] + (stage["width"] - width * scale) / 2, stage["y"] + (stage["height"] - height * scale) / 2, scale


def ready(tab: Page) -> None:
    expect(tab.locator("#viewer .marks[data-ready=yes]")).to_be_attached()
    tab.locator("#viewer .bar").scroll_into_view_if_needed()
    rest(tab)


def rest(tab: Page) -> None:
    """Let what moves the view reach the page, and wait until it has stood still for a third of a second of frames."""
    tab.wait_for_timeout(300)
    tab.evaluate("""async () => {
        const view = () => JSON.stringify(window.medllavaMarked());
        for (let last = view(), still = 0; still < 20; ) {
            await new Promise(requestAnimationFrame);
            const now = view();
            still = now === last ? still + 1 : 0;
            last = now;
        }
    }""")


def draw(tab: Page, *places: tuple[float, float]) -> None:
    tab.mouse.move(*places[0])
    tab.mouse.down()
    for place in places[1:]:
        tab.mouse.move(*place, steps=5)
    tab.mouse.up()


def ask(tab: Page, text: str) -> None:
    count = tab.locator("#chat .message.bot").count()
    tab.fill("#question textarea", text)
    tab.click("#ask")
    expect(tab.locator("#chat .message.bot")).to_have_count(count + 1)
    expect(tab.locator("#chat .chat[data-busy=no]")).to_be_attached()


def marked_pixels(tab: Page) -> Any:
    uri = tab.evaluate("document.querySelector('#viewer .marks').toDataURL('image/png')")
    return np.asarray(load_image(uri), int)


def picture(folder: Path, width: int, height: int) -> Path:
    path = folder / "picture.png"
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(path)
    return path


@pytest.mark.parametrize("size", [(300, 900), (900, 300)])
def test_box_point_and_freehand_on_a_photograph(
    worker: Any, serve_page: Serve, tab: Page, tmp_path: Path, told: list[Any], size: tuple[int, int]
) -> None:
    tab.goto(serve_page(worker.url))
    tab.set_input_files("#viewer input[type=file]", picture(tmp_path, *size))
    ready(tab)
    x, y, scale = shown(tab, *size)
    corners = [(0.2, 0.3), (0.7, 0.8)]
    on_page = [(round(x + fx * size[0] * scale), round(y + fy * size[1] * scale)) for fx, fy in corners]
    meant = [((px - x) / scale, (py - y) / scale) for px, py in on_page]  # in pixels of the original

    def pixels(places: list[Any]) -> list[tuple[float, float]]:
        return [(fx * size[0], fy * size[1]) for fx, fy in places]

    draw(tab, *on_page)
    ask(tab, "What is here?")
    box = told[-1]["box"]
    assert np.allclose(pixels([box[:2], box[2:]]), meant, atol=1.0)
    assert told[-1]["point"] is None and told[-1]["path"] is None and told[-1]["picture"] == 0

    tab.click("[data-tool=point]")
    expect(tab.locator("[data-tool=point]")).to_have_attribute("aria-pressed", "true")
    expect(tab.locator("[data-tool=box]")).to_have_attribute("aria-pressed", "false")
    tab.mouse.click(*on_page[1])
    ask(tab, "And here?")
    assert np.allclose(pixels([told[-1]["point"]]), meant[1:], atol=1.0)

    # Zoomed and moved, what is drawn is where it is seen.
    tab.mouse.move(*on_page[0])
    tab.mouse.wheel(0, -400)
    rest(tab)
    tab.click("[data-tool=move]")
    draw(tab, on_page[0], (on_page[0][0] + 40, on_page[0][1] + 25))
    rest(tab)
    before = told[-1]["view"]
    tab.click("[data-tool=freehand]")
    px, py = on_page[0][0] + 40, on_page[0][1] + 25  # the place of the picture that was under on_page[0]
    draw(tab, (px, py), (px + 60, py), (px + 60, py + 50), (px, py + 50))
    ask(tab, "And around there?")
    value = told[-1]
    assert value["view"] != before and value["view"][2] - value["view"][0] <= 1
    assert np.allclose(pixels([value["box"][:2]]), meant[:1], atol=1.0)
    stage = tab.locator("#viewer .stage").bounding_box()
    assert stage is not None
    path = pixels(value["path"])
    assert len(path) > 3 and np.allclose(path[0], meant[0], atol=1.0)
    # Its sides are those of the drawn shape at the zoom of the view.
    whole = [value["view"][2] - value["view"][0], value["view"][3] - value["view"][1]]
    zoom = max(w * s / e for w, s, e in zip(whole, size, (stage["width"], stage["height"]), strict=True))
    sides = [(value["box"][2] - value["box"][0]) * size[0], (value["box"][3] - value["box"][1]) * size[1]]
    assert np.allclose(sides, [60 * zoom, 50 * zoom], atol=1.0)
    tab.click("#viewer .whole")
    expect(tab.locator("#viewer .region")).to_have_text("whole image")


def test_a_slide_of_a_gigapixel(
    worker: Any, serve_page: Serve, tab: Page, told: list[Any], slides: list[ShownSlide], gigapixel: Any
) -> None:
    """What is drawn on the slide's red mark is the red mark in the picture that the model gets, and the boxes of the
    answer come back to their place on the slide."""
    tab.goto(serve_page(worker.url, slides=slides))
    expect(tab.locator("#slides button")).to_have_count(1)
    tab.click("#slides button")
    ready(tab)
    expect(tab.locator("#viewer .size")).to_have_text("40960 × 32768 px")
    expect(tab.locator("#viewer .field")).to_contain_text("not the whole slide")
    x, y, scale = shown(tab, *gigapixel.size)
    x0, y0, x1, y1 = gigapixel.marks[0][0]
    corners = [(x + x0 * scale, y + y0 * scale), (x + x1 * scale, y + y1 * scale)]
    draw(tab, *corners)
    ask(tab, "What is in this region?")
    pixel = 1 / scale  # of the screen, in pixels of the slide
    box = [v * side for v, side in zip(told[-1]["box"], gigapixel.size * 2, strict=True)]
    assert np.allclose(box, [x0, y0, x1, y1], atol=1.1 * pixel)
    images, turns, _ = worker.answerer.asked[-1]
    assert max(images[0].size) == 2048
    asked = parse_boxes(turns[-1].text)[0]
    region = np.asarray(images[0].crop([round(v) for v in asked.to_pixels(*images[0].size)]), int)
    assert (np.abs(region - RED).max(axis=-1) < 60).mean() > 0.9

    # Close to it, the field that is sent is what is visible.
    tab.click("#viewer .whole")
    tab.mouse.move((corners[0][0] + corners[1][0]) / 2, (corners[0][1] + corners[1][1]) / 2)
    # Wheel events that a busy page gets together count as one.
    while np.ptp(tab.evaluate("medllavaMarked().view")[::2]) > 0.05:
        tab.mouse.wheel(0, -300)
        tab.wait_for_timeout(120)
    rest(tab)
    ask(tab, "Where is the gland?")
    view = Box.model_validate(told[-1]["view"])
    assert told[-1]["box"] is None and view.x2 - view.x1 < 0.06
    sent = np.asarray(worker.answerer.asked[-1][0][-1], int)
    assert np.abs(sent - RED).max() < 40
    # The model said [0.10, 0.20, 0.40, 0.60] of the field: that is drawn at the same part of the view.
    expect(tab.locator("#chat .message.bot").last).to_contain_text("A gland.")
    rest(tab)
    seen = marked_pixels(tab)
    rows, columns = np.nonzero(np.all(np.abs(seen - (230, 25, 75)) < 8, axis=-1))
    high, wide = seen.shape[:2]
    assert np.allclose(
        [columns.min() / wide, columns.max() / wide, rows.max() / high], [0.1, 0.4, 0.6], atol=4 / min(wide, high)
    )
    # Point and freehand there.
    stage = tab.locator("#viewer .stage").bounding_box()
    assert stage is not None
    middle = stage["x"] + stage["width"] / 2, stage["y"] + stage["height"] / 2
    tab.click("[data-tool=point]")
    tab.mouse.click(*middle)
    ask(tab, "What is in this region?")
    centre = view.centre
    assert np.allclose(told[-1]["point"], (centre.x, centre.y), atol=2e-4)
    asked = parse_boxes(worker.answerer.asked[-1][1][-1].text)[0]
    assert asked.centre.x == pytest.approx(0.5, abs=0.02) and asked.x2 - asked.x1 == pytest.approx(0.16, abs=0.02)
    tab.click("[data-tool=freehand]")
    draw(tab, middle, (middle[0] + 80, middle[1]), (middle[0] + 80, middle[1] + 60), (middle[0], middle[1] + 60))
    expect(tab.locator("#viewer .region")).to_contain_text("freehand, within")
    ask(tab, "What is in this region?")
    assert len(told[-1]["path"]) > 3 and np.allclose(told[-1]["box"][:2], (centre.x, centre.y), atol=2e-4)


def test_a_region_out_of_view_is_sent_with_what_is_around(slides: list[ShownSlide]) -> None:
    marked = Box(x1=0.2, y1=0.2, x2=0.24, y2=0.22)
    beyond = slides[0].sight(marked, Box(x1=0.5, y1=0.5, x2=0.6, y2=0.6)).frame
    assert np.allclose(beyond.as_tuple(), (0.19, 0.195, 0.25, 0.225), atol=1e-4)
    within = slides[0].sight(marked, Box(x1=0.1, y1=0.1, x2=0.3, y2=0.3)).frame
    assert np.allclose(within.as_tuple(), (0.1, 0.1, 0.3, 0.3), atol=1e-4)


def test_scale_and_the_models_scale(
    start_worker: Any, serve_page: Serve, tab: Page, slides: list[ShownSlide]
) -> None:
    worker = start_worker()
    worker.answerer.manifest.training_mpp = 0.5
    tab.goto(serve_page(worker.url, slides=slides))
    tab.click("#slides button")
    ready(tab)
    stage = tab.locator("#viewer .stage").bounding_box()
    assert stage is not None
    per = 0.5 / min(stage["width"] / 40_960, stage["height"] / 32_768)
    expect(tab.locator("#viewer .zoom")).to_have_text(f"{per:.1f} µm/px, {float(f'{10 / per:.2g}'):g}×")
    rule, length = tab.locator("#viewer .rule").bounding_box(), tab.locator("#viewer .length").inner_text()
    assert rule is not None and length == "5 mm"
    assert rule["width"] == pytest.approx(5000 / per, abs=1)
    times = float(f"{per / 0.5:.2g}")
    expect(tab.locator("#viewer .mismatch")).to_have_text(f"{times:g} times coarser than the model's 0.5 µm/px")
    tab.focus("#viewer .deep .openseadragon-canvas")
    for _ in range(10):
        tab.keyboard.press("+")
    rest(tab)
    expect(tab.locator("#viewer .mismatch")).to_be_hidden()
    for _ in range(3):
        tab.keyboard.press("+")
    expect(tab.locator("#viewer .mismatch")).to_contain_text("finer than the model's")


def test_with_the_keyboard_only(
    worker: Any, serve_page: Serve, tab: Page, tmp_path: Path, told: list[Any]
) -> None:
    tab.goto(serve_page(worker.url))
    tab.set_input_files("#viewer input[type=file]", picture(tmp_path, 800, 600))
    ready(tab)
    _, _, scale = shown(tab, 800, 600)
    step = 12 / scale  # of an arrow key, in pixels of the picture
    # From the file field, Tab reaches the tools, the view's buttons and the picture.
    tab.focus("#viewer input[type=file]")
    for _ in range(12):
        tab.keyboard.press("Tab")
        if "openseadragon-canvas" in tab.evaluate("document.activeElement.className"):
            break
    else:
        raise AssertionError("Tab does not reach the picture")
    region = tab.locator("#viewer .region")
    tab.keyboard.press("Enter")
    expect(region).to_have_text("box [0.33, 0.33, 0.67, 0.67]")
    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "Shift+ArrowRight", "Shift+ArrowUp", "Shift+ArrowUp"):
        tab.keyboard.press(key)
    tab.keyboard.press("Enter")
    ask(tab, "What is in this region?")
    box = [v * side for v, side in zip(told[-1]["box"], (800, 600) * 2, strict=True)]
    third = (800 / 3, 600 / 3)
    meant = [third[0] + 2 * step, third[1] - step, 2 * third[0] + 3 * step, 2 * third[1] - 3 * step]
    assert np.allclose(box, meant, atol=1.0)

    tab.focus("#viewer .deep .openseadragon-canvas")
    tab.keyboard.press("+")
    tab.keyboard.press("ArrowRight")
    rest(tab)
    tab.keyboard.press("Escape")
    expect(region).to_have_text("whole image")
    ask(tab, "What do you see?")
    view = told[-1]["view"]
    assert told[-1]["box"] is None and view[2] - view[0] < 1 and (view[0] + view[2]) / 2 > 0.52
    tab.focus("#viewer .deep .openseadragon-canvas")
    tab.keyboard.press("0")
    rest(tab)

    tab.focus("[data-tool=freehand]")
    tab.keyboard.press("Space")
    tab.focus("#viewer .deep .openseadragon-canvas")
    tab.keyboard.press("Enter")
    for key in ("Space", "ArrowRight", "ArrowRight", "Space", "ArrowDown", "ArrowDown", "Enter"):
        tab.keyboard.press(key)
    ask(tab, "What is in this region?")
    path = [(x * 800, y * 600) for x, y in told[-1]["path"]]
    assert np.allclose(path, [(400, 300), (400 + 2 * step, 300), (400 + 2 * step, 300 + 2 * step)], atol=1.0)


@pytest.fixture
def tablet(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 820, "height": 1180}, has_touch=True)
    page = context.new_page()
    page.set_default_timeout(60_000)
    yield page
    context.close()


def test_fingers(worker: Any, serve_page: Serve, tablet: Page, tmp_path: Path, told: list[Any]) -> None:
    """One finger draws; two zoom and draw nothing."""
    tablet.goto(serve_page(worker.url))
    tablet.set_input_files("#viewer input[type=file]", picture(tmp_path, 800, 600))
    ready(tablet)
    x, y, scale = shown(tablet, 800, 600)
    touch = tablet.context.new_cdp_session(tablet)

    def fingers(kind: str, *places: tuple[float, float]) -> None:
        points = [{"x": px, "y": py, "id": n} for n, (px, py) in enumerate(places)]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    start = (x + 200 * scale, y + 150 * scale)
    end = (x + 600 * scale, y + 450 * scale)
    fingers("touchStart", start)
    for n in range(1, 6):
        fingers("touchMove", (start[0] + (end[0] - start[0]) * n / 5, start[1] + (end[1] - start[1]) * n / 5))
    fingers("touchEnd")
    expect(tablet.locator("#viewer .region")).to_have_text("box [0.25, 0.25, 0.75, 0.75]")
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    fingers("touchStart", (middle[0] - 20, middle[1]), (middle[0] + 20, middle[1]))
    for n in range(1, 7):
        fingers("touchMove", (middle[0] - 20 - 10 * n, middle[1]), (middle[0] + 20 + 10 * n, middle[1]))
    fingers("touchEnd")
    rest(tablet)
    expect(tablet.locator("#viewer .region")).to_have_text("box [0.25, 0.25, 0.75, 0.75]")
    ask(tablet, "What is in this region?")
    view = told[-1]["view"]
    stage = tablet.locator("#viewer .stage").bounding_box()
    assert stage is not None
    across = stage["width"] / (800 * scale)  # of the fitted view, in widths of the picture
    assert view[2] - view[0] == pytest.approx(across * 40 / 160, rel=0.05)
    assert (view[0] + view[2]) / 2 == pytest.approx(0.5, abs=0.03)


def test_a_clicked_phrase_flashes_its_box(
    worker: Any, serve_page: Serve, tab: Page, slides: list[ShownSlide]
) -> None:
    tab.goto(serve_page(worker.url, slides=slides))
    tab.click("#slides button")
    ready(tab)
    ask(tab, "Where is the gland?")
    tab.click("#viewer .closer")
    for _ in range(8):
        tab.click("#viewer .closer")
    rest(tab)
    # Looked at in the same breath: it goes after a moment.
    assert tab.evaluate("""() => {
        document.dispatchEvent(new CustomEvent("medllava-flash", { detail: { index: 0 } }));
        return document.querySelector("#viewer .marks").dataset.flash;
    }""") == "0"
    expect(tab.locator("#viewer .marks[data-flash]")).to_have_count(0)
    # The box was out of view, and is in it now.
    rows, columns = np.nonzero(np.all(np.abs(marked_pixels(tab) - (230, 25, 75)) < 8, axis=-1))
    assert len(rows) > 100 and columns.max() - columns.min() > 100


def test_a_slide_file_is_not_uploaded(
    worker: Any, serve_page: Serve, tab: Page, gigapixel: Any, tmp_path: Path
) -> None:
    tab.goto(serve_page(worker.url))
    (tmp_path / "scan.svs").write_bytes(gigapixel.path.read_bytes())
    tab.set_input_files("#viewer input[type=file]", tmp_path / "scan.svs")
    expect(tab.get_by_text("Whole slides are not sent through the browser")).to_be_visible()
    expect(tab.get_by_text("--slides FOLDER")).to_be_visible()
    # One with the name of a photograph is told by its pixels, in words of this field.
    tab.set_input_files("#viewer input[type=file]", gigapixel.path)
    told = tab.get_by_text("This picture cannot be opened: far more pixels than the limit of 100,000,000")
    expect(told).to_contain_text("Of a slide: Ask the operator to start this page with --slides FOLDER.")
    expect(told).not_to_contain_text("attack")


def test_tiles_by_number_only(worker: Any, serve_page: Serve, slides: list[ShownSlide]) -> None:
    url = serve_page(worker.url, slides=slides)
    tile = httpx.get(f"{url}/medllava/slides/0/16/40_30.jpg")
    assert tile.status_code == 200 and tile.headers["content-type"] == "image/jpeg"
    assert tile.headers["cache-control"] == "no-store"
    for path in [
        "slides/1/16/0_0.jpg", "slides/-1/16/0_0.jpg", "slides/0/17/0_0.jpg", "slides/0/16/9999_0.jpg",
        "slides/..%2f..%2fetc/16/0_0.jpg", "slides/0/..%2f..%2f/0_0.jpg", "slides/0/16/0_0.jpg%2f..%2f..",
        "vendor/..%2fpage.py", "vendor/LICENSE.txt", "slides/0/16/1e9_0.jpg", "slides/0", "slides/big.tiff",
    ]:
        reply = httpx.get(f"{url}/medllava/{path}")
        assert reply.status_code in {404, 422}, path
        assert "big.tiff" not in reply.text.replace(path, "")
    library = httpx.get(f"{url}/medllava/vendor/openseadragon.min.js")
    assert library.status_code == 200 and "openseadragon 6.1.1" in library.text[:200]


def test_a_slide_behind_a_proxy_that_serves_it_under_a_path(
    worker: Any, serve_page: Serve, tab: Page, slides: list[ShownSlide], proxy: Callable[[str], str]
) -> None:
    address = proxy(serve_page(worker.url, slides=slides, root_path="/chat"))
    got: list[tuple[int, str]] = []
    tab.on("response", lambda response: got.append((response.status, response.url)))
    tab.goto(f"{address}/chat/")
    tab.click("#slides button")
    ready(tab)
    ask(tab, "Where is the gland?")
    expect(tab.locator("#chat .phrase")).to_have_count(1)
    tiles = [(status, url) for status, url in got if "/slides/" in url]
    assert len(tiles) > 4
    assert all(status == 200 and url.startswith(f"{address}/chat/medllava/slides/0/") for status, url in tiles)
    assert all(url.startswith((f"{address}/chat", "data:")) for _, url in got if not url.endswith("/favicon.ico"))
    tab.goto("about:blank")  # before the proxy ends and breaks off what the page listens to


def test_nobody_sees_a_slide_before_the_login(
    worker: Any, slides: list[ShownSlide], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    from medllava.serve.client import Worker
    from medllava.serve.page import build, launch
    from medllava.serve.web import free_port

    page = build([Worker(worker.url)], (), (), slides=slides)
    port = free_port("127.0.0.1", 0)
    launch(page, "127.0.0.1", port, logins=[("anna", "secret")], slides=slides)
    try:
        tile = f"http://127.0.0.1:{port}/medllava/slides/0/16/0_0.jpg"
        assert httpx.get(tile).status_code == 401
        with httpx.Client() as client:
            client.post(f"http://127.0.0.1:{port}/login", data={"username": "anna", "password": "secret"})
            assert client.get(tile).status_code == 200
    finally:
        page.close(verbose=False)


def test_names_of_slides_stay_text(gigapixel: Any, tmp_path: Path) -> None:
    from medllava.serve.tiles import slide_strip

    path = tmp_path / "a<img src=x onerror=alert(1)>&.tiff"
    path.write_bytes(gigapixel.path.read_bytes())
    strip = slide_strip([ShownSlide(Slide(path), 0)])
    assert "<img src=x" not in strip and "a&lt;img src=x onerror=alert(1)&gt;&amp;" in strip


@pytest.mark.skipif("MEDLLAVA_SCREENSHOT_DIR" not in os.environ, reason="for looking at: names a folder")
@pytest.mark.parametrize("size", [(1280, 800), (820, 1180), (1600, 1000)])
def test_pictures_to_look_at(
    start_worker: Any, serve_page: Serve, tab: Page, tissue: Path, slides: list[ShownSlide], size: tuple[int, int]
) -> None:
    worker = start_worker()
    worker.answerer.manifest.training_mpp = 0.5
    folder = Path(os.environ["MEDLLAVA_SCREENSHOT_DIR"])
    tab.set_viewport_size({"width": size[0], "height": size[1]})
    tab.goto(serve_page(worker.url, slides=slides, examples=(tissue,)))
    tab.wait_for_timeout(2500)
    tab.screenshot(path=folder / f"empty-{size[0]}.png")
    tab.click("#examples button")
    ready(tab)
    x, y, scale = shown(tab, 1200, 600)
    draw(tab, (x + 660 * scale, y + 120 * scale), (x + 1080 * scale, y + 420 * scale))
    ask(tab, "What is in this region?")
    ask(tab, "Where is the gland?")
    tab.wait_for_timeout(500)
    tab.screenshot(path=folder / f"photo-{size[0]}.png", full_page=True)
    tab.click("#slides button")
    ready(tab)
    tab.wait_for_timeout(800)
    x, y, scale = shown(tab, 40_960, 32_768)
    tab.mouse.move(x + 10_000 * scale, y + 7000 * scale)
    for _ in range(4):
        tab.mouse.wheel(0, -300)
        tab.wait_for_timeout(120)
    tab.wait_for_timeout(900)
    tab.click("[data-tool=freehand]")
    stage = tab.locator("#viewer .stage").bounding_box()
    assert stage is not None
    angles = np.linspace(0, 2 * np.pi, 24)
    middle = stage["x"] + stage["width"] * 0.6, stage["y"] + stage["height"] * 0.6
    draw(tab, *[(middle[0] + 90 * np.cos(a), middle[1] + 60 * np.sin(2 * a) + 40 * np.sin(a)) for a in angles])
    ask(tab, "Where is the gland?")
    tab.wait_for_timeout(800)
    tab.screenshot(path=folder / f"slide-{size[0]}.png", full_page=True)
