"""URLs that somebody else wrote, in a tag of MLflow, a checkpoint or another file: which of them may be opened.

fsspec opens many schemes: some chain to others (`::`), run code or fetch any address of the web. Not for a URL that
the user of this program gives, which may have any scheme.
"""

from __future__ import annotations

from eiwtrain.storage.retry import StorageError
from eiwtrain.terminal.lines import one_line

OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
"""Schemes of the object stores that a foreign URL may name; a path of this machine is allowed, too."""

_LONGEST = 2048


def foreign(url: object, where: str) -> str:
    """Return a URL that somebody else wrote, if it is a local path or names an object store.

    Args:
        url: as it was read, of any type.
        where: it was read from, for the error.

    Raises:
        StorageError: it is neither, or a chain of URLs; nothing was opened.
    """
    allowed = f"a local path or one of {', '.join(f'{name}://' for name in OBJECT_STORES)} is opened from there"
    if not isinstance(url, str) or not url:
        raise StorageError(f"{where}: it holds no URL; {allowed}")
    scheme, separator, _ = url.partition("://")
    fine = not separator or scheme in ("file", *OBJECT_STORES)
    if not fine or "::" in url or len(url) > _LONGEST or not url.isprintable():
        raise StorageError(f"{where}: {one_line(url, 80)} is not opened; {allowed}")
    return url
