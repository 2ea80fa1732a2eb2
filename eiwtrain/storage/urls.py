"""Which file system a URL is of, and the exact path inside it. Not for reading or writing: that is `files`.

A URL without a scheme is a local path. What follows a scheme is a path and nothing else: `::`, which fsspec takes for a
chain of file systems, and `* ? [ ]`, which it takes for patterns, are characters of names here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import fsspec
import fsspec.asyn

from eiwtrain.storage.retry import StorageError
from eiwtrain.terminal.lines import one_line
from eiwtrain.terminal.redact import REFUSAL, holds_secret, redact

_SCHEME = re.compile(r"([A-Za-z][^/]*)://")

os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)  # else a child waits forever for its parent's thread


def is_local(url: str) -> bool:
    """Return whether `url` is a path of this machine's file system."""
    scheme = _SCHEME.match(url)
    return scheme is None or scheme[1] == "file"


def absolute(url: str) -> str:
    """Return a local path made absolute; any other URL as it is, without a trailing slash."""
    if is_local(url):
        return str(_local(url).absolute())
    return url.rstrip("/")


def anchored(url: str) -> str:
    """Return a local path made absolute, as workers have working directories of their own; any other URL as it is.

    A submitted job's working directory is a copy that is deleted with the job, so relative paths are in `~/eiwtrain`.
    """
    if not is_local(url):
        return url
    job = "working_dir_files" in Path.cwd().parts  # where Ray unpacks a job's working directory
    return str((Path.home() / "eiwtrain" if job else Path.cwd()) / _local(url))


def join(url: str, *parts: str) -> str:
    """Return `url/part/part`, with single slashes."""
    return "/".join([url.rstrip("/"), *(p.strip("/") for p in parts)])


def filesystem(url: str, tries: int = 1) -> tuple[Any, str]:
    """Return the fsspec file system of `url` and the path inside it. Listings are not cached, as others write too.

    Call it for each use: in a forked process fsspec refuses a file system made before the fork.

    Args:
        url: a path or any fsspec URL.
        tries: tries of each request by an S3 client itself. One by default, as `retrying` does the rest: on its own
            s3fs takes 25 requests and 40 s to give up on a 503, and minutes on a silent server.

    Raises:
        StorageError: the scheme is unknown or its package is not installed, or the URL holds a password.
    """
    if is_local(url):
        return fsspec.filesystem("file"), absolute(url)
    if holds_secret(url):
        raise StorageError(f"{redact(url)}: {REFUSAL}")
    options: dict[str, Any] = {}
    if is_s3(url):
        config = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        retries = {"mode": "standard", "total_max_attempts": tries}
        options = {"use_listings_cache": False, "config_kwargs": {"retries": retries} | config}
    try:  # not by `url_to_fs`, which would take a "::" in the path for a chain of file systems
        kind = fsspec.get_filesystem_class(url.partition("://")[0])
        fs = kind(**(kind._get_kwargs_from_urls(url) | options))
        path = kind._strip_protocol(url)
    except Exception as e:  # a file system that cannot be made from a URL alone fails in a way of its own
        raise StorageError(f"{url}: {one_line(e)}") from None
    if is_s3(url):
        fs.retries = 1
    else:
        fs.invalidate_cache()
    return fs, path


def is_s3(url: str) -> bool:
    """Return whether `url` is of an S3 bucket."""
    return url.startswith(("s3://", "s3a://"))


def _local(url: str) -> Path:
    path = Path(url.removeprefix("file://"))
    try:
        return path.expanduser()
    except RuntimeError:  # "~name" of no user is a name, as in a shell
        return path
