"""Texts of others, such as the message of an error, as one line. Not for where a line is printed."""

from __future__ import annotations

import re

from eiwtrain.terminal.redact import redact

_LONGEST = 20_000  # characters that are looked at
# torch's own words, those of CUDA and NCCL, and the codes of cuBLAS, cuSOLVER and cuDNN
_SHORT_OF_MEMORY = re.compile(
    r"out of memory|_STATUS_ALLOC_FAILED|_ALLOCATION_FAILED|failed to cuda (m|c)alloc", re.IGNORECASE
)


def one_line(text: object, limit: int | None = 200) -> str:
    """Return the text of an error, or any other, with runs of white space as single spaces, without secrets of URLs and
    without characters that command a terminal.

    Args:
        limit: the most characters to keep; None: all, up to 20,000.
    """
    line = redact(" ".join(str(text)[:_LONGEST].split()))  # before it is cut, which could hide a URL's end from it
    return printable(line)[:limit]


def printable(text: str) -> str:
    """Return a text without line breaks and other characters that command a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch says that a GPU's memory was too small. Not all of these are OutOfMemoryError: that
    comes from torch's own allocator, and not from the libraries that it calls."""
    return _SHORT_OF_MEMORY.search(str(error)) is not None
