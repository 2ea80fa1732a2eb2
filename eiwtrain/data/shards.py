"""Name the parts of a data set: its splits, their shards, and the files of these. Not for what is in them: see
`manifest`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_USUAL_SPLITS = ("train", "val", "test", "valid", "validation", "testing", "eval")


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, its number of images, its size in bytes, its hex SHA-256 and that of its sidecar.

    Inside the sidecar itself, `sidecar_sha256` is empty.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    sidecar_sha256: str = ""


@dataclass(frozen=True)
class Split:
    """A named part of the data set. Its sample i is image i of its shards laid end to end."""

    name: str
    samples: int
    shards: tuple[Shard, ...]


def shard_name(split: str, number: int) -> str:
    """Return the file name of shard `number` of `split`."""
    return f"{split}-{number:06d}.tar"


def sidecar_name(shard: str) -> str:
    """Return the file name of the sidecar of a shard."""
    return shard.removesuffix(".tar") + ".json"


def is_shard_file(name: str, splits: Iterable[str]) -> bool:
    """Return whether a file name is that of a shard or sidecar of one of these splits, or of a usual split."""
    known = "|".join(map(re.escape, {*splits, *_USUAL_SPLITS}))
    return re.fullmatch(rf"({known})-\d{{6,}}\.(tar|json)", name) is not None
