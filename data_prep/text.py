"""Decodes the text files of a source, such as lists of classes. Not for what is in them."""

from __future__ import annotations

import codecs

from eiwtrain.data.manifest import DataError

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def decode_text(content: bytes, name: str) -> str:
    """Decode a text: UTF-8, or what the mark at its beginning says, as Windows programs write it.

    Raises:
        DataError: it is not such text; `name` names it in the error.
    """
    encoding = next((encoding for mark, encoding in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as e:
        raise DataError(f"{name}: not text in UTF-8 (byte {e.start})") from None
