"""Texts of others inside a page of Markdown, as they read and without effect. Not for text that is Markdown itself."""

from __future__ import annotations

import re

from eiwtrain.terminal.lines import one_line

# HTML, links, emphasis, tables, mathematics; an underscore inside a word has no effect.
_MARKS = re.compile(r"([\\`*\[\]<>&|~$]|(?<!\w)_|_(?!\w)|(?<=http)(?=:)|(?<=https)(?=:)|(?<=www)(?=\.))", re.IGNORECASE)
_BEGINS = re.compile(r"(\d{1,9})?([-+#=>.)])")  # a heading, a list, a quotation


def text(value: object, limit: int = 500) -> str:
    """Return a text of somebody else as Markdown that shows it: one line, no link, no HTML, no heading."""
    line = _MARKS.sub(lambda mark: f"\\{mark[1]}", one_line(value, limit))
    return _BEGINS.sub(lambda mark: f"{mark[1] or ''}\\{mark[2]}", line, count=1) if _BEGINS.match(line) else line


def code(value: object, limit: int = 500) -> str:
    """Return a text of somebody else as a code span."""
    return f"`{one_line(value, limit).replace('`', chr(39))}`"
