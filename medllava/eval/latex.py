"""Tables for papers: LaTeX with booktabs, and the cells of Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SPECIAL = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
            "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
            # In the font that LaTeX begins with these three are other signs.
            "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
_STAR = "$^*$"


def escape(text: str) -> str:
    """Text as LaTeX prints it; a star of significance stays."""
    parts = text.split(_STAR)
    return _STAR.join(re.sub(r"[&%_#${}~^\\<>|]", lambda found: _SPECIAL[found.group()], part) for part in parts)


def markdown_cell(text: str) -> str:
    """Text for a cell of a Markdown table, which a bar or a line break would end."""
    return " ".join(text.replace("|", r"\|").split())


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A whole table environment; needs ``\\usepackage{booktabs}``."""
    lines = [" & ".join(map(escape, row)) + r" \\" for row in rows]
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{escape(caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule", " & ".join(map(escape, head)) + r" \\",
        r"\midrule", *lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
    ])
