"""Hugging Face hub ids where a folder is expected: looked for in the local cache, then downloaded."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from medllava.errors import CheckpointError, first_line

log = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def local_folder(name: str | Path) -> Path:
    """``name`` if it is there; if it has the form of a hub id (``owner/name``), its folder in Hugging Face's cache.

    With HF_HUB_OFFLINE=1 nothing is downloaded. Raises CheckpointError if a hub id cannot be had; anything else that is
    not there is returned as it is, for the caller to refuse in its own words.
    """
    folder = Path(name)
    if folder.exists() or not _ID.fullmatch(str(name)):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), local_files_only=True))
    except LocalEntryNotFoundError:
        log.info("%s: not in the cache; downloading it from the hub", name)
    try:
        return Path(snapshot_download(str(name)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{name}: no such checkpoint folder, and not to be had from the hub ({type(error).__name__}:"
            f" {first_line(error, 150)})"
        ) from error


def display_name(name: str | Path) -> str:
    """What a checkpoint is called: its folder's name, or the second part of its hub id."""
    found = hub_id(Path(name))
    return found[0].rpartition("/")[2] if found else Path(name).resolve().name


def hub_id(folder: Path) -> tuple[str, str] | None:
    """(id, revision) of a folder in Hugging Face's cache; None for any other."""
    parts = folder.absolute().parts[-3:]
    if len(parts) == 3 and parts[0].startswith("models--") and parts[1] == "snapshots":
        return parts[0].removeprefix("models--").replace("--", "/"), parts[2]
    return None
