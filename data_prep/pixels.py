"""Makes pixels of the data set out of every image (crop, resize), and encodes them.

The pixels depend only on an image's bytes and name and on `Preprocess`, which is recorded in the manifest. Not for
where images come from, nor for decoding them: that is in `data_prep.decode`.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
from PIL import Image, ImageColor

from data_prep.decode import NotRead, Pixels, Undecodable, decode
from data_prep.items import Box, Loaded
from eiwtrain.data.fingerprint import image_digest
from eiwtrain.data.manifest import ENCODINGS, MAX_RESOLUTION, DataError

VERSION = 3  # raise it when the same image would give other pixels
RESAMPLING = {
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
}
CROPS = ("center", "random")
_MOST_PIXELS = 50_000_000  # of a resized image, 150 MB: a short side of 96 makes 1.8 GB of an image of 1 x 65,000
# Photographs have almost no repeats: looking only for runs halves the time of encoding at the same size.
_PNG_LEVEL, _PNG_FILTER, _PNG_STRATEGY = 6, imagecodecs.PNG.FILTER.PAETH, imagecodecs.PNG.STRATEGY.RLE


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
        background: what is seen through transparent pixels: a colour by name or as #rrggbb.
        accept_damaged: use JPEGs of which the decoder says that they are damaged, with what it makes of them.
    """

    resolution: int
    resample: str = "box"
    encoding: str = "png"
    crop: str = "center"
    short_side: int | None = None
    seed: int = 0
    box: Box | None = None
    background: str = "white"
    accept_damaged: bool = False

    def __post_init__(self) -> None:
        """Raise DataError for a value that is not allowed."""
        for name, choices in (("resample", tuple(RESAMPLING)), ("encoding", ENCODINGS), ("crop", CROPS)):
            if getattr(self, name) not in choices:
                raise DataError(f"{name} must be one of {', '.join(choices)}, not '{getattr(self, name)}'")
        if not 1 <= self.resolution <= MAX_RESOLUTION:
            raise DataError(f"resolution must be 1 to {MAX_RESOLUTION}, not {self.resolution}")
        if self.short_side is not None and self.short_side < self.resolution:
            raise DataError(f"short side must be at least the resolution, {self.resolution}, not {self.short_side}")
        try:
            self.colour()
        except ValueError:
            raise DataError(f"background must be a colour, such as white or #ffffff, not '{self.background}'") from None

    def colour(self) -> tuple[int, ...]:
        """Return the background: red, green and blue, 0 to 255 each."""
        return ImageColor.getrgb(self.background)[:3]

    def describe(self) -> dict[str, Any]:
        """Return {"name", "version", "params"} for the manifest; parameters without effect are left out."""
        params = {k: v for k, v in asdict(self).items() if v is not None}
        if self.crop == "center":
            del params["seed"]
        if not self.accept_damaged:
            del params["accept_damaged"]
        params["background"] = "#{:02x}{:02x}{:02x}".format(*self.colour())
        if self.box is not None:
            params["box"] = list(self.box)  # as JSON gives it back
        name = f"{self.crop}-crop-resize" if self.short_side is None else f"short-side-{self.crop}-crop"
        return {"name": name, "version": VERSION, "params": params}


class Fitted(NamedTuple):
    """Pixels of the data set, uint8 (resolution, resolution, 3), and what was changed in the image, as `Decoded`."""

    pixels: Pixels
    changed: tuple[str, ...]


def fit(loaded: Loaded | NotRead, name: str, preprocess: Preprocess) -> Pixels:
    """Return what an item has loaded as uint8 (resolution, resolution, 3); its name chooses a random crop.

    Raises:
        Undecodable: it is not an image that can be used.
    """
    return fit_image(loaded, name, preprocess).pixels


def fit_image(loaded: Loaded | NotRead, name: str, preprocess: Preprocess) -> Fitted:
    """Do as `fit`, and say what was changed in the image."""
    fits = (preprocess.resolution, preprocess.resolution) if preprocess.short_side is None else None
    decoded = decode(loaded, preprocess.colour(), preprocess.accept_damaged)
    image = decoded.image
    if isinstance(image, np.ndarray):
        if image.shape[:2] == fits and preprocess.box is None:
            return Fitted(image, decoded.changed)
        image = Image.fromarray(image)
    if preprocess.box is not None:
        image = _within(image, preprocess.box)
    if image.size != fits:
        image = _square(image, name, preprocess)
    return Fitted(np.asarray(image), decoded.changed)


def digest(pixels: Pixels) -> str:
    """Return 24 hex characters that are equal for equal pixels and, but for one chance in 2^96, for no others."""
    return image_digest(np.ascontiguousarray(pixels)).hex()


def encode(pixels: Pixels, encoding: str) -> bytes:
    """Encode uint8 (H, W, 3) as the bytes of a PNG or a .npy file."""
    if encoding == "png":
        pixels = np.ascontiguousarray(pixels)
        return bytes(imagecodecs.png_encode(pixels, level=_PNG_LEVEL, filter=_PNG_FILTER, strategy=_PNG_STRATEGY))
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, pixels, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


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
