"""Decodes the image files of strangers: to upright RGB pixels of 8 bits, within bounds, or not at all.

What a file may cost is decided from its size and its header, before its pixels are decoded. Not for cropping and
resizing: that is in `data_prep.pixels`.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from data_prep.items import Item, Loaded
from eiwtrain.data.image_formats import image_formats
from eiwtrain.terminal.lines import one_line

Pixels = npt.NDArray[np.uint8]

warnings.filterwarnings("ignore", module=r"PIL\.")  # it warns at every image of flaws that it accepts

TRANSPARENT, DAMAGED = "transparent", "damaged"  # what can be changed in an image that is used
_DEEP_MODES = ("I", "F")  # more than 8 bits a channel: converting would clip, so these are rejected
_HARMLESS = ("unknown JFIF revision", "bad ICC marker", "Invalid SOS parameters", "Unknown Adobe color")  # of warnings
_TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MOST_BYTES = 1 << 29  # of a file: more than any image has that is not refused for its pixels
_SMALL = 1 << 25  # pixels, 100 MB as RGB; a larger image has to be as large as a file, too
_MOST_PIXELS = 1 << 27  # 400 MB as RGB; cameras reach 102 million
_PIXELS_A_BYTE = 128  # a dull photograph as a small JPEG has 50; one colour as PNG has 340
_SCANS, _SCAN_BYTES = 100, 1 << 14  # of a JPEG, usually one or about ten: each takes as long as the whole image
_POINTERS = ((b"version https://git-lfs", "git lfs pull"), (b"/annex/objects/", "git annex get"))  # text, no image
_CODESTREAM = re.compile(rb"\xff\x4f\xff\x51....", re.DOTALL)  # begins a JPEG 2000; its size and its tiles follow
_TILE_BYTES = 14  # of a tile at least: its two marks
_TIFF_TILE = (322, 323)  # the tags of a tile's width and length


class Undecodable(ValueError):
    """Not an image that can be used: of more than 8 bits a channel, damaged, or too large; the message is one line."""


class NotRead(NamedTuple):
    """A file that is not read, as it is known to be no image that can be used, and why."""

    reason: str


@dataclass(frozen=True)
class Decoded:
    """The pixels of an image, RGB, and what had to be changed: `TRANSPARENT`, `DAMAGED`."""

    image: Image.Image | Pixels
    changed: tuple[str, ...] = ()


def load(item: Item) -> Loaded | NotRead:
    """Load an item, unless it is known to be no image, or too large for one. Raises as the item's loader."""
    if item.flaw:
        return NotRead(item.flaw)
    if item.size > _MOST_BYTES:
        return NotRead(f"a file of {item.size:,} bytes; an image has at most {_MOST_BYTES:,}")
    return item.load()


def decode(loaded: Loaded | NotRead, background: tuple[int, ...], accept_damaged: bool) -> Decoded:
    """Decode what an item has loaded.

    Args:
        background: the colour, red, green and blue, on which transparent pixels are shown.
        accept_damaged: use a JPEG that its decoder can only guess in part.

    Raises:
        Undecodable: it is not an image that can be used.
    """
    if isinstance(loaded, NotRead):
        raise Undecodable(loaded.reason)
    if isinstance(loaded, np.ndarray):
        return Decoded(loaded)
    try:
        if isinstance(loaded, Image.Image):
            return _on(background, loaded)
        if loaded.startswith(b"\xff\xd8"):
            return _decode_jpeg(loaded, accept_damaged)
        with Image.open(io.BytesIO(loaded), formats=image_formats()) as opened:
            check_pixels(opened.size, len(loaded))
            _check_tiles(opened, loaded)
            if opened.mode.split(";")[0] in _DEEP_MODES:
                raise Undecodable(f"mode {opened.mode}: more than 8 bits a channel")
            opened.load()  # turns a TIFF, and forgets its orientation
            return _on(background, _upright(opened, opened))
    except (MemoryError, Undecodable):
        raise
    except UnidentifiedImageError:  # its text has an address in memory, which differs in every run
        raise Undecodable(_what_instead(loaded)) from None
    except Exception as e:  # Pillow's plugins raise anything
        raise Undecodable(f"{type(e).__name__}: {one_line(e)}") from None


def _what_instead(loaded: object) -> str:
    """Return what a file holds that is no image."""
    tool = next((tool for mark, tool in _POINTERS if isinstance(loaded, bytes) and loaded.startswith(mark)), None)
    return "no image of a known format" if tool is None else f"only a pointer to the image, which {tool} fetches"


def check_pixels(size: tuple[int, int], file: int) -> None:
    """Check the width and height that an image file of `file` bytes says it has.

    Raises:
        Undecodable: it is too large to be decoded, or far too large for a file of so few bytes.
    """
    pixels = size[0] * size[1]
    most = _MOST_PIXELS if file * _PIXELS_A_BYTE >= pixels else _SMALL
    if pixels > most:
        raise Undecodable(f"{size[0]}x{size[1]} pixels in {file:,} bytes; at most {most:,} are decoded of such a file")


