"""Reads the batch files of ImageNet at 32x32 or 64x64 pixels, downsampled by Chrabaszcz et al. 2017 (arXiv 1707.08819).

Part of the `imagenet` source, which says what figures on it are comparable with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from data_prep.formats.files import FoundFile, range_of
from data_prep.formats.ranges import ByteRange
from data_prep.formats.rows import RowBatch, batch_items, npz_batch, pickled_batch, zip_members
from data_prep.items import LazyItems
from eiwtrain.data.manifest import DataError

CLASSES = 1000
_BATCH = re.compile(r"(train_data_batch_(\d+)|val_data)(\.npz)?")
_ZIP = re.compile(r"imagenet\d+_(train|val)(_part\d+)?(_npz)?\.zip", re.IGNORECASE)


def read_downsampled(path: str, files: Sequence[FoundFile]) -> tuple[dict[str, LazyItems], int] | None:
    """Return the splits `train` and `val`, and the side of the images in pixels; None if there are no such batches.

    The batches are pickles or npz files called train_data_batch_1, ... and val_data, in any folder of `path` or in the
    zips as published (Imagenet64_train_part1.zip, Imagenet32_val_npz.zip, ...). Compressed batches, as those in zips
    are, are unpacked on each machine (4 GB at 32x32, 16 GB at 64x64; see `data_prep.formats.ranges`); others are read
    in place. Labels, which are 1 to 1000 in the files, become 0 to 999.

    Raises:
        DataError: a batch is missing, there twice or damaged, or the batches do not fit each other.
        StorageError: they cannot be reached, or the disk is too full to unpack them.
    """
    parts: dict[str, ByteRange] = {}
    for name, file in _batch_files(files):
        if (known := parts.setdefault(name, file)) is not file:
            raise DataError(f"source {path}: {name} is there twice, in {known.name()} and in {file.name()}")
    if not parts:
        return None
    numbers = sorted(int(name.rpartition("_")[2]) for name in parts if name != "val_data")
    expected = [f"train_data_batch_{n}" for n in range(1, max(numbers, default=1) + 1)] + ["val_data"]
    if missing := [name for name in expected if name not in parts]:
        raise DataError(f"source {path}: {missing[0]} is missing beside {', '.join(parts)}")
    batches = [_batch(parts[name], name) for name in expected]
    first = batches[0]
    if other := [batch for batch in batches if batch.side != first.side]:
        raise DataError(
            f"source {path}: {first.name} has images of {first.side} pixels a side, {other[0].name} of {other[0].side}"
        )
    return {"train": batch_items(batches[:-1]), "val": batch_items(batches[-1:])}, first.side


def is_batch(file: FoundFile) -> bool:
    """Return whether a file is a batch, or a zip of batches, by its name."""
    return bool(_BATCH.fullmatch(file.parts[-1]) or _ZIP.fullmatch(file.parts[-1]))


def _batch_files(files: Sequence[FoundFile]) -> Iterator[tuple[str, ByteRange]]:
    """Yield the names of batches, without suffix, and where they lie."""
    for entry in files:
        name = entry.parts[-1]
        if _BATCH.fullmatch(name):
            yield name.removesuffix(".npz"), range_of(entry)
        elif _ZIP.fullmatch(name):
            for member, file in zip_members(range_of(entry)).items():
                if _BATCH.fullmatch(base := member.rpartition("/")[2]):
                    yield base.removesuffix(".npz"), file


def _batch(file: ByteRange, name: str) -> RowBatch:
    is_zip = file.size > 1 and file.within(0, 2)() == b"PK"
    batch = npz_batch(file, name) if is_zip else pickled_batch(file, name)
    if len(batch.labels) == 0 or batch.labels.min() < 1 or batch.labels.max() > CLASSES:
        raise DataError(f"{file.name()}: its {len(batch.labels)} labels are not all from 1 to {CLASSES}")
    return replace(batch, labels=batch.labels - 1)
