"""Finds images with exactly the same pixels by the digests in the sidecars. Not for near-duplicates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from eiwtrain.data.manifest import Sidecar


class Duplicate(NamedTuple):
    """An image of `split`, under `key`, that has the pixels of an earlier one, named `split/key`."""

    split: str
    key: str
    first: str


def find_duplicates(sidecars: Mapping[str, Iterable[Sidecar]]) -> list[Duplicate]:
    """Find all images that equal an earlier one, including those that were dropped.

    The split `train` comes last: if an image is in two splits, the one in `train` counts as the duplicate, and the
    held-out images stay those of the literature. Within a split the order is that of the keys.
    """
    seen: dict[str, str] = {}
    found = []
    for split in sorted(sidecars, key=lambda name: (name == "train", name)):
        images = [
            image
            for sidecar in sidecars[split]
            for image in (
                *zip(sidecar.keys, sidecar.digests, strict=True),
                *((dropped["key"], dropped["digest"]) for dropped in sidecar.dropped),
            )
        ]
        for key, digest in sorted(images):
            first = seen.setdefault(digest, f"{split}/{key}")
            if first != f"{split}/{key}":
                found.append(Duplicate(split, key, first))
    return found
