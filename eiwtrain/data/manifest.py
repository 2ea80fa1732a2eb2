"""Describe the shards of a data set: the manifest of the whole, the sidecar of each shard, and their JSON.

With `shards`, this is all that `data_prep` (which writes) and `eiwtrain.data` (which reads) share. It holds no pixels
and no order.

A data set is a folder at any fsspec URL:

    manifest.json        written last: without it there is no data set
    train-000000.tar     WebDataset tar: key.png (or key.npy) + key.json per image
    train-000000.json    its sidecar: checksum, what was left out, and where each image is inside the tar
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from eiwtrain import storage
from eiwtrain.data.fields import DataError, Fields, parse_object
from eiwtrain.data.fingerprint import fingerprint, first_fingerprint
from eiwtrain.data.left_out import LeftOut
from eiwtrain.data.shards import Shard, Split, sidecar_name
from eiwtrain.terminal.lines import one_line

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = "eiwtrain-data-3"
_FIRST_FORMAT = "eiwtrain-data-2"
_FINGERPRINTS = {_FIRST_FORMAT: first_fingerprint, MANIFEST_FORMAT: fingerprint}
SIDECAR_FORMAT = "eiwtrain-shard-2"
ENCODINGS = ("png", "npy")
MAX_RESOLUTION = 1024  # pixels; beyond it a typing error is more likely than an image model
_MOST_BYTES = 1 << 28  # of a manifest or a sidecar: of some 2 million images a shard
_SAMPLE = 4 * 512  # bytes of a tar that an image takes at least: two members, each a header and a block


@dataclass(frozen=True)
class Manifest:
    """A whole data set.

    Attributes:
        name: for people; not part of the fingerprint.
        resolution: height and width of every image, in pixels.
        channels: 3 (RGB).
        preprocessing: {"name", "version", "params"}: what was done to the pixels.
        splits: by name.
        fingerprint: SHA-256 over the checksums of shards and sidecars, the preprocessing and the classes: equal
            exactly when images and labels are.
        classes: class names; a sample's label is an index into them, -1 where it has none.
        plan: SHA-256 of the task of `data_prep`; shows whether an unfinished data set belongs to the same task.
        duplicates: by split, how many of its images have exactly the pixels of an earlier one, in any split; the
            splits for evaluation come first.
        left_out: files of the source that are not in the data set; not part of the fingerprint.
    """

    name: str
    resolution: int
    channels: int
    preprocessing: dict[str, Any]
    splits: dict[str, Split]
    fingerprint: str
    classes: tuple[str, ...] = ()
    plan: str = ""
    duplicates: dict[str, int] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()

    @property
    def encoding(self) -> str:
        """The format of the stored images, one of `ENCODINGS`."""
        return str(self.preprocessing["params"].get("encoding", "png"))

    @property
    def protocol(self) -> str:
        """The settings with which scores on this data set cannot be compared with others; else empty."""
        params = self.preprocessing["params"]
        source = params.get("source", {})
        of_source = str(source.get("protocol", "")) if isinstance(source, dict) else ""
        short, crop = params.get("short_side"), params.get("crop", "center")
        cut = "" if short is None and crop == "center" else f"{crop} squares"
        scaled = "" if short is None else f"shorter side {short}"
        return ", ".join(filter(None, [of_source, scaled, cut]))

    @property
    def title(self) -> str:
        """The name to print beside a score, with the protocol where there is one."""
        return one_line(f"{self.name} ({self.protocol})" if self.protocol else self.name, limit=None)

    def split(self, name: str) -> Split:
        """Return the split of that name.

        Raises:
            DataError: there is no such split, or it holds no samples.
        """
        if name not in self.splits:
            raise DataError(f"data set '{self.name}' has no split '{name}'; it has {', '.join(self.splits) or 'none'}")
        if self.splits[name].samples == 0:
            raise DataError(f"split '{name}' of data set '{self.name}' has no samples")
        return self.splits[name]


@dataclass(frozen=True)
class Sidecar:
    """The facts about one shard: its checksum, what was left out of it, and where each image is inside it.

    Attributes:
        shard: name, samples, bytes, sha256.
        plan: the plan of the data set it belongs to.
        rejects: {"key", "source", "reason"} of each item that could not be decoded.
        keys, labels, offsets, sizes, digests: one entry an image: WebDataset key, class index, first byte and length of
            the image inside the tar, digest of its pixels.
        dropped: {"key", "source", "digest", "reason"} of each image that was left out as a duplicate.
        changed: how many images were changed beyond cropping and resizing, by what it was ("transparent", "damaged").
    """

    shard: Shard
    plan: str
    rejects: tuple[dict[str, str], ...] = ()
    keys: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    digests: tuple[str, ...] = ()
    dropped: tuple[dict[str, str], ...] = ()
    changed: dict[str, int] = field(default_factory=dict)


def fingerprint_for(
    form: str, splits: Mapping[str, Split], preprocessing: Mapping[str, Any], classes: Iterable[str]
) -> str:
    """Return the fingerprint of a data set whose manifest has the format `form`."""
    return _FINGERPRINTS[form](splits, preprocessing, classes)


def load_manifest(url: str) -> Manifest:
    """Read the manifest of the data set at `url`.

    Raises:
        DataError: there is no data set, or its format is another one; the message names the field that is wrong.
        StorageError: storage cannot be reached.
    """
    return manifest_from_json(read_manifest(url), storage.join(url, MANIFEST_NAME))


def read_manifest(url: str) -> bytes:
    """Return the bytes of the manifest of the data set at `url`. Raises as `load_manifest`."""
    try:
        return storage.read_bytes(storage.join(url, MANIFEST_NAME), _MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"no data set at {url}: {MANIFEST_NAME} is not there") from None


def manifest_to_json(manifest: Manifest) -> bytes:
    """Return the bytes of `manifest.json`, in the format that the fingerprint is of."""
    first = first_fingerprint(manifest.splits, manifest.preprocessing) == manifest.fingerprint
    content = {
        "format": _FIRST_FORMAT if first else MANIFEST_FORMAT,
        "name": manifest.name,
        "resolution": manifest.resolution,
        "channels": manifest.channels,
        "classes": list(manifest.classes),
        "preprocessing": manifest.preprocessing,
        "splits": {
            name: {"samples": split.samples, "shards": [vars(s) for s in split.shards]}
            for name, split in manifest.splits.items()
        },
        "fingerprint": manifest.fingerprint,
        "plan": manifest.plan,
        "duplicates": manifest.duplicates,
        "left_out": [vars(kind) for kind in manifest.left_out],
    }
    return (json.dumps(content, indent=1) + "\n").encode()


def manifest_from_json(text: bytes, where: str) -> Manifest:
    """Parse a manifest; `where` names it in errors.

    Raises:
        DataError: it is not JSON, has another format, lacks a field, has one of a wrong type, or contradicts itself.
    """
    top = Fields(parse_object(text, where), where)
    _check_format(top, *_FINGERPRINTS)
    preprocessing = top.mapping("preprocessing")
    preprocessing.check_depth()
    preprocessing.mapping("params")
    for key in ("name", "version"):
        if key not in preprocessing.values:
            raise DataError(f"{where}: field 'preprocessing.{key}' is missing")
    splits = {}
    for name in (fields := top.mapping("splits")).values:
        split = fields.mapping(name)
        shards = tuple(_shard(s, s.text("sidecar_sha256")) for s in split.mappings("shards"))
        if sum(s.samples for s in shards) != split.integer("samples"):
            raise DataError(f"{where}: field 'splits.{name}.samples' is not the sum over its shards")
        for shard in shards:
            _check_shard(shard, where)
        splits[name] = Split(name, split.integer("samples"), shards)
    manifest = Manifest(
        name=top.text("name"),
        resolution=top.integer("resolution"),
        channels=top.integer("channels"),
        preprocessing=preprocessing.values,
        splits=splits,
        fingerprint=top.text("fingerprint"),
        classes=tuple(top.listed("classes", str)),
        plan=top.text("plan"),
        duplicates={name: top.mapping("duplicates").integer(name) for name in top.mapping("duplicates").values},
        left_out=tuple(
            LeftOut(kind.text("suffix"), kind.text("reason"), kind.integer("files"), kind.text("first"))
            for kind in (top.mappings("left_out") if "left_out" in top.values else ())  # earlier versions had none
        ),
    )
    if not 1 <= manifest.resolution <= MAX_RESOLUTION or manifest.channels != 3:
        size = f"{manifest.resolution} pixels, {manifest.channels} channels"
        raise DataError(f"{where}: images of {size}; this version reads 1 to {MAX_RESOLUTION} pixels, 3 channels")
    if manifest.encoding not in ENCODINGS:
        raise DataError(f"{where}: images are stored as '{manifest.encoding}', this version reads {ENCODINGS}")
    if manifest.fingerprint != fingerprint_for(top.text("format"), splits, manifest.preprocessing, manifest.classes):
        raise DataError(f"{where}: field 'fingerprint' does not match the shards, sidecars, classes and preprocessing")
    return manifest


def load_sidecar(url: str, shard: str) -> Sidecar:
    """Read the sidecar of the shard named `shard` of the data set at `url`.

    Raises:
        DataError: it is absent or damaged.
        StorageError: storage cannot be reached.
    """
    return sidecar_from_json(read_sidecar(url, shard), storage.join(url, sidecar_name(shard)))


def read_sidecar(url: str, shard: str) -> bytes:
    """Return the bytes of the sidecar of the shard named `shard`. Raises as `load_sidecar`."""
    where = storage.join(url, sidecar_name(shard))
    try:
        return storage.read_bytes(where, _MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"shard {shard}: its sidecar {where} is not there") from None


def sidecar_to_json(sidecar: Sidecar) -> bytes:
    """Return the bytes of the sidecar's file."""
    shard = vars(sidecar.shard)
    content = {
        "format": SIDECAR_FORMAT,
        **{k: v for k, v in shard.items() if k != "sidecar_sha256"},
        "plan": sidecar.plan,
        "rejects": sidecar.rejects,
        "dropped": sidecar.dropped,
        **({"changed": sidecar.changed} if sidecar.changed else {}),
        "index": _columns(sidecar),
    }
    return (json.dumps(content, separators=(",", ":")) + "\n").encode()


