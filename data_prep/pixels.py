"""Makes pixels of the data set out of every image (decode, turn upright, RGB, crop, resize), and encodes them.

The pixels depend only on an image's bytes and name and on `Preprocess`, which is recorded in the manifest. Not for
where images come from.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from data_prep.items import Box, Loaded
from eiwtrain.data.manifest import ENCODINGS, DataError
from eiwtrain.terminal.lines import one_line

Pixels = npt.NDArray[np.uint8]

warnings.filterwarnings("ignore", module=r"PIL\.")  # it warns at every image of flaws that it accepts

VERSION = 2  # raise it when the same image would give other pixels
MAX_RESOLUTION = 1024  # pixels; beyond it a typing error is more likely than an image model
RESAMPLING = {
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
}
CROPS = ("center", "random")
_DEEP_MODES = ("I", "F")  # more than 8 bits a channel: converting would clip, so these are rejected
_TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MOST_PIXELS = 50_000_000  # of a resized image, 150 MB: a short side of 96 makes 1.8 GB of an image of 1 x 65,000
# Photographs have almost no repeats: looking only for runs halves the time of encoding at the same size.
_PNG_LEVEL, _PNG_FILTER, _PNG_STRATEGY = 6, imagecodecs.PNG.FILTER.PAETH, imagecodecs.PNG.STRATEGY.RLE
_PLAIN_PIXELS = 89_478_485  # above this Pillow warns of a decompression bomb


class Undecodable(ValueError):
    """Not an image of 8 bits a channel, or one that is cut off; the message is one line."""


@dataclass(frozen=True)
class Preprocess:
    """How an image of any size becomes `resolution` x `resolution` RGB pixels.

    Without `short_side` the largest square is cut and resized. With it the image is resized so that its shorter side
    has that many pixels, and a square of `resolution` is cut.

    Attributes:
        resolution: height and width of the result, in pixels.
        resample: filter for resizing, a key of `RESAMPLING`.
        encoding: png, or npy (no compression: files are half as large again, and read many times faster).
        crop: where the square is cut: center, or random (by `seed` and the item's name).
        short_side: in pixels.
        seed: of random crops.
        box: the part of each image that is used, (left, top, right, bottom) in its pixels; cut first.
    """

    resolution: int
    resample: str = "box"
    encoding: str = "png"
    crop: str = "center"
    short_side: int | None = None
    seed: int = 0
    box: Box | None = None

    def __post_init__(self) -> None:
        """Raise DataError for a value that is not allowed."""
        for name, choices in (("resample", tuple(RESAMPLING)), ("encoding", ENCODINGS), ("crop", CROPS)):
            if getattr(self, name) not in choices:
                raise DataError(f"{name} must be one of {', '.join(choices)}, not '{getattr(self, name)}'")
        if not 1 <= self.resolution <= MAX_RESOLUTION:
            raise DataError(f"resolution must be 1 to {MAX_RESOLUTION}, not {self.resolution}")
        if self.short_side is not None and self.short_side < self.resolution:
            raise DataError(f"short side must be at least the resolution, {self.resolution}, not {self.short_side}")

    def describe(self) -> dict[str, Any]:
        """Return {"name", "version", "params"} for the manifest; parameters without effect are left out."""
        params = {k: v for k, v in asdict(self).items() if v is not None}
        if self.crop == "center":
            del params["seed"]
        if self.box is not None:
            params["box"] = list(self.box)  # as JSON gives it back
        name = f"{self.crop}-crop-resize" if self.short_side is None else f"short-side-{self.crop}-crop"
        return {"name": name, "version": VERSION, "params": params}


def fit(loaded: Loaded, name: str, preprocess: Preprocess) -> Pixels:
    """Return what an item has loaded as uint8 (resolution, resolution, 3); its name chooses a random crop.

    Raises:
        Undecodable: it is not an image that can be used.
    """
    fits = (preprocess.resolution, preprocess.resolution) if preprocess.short_side is None else None
    try:
        decoded = _decode(loaded) if isinstance(loaded, bytes) else loaded
        if isinstance(decoded, np.ndarray):
            if decoded.shape[:2] == fits and preprocess.box is None:
                return decoded
            decoded = Image.fromarray(decoded)
        image = decoded if decoded.mode == "RGB" else decoded.convert("RGB")
    except (MemoryError, Undecodable):
        raise
    except UnidentifiedImageError:  # its text has an address in memory, which differs in every run
        raise Undecodable("no image of a known format") from None
    except Exception as e:  # Pillow's plugins raise anything
        raise Undecodable(f"{type(e).__name__}: {one_line(e)}") from None
    if preprocess.box is not None:
        image = _within(image, preprocess.box)
    if image.size != fits:
        image = _square(image, name, preprocess)
    return np.asarray(image)


def digest(pixels: Pixels) -> str:
    """Return 24 hex characters that are equal for equal pixels and, but for one chance in 2^96, for no others."""
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()[:24]


def encode(pixels: Pixels, encoding: str) -> bytes:
    """Encode uint8 (H, W, 3) as the bytes of a PNG or a .npy file."""
    if encoding == "png":
        pixels = np.ascontiguousarray(pixels)
        return bytes(imagecodecs.png_encode(pixels, level=_PNG_LEVEL, filter=_PNG_FILTER, strategy=_PNG_STRATEGY))
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, pixels, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _decode(data: bytes) -> Image.Image | Pixels:
    """Decode an image of 8 bits a channel and turn it upright; pixels are RGB."""
    if (size := _plain_jpeg_size(data)) is not None:
        with contextlib.suppress(ValueError, RuntimeError):  # Pillow then finds what is wrong, or accepts it
            pixels: Pixels = imagecodecs.jpeg8_decode(data)
            if pixels.shape == (*size, 3):
                return pixels
    with Image.open(io.BytesIO(data)) as opened:
        if opened.mode.split(";")[0] in _DEEP_MODES:
            raise Undecodable(f"mode {opened.mode}: more than 8 bits a channel")
        return _upright(opened)


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return the height and width of a JPEG of three channels that has its end, and nothing to turn or convert.

    Pillow makes the same pixels of these, but takes longer to read the header than a small image takes to decode.

    Returns:
        None for anything else.
    """
    if not data.startswith(b"\xff\xd8") or not data.endswith(b"\xff\xd9"):
        return None
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in (0xC0, 0xC1, 0xC2):  # the frame: precision, height, width, channels
            height, width = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
            plain = data[at + 4] == 8 and data[at + 9] == 3 and 0 < height * width <= _PLAIN_PIXELS
            return (height, width) if plain else None
        if data[at + 4 : at + 8] in (b"Exif", b"Adob") or marker < 0xC0 or 0xD0 <= marker <= 0xD9:
            return None
        at += 2 + length
    return None


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF says, if that can be read.

    `ImageOps.exif_transpose` is not used: it rewrites all of the EXIF, which fails on many photographs.
    """
    image.load()  # turns a TIFF, and forgets its orientation
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as above
        turn = None
    return image if turn is None else image.transpose(turn)


def _within(image: Image.Image, box: Box) -> Image.Image:
    if box[2] > image.width or box[3] > image.height:
        raise Undecodable(f"{image.width}x{image.height} pixels are too few for the crop {box}")
    return image.crop(box)


def _square(image: Image.Image, name: str, p: Preprocess) -> Image.Image:
    """Cut a square out of the image and resize, in the order that `p` asks for."""
    if p.short_side is None:
        side, size = min(image.size), (p.resolution, p.resolution)
    else:
        scale = p.short_side / min(image.size)
        width, height = (max(p.short_side, round(scale * n)) for n in image.size)
        if width * height > _MOST_PIXELS:
            raise Undecodable(
                f"{image.width}x{image.height} pixels are too elongated for a short side of {p.short_side}"
            )
        image = image.resize((width, height), RESAMPLING[p.resample])
        side, size = p.resolution, None
    spare = image.width - side, image.height - side
    if p.crop == "center":
        left, top = spare[0] // 2, spare[1] // 2
    else:
        left, top = (number % (most + 1) for number, most in zip(_two_numbers(p.seed, name), spare, strict=True))
    box = (left, top, left + side, top + side)
    return image.crop(box) if size is None else image.resize(size, RESAMPLING[p.resample], box=box)


def _two_numbers(seed: int, name: str) -> tuple[int, int]:
    """Return two numbers far above any side of an image, which depend only on the seed and the name."""
    words = hashlib.sha256(f"{seed}:".encode() + name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(words[:8], "big"), int.from_bytes(words[8:16], "big")
