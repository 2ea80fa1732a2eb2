"""Shows what a data set holds: a page of text, a sheet of its first images, and its size before it is written.

Not for checking it: that is `data_prep.verify`.
"""

from __future__ import annotations

import json
import random
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from data_prep.decode import DAMAGED, TRANSPARENT, Pixels, Undecodable, load
from data_prep.pixels import encode, fit
from data_prep.shard_check import read_image
from data_prep.writer import Plan
from eiwtrain import storage
from eiwtrain.data.left_out import left_out_table
from eiwtrain.data.manifest import DataError, Manifest, Sidecar, load_sidecar
from eiwtrain.data.shards import Split
from eiwtrain.terminal.lines import printable

_READERS = 16  # sidecars that are read side by side
_REASONS = 3  # how many of the most frequent reasons are printed
_CLASSES = 10  # how many names of classes are printed
_TILE = 64  # pixels to which an image is enlarged, so that small ones can be seen
_GAP, _MARGIN = 4, 16
_PAPER, _INK, _FAINT = (240, 240, 238), (30, 30, 30), (105, 105, 105)
_NAME_SIZE, _CAPTION_SIZE = 10, 16
_NAME_HEIGHT, _CAPTION_HEIGHT = 15, 30
_SEED = 20240704  # chooses the items that `size_estimate` encodes
_INDEX_ROW = 64  # bytes an image takes in a sidecar, roughly
_ABOUT_SHARD = 400  # bytes a shard takes in the manifest and in the head of its sidecar, roughly


class Size(NamedTuple):
    """The size of a data set before it is written, in bytes, and how many images the estimate is from."""

    bytes: int
    images: int


def describe(manifest: Manifest, where: str) -> str:
    """Describe the data set at `where`: counts, sizes, what was left out and why, and what was done to the pixels.

    Raises:
        StorageError: storage cannot be reached.
    """
    side = manifest.resolution
    lines = [f"{manifest.name}: {side}x{side}x{manifest.channels}, {manifest.encoding}, at {where}"]
    if manifest.protocol:
        lines.append(f"  protocol: {manifest.protocol}")
    names = ", ".join(manifest.classes[:_CLASSES]) + (", ..." if len(manifest.classes) > _CLASSES else "")
    lines.append(f"  classes: {len(manifest.classes)}" + (f" ({names})" if names else ""))
    for split in manifest.splits.values():
        lines += _describe_split(manifest, split, where)
    lines += [f"  {line}" for line in left_out_table(manifest.left_out)]
    made = manifest.preprocessing
    lines.append(f"  preprocessing: {made['name']} v{made['version']} {json.dumps(made['params'], sort_keys=True)}")
    lines.append(f"  fingerprint: {manifest.fingerprint}")
    return "\n".join(map(printable, lines))


def contact_sheet(
    url: str, manifest: Manifest, split: str | None = None, columns: int = 16, rows: int = 8
) -> Image.Image:
    """Draw the first images of each split, or of the one named, in the data set's order, row by row.

    Small images are enlarged by a whole factor without smoothing. The class stands below an image, if there are
    classes. Only the part of each shard that is shown is read.

    Args:
        columns, rows: the most images of each split, across and down.

    Raises:
        DataError: there is no such split, a shard is missing, or an image is damaged.
        StorageError: storage cannot be reached.
    """
    shown = [manifest.split(split)] if split is not None else [s for s in manifest.splits.values() if s.samples]
    if not shown:
        raise DataError(f"data set '{manifest.name}' has no images")
    panels = []
    for part in shown:
        images = list(_first_images(url, manifest, part, columns * rows))
        caption = f"{part.name}: {part.samples:,} images, {manifest.resolution}x{manifest.resolution}"
        if len(images) < part.samples:
            caption += f"; the first {len(images)}"
        panels.append(_panel(manifest, caption, images, columns))
    sheet = Image.new("RGB", (max(p.width for p in panels), sum(p.height for p in panels) + _MARGIN), _PAPER)
    top = 0
    for panel in panels:
        sheet.paste(panel, (0, top))
        top += panel.height
    return sheet


def size_estimate(plan: Plan, images: int = 64) -> Size:
    """Estimate the size of the data set of `plan` by encoding a few of its items, the same at every call.

    Args:
        images: how many items are tried. The share of them that cannot be decoded is expected of the rest as well.

    Raises:
        DataError, StorageError: an item cannot be read.
    """
    items = [(split, number) for split, order in plan.orders.items() for number in range(len(order))]
    tried = random.Random(_SEED).sample(items, min(images, len(items)))
    sizes = []
    for split, number in tried:
        item = plan.source.splits[split][number]
        try:
            pixels = fit(load(item), item.source, plan.preprocess)
        except Undecodable:
            continue
        image = len(encode(pixels, plan.preprocess.encoding))
        about = len(json.dumps({"label": item.label, "source": item.source}))
        sizes.append(_in_tar(image) + _in_tar(about) + _INDEX_ROW)
    shards = sum(plan.shards().values())
    of_shard = 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE // 2 + _ABOUT_SHARD
    return Size(round(len(items) * sum(sizes) / max(len(tried), 1)) + shards * of_shard, len(sizes))