def sidecar_from_json(text: bytes, where: str) -> Sidecar:
    """Parse a sidecar; `where` names it in errors.

    Raises:
        DataError: as `manifest_from_json`.
    """
    top = Fields(parse_object(text, where), where)
    _check_format(top, SIDECAR_FORMAT)
    index = top.mapping("index")
    changed = top.mapping("changed") if "changed" in top.values else Fields({}, where)
    sidecar = Sidecar(
        shard=_shard(top),
        plan=top.text("plan"),
        rejects=_texts(top.mappings("rejects"), "key", "source", "reason"),
        keys=tuple(index.listed("key", str)),
        labels=tuple(index.listed("label", int)),
        offsets=tuple(index.listed("offset", int)),
        sizes=tuple(index.listed("size", int)),
        digests=tuple(index.listed("digest", str)),
        dropped=_texts(top.mappings("dropped"), "key", "source", "reason", "digest"),
        changed={what: changed.integer(what) for what in changed.values},
    )
    for name, column in _columns(sidecar).items():
        if len(column) != sidecar.shard.samples:
            raise DataError(f"{where}: field 'index.{name}' has {len(column)} entries, not {sidecar.shard.samples}")
    for row, (start, size) in enumerate(zip(sidecar.offsets, sidecar.sizes, strict=True)):
        if start < 0 or size < 0 or start + size > sidecar.shard.bytes:
            raise DataError(f"{where}: image {row} would lie outside the shard")
    return sidecar


