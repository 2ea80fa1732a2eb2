"""Deletes files and folders by their exact names, and what killed uploads have left.

fsspec's `rm` is not used: it expands `* ? [ ]` in remote paths, so that it deletes others and keeps what was named.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from pathlib import Path
from typing import Any

from eiwtrain.storage.retry import retrying
from eiwtrain.storage.urls import filesystem, is_local, is_s3


def delete(url: str) -> None:
    """Delete the file, or the folder with all in it; nothing needs to be there."""
    fs, path = filesystem(url)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        retrying(url, lambda: _delete_local(Path(path)) if is_local(url) else _delete_remote(fs, path, is_s3(url)))


def abandon_uploads(url: str) -> None:
    """Abort the multipart uploads below the folder `url` that were never completed, such as those of killed processes:
    S3 keeps their parts, and no listing shows them. Other stores have no such uploads.

    Raises:
        StorageError: the store cannot list them or does not allow it.
    """
    if not is_s3(url):
        return
    fs, path = filesystem(url)
    bucket, prefix, _ = fs.split_path(path)
    asked = {"Bucket": bucket, "Prefix": prefix.rstrip("/") + "/"}
    while True:
        answer = retrying(url, functools.partial(fs.call_s3, "list_multipart_uploads", **asked))
        for upload in answer.get("Uploads", []):
            retrying(url, functools.partial(_abort_upload, fs, bucket, upload))
        if not answer.get("IsTruncated"):
            return
        asked |= {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}


def _abort_upload(fs: Any, bucket: str, upload: dict[str, str]) -> None:
    with contextlib.suppress(FileNotFoundError):  # `retrying` would take it for a passing fault of the server
        fs.abort_mpu(bucket, upload["Key"], upload["UploadId"])


def _delete_local(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _delete_remote(fs: Any, path: str, s3: bool) -> None:
    """Delete the file, or what lies below the folder; then the folders themselves, where the store has any."""
    found = fs.find(path, withdirs=True, detail=True)
    folders = {name for name, about in found.items() if about["type"] == "directory"}
    files = found.keys() - folders
    if s3 and "/" in path:  # where a folder may have the name of a file
        files |= {path}
    for name in files:
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(name)
    for folder in sorted(folders, key=len, reverse=True):
        with contextlib.suppress(OSError):  # gone, or no longer empty
            # in S3 a folder is at most an empty file whose name ends in a slash
            fs.rm_file(folder.rstrip("/") + "/") if s3 else fs.rmdir(folder)
