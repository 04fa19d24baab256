"""Requests and pictures that took a worker down, or held up everybody else, when they were tried on one."""

from __future__ import annotations

import base64
import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import EpsImagePlugin, Image

from medllava.conversation import Turn
from medllava.errors import DataError, ImageTooLarge, PromptTooLong
from medllava.images import load_image
from medllava.model.answerer import Answerer
from medllava.serve.export import read_geojson
from medllava.serve.faults import Refused
from medllava.serve.intake import parse, text_bytes
from medllava.serve.schema import ChatRequest

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def model(tiny: Path) -> Answerer:
    return Answerer.load(tiny, device="cpu")


def request(content: Any, **options: Any) -> bytes:
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 2, **options}
    return json.dumps(body).encode()


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# -- requests


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (request([1] * 100_000), None),  # each of a million parts was named: 40 s, and 54 MB to say it
        (request("x", **{f"key{number}": 1 for number in range(900)}), "key0"),
        (request("x", **{"k" * 100_000: 1}), "k" * 200),
        (request([{"type": "t" * 100_000}]), "messages.0.content.0"),
        (request("x", messages=[{"role": "x", "content": 5}] * 400), "messages.0.role"),
    ],
    ids=["parts", "fields", "long field", "long tag", "messages"],
)
def test_a_fault_is_told_in_few_words(body: bytes, param: str | None) -> None:
    with pytest.raises(Refused) as caught:
        parse(body, ChatRequest)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert len(caught.value.message) < 2500


def test_the_text_of_a_request_is_bounded_and_its_pictures_are_not_text(start_worker: Any) -> None:
    worker = start_worker()

    def post(content: Any) -> httpx.Response:
        body = json.loads(request(content)) | {"model": "scripted"}
        return httpx.post(f"{worker.url}/v1/chat/completions", json=body, timeout=60)

    reply = post("gland " * 1_000_000)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
    noise = encoded(Image.effect_noise((1500, 1500), 90), "BMP")  # 6 MB of base64 in two pictures
    uri = f"data:image/bmp;base64,{base64.b64encode(noise).decode()}"
    picture = {"type": "image_url", "image_url": {"url": uri}}
    assert post([picture, picture, {"type": "text", "text": "What is here?"}]).status_code == 200


def test_only_base64_is_no_text() -> None:
    assert text_bytes(b'{"url": "data:image/png;base64,AAAA"}') == len(b'{"url": "data:image/png"}')
    hidden = b'{"a;base64,": [' + b"1," * 1000 + b"1]}"
    assert text_bytes(hidden) > 2000
    assert text_bytes(b";base64," + b"x" * 1000) == 1008  # without an end it is no JSON


