"""Paths of SQLite databases inside the URIs that MLflow takes. Not for what is in a database."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from urllib.parse import unquote

_PREFIXES = ("sqlite:///", "sqlite+pysqlite:///")


def sqlite_uri(path: str | os.PathLike[str]) -> str:
    """Return the URI of the database at an absolute path."""
    path = os.fspath(path)
    if not set("?%") & set(path):
        return f"{_PREFIXES[0]}{path}"
    # SQLAlchemy unquotes the path, and MLflow makes the folders that the quoted one names, but not with this prefix
    return _PREFIXES[1] + path.replace("%", "%25").replace("?", "%3F")


def sqlite_path(uri: str) -> Path | None:
    """Return the path of the database that `uri` names; None if it names something else."""
    for prefix in _PREFIXES:
        if uri.startswith(prefix):
            return Path(unquote(uri.removeprefix(prefix).partition("?")[0]))
    return None


def check_sqlite(path: Path) -> None:
    """Check that there is a database at `path`, or that one can be made. MLflow would try for two minutes.

    Raises:
        OSError, ValueError, sqlite3.Error: there is none and it cannot be made.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    if not path.exists():
        above = next(p for p in path.absolute().parents if p.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(f"{above} is no folder in which files may be made")
        return
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as database:
        try:
            database.execute("PRAGMA schema_version").fetchone()
        except sqlite3.OperationalError as e:
            if "locked" not in str(e):  # by another process that writes, which MLflow waits for
                raise
