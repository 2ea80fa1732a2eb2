"""Names the formats of image files that are read: a list, as Pillow also opens formats that run other programs.

Not for decoding: pass `image_formats()` to `PIL.Image.open` wherever an image is opened.
"""

from __future__ import annotations

from functools import cache

from PIL import Image, features

_WANTED = ("JPEG", "PNG", "PPM", "BMP", "DIB", "GIF", "TIFF", "WEBP", "JPEG2000", "AVIF", "TGA", "QOI")
_CODECS = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}  # parts of Pillow that a build may lack
_WITH = {"MPO": "JPEG"}  # formats that Pillow opens as another one

# Other images: photographs as phones and cameras store them, drawings, and files of programs.
_OTHERS = frozenset(
    f".{suffix}"
    for suffixes in (
        "heic heif heics heifs hif avif avifs jxl jxr wdp hdp jls jp2 j2k jpf jpx jpm webp bpg flif qoi tga mpo",
        "dng cr2 cr3 crw nef nrw arw srf sr2 orf rw2 raf pef srw raw 3fr x3f rwl iiq kdc dcr mrw erf mef mos",
        "svg svgz eps wmf emf psd psb xcf kra exr hdr dds ico cur icns pcx dcx sgi rgb rgba ras xbm xpm fits fit",
        "dcm dicom djvu iff cin dpx pict pct",
    )
    for suffix in suffixes.split()
)


@cache
def image_formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats that are wanted and can be decoded here."""
    Image.init()
    return tuple(
        name for name in _WANTED if name in Image.OPEN and (name not in _CODECS or features.check(_CODECS[name]))
    )


@cache
def image_suffixes() -> tuple[str, ...]:
    """Return the suffixes, in lower case, of the files that can be decoded here."""
    formats = image_formats()
    known = Image.registered_extensions().items()
    return tuple(sorted(suffix for suffix, name in known if _WITH.get(name, name) in formats))


def other_suffixes() -> tuple[str, ...]:
    """Return the suffixes, in lower case, of images that cannot be decoded here."""
    return tuple(sorted(_OTHERS.difference(image_suffixes())))


def is_image_name(name: str) -> bool:
    """Return whether a file's name is that of an image, of a format that can be decoded here or of another one."""
    return _suffix(name) in _OTHERS or _suffix(name) in image_suffixes()


def unreadable(name: str) -> str:
    """Return why an image with this file name is not read; "" if its format can be decoded here."""
    suffix = _suffix(name)
    return f"{suffix} is no format that is read here" if suffix in _OTHERS and suffix not in image_suffixes() else ""


def _suffix(name: str) -> str:
    _, dot, suffix = name.rpartition(".")
    return dot + suffix.lower()