def test_a_text_of_megabytes_is_refused_before_it_is_tokenized(
    model: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 MB of words took the tokenizer five minutes and 9 GB, while others waited."""
    monkeypatch.setattr(model._prompts, "question", lambda turns: pytest.fail("tokenized"))
    with pytest.raises(PromptTooLong, match="600,000 characters"):
        model.prepare([], [Turn(role="user", text="gland " * 100_000)])
    asked = [Turn(role="user", text="Where?")]
    with pytest.raises(PromptTooLong, match="characters"):
        model.looker.prepare([Image.new("RGB", (40, 40))], asked, "gland " * 100_000)


def test_a_temperature_next_to_nothing_is_greedy(model: Answerer) -> None:
    """The division left the range of numbers; the error could take all answers of the batch with it."""
    turns = [Turn(role="user", text="hello")]
    greedy = model.answer([], turns, max_new_tokens=8).text
    for temperature in (5e-324, 1e-40, 1e-30):
        assert model.answer([], turns, max_new_tokens=8, temperature=temperature, seed=1).text == greedy


def test_a_page_reads_no_request_without_an_end(serve_page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medllava.serve.body_limit.MOST_BYTES", 1_000_000)
    address = f"{serve_page('http://127.0.0.1:9')}/gradio_api/call/ask"
    sent = []

    def endless() -> Iterator[bytes]:  # its length is not announced
        for _ in range(200):
            sent.append(1)
            yield b" " * 100_000

    assert httpx.post(address, content=b" " * 1_000_001, headers=JSON, timeout=60).status_code == 413
    try:
        assert httpx.post(address, content=endless(), headers=JSON, timeout=60).status_code == 413
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        assert len(sent) < 200  # the page hung up in the middle
    body = {"data": ["", " " * 900_000, None]}
    assert httpx.post(address, json=body, timeout=60).status_code == 200


# -- pictures


def directory(entries: list[tuple[int, int, int, int]]) -> bytes:
    table = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return struct.pack("<H", len(entries)) + table + bytes(4)


PLAIN = [
    (256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, 1),
    (278, 4, 1, 8), (279, 4, 1, 64),
]
MANY = [(1000 + number, 1, 100_000, 8) for number in range(2000)]
"""Tags that all have the same 100 kB for their value: 200 MB of copies."""
TIFF = b"II*\0" + struct.pack("<I", 8)


def test_tags_that_share_their_bytes_are_not_copied() -> None:
    """A TIFF of 11 MB with 60,000 such tags took all memory there was, and the worker was killed."""
    exif = b"Exif\0\0" + TIFF + directory(MANY) + bytes(100_000)
    whole = encoded(Image.new("RGB", (30, 20)), "JPEG")
    parts = [exif[6:][start : start + 60_000] for start in range(0, len(exif), 60_000)]
    jpeg = b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part for part in parts)
    behind = len(TIFF) + len(directory([*PLAIN, (34665, 4, 1, 0)]))
    for data in (
        TIFF + directory(PLAIN + MANY) + bytes(100_000),
        TIFF + directory([*PLAIN, (34665, 4, 1, behind)]) + directory(MANY) + bytes(100_000),
        whole[:2] + jpeg + whole[2:],
        encoded(Image.new("RGB", (30, 20)), "PNG", exif=exif),
        encoded(Image.new("RGB", (30, 20)), "WEBP", exif=exif),
    ):
        with pytest.raises(DataError, match="claim more than the file holds"):
            load_image(data)
    assert load_image(TIFF + directory(PLAIN) + bytes(100)).size == (8, 8)


def test_a_damaged_picture_is_the_senders_fault_whatever_its_decoder_raises() -> None:
    noise = Image.effect_noise((40, 30), 60)
    faults = 0
    for kind in ("AVIF", "PNG", "WEBP", "JPEG2000"):
        data = encoded(noise.convert("RGB"), kind)
        for place in range(min(len(data), 320)):
            for value in (0, 255):
                try:
                    load_image(data[:place] + bytes([value]) + data[place + 1 :])
                except DataError:
                    faults += 1
    assert faults > 100


def test_rare_formats_are_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **more: pytest.fail("run as a program"))
    for kind in ("EPS", "ICO", "QOI", "DDS", "TGA"):
        with pytest.raises(DataError, match="not an image in a known format"):
            load_image(encoded(Image.new("RGB", (16, 16)), kind))
    assert load_image(encoded(Image.new("RGB", (16, 16)), "JPEG2000")).size == (16, 16)


def test_a_picture_of_a_hundred_million_rows_is_refused() -> None:
    header = struct.pack("<IiiHHIIiiII", 40, 1, 90_000_000, 1, 8, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ImageTooLarge, match="a side"):
        load_image(b"BM" + struct.pack("<IHHI", 1000, 0, 0, 54) + header + bytes(1200))


def test_a_million_comments_are_not_joined_one_by_one() -> None:
    image = Image.effect_noise((60, 60), 50).convert("RGB")
    jpeg, gif = encoded(image, "JPEG", exif=b"Exif\0\0"), encoded(image, "GIF", comment=b"well " * 400)
    assert load_image(jpeg).size == load_image(gif).size == (60, 60)
    exif = b"\xff\xe1" + struct.pack(">H", 16) + b"Exif\0\0" + b"12345678"
    frame = gif.index(b"!", 13)
    for many in (
        jpeg[:2] + exif * 100_000 + jpeg[2:],
        gif[:frame] + b"!\xfe\x01a\0" * 100_000 + gif[frame:],
        gif[:frame] + b"!\xfe" + (b"\xff" + b"a" * 255) * 10_000 + b"\0" + gif[frame:],
        gif[:frame] + b"\0" * 100_000 + gif[frame:],
    ):
        with pytest.raises(DataError, match="more than 1,000 pieces of EXIF data or comments"):
            load_image(many)


# -- regions


@pytest.mark.parametrize("number", ["9" * 400, "-" + "9" * 400, "1e400", "NaN"])
def test_a_region_of_impossible_numbers_is_told(number: str) -> None:
    with pytest.raises(DataError, match="feature 1: its geometry cannot be read"):
        read_geojson('{"type": "Point", "coordinates": [' + number + ", 1]}", (100, 100))


def test_the_name_of_a_region_can_be_sent_to_a_browser() -> None:
    point = {"type": "Point", "coordinates": [1, 1]}
    file = json.dumps({"type": "Feature", "geometry": point, "properties": {"name": "gland \ud800 A"}})
    assert read_geojson(file, (100, 100))[0].name == "gland ? A"
