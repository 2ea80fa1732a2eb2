"""The `folder` source: images in class folders, in a folder or an archive, with or without folders for the splits."""

from __future__ import annotations

from collections.abc import Sequence

from data_prep.formats.files import FoundFile, list_files
from data_prep.items import IMAGE_SUFFIXES, Item, Source
from eiwtrain import storage
from eiwtrain.data.manifest import DataError

TRAIN_FOLDERS = ("train", "training")
EVAL_FOLDERS = ("test", "testing", "val", "valid", "validation", "eval")


def folder(path: str) -> Source:
    """List the images under the folder or inside the tar or zip at `path`, any URL, in the order of their names.

    - Top-level folders `train` and one of `test`, `val`, ... are the splits, called `train` and `test` (several
      folders for evaluation keep their names). Otherwise all images are in `train`, also if only one of these folders
      is there.
    - The next folder is the class; deeper folders have no meaning. Images in no folder have label -1.

    Raises:
        DataError: the path is absent, cannot be read, or holds no images.
        StorageError: it cannot be reached.
    """
    entries = _without_common_top(list_files(path))
    if not entries:
        raise DataError(f"source {path}: it holds no images ({' '.join(IMAGE_SUFFIXES)})")
    by_split = _split(entries)
    classes = sorted({parts[0] for members in by_split.values() for parts, *_ in members if len(parts) > 1})
    number = {name: i for i, name in enumerate(classes)}
    splits = {
        split: [
            Item(number[parts[0]] if len(parts) > 1 else -1, "/".join(parts), size, load)
            for parts, size, load, _ in members
        ]
        for split, members in by_split.items()
    }
    return Source("folder", splits, tuple(classes), remote=not storage.is_local(path))


def _split(entries: Sequence[FoundFile]) -> dict[str, list[FoundFile]]:
    """Return the files of each split, without the folder of the split in their names."""
    tops = {parts[0] if len(parts) > 1 else "" for parts, *_ in entries}
    kinds = {top: top.lower() for top in tops}
    trains = [top for top in tops if kinds[top] in TRAIN_FOLDERS]
    evals = sorted(top for top in tops if kinds[top] in EVAL_FOLDERS)
    strays = sorted(tops - set(trains) - set(evals))
    if trains and evals and strays:
        raise DataError(
            f"'{trains[0]}' and '{evals[0]}' look like splits, but there are also images in "
            f"{', '.join(repr(s or '.') for s in strays[:3])}; move them away, or the test images would be trained on"
        )
    if len(tops) == 1 and not strays:
        return {"train": [FoundFile(parts[1:], size, load) for parts, size, load, _ in entries]}
    if len(trains) == 1 and not strays:
        names = {trains[0]: "train"} | ({evals[0]: "test"} if len(evals) == 1 else {top: top for top in evals})
        splits: dict[str, list[FoundFile]] = {name: [] for name in names.values()}
        for parts, size, load, _ in entries:
            splits[names[parts[0]]].append(FoundFile(parts[1:], size, load))
        return splits
    return {"train": list(entries)}


def _without_common_top(entries: list[FoundFile]) -> list[FoundFile]:
    """Remove a folder that all files are in, as tars often have, unless it is a split or the only class."""
    while len({parts[0] for parts, *_ in entries}) == 1 and min(len(parts) for parts, *_ in entries) > 2:
        if entries[0][0][0].lower() in TRAIN_FOLDERS + EVAL_FOLDERS:
            break
        entries = [FoundFile(parts[1:], size, load) for parts, size, load, _ in entries]
    return entries