def _columns(sidecar: Sidecar) -> dict[str, tuple[Any, ...]]:
    """Return the index by column, with one entry an image."""
    return {
        "key": sidecar.keys,
        "label": sidecar.labels,
        "offset": sidecar.offsets,
        "size": sidecar.sizes,
        "digest": sidecar.digests,
    }


def _texts(entries: list[Fields], *names: str) -> tuple[dict[str, str], ...]:
    """Return the entries; each must have strings of these names."""
    return tuple({name: entry.text(name) for name in names} for entry in entries)


def _check_format(top: Fields, *expected: str) -> None:
    found = top.values.get("format")
    if found not in expected:
        raise DataError(f"{top.where}: format is {found!r}, this version reads {' and '.join(map(repr, expected))}")


def _check_shard(shard: Shard, where: str) -> None:
    """Check what a manifest says of a shard before any file is opened by it."""
    if shard.samples * _SAMPLE > shard.bytes:
        few = f"{shard.samples} samples cannot be in {shard.bytes} bytes"
        raise DataError(f"{where}: {few}, as is said of shard {shard.name!r:.60}")
    if not all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in (shard.sha256, shard.sidecar_sha256)):
        raise DataError(f"{where}: the checksums of shard {shard.name!r:.60} are no SHA-256")


def _shard(fields: Fields, sidecar_sha256: str = "") -> Shard:
    name = fields.text("name")
    if name in ("", ".", "..") or {"/", "\\"} & set(name) or "::" in name:  # a place elsewhere
        raise DataError(f"{fields.where}: field '{fields.prefix}name' is {name!r:.60}, not the name of a file")
    return Shard(
        fields.text("name"), fields.integer("samples"), fields.integer("bytes"), fields.text("sha256"), sidecar_sha256
    )