def _in_tar(size: int) -> int:
    """Return the bytes of a member of a tar: a header, and its data in whole blocks."""
    return tarfile.BLOCKSIZE * (1 + -(-size // tarfile.BLOCKSIZE))


def _describe_split(manifest: Manifest, split: Split, where: str) -> list[str]:
    sizes = [shard.bytes / 1e6 for shard in split.shards]
    lines = [f"  {split.name}: {split.samples:,} images in {len(sizes)} shards, {sum(sizes):,.1f} MB"]
    if len(sizes) > 1:
        lines[0] += f" (a shard {min(sizes):,.1f} to {max(sizes):,.1f} MB, {sum(sizes) / len(sizes):,.1f} on average)"
    sidecars, unread = _sidecars(where, split)
    rejects = [entry.get("reason", "") for sidecar in sidecars for entry in sidecar.rejects]
    dropped = [entry.get("reason", "") for sidecar in sidecars for entry in sidecar.dropped]
    duplicates = manifest.duplicates.get(split.name, 0)
    of_them = f", {len(dropped):,} of them dropped" if duplicates else ""
    lines.append(f"    {len(rejects):,} rejects, {duplicates:,} duplicates{of_them}")
    lines += [f"    rejects: {reason}" for reason in _most_frequent(rejects)]
    lines += [f"    dropped: {reason}" for reason in _most_frequent(dropped)]
    background = manifest.preprocessing["params"].get("background", "")
    kinds = {
        TRANSPARENT: f"with transparent pixels, shown on {background}",
        DAMAGED: "damaged, and used as they are",
    }
    for kind, what in kinds.items():
        if count := sum(sidecar.changed.get(kind, 0) for sidecar in sidecars):
            lines.append(f"    {count:,} {what}")
    if unread:
        lines.append(f"    {len(unread)} sidecars cannot be read, the first: {unread[0]}")
    return lines


def _sidecars(where: str, split: Split) -> tuple[list[Sidecar], list[str]]:
    """Return the sidecars that can be read, and what is wrong with the others."""

    def read(name: str) -> Sidecar | str:
        try:
            return load_sidecar(where, name)
        except DataError as e:
            return str(e)

    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(read, [shard.name for shard in split.shards]))
    return [s for s in found if isinstance(s, Sidecar)], [s for s in found if isinstance(s, str)]


def _most_frequent(reasons: Iterable[str]) -> list[str]:
    """List the most frequent reasons with their counts; those that differ only in numbers count as one."""
    examples: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for reason in reasons:
        kind = re.sub(r"0x[0-9a-f]+|\d+", "0", reason)
        examples.setdefault(kind, reason)
        counts[kind] += 1
    lines = [f"{n:,} x {examples[kind]:.100}" for kind, n in counts.most_common(_REASONS)]
    others = counts.total() - sum(n for _, n in counts.most_common(_REASONS))
    return [*lines, f"{others:,} for other reasons"] if others else lines


def _first_images(url: str, manifest: Manifest, split: Split, number: int) -> Iterator[tuple[Pixels, int]]:
    """Yield the first images of a split with their labels; each shard is read once."""
    for shard in split.shards:
        n = min(number, shard.samples)
        if n == 0:
            continue
        number -= n
        sidecar = load_sidecar(url, shard.name)
        start = sidecar.offsets[0]
        try:
            data = storage.read_range(
                storage.join(url, shard.name), start, sidecar.offsets[n - 1] + sidecar.sizes[n - 1] - start
            )
        except FileNotFoundError:
            raise DataError(f"shard {shard.name} is missing") from None
        for key, label, offset, size in zip(
            sidecar.keys[:n], sidecar.labels, sidecar.offsets, sidecar.sizes, strict=False
        ):
            try:
                yield read_image(data[offset - start :][:size], manifest.encoding, manifest.resolution), label
            except ValueError as e:
                raise DataError(f"shard {shard.name}: image {key} {e}") from None


def _panel(manifest: Manifest, caption: str, images: Sequence[tuple[Pixels, int]], columns: int) -> Image.Image:
    """Draw a caption and the images below it."""
    caption = _plain(caption)
    side = manifest.resolution * max(1, _TILE // manifest.resolution)
    named = bool(manifest.classes) and side >= _TILE // 2
    step_x, step_y = side + _GAP, side + (_NAME_HEIGHT + 2 if named else _GAP)
    rows = -(-len(images) // columns)
    width = 2 * _MARGIN + min(columns, len(images)) * step_x - _GAP
    caption_width = round(_font(_CAPTION_SIZE).getlength(caption)) + 2 * _MARGIN
    panel = Image.new("RGB", (max(width, caption_width), _MARGIN + _CAPTION_HEIGHT + rows * step_y), _PAPER)
    draw = ImageDraw.Draw(panel)
    draw.text((_MARGIN, _MARGIN), caption, fill=_INK, font=_font(_CAPTION_SIZE))
    for i, (pixels, label) in enumerate(images):
        left, top = _MARGIN + i % columns * step_x, _MARGIN + _CAPTION_HEIGHT + i // columns * step_y
        panel.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (left, top))
        if named and 0 <= label < len(manifest.classes):
            name = _shortened(manifest.classes[label], side)
            draw.text((left, top + side + 1), name, fill=_FAINT, font=_font(_NAME_SIZE))
    return panel


def _shortened(name: str, width: int) -> str:
    """Cut the name so that it is no wider than `width` pixels."""
    name = _plain(name)
    if _font(_NAME_SIZE).getlength(name) <= width:
        return name
    while name and _font(_NAME_SIZE).getlength(name + "..") > width:
        name = name[:-1]
    return name + ".."


def _plain(text: str) -> str:
    """Replace all but ASCII, which is all that the font has."""
    return text.encode("ascii", "replace").decode()


@cache
def _font(size: int) -> Any:
    """Return Pillow's own font."""
    return ImageFont.load_default(size)
