"""Read the `webdataset` source: images that are already in WebDataset tars, which are read in place.

A sample is a run of members with one key, the name up to the first dot of its last part, as webdataset reads tars.
Not for decoding the images: that is the business of `data_prep.pixels`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from braceexpand import braceexpand

from data_prep.formats.files import FoundFile, list_files
from data_prep.formats.ranges import ByteRange
from data_prep.formats.tars import tar_members
from data_prep.items import Item, Source
from data_prep.listing import count_others, refuse_lost
from data_prep.split_names import split_in
from eiwtrain import storage
from eiwtrain.data.image_formats import is_image_name, unreadable
from eiwtrain.data.left_out import LeftOut, count_left_out, join_left_out
from eiwtrain.data.manifest import DataError

LABELS = ("auto", "cls", "json", "txt", "none")  # members that can hold the class
IMAGES = ("jpg", "jpeg", "png", "webp")  # members that are images; others are only where a sample has none of these
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")
_LISTING = 16  # tars of a remote source that are listed side by side
_LONGEST_JSON = 1 << 20  # bytes; longer ones are not looked into
_LONGEST_NAME = 200  # characters of a class name; longer text is a caption
_NUMBER = re.compile(r"[0-9]{1,18}")
_MOST_CLASSES = 100_000  # more are identifiers or captions; ImageNet-21k has 21,841


class _Tar(NamedTuple):
    """A tar: its name below the folder that all tars have in common, its URL and its bytes."""

    name: str
    url: str
    size: int


@dataclass(frozen=True, slots=True)
class _Sample:
    """A sample: its tar's name, its key, its image (None where it has none) and its class as text ("" for none).

    The flaw says why the image cannot be decoded here; "" for one that is tried.
    """

    tar: str
    key: str
    image: ByteRange | None
    label: str
    flaw: str


def webdataset(path: str, labels: str = "auto") -> Source:
    """Read the images of WebDataset tars, in the order of the tars and of the samples in them.

    - Tars: a single one, all `*.tar` of a folder and those below it by name, or a pattern with braces, as in
      `s3://bucket/imagenet-{000000..000146}.tar` or `{train-{0..9},val-0}.tar`; at any URL.
    - Splits: a tar is of the split that a word of its name says (`train`; `test`, `val`, ...). A single split for
      evaluation is called `test`; several keep their names. Tars without such a word are `train`.
    - Classes: whole numbers are kept as they are; where a label is anything else, all are names, sorted.
    - An image's source name is its key; with its tar before it where keys repeat.

    Args:
        path: a path, any URL, or such a pattern.
        labels: the member that holds the class: `cls` (a number or a name), `json` (its `label`, or else `cls`), `txt`
            (a name), `none`; `auto` takes `cls`, else `json`. Text is often a caption, so `txt` has to be asked for.

    Returns:
        A source whose notes say how many samples have no image, no label, or the key of another sample in their tar.

    Raises:
        DataError: a tar is absent or broken, no sample has an image, a sample has two, or the labels are no classes.
        StorageError: the path cannot be reached.
    """
    if labels not in LABELS:
        raise DataError(f"labels must be one of {', '.join(LABELS)}, not '{labels}'")
    kinds = {"auto": ("cls", "json"), "none": ()}.get(labels, (labels,))
    others: list[FoundFile] = []
    tars = _find_tars(path, others)
    remote = not storage.is_local(path)
    with ThreadPoolExecutor(_LISTING if remote else 1) as pool:
        listed = dict(zip((tar.name for tar in tars), pool.map(lambda tar: _list_tar(tar, kinds), tars), strict=True))
    samples = [sample for tar in tars for sample in listed[tar.name][0]]
    images = [sample for sample in samples if sample.image is not None]
    if not images:
        raise DataError(f"source {path}: no images in its {len(samples):,} samples (members {', '.join(IMAGES)})")
    classes = _classes(path, {sample.label for sample in images} - {""})
    number = {name: i for i, name in enumerate(classes)}
    splits = {
        split: _items([sample for tar in members for sample in listed[tar.name][0]], number)
        for split, members in _by_split(path, tars).items()
    }
    return Source(
        "webdataset",
        splits,
        classes,
        remote=remote,
        params={"labels": labels},
        notes=tuple(_notes(samples, images)),
        left_out=join_left_out([*count_others(others), *(kind for _, rest in listed.values() for kind in rest)]),
    )


def _find_tars(path: str, others: list[FoundFile]) -> list[_Tar]:
    """Find the tars; fill in the other files of a folder."""
    if "{" in path and not storage.exists(path):
        try:
            urls = list(dict.fromkeys(storage.absolute(url) for url in braceexpand(path)))
        except ValueError as e:
            raise DataError(f"source {path}: a wrong pattern: {e}") from None
    else:
        url = storage.absolute(path)
        fs, where = storage.filesystem(url)
        try:
            about = storage.retrying(url, lambda: fs.info(where))
        except FileNotFoundError:
            raise DataError(f"source {path}: no such folder or tar") from None
        urls = [url]
        if about["type"] == "directory":
            urls = [f.load.url() for f in list_files(url, (".tar",), others) if isinstance(f.load, ByteRange)]
            refuse_lost(path, [f for f in others if f.parts[-1].lower().endswith(".tar")])
            if not urls:
                raise DataError(f"source {path}: no .tar is in this folder or below it")
    if packed := [url for url in urls if url.endswith(_COMPRESSED)]:
        raise DataError(f"source {packed[0]}: uncompress it: only a plain tar can be read by offset")
    with ThreadPoolExecutor(_LISTING) as pool:
        sizes = list(pool.map(_size, urls))
    if missing := [url for url, size in zip(urls, sizes, strict=True) if size is None]:
        raise DataError(f"source {path}: {len(missing):,} of {len(urls):,} tars are missing; the first: {missing[0]}")
    parts = [url.split("/") for url in urls]
    shared = 0
    while all(shared < len(p) - 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return [_Tar("/".join(p[shared:]), url, size or 0) for p, url, size in zip(parts, urls, sizes, strict=True)]


def _size(url: str) -> int | None:
    try:
        return storage.size(url)
    except FileNotFoundError:
        return None


def _list_tar(tar: _Tar, kinds: Sequence[str]) -> tuple[list[_Sample], tuple[LeftOut, ...]]:
    """List the samples of a tar by its headers, and count the other members.

    Only members of `kinds`, which may hold a label, are read.
    """
    groups: list[tuple[str, dict[str, Any]]] = []
    others = []
    for parts, header, data, read in tar_members(ByteRange(tar.url, 0, tar.size)):
        stem, dot, kind = parts[-1].partition(".")
        kind = kind.lower()
        if not header.isreg() or not stem or not dot:
            if not header.isdir():
                others.append(("/".join((tar.name, *parts)), "not in a sample"))
            continue
        key = "/".join((*parts[:-1], stem))
        if not groups or groups[-1][0] != key or kind in groups[-1][1]:
            groups.append((key, {}))
        if _is_image(kind):
            groups[-1][1][kind] = data
        else:
            groups[-1][1][kind] = read() if kind in kinds and data.size <= _LONGEST_JSON else b""
    samples = [_sample(tar, key, members, kinds) for key, members in groups]
    for sample, (key, members) in zip(samples, groups, strict=True):
        unused = (kind for kind in members if kind not in kinds and members[kind] is not sample.image)
        others += ((f"{tar.name}/{key}.{kind}", "not an image or a label") for kind in unused)
    return samples, count_left_out(others)


def _is_image(kind: str) -> bool:
    return "." not in kind and is_image_name(f".{kind}")


def _sample(tar: _Tar, key: str, members: dict[str, Any], kinds: Sequence[str]) -> _Sample:
    images = [kind for kind in IMAGES if kind in members]
    if len(images) > 1:
        raise DataError(f"source {tar.url}: sample {key} has two images, .{images[0]} and .{images[1]}; remove one")
    label = next(filter(None, (label_of(kind, members[kind]) for kind in kinds if kind in members)), "")
    if not images:  # one that can be decoded here before one that cannot
        images = sorted(filter(_is_image, members), key=lambda kind: (unreadable(f".{kind}"), kind))
    image = images[0] if images else ""
    return _Sample(tar.name, key, members.get(image), label, unreadable(f".{image}"))


def label_of(kind: str, data: bytes) -> str:
    """Return the class in a member of a sample, as text; "" where it holds none."""
    value: object = data.decode("utf-8", "replace")
    if kind == "json":
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            return ""
        value = content.get("label", content.get("cls")) if isinstance(content, dict) else None
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    text = unicodedata.normalize("NFC", value).strip() if isinstance(value, str) else ""
    if len(text) > _LONGEST_NAME or "\n" in text or re.fullmatch(r"-[0-9]+", text):
        return ""
    return str(int(text)) if _NUMBER.fullmatch(text) else text


def _classes(path: str, labels: set[str]) -> tuple[str, ...]:
    numbers = all(map(_NUMBER.fullmatch, labels))
    count = max(map(int, labels), default=-1) + 1 if numbers else len(labels)
    if count > _MOST_CLASSES:
        raise DataError(f"source {path}: its labels would be {count:,} classes; use --labels none, or another member")
    return tuple(map(str, range(count))) if numbers else tuple(sorted(labels))


def _by_split(path: str, tars: Sequence[_Tar]) -> dict[str, list[_Tar]]:
    """Return the tars of each split, by the words of their names."""
    found: dict[str, list[_Tar]] = {}
    for tar in tars:
        kind, word = split_in(tar.name) or ("", "")
        found.setdefault("train" if kind == "train" else word, []).append(tar)
    evals = sorted(found.keys() - {"train", ""})
    if len(found) == 1 or not evals:
        return {"train": list(tars)}
    if "train" in found and "" in found:
        stray = found[""][0].name
        raise DataError(f"source {path}: '{stray}' is named for no split, unlike other tars; give a pattern without it")
    train = found.get("train", []) + found.get("", [])
    names = {evals[0]: "test"} if len(evals) == 1 else {name: name for name in evals}
    return ({"train": train} if train else {}) | {names[name]: found[name] for name in evals}


def _items(samples: Iterable[_Sample], number: dict[str, int]) -> list[Item]:
    images = [(sample, sample.image) for sample in samples if sample.image is not None]
    keys = Counter(sample.key for sample, _ in images)
    seen: Counter[str] = Counter()
    items = []
    for sample, image in images:
        name = sample.key if keys[sample.key] == 1 else f"{sample.tar}/{sample.key}"
        seen[name] += 1
        name += f"#{seen[name]}" if seen[name] > 1 else ""
        items.append(Item(number.get(sample.label, -1), name, image.size, image, sample.flaw))
    return items


def _notes(samples: Sequence[_Sample], images: Sequence[_Sample]) -> Iterable[str]:
    if without := [sample for sample in samples if sample.image is None]:
        first = f"{without[0].tar}/{without[0].key}"
        yield f"{len(without):,} samples have no image ({', '.join(IMAGES)}) and are left out; the first: {first}"
    if not any(sample.label for sample in images) and len({sample.key.rpartition("/")[0] for sample in images}) > 1:
        yield "no sample has a label; if the folders in the tars are classes, the folder source reads them"
    counts = Counter((sample.tar, sample.key) for sample in images)
    if repeated := [name for name, count in counts.items() if count > 1]:
        yield f"{len(repeated):,} keys come more than once in a tar; all are kept; the first: {'/'.join(repeated[0])}"
