"""Checksums of what a data set holds: of an image, of JSON, of the whole. Not of files: see `storage.sha256_file`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from eiwtrain.data.shards import Split

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

DIGEST_BYTES = 12


def image_digest(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Return DIGEST_BYTES that are equal for equal pixels and, but for one chance in 2^96, for no others.

    Args:
        pixels: contiguous in memory.
    """
    return hashlib.sha256(pixels.data).digest()[:DIGEST_BYTES]


def fingerprint(
    splits: Mapping[str, Split], preprocessing: Mapping[str, Any], classes: Iterable[str] | None = None
) -> str:
    """Return the hex SHA-256 over the checksums of all shards and sidecars, in order, the preprocessing and the names
    of the classes: over all that decides images and labels."""
    content = {
        "preprocessing": preprocessing,
        "splits": {name: [[s.sha256, s.sidecar_sha256] for s in split.shards] for name, split in splits.items()},
        "classes": list(classes or ()),
    }
    return digest(content)


def first_fingerprint(
    splits: Mapping[str, Split], preprocessing: Mapping[str, Any], classes: Iterable[str] | None = None
) -> str:
    """Return the fingerprint that data sets of the first format have: without sidecars and classes, so without labels.

    Runs that began on them keep their order of samples, which follows from it.
    """
    shards = {name: [s.sha256 for s in split.shards] for name, split in splits.items()}
    return digest({"preprocessing": preprocessing, "splits": shards})


def canonical_json(content: Any) -> bytes:
    """Return the same bytes for equal content: sorted keys, no spaces, ASCII."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def digest(content: Any) -> str:
    """Return the hex SHA-256 of the canonical JSON of `content`."""
    return hashlib.sha256(canonical_json(content)).hexdigest()
