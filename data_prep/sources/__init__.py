"""The sources by name. Each is a module with one function of the same name that makes a `Source`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from data_prep.items import Source
from data_prep.splits import apply_rule
from eiwtrain.data.manifest import DataError

SOURCES = ("imagenet", "lsun", "celeba", "cifar10", "folder", "webdataset", "photos")


def read_source(
    name: str,
    resolution: int,
    path: str | None = None,
    *,
    split: str = "auto",
    only: Sequence[str] = (),
    **options: Any,
) -> Source:
    """List the items of the source called `name`, without decoding any.

    Args:
        name: one of `SOURCES`.
        resolution: height and width of the images to write, in pixels.
        path: where the images are, a path or any fsspec URL; `photos` takes none.
        split, only: see `data_prep.splits.apply_rule`.
        options: passed to the source's own function.

    Raises:
        DataError: an argument is wrong, or there are no images.
        StorageError: the path cannot be reached.
    """
    if name not in SOURCES:
        raise DataError(f"there is no source '{name}'; choose one of {', '.join(SOURCES)}")
    make = getattr(importlib.import_module(f"data_prep.sources.{name}"), name)
    if name == "photos":
        if path is not None:
            raise DataError("the photos source takes no path: it cuts photographs of installed packages")
        return apply_rule(make(resolution, **options), split, only)
    if path is None:
        raise DataError(f"the {name} source needs a path")
    source = make(path, **options)
    if (side := source.params.get("side", resolution)) != resolution:
        raise DataError(
            f"source {path}: its images were downsampled to {side} pixels; use --resolution {side}: resized again, "
            "they would be comparable with no other data set"
        )
    return apply_rule(source, split, only)
