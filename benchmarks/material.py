"""Videos for the benchmark of ``narrate`` that are made in seconds: as video sites encode, and an hour long."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av


def as_sites_encode(video: Path, out: Path) -> Path:
    """The video once more, encoded as the H.264 of video sites is: bidirectional frames, CABAC, several references, key
    frames some seconds apart. Transcript and truth go with it."""
    out.mkdir(parents=True, exist_ok=True)
    made = out / video.name
    options = {"preset": "fast", "crf": "23", "bf": "3", "threads": "1"}
    with av.open(str(video)) as source, av.open(str(made), "w") as target:
        rate = source.streams.video[0].average_rate
        if rate is None:
            raise SystemExit(f"{video}: no frame rate")
        stream = target.add_stream("libx264", rate=rate, options=options)
        shown = source.streams.video[0]
        stream.width, stream.height, stream.pix_fmt = shown.width, shown.height, "yuv420p"
        stream.codec_context.gop_size = round(5 * rate)
        for number, frame in enumerate(source.decode(video=0)):
            frame.pts, frame.time_base = number, Fraction(1) / rate
            frame.pict_type = av.video.frame.PictureType.NONE
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    for ending in (".words.json", ".truth.json"):
        made.with_suffix(ending).write_bytes(video.with_suffix(ending).read_bytes())
    return made


def repeated(video: Path, made: Path, seconds: float) -> Path:
    """The video over and over for at least ``seconds``, its packets copied, its transcript said again each time."""
    made.parent.mkdir(parents=True, exist_ok=True)
    segments = json.loads(video.with_suffix(".words.json").read_text())["segments"]
    said = []
    with av.open(str(made), "w") as target:
        with av.open(str(video)) as source:
            stream = target.add_stream_from_template(source.streams.video[0])
            length = source.streams.video[0].duration
            tick_s = source.streams.video[0].time_base
        if length is None or tick_s is None:
            raise SystemExit(f"{video}: no length")
        for turn in range(-int(-seconds // float(length * tick_s))):
            shift_s = float(turn * length * tick_s)
            said += [_later(segment, shift_s) for segment in segments]
            with av.open(str(video)) as source:
                for packet in source.demux(video=0):
                    if packet.dts is None or packet.pts is None:
                        continue  # the empty packet at the end
                    packet.pts += turn * length
                    packet.dts += turn * length
                    packet.stream = stream
                    target.mux(packet)
    made.with_suffix(".words.json").write_text(json.dumps({"segments": said}))
    return made


def _later(segment: dict[str, object], shift_s: float) -> dict[str, object]:
    """A segment of a transcript, its words included, said ``shift_s`` later."""
    words = segment["words"]
    assert isinstance(words, list)
    moved = [{**word, "start": word["start"] + shift_s, "end": word["end"] + shift_s} for word in words]
    start, end = segment["start"], segment["end"]
    assert isinstance(start, float | int) and isinstance(end, float | int)
    return {**segment, "start": start + shift_s, "end": end + shift_s, "words": moved}
