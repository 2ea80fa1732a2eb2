"""The `imagenet` source: ILSVRC 2012 as published, or downsampled by others; it detects and records which it is.

Not for what is done to the images: that is in `data_prep.pixels`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from data_prep.formats.files import FoundFile, list_files, list_tar, range_of
from data_prep.formats.matlab import load_matlab
from data_prep.formats.rows import gunzipped
from data_prep.items import Item, Source
from data_prep.listing import ARCHIVES, all_image_suffixes, count_others, flaw_of, notes_on_lost, refuse_lost, take_lost
from data_prep.sources.downsampled import CLASSES, is_batch, read_downsampled
from data_prep.text import decode_text
from eiwtrain import storage
from eiwtrain.data.image_formats import is_image_name
from eiwtrain.data.manifest import DataError
from eiwtrain.terminal.lines import one_line


class Variant(NamedTuple):
    """A data set that is called ImageNet: what it is, how large it is, and what it must not be compared with."""

    what: str
    train: int
    val: int
    other: str


VARIANTS = {
    "original": Variant("ImageNet 2012, resized here", 1_281_167, 50_000, "the downsampled sets of others"),
    "downsampled-2017": Variant(
        "ImageNet {side}x{side} downsampled by Chrabaszcz et al. 2017", 1_281_167, 50_000, "van den Oord et al. 2016"
    ),
    "pixelrnn-2016": Variant(
        "ImageNet {side}x{side} downsampled by van den Oord et al. 2016", 1_281_149, 49_999, "Chrabaszcz et al. 2017"
    ),
}
LAYOUTS = (
    "the original (train/n01440764/... or train/n01440764.tar or ILSVRC2012_img_train.tar, and val/... or "
    "ILSVRC2012_img_val.tar, also below ILSVRC/Data/CLS-LOC); downsampled in 2017 (train_data_batch_1, ... and "
    "val_data, pickled or .npz, also in Imagenet64_train_part1.zip, ...); downsampled in 2016 (train_64x64 and "
    "valid_64x64, folders or .tar)"
)
TRAIN_TAR, VAL_TAR, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
GROUND_TRUTH, META, KAGGLE_LABELS = "ILSVRC2012_validation_ground_truth.txt", "meta.mat", "LOC_val_solution.csv"
_ABOUT = (KAGGLE_LABELS, GROUND_TRUTH, META, DEVKIT)
_KAGGLE = ("ILSVRC", "Data", "CLS-LOC")
_SYNSET = re.compile(r"n\d{8}")
_SMALL = re.compile(r"(train|valid)_(32x32|64x64)(\.tar)?")
_LISTING = 16  # tars of a remote source that are listed side by side

Named = list[tuple[str, str, FoundFile]]  # synset or "", name, file


def imagenet(path: str, val_labels: str | None = None) -> Source:
    """List ImageNet with the splits `train` and `val`, from the folder, tar or URL `path`, in one of these layouts:

    - The original, to be resized here: class folders or tars, which are read in place. Labels follow the sorted
      synsets, as with torchvision. Validation images outside class folders get the labels of `val_labels`, of Kaggle's
      LOC_val_solution.csv, or of the development kit (its folder or archive); otherwise -1.
    - Downsampled by Chrabaszcz et al. 2017, see `data_prep.sources.downsampled`. Labels are in the order of that data
      set; class names are its numbers, 1 to 1000.
    - Downsampled by van den Oord et al. 2016 (PixelRNN, arXiv 1601.06759), without labels.

    Args:
        path: a path or any URL.
        val_labels: a file with a line for each validation image in the order of their names: its synset, or its class
            as a number from 0 in the order of the sorted synsets; or a file like Kaggle's.

    Returns:
        A source whose `protocol` distinguishes the variants and says if it is only a subset. Its params are the
        variant, a key of `VARIANTS`, and the side in pixels where it was downsampled by others.

    Raises:
        DataError: the layout is not one of these, something is missing or damaged, or the number of validation images
            is that of another variant.
        StorageError: the path cannot be reached.
    """
    others: list[FoundFile] = []
    files, rest = take_lost(list_files(path, ("",), others), others)
    refuse_lost(path, rest)
    used: set[tuple[str, ...]] = set()
    remote = not storage.is_local(path)
    side = None
    splits: Mapping[str, Sequence[Item]]
    classes: tuple[str, ...]
    if (original := _original(path, files, val_labels, remote, used, rest)) is not None:
        variant, (splits, classes) = "original", original
    elif val_labels is not None:
        raise DataError(f"source {path}: val labels are only for the original ImageNet, and this is not it")
    elif (batches := read_downsampled(path, files)) is not None:
        variant, (splits, side) = "downsampled-2017", batches
        classes = tuple(str(n) for n in range(1, CLASSES + 1))
        used.update(file.parts for file in files if is_batch(file))
    elif (images := _pixelrnn(path, files, used, rest)) is not None:
        variant, (splits, side), classes = "pixelrnn-2016", images, ()
    else:
        hint = ""
        if any(is_image_name(file.parts[-1]) for file in files):  # as of Tiny ImageNet, or of a part of the classes
            hint = f"; images in other folders: python -m data_prep folder --source {path}"
        raise DataError(f"source {path}: not a known layout of ImageNet; these are: {LAYOUTS}{hint}")
    params = {"variant": variant} | ({} if side is None else {"side": side})
    protocol = describe(variant, side, len(splits["train"]), len(splits["val"]))
    unused = [file for file in files if file.parts not in used and file.parts[-1] not in _ABOUT]
    strays = (*unused, *(file for file in rest if not file.flaw))
    return Source(
        "imagenet",
        splits,
        classes,
        protocol,
        remote=remote,
        params=params,
        notes=(*notes_on_lost(files), *_notes(strays)),
        left_out=count_others([*unused, *rest]),
    )


def _notes(unused: Sequence[FoundFile]) -> list[str]:
    """Return a note on images and archives of the splits that are not directly in the folder of a class."""
    suffixes = (*all_image_suffixes(), *ARCHIVES)
    inside = [file for file in unused if {"train", "val"}.intersection(file.parts[:-1])]
    strays = ["/".join(file.parts) for file in inside if file.parts[-1].lower().endswith(suffixes)]
    if not strays:
        return []
    return [f"{len(strays):,} files are not in the folder of a class, and are left out; the first: {strays[0]}"]


def describe(variant: str, side: int | None, train: int, val: int) -> str:
    """Return what to say beside every figure on a data set of that variant with these numbers of images.

    Raises:
        DataError: the number of validation images is that of another variant.
    """
    about = VARIANTS[variant]
    what = about.what.format(side=side)
    if val != about.val and any(val == other.val for other in VARIANTS.values()):
        raise DataError(
            f"the layout is that of {what}, which has {about.val:,} validation images, but there are {val:,}, as in "
            f"another downsampling of ImageNet; figures on the two are not comparable"
        )
    count = f"{val:,} validation images"
    if (train, val) != (about.train, about.val):
        count = f"a subset: {train:,} training and {val:,} validation images"
    return f"{what} ({count}; not comparable with {about.other})"


def _original(
    path: str,
    files: Sequence[FoundFile],
    val_labels: str | None,
    remote: bool,
    used: set[tuple[str, ...]],
    others: list[FoundFile],
) -> tuple[dict[str, list[Item]], tuple[str, ...]] | None:
    """Return the splits and the synsets; None if there are no class folders or class tars.

    Names of files that are used are added to `used`, and other files in tars to `others`.
    """
    train = _images("train", TRAIN_TAR, files, remote, used, others)
    if not any(synset for synset, _, _ in train):
        return None
    val = _images("val", VAL_TAR, files, remote, used, others)
    if not val:
        raise DataError(f"source {path}: the original ImageNet without validation images; add val or {VAL_TAR}")
    if strays := [name for synset, name, _ in train if not synset]:
        raise DataError(f"source {path}: {len(strays)} training images are in no class folder; the first: {strays[0]}")
    classes = tuple(sorted({synset for synset, _, _ in (*train, *val) if synset}))
    number = {synset: i for i, synset in enumerate(classes)}
    flat = sorted(name for synset, name, _ in val if not synset)
    if flat and len(flat) < len(val):
        raise DataError(f"source {path}: some validation images are in class folders and some are not, as {flat[0]}")
    if val_labels is not None and not flat:
        raise DataError(f"source {path}: val labels have no effect, as the validation images are in class folders")
    labels = _flat_labels(files, flat, val_labels, number) if flat else {}
    ambiguous = len({name for _, name, _ in val}) < len(val)
    splits = {
        "train": [
            Item(number[synset], f"{synset}/{name}", e.size, e.load, flaw_of(e))
            for synset, name, e in sorted(train, key=_place)
        ],
        "val": [
            Item(
                number[synset] if synset else labels[name],
                f"{synset}/{name}" if ambiguous else name,
                e.size,
                e.load,
                flaw_of(e),
            )
            for synset, name, e in sorted(val, key=lambda image: _place(image)[::-1])
        ],
    }
    return splits, classes


def _place(image: tuple[str, str, FoundFile]) -> tuple[str, str]:
    return image[:2]


def _images(
    split: str,
    tar: str,
    files: Sequence[FoundFile],
    remote: bool,
    used: set[tuple[str, ...]],
    others: list[FoundFile],
) -> Named:
    """List the images of a split: in class folders, in tars of the other classes, or if there are none, in `tar`."""
    found: Named = []
    tars: dict[str, FoundFile] = {}
    for entry in files:
        parts = entry.parts[len(_KAGGLE) :] if entry.parts[: len(_KAGGLE)] == _KAGGLE else entry.parts
        if parts[0] != split or len(parts) not in (2, 3):
            continue
        if is_image_name(parts[-1]):
            if len(parts) == 2 or _SYNSET.fullmatch(parts[1]):
                found.append((parts[1] if len(parts) == 3 else "", parts[-1], entry))
        elif len(parts) == 2 and _SYNSET.fullmatch(synset := parts[1].removesuffix(".tar")):
            tars[synset] = entry
    whole = [entry for entry in files if entry.parts[-1] == tar]
    if not found and not tars and whole:
        used.add(whole[0].parts)
        for entry in _in_tar(whole[0], others, ".tar"):
            name = entry.parts[-1]
            if not name.endswith(".tar"):
                found.append(("", name, entry))
            elif _SYNSET.fullmatch(synset := name.removesuffix(".tar")):
                tars[synset] = entry
            else:
                others.append(entry._replace(parts=(*whole[0].parts, *entry.parts)))
    used.update(entry.parts for _, _, entry in found)
    unpacked = {synset for synset, _, _ in found}
    packed = [synset for synset in tars if synset not in unpacked]
    used.update(tars[synset].parts for synset in packed)
    with ThreadPoolExecutor(_LISTING if remote else 1) as pool:
        listed = pool.map(lambda synset: _in_tar(tars[synset], others), packed)
        for synset, entries in zip(packed, listed, strict=True):
            found.extend((synset, entry.parts[-1], entry) for entry in entries)
    return found


def _in_tar(tar: FoundFile, others: list[FoundFile], *suffixes: str) -> list[FoundFile]:
    """List the images, and files with these suffixes, in a tar, which can itself lie in a tar; fill in the others."""
    rest: list[FoundFile] = []
    found, rest = take_lost(list_tar(range_of(tar), (*all_image_suffixes(), *suffixes), rest), rest)
    others.extend(file._replace(parts=(*tar.parts, *file.parts)) for file in rest)
    return found


def _flat_labels(
    files: Sequence[FoundFile], names: Sequence[str], val_labels: str | None, number: Mapping[str, int]
) -> dict[str, int]:
    """Return the labels of validation images outside class folders, by name; -1 if they are not known."""
    about = {e.parts[-1]: e for e in files if e.parts[-1] in _ABOUT}
    if val_labels is not None:
        try:
            text = storage.read_bytes(storage.absolute(val_labels))
        except OSError as e:
            raise DataError(f"val labels {val_labels} cannot be read: {e.strerror or e}") from None
        synsets = _parse_labels(text, names, sorted(number), val_labels)
    elif KAGGLE_LABELS in about:
        synsets = _parse_labels(about[KAGGLE_LABELS].load(), names, sorted(number), KAGGLE_LABELS)
    else:
        if DEVKIT in about and GROUND_TRUTH not in about:
            kit = gunzipped(range_of(about[DEVKIT]))
            about |= {e.parts[-1]: e for e in list_tar(kit, (GROUND_TRUTH.lower(), META))}
        if GROUND_TRUTH not in about or META not in about:
            return dict.fromkeys(names, -1)
        synsets = _from_devkit(about[GROUND_TRUTH].load(), about[META].load())
        _check_number(synsets, names, GROUND_TRUTH)
    if unknown := sorted(set(synsets) - set(number)):
        raise DataError(f"a validation label is {unknown[0]}, but there are no training images of that class")
    return {name: number[synset] for name, synset in zip(names, synsets, strict=True)}


def _parse_labels(content: bytes, names: Sequence[str], classes: Sequence[str], what: str) -> list[str]:
    """Return the synset of each image: by name from a file like Kaggle's, by order from one of synsets or classes."""
    lines = [line for line in decode_text(content, what).split("\n") if line.strip()]
    if lines and lines[0].startswith("ImageId"):
        of = {line.split(",")[0]: line.partition(",")[2].split(" ")[0].strip() for line in lines[1:]}
        if missing := [name for name in names if name.rpartition(".")[0] not in of]:
            raise DataError(f"val labels {what}: no line for {missing[0]}")
        return [of[name.rpartition(".")[0]] for name in names]
    words = [line.strip() for line in lines]
    _check_number(words, names, what)
    if all(_SYNSET.fullmatch(word) for word in words):
        return words
    if not all(word.isdecimal() for word in words) or max(map(int, words)) >= len(classes):
        raise DataError(
            f"val labels {what}: each line must be a synset, or a class as a number from 0 to {len(classes) - 1} "
            f"in the order of the sorted synsets, not the numbers from 1 of the development kit"
        )
    return [classes[int(word)] for word in words]


