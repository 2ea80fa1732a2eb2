"""The `lsun` source: scene categories of LSUN (arXiv 1506.03365), each an LMDB whose values are JPEG or WebP files.

Nothing is copied or mapped: the tree of each LMDB is read once, and each image by its offset, on a disk or in a bucket.
Of the 3 million bedrooms (tens of GB) that is 180 MB to read and 190 MB to keep, in about ten seconds from a disk.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from data_prep.formats.files import FoundFile, ZipImage, list_files, range_of
from data_prep.formats.lmdb_values import Values, list_values
from data_prep.formats.ranges import ByteRange
from data_prep.items import Item, LazyItems, Source, join_items
from data_prep.listing import count_others, refuse_lost
from eiwtrain import storage
from eiwtrain.data.image_formats import is_image_name
from eiwtrain.data.manifest import DataError

# Images for training, as downloaded (github.com/openai/glow, data_loaders/generate_tfr/lsun.py); 300 more in each val.
TRAIN_IMAGES = {
    "bedroom": 3_033_042,
    "bridge": 818_687,
    "church_outdoor": 126_227,
    "classroom": 168_103,
    "conference_room": 229_069,
    "dining_room": 657_571,
    "kitchen": 2_212_277,
    "living_room": 1_315_802,
    "restaurant": 626_331,
    "tower": 708_264,
}
SPLITS = ("train", "val")
_DATA = "data.mdb"
_NAME = re.compile(r"(.+)_(train|val)(_lmdb)?")


def lsun(path: str, categories: Sequence[str] = ()) -> Source:
    """List the images of one or several categories, in the order of their keys.

    The splits are `train` and `val`; the labels are the categories in the order of their names.

    Args:
        path: an LMDB (a folder such as `bedroom_train_lmdb`, or the `data.mdb` in it), or a folder or tar of several,
            at any URL. Their names, CATEGORY_train_lmdb and CATEGORY_val_lmdb, say what they hold; LMDBs with other
            names, such as `test_lmdb`, which mixes all categories, are ignored.
        categories: which to use; all if it is empty.

    Raises:
        DataError: there is no LMDB, a category asked for is absent, or some categories have a split that others lack;
            an LMDB is still in its zip, damaged, cut off or cannot be read.
        StorageError: the path cannot be reached.
    """
    others: list[FoundFile] = []
    found = _find(storage.absolute(path), others)
    refuse_lost(path, others)
    there = sorted({category for category, _ in found})
    for category in categories:
        if category not in there:
            raise DataError(f"source {path}: there is no category '{category}', only {', '.join(there)}")
    classes = tuple(category for category in there if not categories or category in categories)
    splits = {}
    for split in SPLITS:
        has = [category for category in classes if (category, split) in found]
        if missing := [category for category in classes if category not in has]:
            if has:
                raise DataError(
                    f"source {path}: {has[0]} has a {split} LMDB and {missing[0]} has none; choose categories"
                )
            continue
        splits[split] = join_items(
            [_images(f"{c}_{split}", label, _data_file(found[c, split])) for label, c in enumerate(classes)]
        )
    protocol, left_out = _protocol(classes, splits), count_others(others)
    return Source("lsun", splits, classes, protocol, remote=not storage.is_local(path), left_out=left_out)


def _images(name: str, label: int, file: ByteRange) -> LazyItems:
    """Return the images of an LMDB; the source of each is called `name` and its key."""
    values = list_values(file)
    return LazyItems(partial(_image, name, label, file, values), range(len(values)))


def _image(name: str, label: int, file: ByteRange, values: Values, row: int) -> Item:
    key, size = values.key(row).decode("ascii", "backslashreplace"), values.sizes[row]
    return Item(label, f"{name}/{key}", size, ByteRange(file.file, values.starts[row], size))


def _find(path: str, others: list[FoundFile]) -> dict[tuple[str, str], FoundFile]:
    """Find the data file of each (category, split), or its zip if it has not been unpacked; fill in all other files."""
    top = path.rsplit("/", 1)[-1]
    if top.endswith(".mdb"):
        try:
            entries = [FoundFile((top,), storage.size(path), ByteRange(path))]
        except FileNotFoundError:
            raise DataError(f"source {path}: no such file") from None
        top = path.split("/")[-2] if top == _DATA else top
    else:
        entries = list_files(path, (_DATA, ".zip"), others)
    found: dict[tuple[str, str], FoundFile] = {}
    for entry in sorted(entries, key=_is_zip):  # data files first: a zip counts only if it has not been unpacked
        *folders, last = entry.parts
        name = last if _is_zip(entry) else folders[-1] if folders else top
        if match := _NAME.fullmatch(re.sub(r"\.(zip|tar|mdb)$", "", name)):
            same = found.setdefault((match[1], match[2]), entry)
            if same is not entry and _is_zip(entry):
                others.append(entry._replace(flaw="a zip beside its content"))
            elif same is not entry:
                raise DataError(
                    f"source {path}: {name} is there twice: {'/'.join(same.parts)} and {'/'.join(entry.parts)}"
                )
        else:
            others.append(entry._replace(flaw="no LMDB of one category"))
    if not found:
        exported = any(not file.flaw and is_image_name(file.parts[-1]) for file in others)
        raise DataError(
            f"source {path}: it holds no LMDB of LSUN: folders called CATEGORY_train_lmdb and CATEGORY_val_lmdb, "
            f"with a {_DATA} in each"
            + (f"; its images, if exported from one: python -m data_prep folder --source {path}" if exported else "")
        )
    return found


def _is_zip(entry: FoundFile) -> bool:
    return entry.parts[-1] != _DATA and entry.parts[-1].endswith(".zip")


def _data_file(entry: FoundFile) -> ByteRange:
    if isinstance(entry.load, ByteRange) and not _is_zip(entry):
        return range_of(entry)
    archive = entry.load.name() if isinstance(entry.load, (ByteRange, ZipImage)) else "/".join(entry.parts)
    raise DataError(f"source {archive}: an LMDB cannot be read in its zip; unpack it first: unzip {archive}")


def _protocol(classes: Sequence[str], splits: dict[str, LazyItems]) -> str:
    """Name the categories, and how many of their images for training are there, unless all are."""
    protocol = f"LSUN {', '.join(classes)}"
    train = len(splits.get("train", ()))
    if train and all(category in TRAIN_IMAGES for category in classes):
        of = sum(TRAIN_IMAGES[category] for category in classes)
        protocol += f", {train:,} of {of:,} images for training" if train != of else ""
    return protocol
