"""Texts of others, such as the message of an error, as one line. Not for where a line is printed."""

from __future__ import annotations


def one_line(text: object, limit: int | None = 200) -> str:
    """Return the text of an error, or any other, with runs of white space as single spaces.

    Args:
        limit: the most characters to keep; None: all.
    """
    return " ".join(str(text).split())[:limit]
