"""The `folder` source: images in class folders, in a folder or an archive, with or without folders for the splits."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from data_prep.formats.files import LOST, FoundFile, list_files
from data_prep.formats.ranges import ByteRange
from data_prep.items import Item, Source
from data_prep.layout import Layout, Place, find_layout
from data_prep.listing import ARCHIVES, all_image_suffixes, count_others, flaw_of, notes_on_lost, take_lost
from data_prep.sources.webdataset import label_of
from data_prep.text import decode_text
from eiwtrain import storage
from eiwtrain.data.left_out import suffix_of
from eiwtrain.data.manifest import DataError

ANNOTATIONS = "val_annotations.txt"  # of Tiny ImageNet: name, class and box of each image, separated by tabs
_MOST_ANNOTATIONS = 1 << 26  # bytes of such a file; Tiny ImageNet's has 360,000
_MARKS = {  # names of files that other sources read
    ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"): "imagenet",
    ("data.mdb",): "lsun",
    ("data_batch_1", "data_batch_1.bin"): "cifar10",
}
_LONGEST = 1 << 20  # bytes of a file of a label; longer ones are not looked into


def folder(path: str) -> Source:
    """List the images under the folder or inside the tar or zip at `path`, any URL, in the order of their names.

    Splits and classes are found by `data_prep.layout.find_layout`. Images in no class folder have label -1. A split
    without class folders gets the classes of Tiny ImageNet's `val_annotations.txt`, if that is in it. Names that are
    equal in Unicode's form NFC are one class.

    Images of formats that cannot be decoded here, and links to images that are not there, are rejects. All other files
    are counted.

    Raises:
        DataError: the path is absent, cannot be read, or holds no images; its splits are not clear; or its labels are
            in files that this source does not read.
        StorageError: it cannot be reached.
    """
    others: list[FoundFile] = []
    images, rest = take_lost(list_files(path, all_image_suffixes(), others), others)
    if not images:
        raise DataError(f"source {path}: it holds no images{_instead(path, rest)}")
    layout = find_layout(path, [file.parts for file in images])
    places = _annotated(path, layout, images, rest)
    _check_samples(path, images, places, rest)
    classes = sorted({_plain(place.label) for place in places if place and place.label})
    number = {name: label for label, name in enumerate(classes)}
    splits: dict[str, list[Item]] = {}
    for file, place in zip(images, places, strict=True):
        if place is not None:
            label = number[_plain(place.label)] if place.label else -1
            splits.setdefault(place.split, []).append(Item(label, place.name, file.size, file.load, flaw_of(file)))
    outside = [file for file, place in zip(images, places, strict=True) if place is None]
    order = sorted(splits, key=lambda split: (split != "train", split))
    return Source(
        "folder",
        {split: splits[split] for split in order},
        tuple(classes),
        remote=not storage.is_local(path),
        notes=(*layout.notes, *notes_on_lost(images), *_notes(places, rest)),
        left_out=count_others([*outside, *rest]),
    )


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _notes(places: Iterable[Place | None], rest: Sequence[FoundFile]) -> Iterable[str]:
    forms: dict[str, str] = {}
    for place in places:
        if place and forms.setdefault(_plain(place.label), place.label) != place.label:
            yield f"folders called '{_plain(place.label)}' in two forms of Unicode are one class"
            break
    if lost := [file for file in rest if file.flaw == LOST]:
        yield f"{len(lost):,} other names are links to nothing; the first: {'/'.join(lost[0].parts)}"
    if archives := sorted("/".join(file.parts) for file in rest if suffix_of(file.parts[-1]) in ARCHIVES):
        yield f"{len(archives):,} archives are in the source, and are not looked into; the first: {archives[0]}"


def _annotated(path: str, layout: Layout, images: Sequence[FoundFile], rest: Iterable[FoundFile]) -> list[Place | None]:
    """Return the places with the classes of splits that have them in a file of annotations."""
    places = list(layout.places)
    for file in rest:
        split = layout.splits.get(file.parts[:-1]) if file.parts[-1] == ANNOTATIONS and not file.flaw else None
        mine = [n for n, place in enumerate(places) if place is not None and place.split == split]
        if split is None or any((place := places[n]) is not None and place.label for n in mine):
            continue
        if file.size > _MOST_ANNOTATIONS:
            raise DataError(
                f"source {path}: {'/'.join(file.parts)} has {file.size:,} bytes; no list of classes is so long"
            )
        classes = _classes_in("/".join(file.parts), file.load())
        for n in mine:
            place = places[n]
            assert place is not None
            places[n] = place._replace(label=classes.get(images[n].parts[-1], ""))
    return places


def _classes_in(name: str, content: bytes) -> Mapping[str, str]:
    classes = {}
    for line, text in enumerate(decode_text(content, name).splitlines(), 1):
        if text.strip():
            image, _, about = text.partition("\t")
            if not (label := about.partition("\t")[0].strip()):
                raise DataError(f"{name}, line {line}: '{text:.60}' is not a name and a class, separated by a tab")
            classes[image] = label
    return classes


def _check_samples(
    path: str, images: Sequence[FoundFile], places: Sequence[Place | None], rest: Iterable[FoundFile]
) -> None:
    """Check that the images are no samples of a WebDataset, whose labels this source would lose."""
    keys = {(*file.parts[:-1], file.parts[-1].partition(".")[0]) for file in images}
    bare = all(place is None or not place.label for place in places)
    for file in rest:
        stem, _, kind = file.parts[-1].partition(".")
        if file.flaw or kind not in ("cls", "json") or (*file.parts[:-1], stem) not in keys or file.size > _LONGEST:
            continue
        if kind == "cls" or (bare and label_of(kind, file.load())):
            where = f"--source {path}" if _in_tar(images) else "with a tar of these files (tar --sort=name -cf ...)"
            raise DataError(
                f"source {path}: {'/'.join(file.parts)} holds the class of the image beside it, as in WebDataset tars; "
                f"use python -m data_prep webdataset {where}"
            )
        if kind == "json" and bare:
            return  # one shows what all are


def _in_tar(images: Sequence[FoundFile]) -> bool:
    load = images[0].load
    return isinstance(load, ByteRange) and load.size >= 0  # in a folder files are read whole, and a zip is no range


def _instead(path: str, rest: Sequence[FoundFile]) -> str:
    """Return what the source holds instead of images, and which command reads that."""
    names = Counter(file.parts[-1] for file in rest if not file.flaw)
    first = {name: storage.join(path, "/".join(f.parts)) for f in reversed(rest) for name in (f.parts[-1],)}
    kinds = Counter(suffix_of(name) for name in names.elements())
    what = ", ".join(f"{count:,} {suffix or 'without suffix'}" for suffix, count in kinds.most_common(5))
    hint = f", only files of other kinds ({what})" if what else ""
    archives = sorted(name for name in names if suffix_of(name) in ARCHIVES)
    if archives and not any(isinstance(file.load, ByteRange) and file.load.size < 0 for file in rest):
        return f"{hint}; unpack it, and give what is in it"
    if zips := [name for name in archives if name.startswith("img_align_celeba")]:
        return f"{hint}; use python -m data_prep celeba --source {first[zips[0]]}"
    for marks, source in _MARKS.items():
        if any(mark in names for mark in marks):
            return f"{hint}; use python -m data_prep {source} --source {path}"
    if archives and kinds[".tar"] == names.total():
        return (
            f"{hint}; if they are WebDataset tars, use python -m data_prep webdataset --source {path}, else give one "
            f"of them: --source {first[archives[0]]}"
        )
    if archives:
        return f"{hint}; give an archive itself: --source {first[archives[0]]}"
    if kinds[".dvc"]:
        return f"{hint}; fetch the images first: dvc pull"
    return hint
