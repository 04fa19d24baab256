"""Prompt files: Markdown that a person can edit, with ``$placeholders``.

A file has the sections ``## system`` and ``## user``, and for kinds whose question is not written by the teacher
``## questions`` with one question per ``- `` line. What stands above the first section is a note to people.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from medllava.errors import ConfigError

_SECTION = re.compile(r"^## (system|user|questions)[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Prompt:
    """One prompt file. ``hash`` is of its whole text: it tells which wording made a sample."""

    name: str
    system: str
    user: str
    questions: tuple[str, ...]
    hash: str

    def fill(self, **values: object) -> tuple[dict[str, Any], ...]:
        """The system and the user message with the placeholders of the user section filled.

        Raises ConfigError for a placeholder that this kind of prompt does not have.
        """
        try:
            user = Template(self.user).substitute({name: str(value) for name, value in values.items()})
        except (KeyError, ValueError) as error:
            known = ", ".join(f"${name}" for name in sorted(values))
            raise ConfigError(f"prompt {self.name}: placeholder {error}; this prompt may use {known}") from error
        return {"role": "system", "content": self.system}, {"role": "user", "content": user}


def load_prompt(folder: Path, name: str) -> Prompt:
    """Read ``folder/name.md``. Raises ConfigError if it is absent or a section is missing."""
    path = folder / f"{name}.md"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"prompt {path}: cannot be read ({error.strerror}); the recipe's 'prompts' names the folder"
        ) from error
    _, *pieces = _SECTION.split(text)
    sections = dict(zip(pieces[::2], (piece.strip() for piece in pieces[1::2]), strict=True))
    for section in ("system", "user"):
        if not sections.get(section):
            raise ConfigError(f"prompt {path}: needs a section '## {section}' with text")
    lines = sections.get("questions", "").splitlines()
    questions = tuple(line[2:].strip() for line in lines if line.startswith("- "))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Prompt(name, sections["system"], sections["user"], questions, digest)
