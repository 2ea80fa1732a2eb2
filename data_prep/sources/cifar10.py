"""The `cifar10` source: the python or binary batches of CIFAR-10 (Krizhevsky 2009), as published or unpacked.

Not for a folder of JPEG or PNG files: that is the `folder` source.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from data_prep.formats.files import FoundFile, list_files, list_tar, range_of
from data_prep.formats.ranges import ByteRange
from data_prep.formats.rows import RowBatch, batch_items, gunzipped, pickled_batch
from data_prep.formats.unpickle import load_batch
from data_prep.items import Source
from data_prep.listing import count_others, refuse_lost
from data_prep.text import decode_text
from eiwtrain import storage
from eiwtrain.data.manifest import DataError

SIDE = 32  # pixels
CLASSES = 10
SPLITS = {"train": tuple(f"data_batch_{n}" for n in range(1, 6)), "test": ("test_batch",)}
PYTHON, BINARY = "", ".bin"  # ends of the names of the batches
META = {PYTHON: "batches.meta", BINARY: "batches.meta.txt"}
ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
_ROW = 1 + 3 * SIDE**2  # bytes in a binary batch: the label, then the planes


def cifar10(path: str) -> Source:
    """List CIFAR-10 with its splits, train (50,000 images) and test (10,000), its labels and its class names.

    `path`, a path or any URL, is one of the archives as published, or a folder with the files in it. A compressed
    archive is unpacked once on each machine (about 180 MB, see `data_prep.formats.ranges`). Pickles are loaded only by
    `data_prep.formats.unpickle`. Batches of another size are accepted if all batches have it.

    Raises:
        DataError: there are no such files, a batch is missing or damaged, or labels or names do not fit.
        StorageError: the path cannot be reached.
    """
    files, others = _files(path)
    kinds = [k for k in (PYTHON, BINARY) if any(name + k in files for names in SPLITS.values() for name in names)]
    if not kinds:
        raise DataError(
            f"source {path}: it holds no batches of CIFAR-10, neither data_batch_1 nor data_batch_1.bin; "
            f"give {' or '.join(ARCHIVES)}, or the folder unpacked from one"
        )
    kind = kinds[0]
    needed = [name + kind for names in SPLITS.values() for name in names] + [META[kind]]
    if missing := [name for name in needed if name not in files]:
        raise DataError(f"source {path}: {missing[0]} is missing beside the other files of CIFAR-10")
    classes = _class_names(files[META[kind]], kind)
    make = _python_batch if kind == PYTHON else _binary_batch
    batches = {split: [make(files[name + kind], name) for name in names] for split, names in SPLITS.items()}
    _check_sizes(path, [batch for of_split in batches.values() for batch in of_split])
    splits = {split: batch_items(of_split) for split, of_split in batches.items()}
    others += [FoundFile((name,), 0, file) for name, file in files.items() if name not in needed]
    return Source("cifar10", splits, classes, remote=not storage.is_local(path), left_out=count_others(others))


def _check_sizes(path: str, batches: list[RowBatch]) -> None:
    """Check that all batches have one size, as those of CIFAR-10 do, which have 10,000 images each."""
    sizes = {batch.name: len(batch.labels) for batch in batches}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        raise DataError(f"source {path}: the batches hold different numbers of images ({found}); is one cut off?")


def _files(path: str) -> tuple[Mapping[str, ByteRange], list[FoundFile]]:
    """List all files by name, without their folders; and hidden ones."""
    others: list[FoundFile] = []
    url = storage.absolute(path)
    if url.endswith((".tar.gz", ".tgz")):
        try:
            return _in_archive(ByteRange(url, 0, storage.size(url)), others), others
        except FileNotFoundError:
            raise DataError(f"source {path}: no such file") from None
    files = {found.parts[-1]: range_of(found) for found in list_files(url, ("",), others)}
    refuse_lost(path, others)
    for name in ARCHIVES:
        if name in files and not any(batch + k in files for batch in SPLITS["test"] for k in (PYTHON, BINARY)):
            return _in_archive(files[name], others), others
    return files, others


def _in_archive(file: ByteRange, others: list[FoundFile]) -> Mapping[str, ByteRange]:
    return {found.parts[-1]: range_of(found) for found in list_tar(gunzipped(file), ("",), others)}


def _class_names(file: ByteRange, kind: str) -> tuple[str, ...]:
    if kind == PYTHON:
        names = load_batch(file(), file.name()).get("label_names")
    else:
        names = decode_text(file(), file.name()).split()
    if isinstance(names, list):  # names of a batch that Python 3 has pickled again are bytes
        names = [name.decode("latin-1") if isinstance(name, bytes) else name for name in names]
    if not isinstance(names, list) or len(names) != CLASSES or not all(isinstance(name, str) for name in names):
        raise DataError(f"{file.name()}: it does not hold the names of {CLASSES} classes")
    return tuple(names)


def _python_batch(file: ByteRange, name: str) -> RowBatch:
    batch = pickled_batch(file, name)
    if batch.side != SIDE:
        raise DataError(f"{file.name()}: images of {batch.side}x{batch.side} pixels, not {SIDE}x{SIDE}")
    return _checked(batch, file)


def _binary_batch(file: ByteRange, name: str) -> RowBatch:
    rows, rest = divmod(file.size, _ROW)
    if rest or not rows:
        raise DataError(
            f"{file.name()}: {file.size} bytes are not a whole number of images of {_ROW} bytes; is it cut off?"
        )
    labels = np.frombuffer(file(), np.uint8)[::_ROW].astype(np.int64)
    return _checked(RowBatch(name, file.within(1, file.size - 1), _ROW, SIDE, labels), file)


def _checked(batch: RowBatch, file: ByteRange) -> RowBatch:
    if not len(batch.labels):
        raise DataError(f"{file.name()}: it holds no images")
    if batch.labels.min() < 0 or batch.labels.max() >= CLASSES:
        raise DataError(
            f"{file.name()}: labels from {batch.labels.min()} to {batch.labels.max()}, not 0 to {CLASSES - 1}"
        )
    return batch