def _check_number(labels: Sequence[str], names: Sequence[str], what: str) -> None:
    if len(labels) != len(names):
        raise DataError(f"val labels {what}: {len(labels):,} lines for {len(names):,} validation images")


def _from_devkit(ground_truth: bytes, meta: bytes) -> list[str]:
    """Return the synset of each validation image; the development kit numbers synsets in an order of its own."""
    try:
        synsets = load_matlab(meta, META)["synsets"]
        of = {
            int(number): str(synset) for number, synset in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        }
        return [of[int(word)] for word in ground_truth.split()]
    except DataError:
        raise
    except Exception as e:  # the fields may be of any type
        raise DataError(f"the development kit is damaged ({type(e).__name__}: {one_line(e)})") from None


def _pixelrnn(
    path: str, files: Sequence[FoundFile], used: set[tuple[str, ...]], others: list[FoundFile]
) -> tuple[dict[str, list[Item]], int] | None:
    """Return the splits, and the side of the images in pixels; None if there are no such folders or tars."""
    images: dict[tuple[str, int], list[FoundFile]] = {}
    tars: dict[tuple[str, int], FoundFile] = {}
    for entry in files:
        if (match := _SMALL.fullmatch(entry.parts[0])) is None:
            continue
        key = {"train": "train", "valid": "val"}[match[1]], int(match[2].partition("x")[0])
        if match[3] and len(entry.parts) == 1:
            tars[key] = entry
        elif not match[3] and is_image_name(entry.parts[-1]):
            images.setdefault(key, []).append(entry)
    used.update(entry.parts for found in images.values() for entry in found)
    used.update(entry.parts for key, entry in tars.items() if key not in images)
    images |= {key: _in_tar(entry, others) for key, entry in tars.items() if key not in images}
    if not images:
        return None
    sides = {side for _, side in images}
    if len(sides) > 1:
        raise DataError(f"source {path}: ImageNet at 32x32 and at 64x64 pixels side by side; move one of them away")
    side = sides.pop()
    splits = {}
    for split, name in (("train", "train"), ("val", "valid")):
        found = images.get((split, side))
        if not found:
            raise DataError(f"source {path}: {name}_{side}x{side}, a folder or a .tar with images, is missing")
        splits[split] = [
            Item(-1, e.parts[-1], e.size, e.load, flaw_of(e))
            for e in sorted(found, key=lambda e: (e.parts[-1], e.parts))
        ]
    return splits, side
