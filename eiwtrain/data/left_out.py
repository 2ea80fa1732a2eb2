"""Counts the files of a source that are not in its data set, by suffix and reason. Not for images that were tried."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from eiwtrain.terminal.lines import one_line

FOLDER = "/"  # stands for a suffix where a whole folder was left out
_SUFFIX = re.compile(r"\.[a-z0-9_~+-]{1,12}")
_MOST_KINDS = 100  # in a manifest: files that end in anything must not make it large
_SHOWN = 12  # kinds in a table


@dataclass(frozen=True)
class LeftOut:
    """Files of a source that are not in the data set: of one suffix, and for one reason.

    Attributes:
        suffix: in lower case and with its dot; empty for names without one, `FOLDER` for folders.
        reason: a few words.
        files: how many there are.
        first: the first of their names.
    """

    suffix: str
    reason: str
    files: int
    first: str


def count_left_out(files: Iterable[tuple[str, str]]) -> tuple[LeftOut, ...]:
    """Count files, given as (name, reason), by suffix and reason. See `join_left_out`."""
    return join_left_out(LeftOut(suffix_of(name), reason, 1, name) for name, reason in files)


def join_left_out(counted: Iterable[LeftOut]) -> tuple[LeftOut, ...]:
    """Add up counts of the same suffix and reason, the most frequent first.

    The result does not depend on their order. Beyond 100 kinds the rest are one.
    """
    counts: dict[tuple[str, str], tuple[int, str]] = {}
    for suffix, reason, files, first in ((c.suffix, c.reason, c.files, c.first) for c in counted):
        number, earliest = counts.get((suffix, reason), (0, first))
        counts[suffix, reason] = number + files, min(earliest, first)
    found = [LeftOut(*kind, *count) for kind, count in counts.items()]
    found.sort(key=lambda kind: (-kind.files, kind.suffix, kind.reason))
    if len(rest := found[_MOST_KINDS - 1 :]) > 1:
        others = LeftOut("", "of other kinds", sum(kind.files for kind in rest), min(kind.first for kind in rest))
        found[_MOST_KINDS - 1 :] = [others]
    return tuple(found)


def suffix_of(name: str) -> str:
    """Return the suffix of a file's name in lower case, with its dot; numbers, which can be many, are `.0`."""
    if name.endswith("/"):
        return FOLDER
    stem, dot, suffix = name.rpartition("/")[2].rpartition(".")
    suffix = dot + suffix.lower()
    if not stem or not _SUFFIX.fullmatch(suffix):
        return ""
    return ".0" if suffix[1:].isdecimal() else suffix


def left_out_table(kinds: Iterable[LeftOut]) -> list[str]:
    """Return the lines that show how many files were left out, and why; none where there are no such files."""
    kinds = list(kinds)
    if not kinds:
        return []
    number = sum(kind.files for kind in kinds)
    lines = [f"left out: {number:,} {'file' if number == 1 else 'files'} of the source"]
    for kind in kinds[:_SHOWN]:
        suffix = {"": "no suffix", FOLDER: "folder"}.get(kind.suffix, kind.suffix)
        lines.append(f"  {kind.files:>9,}  {suffix:<10} {kind.reason}; the first: {one_line(kind.first)}")
    if rest := kinds[_SHOWN:]:
        lines.append(f"  {sum(kind.files for kind in rest):>9,}  of {len(rest)} other kinds, which the manifest lists")
    return lines
