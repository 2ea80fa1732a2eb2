"""Awkward images: small examples of all that a folder of found images can hold, and what each must become."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

QUADRANTS = ((230, 30, 30), (30, 200, 30), (30, 30, 230), (230, 220, 30))  # top left, top right, bottom left and right
EXIF_ORIENTATION = 0x0112
UNDECODABLE_NAME = os.fsdecode(b"undecodable-\xff.png")  # a name that is not UTF-8, as Linux allows


def quadrants(width: int = 48, height: int = 32) -> Image.Image:
    """Make an image of four colours, one a quadrant: turned or mirrored it differs, and JPEG keeps the colours."""
    image = Image.new("RGB", (width, height))
    for n, colour in enumerate(QUADRANTS):
        left, top = n % 2 * (width // 2), n // 2 * (height // 2)
        image.paste(colour, (left, top, left + width, top + height))
    return image


def write_awkward(folder: Path) -> dict[str, str]:
    """Write awkward images and other files into the folder; return "image" or "reject" by name.

    Files not in the result are not images of a source: hidden files, a folder with the name of an image, notes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = _images() | _rejects()
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    for name in (".hidden.png", ".trash/image.png", "notes.txt", "Thumbs.db"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(_saved("PNG"))
    return dict.fromkeys(_images(), "image") | dict.fromkeys(_rejects(), "reject")


def oriented(orientation: int) -> bytes:
    """Make a JPEG of `quadrants` whose EXIF says how to turn it."""
    return _with_exif((EXIF_ORIENTATION, 3, 1, struct.pack(">HH", orientation, 0)))


def deep_png(colour: int = 2, value: int = 0x80FF) -> bytes:
    """Make a PNG of 16 bits a channel, 4x4 pixels, all of one value; colour type 0 is gray, 2 is RGB."""
    row = b"\0" + struct.pack(">H", value) * 4 * (3 if colour == 2 else 1)
    return _png(struct.pack(">IIBBBBB", 4, 4, 16, colour, 0, 0, 0), zlib.compress(row * 4))


def without_segment(jpeg: bytes, marker: int) -> bytes:
    """Remove the segments of a kind from a JPEG (0xEE: Adobe's)."""
    kept, at = jpeg[:2], 2
    while jpeg[at + 1] != 0xDA:  # the scan follows
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        kept += b"" if jpeg[at + 1] == marker else jpeg[at:end]
        at = end
    return kept + jpeg[at:]


def _images() -> dict[str, bytes]:
    image = quadrants()
    transparent = image.copy()
    transparent.putalpha(Image.linear_gradient("L").resize(image.size))
    cmyk = _saved("JPEG", image.convert("CMYK"))
    png = _saved("PNG")
    frames = [quadrants().rotate(90 * n).quantize(16) for n in range(3)]
    return {
        "cmyk.jpg": cmyk,
        "cmyk-without-marker.jpg": without_segment(cmyk, 0xEE),
        "gray.jpg": _saved("JPEG", image.convert("L")),
        "rgb.jpg": _saved("JPEG", keep_rgb=True),
        "progressive.jpg": _saved("JPEG", progressive=True),
        "profile.jpg": _saved("JPEG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        **{f"exif-{n}.jpg": oriented(n) for n in range(1, 9)},
        "exif-99.jpg": oriented(99),
        # a text in place of a ratio
        "odd-exif.jpg": _with_exif((EXIF_ORIENTATION, 3, 1, b"\0\6\0\0"), (0x011A, 2, 4, b"abc\0")),
        "broken-exif.jpg": _with_exif().replace(b"MM\0*", b"\xff\xff\xff\xff"),
        "cut-exif.jpg": _with_exif((EXIF_ORIENTATION, 3, 1, b"\0\6\0\0")).replace(b"\0\x08\0\1", b"\0\x08\0\x09"),
        "more-behind-the-end.jpg": _saved("JPEG") + b"\0" * 100 + b"more",
        "png-in-disguise.JPEG": _saved("PNG"),
        "jpeg-in-disguise.png": _saved("JPEG"),
        "webp.webp": _saved("WEBP", quality=95),
        "webp-lossless.webp": _saved("WEBP", lossless=True),
        "bitmap.bmp": _saved("BMP"),
        "tiff.tif": _saved("TIFF"),
        "turned.tiff": _saved("TIFF", tiffinfo={EXIF_ORIENTATION: 6}),
        "animated.gif": _saved("GIF", frames[0], save_all=True, append_images=frames[1:]),
        "wrong-crc.png": _flipped(png, png.index(b"IEND") - 8),  # zlib's own sum of the pixels is right
        "palette.png": _saved("PNG", image.quantize(16)),
        "palette-transparent.png": _saved("PNG", image.quantize(16), transparency=bytes(range(16))),
        "transparent.png": _saved("PNG", transparent),
        "gray-alpha.png": _saved("PNG", transparent.convert("LA")),
        "one-bit.png": _saved("PNG", image.convert("1")),
        "deep-rgb.png": deep_png(),
        "one.png": _saved("PNG", quadrants(1, 1)),
        "thin.png": _saved("PNG", quadrants(1, 300)),
        "wide.png": _saved("PNG", quadrants(4000, 3)),
        "odd.jpg": _saved("JPEG", quadrants(31, 17)),
        "LOUD.PNG": _saved("PNG", quadrants(16, 16)),
        "a name, with spaces.png": _saved("PNG", quadrants(18, 16)),
        "höhe-写真-🖼.png": _saved("PNG", quadrants(20, 16)),
        UNDECODABLE_NAME: _saved("PNG", quadrants(22, 16)),
        "folder.jpg/inside.png": _saved("PNG", quadrants(24, 16)),
    }


def _rejects() -> dict[str, bytes]:
    jpeg, png = _saved("JPEG"), _saved("PNG")
    noise = _saved("JPEG", Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)))
    return {
        "empty.jpg": b"",
        "text.png": b"<html>404 not found</html>\n",
        "truncated.jpg": noise[: len(noise) // 2],
        "truncated-header.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": png[: len(png) // 2],
        "stub.jpg": jpeg[:20],
        "damaged.png": _flipped(png, png.index(b"IEND") - 12),  # zlib's own sum
        "wrong-crc-of-header.png": _flipped(png, png.index(b"IDAT") - 8),
        "deep-gray.png": deep_png(colour=0),
        "float.tif": _saved("TIFF", Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))),
        "bomb.png": _png(struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0), zlib.compress(bytes(1000))),
    }


def _with_exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """Make a JPEG of `quadrants` with an EXIF of these (tag, type, count, 4 bytes)."""
    packed = b"".join(struct.pack(">HHI4s", *entry) for entry in entries)
    return _saved("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + packed + bytes(4))


def _saved(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or quadrants()).save(buffer, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}) | options)
    return buffer.getvalue()


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def _png(header: bytes, pixels: bytes) -> bytes:
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