def _check_tiles(opened: Image.Image, data: bytes) -> None:
    """Check the tiles of a TIFF, which can be larger than the image, and of a JPEG 2000, each of which takes memory."""
    tags: Any = getattr(opened, "tag_v2", {})
    width, height = (int(tags.get(tag, 0)) for tag in _TIFF_TILE)
    check_pixels((width, height), len(data))
    for found in re.finditer(_CODESTREAM, data) if opened.format == "JPEG2000" else ():
        right, bottom, left, top, across, down, first_x, first_y = struct.unpack_from(">8I", data, found.end())
        check_pixels((right - left, bottom - top), len(data))
        tiles = -(-(right - first_x) // max(across, 1)) * -(-(bottom - first_y) // max(down, 1))
        if tiles * _TILE_BYTES > len(data):
            raise Undecodable(f"a JPEG 2000 of {tiles:,} tiles in {len(data):,} bytes")


def _on(background: tuple[int, ...], image: Image.Image) -> Decoded:
    """Make an image RGB; where it is transparent, show it on the background."""
    if not image.has_transparency_data:
        return Decoded(image if image.mode == "RGB" else image.convert("RGB"))
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return Decoded(image.convert("RGB"))
    shown = Image.new("RGB", image.size, background)
    shown.paste(image, mask=alpha)
    return Decoded(shown, (TRANSPARENT,))


class _Frame(NamedTuple):
    """What is said ahead of the pixels of a JPEG; `plain`: three channels, and nothing to turn or convert."""

    size: tuple[int, int]
    plain: bool


def _decode_jpeg(data: bytes, accept_damaged: bool) -> Decoded:
    """Decode a JPEG to the pixels that Pillow would make of it, which hides all that its decoder warns of."""
    frame = _frame(data)
    if (scans := data.count(b"\xff\xda")) > _SCANS + len(data) // _SCAN_BYTES:
        raise Undecodable(f"a JPEG of {scans:,} scans")
    if frame is not None:
        check_pixels(frame.size, len(data))
        if frame.plain and (strict := _strictly(data, "RGB", accept_damaged)) is not None:
            return Decoded(*strict)
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as opened:  # takes longer than a small image to decode
        check_pixels(opened.size, len(data))
        found = _strictly(data, "CMYK" if opened.mode == "CMYK" else "RGB", accept_damaged)
        pixels, changed = found or (None, ())
        # Without pixels, Pillow finds what is wrong, or knows this kind of JPEG; with CMYK, it knows what that means.
        image = opened.convert("RGB") if pixels is None or opened.mode == "CMYK" else Image.fromarray(pixels)
        return Decoded(_upright(opened, image), changed)


def _strictly(data: bytes, colours: str, accept_damaged: bool) -> tuple[Pixels, tuple[str, ...]] | None:
    """Return the pixels of a JPEG, and `DAMAGED` if they are partly guessed; None if it cannot be decoded.

    Raises:
        Undecodable: the decoder warns of damage, such as an early end, and `accept_damaged` is false.
    """
    decode_jpeg: Callable[..., Pixels] = simplejpeg.decode_jpeg
    try:
        return decode_jpeg(data, colours), ()
    except Exception as e:  # ValueError for nearly everything, KeyError for a header that is cut off
        problem = one_line(e)
    if any(part in problem for part in _HARMLESS):  # of all warnings the decoder reports the first
        data = _plain_headers(data)
        try:
            return decode_jpeg(data, colours), ()
        except Exception as e:  # as above
            problem = one_line(e)
    try:
        lenient = decode_jpeg(data, colours, strict=False)
    except Exception:  # as above
        return None
    if accept_damaged:
        return lenient, (DAMAGED,)
    raise Undecodable(f"a damaged JPEG: {problem}; --accept-damaged takes it")


def _plain_headers(data: bytes) -> bytes:
    """Return a JPEG without those parts of its headers that make no difference, and can be odd."""
    kept, at, sequential = data[:2], 2, False
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:
            at += 1
            continue
        if marker == 0xDA:  # its last three bytes are of use in progressive JPEGs alone
            last = b"\x00\x3f\x00" if sequential else data[end - 3 : end]
            return kept + data[at : end - 3] + last + data[end:]
        sequential = sequential or marker in (0xC0, 0xC1)
        if not 0xE0 <= marker <= 0xEF or marker == 0xEE:  # Adobe's says how colours are stored
            kept += data[at:end]
        at = end
    return data


def _frame(data: bytes) -> _Frame | None:
    """Return the frame of a JPEG; None if none is found."""
    at, plain = 2, True
    while at + 10 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xFF:  # fills a gap
            at += 1
            continue
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # precision, height, width, channels
            height, width = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
            plain = plain and data[at + 4] == 8 and data[at + 9] == 3
            return _Frame((width, height), plain)
        if marker < 0xC0 or 0xD0 <= marker <= 0xDA:
            return None
        plain = plain and data[at + 4 : at + 8] not in (b"Exif", b"Adob")
        at += 2 + length
    return None


def _upright(opened: Image.Image, image: Image.Image) -> Image.Image:
    """Turn an image as the EXIF of `opened` says, if that can be read.

    `ImageOps.exif_transpose` is not used: it rewrites all of the EXIF, which fails on many photographs.
    """
    try:
        turn = _TURNS.get(opened.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as above
        turn = None
    return image if turn is None else image.transpose(turn)
