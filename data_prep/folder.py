"""The `folder` source: images in class folders, on disk or inside a tar, with or without folders for the splits."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from data_prep.items import IMAGE_SUFFIXES, FileImage, Item, Loader, Source, TarImage
from eiwtrain.data.manifest import DataError

TRAIN_FOLDERS = ("train", "training")
EVAL_FOLDERS = ("test", "testing", "val", "valid", "validation", "eval")

Entry = tuple[tuple[str, ...], int, Loader]  # parts of the name, bytes, how to load


def folder(path: str, eval_fraction: float = 0.1) -> Source:
    """Images under the folder or inside the tar at `path`, in the order of their names.

    - Top-level folders `train` and one of `test`, `val`, ... are the splits, called `train` and `test` (several
    folders
      for evaluation keep their names). Otherwise a share `eval_fraction` becomes `test`, chosen by a hash of
      the name: the same image stays on its side when others come or go.
    - The next folder is the class; deeper ones play no part. Images in none have label -1.

    Raises:
        DataError: the path is absent, cannot be read, or holds no images.
    """
    if "://" in path:
        raise DataError(f"source {path}: a folder or a tar on this machine is needed, not a URL")
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"source {path}: no such folder or tar")
    entries = sorted(_folder_entries(root) if root.is_dir() else _tar_entries(root), key=lambda e: e[0])
    if not entries:
        raise DataError(f"source {path}: no images in it ({' '.join(IMAGE_SUFFIXES)})")
    if not root.is_dir():
        entries = _without_common_top(entries)
    by_split = _split(entries, eval_fraction)
    classes = sorted({parts[0] for members in by_split.values() for parts, _, _ in members if len(parts) > 1})
    number = {name: i for i, name in enumerate(classes)}
    splits = {
        split: [
            Item(number[parts[0]] if len(parts) > 1 else -1, "/".join(parts), size, load)
            for parts, size, load in members
        ]
        for split, members in by_split.items()
    }
    return Source("folder", splits, tuple(classes))


def _split(entries: Sequence[Entry], eval_fraction: float) -> dict[str, list[Entry]]:
    """Entries by split, without the folder of the split in their names."""
    tops = {parts[0] if len(parts) > 1 else "" for parts, _, _ in entries}
    kinds = {top: top.lower() for top in tops}
    trains = [top for top in tops if kinds[top] in TRAIN_FOLDERS]
    evals = sorted(top for top in tops if kinds[top] in EVAL_FOLDERS)
    strays = sorted(tops - set(trains) - set(evals))
    if trains and evals and strays:
        raise DataError(
            f"'{trains[0]}' and '{evals[0]}' look like splits, but there are also images in "
            f"{', '.join(repr(s or '.') for s in strays[:3])}; move them away, or the test images would be trained on"
        )
    if len(trains) == 1 and not strays:
        names = {trains[0]: "train"} | ({evals[0]: "test"} if len(evals) == 1 else {top: top for top in evals})
        splits: dict[str, list[Entry]] = {name: [] for name in names.values()}
        for parts, size, load in entries:
            splits[names[parts[0]]].append((parts[1:], size, load))
        if evals:
            return splits
        entries = splits["train"]
    splits = {"train": [], "test": []}
    for entry in entries:
        splits["test" if _share("/".join(entry[0])) < eval_fraction else "train"].append(entry)
    if not splits["test"]:
        del splits["test"]
    if not splits["train"]:
        raise DataError(f"with --eval-fraction {eval_fraction} none of {len(entries)} images is left to train on")
    return splits


def _share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64


def _without_common_top(entries: list[Entry]) -> list[Entry]:
    """A tar often packs one folder: look inside it, unless it is the training split or the only class."""
    while len({parts[0] for parts, _, _ in entries}) == 1 and min(len(parts) for parts, _, _ in entries) > 2:
        if entries[0][0][0].lower() in TRAIN_FOLDERS + EVAL_FOLDERS:
            break
        entries = [(parts[1:], size, load) for parts, size, load in entries]
    return entries


def _folder_entries(root: Path) -> Iterator[Entry]:
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if _is_image(name):
                yield path.relative_to(root).parts, path.stat().st_size, FileImage(str(path.absolute()))


def _tar_entries(path: Path) -> Iterator[Entry]:
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                parts = tuple(p for p in PurePosixPath(member.name).parts if p not in (".", "/"))
                if member.isreg() and parts and _is_image(parts[-1]) and not any(p.startswith(".") for p in parts):
                    yield parts, member.size, TarImage(str(path.absolute()), member.offset_data, member.size)
    except tarfile.TarError as e:
        raise DataError(f"source {path}: neither a folder nor an uncompressed tar ({e})") from None


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
