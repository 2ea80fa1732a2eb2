"""Folders, tars and zips of given files, for the tests of the sources that read them."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

Files = dict[str, bytes]  # content by name, a path with slashes


def write_files(root: Path, files: Mapping[str, bytes]) -> Path:
    """Write the files below `root`, and return it."""
    root.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def below(folder: str, files: Files) -> Files:
    """Return the same files in a folder."""
    return {f"{folder}/{name}": data for name, data in files.items()}


def tar_of(
    files: Mapping[str, bytes],
    form: int = tarfile.PAX_FORMAT,
    links: Mapping[str, tuple[bytes, str]] | None = None,
) -> bytes:
    """Make a tar of files, and then links: (type, target) by name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, (kind, target) in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    return buffer.getvalue()


def zip_of(files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED, level: int | None = None) -> bytes:
    """Make a zip of files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method, compresslevel=level) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()
