"""Decoding: damage, transparency, formats that run programs, and the bounds of what a file may cost."""

from __future__ import annotations

import ast
import io
import json
import struct
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from awkward import EXIF_ORIENTATION, quadrants
from containers import write_files
from PIL import EpsImagePlugin, Image, ImageCms

from data_prep import shard
from data_prep.__main__ import main
from data_prep.decode import DAMAGED, TRANSPARENT, Decoded, NotRead, Undecodable, decode, load
from data_prep.items import Item
from data_prep.pixels import Preprocess, fit
from data_prep.shard import ShardTask
from eiwtrain.data.manifest import DataError, load_manifest, load_sidecar

ROOT = Path(__file__).parents[2]
WHITE = (255, 255, 255)

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as in test_prep_pixels


def _decoded(data: Any, background: tuple[int, ...] = WHITE, accept_damaged: bool = False) -> Decoded:
    return decode(data, background, accept_damaged)


def _pixels(decoded: Decoded) -> np.ndarray:
    return np.asarray(decoded.image)


def _noise(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return exif


def _pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


JPEGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "progressive": {"progressive": True},
    "with EXIF": {"exif": _exif(6)},
    "with restart markers": {"restart_marker_rows": 1},
    "gray": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
}


def _jpeg(kind: str) -> bytes:
    options = dict(JPEGS[kind])
    return _saved(_noise(options.pop("mode", "RGB")), "JPEG", **options)


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_that_lost_half_of_its_data_is_rejected_though_it_has_its_end(kind: str) -> None:
    whole = _jpeg(kind)
    damaged = whole[: len(whole) // 2] + b"\xff\xd9"
    assert _decoded(whole).changed == ()
    with pytest.raises(Undecodable, match=r"damaged JPEG.*--accept-damaged"):
        _decoded(damaged)
    assert _decoded(damaged, accept_damaged=True).changed == (DAMAGED,)


def test_accepted_damage_has_the_pixels_that_pillow_sees() -> None:
    for kind in ("plain", "gray", "CMYK"):
        whole = _jpeg(kind)
        damaged = whole[: len(whole) // 2] + b"\xff\xd9"
        np.testing.assert_array_equal(_pixels(_decoded(damaged, accept_damaged=True)), _pillow(damaged))


@pytest.mark.parametrize("kind", JPEGS)
def test_jpegs_of_every_kind_have_the_pixels_that_pillow_sees(kind: str) -> None:
    data = _jpeg(kind)
    expected = np.rot90(_pillow(data), -1) if kind == "with EXIF" else _pillow(data)
    np.testing.assert_array_equal(_pixels(_decoded(data)), expected)


def test_a_jpeg_whose_last_half_is_zeros_is_rejected() -> None:
    whole = _jpeg("plain")
    half = len(whole) // 2
    with pytest.raises(Undecodable, match="damaged JPEG"):
        _decoded(whole[:half] + bytes(half - 2) + b"\xff\xd9")


def _odd_headers() -> dict[str, bytes]:
    """Make JPEGs whose headers the decoder warns of, with all of their pixels."""
    plain = _jpeg("plain")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    at = plain.index(b"\xff\xda")
    end = at + 1 + int.from_bytes(plain[at + 2 : at + 4], "big")
    return {
        "of a later JFIF": plain.replace(b"JFIF\0\1", b"JFIF\0\2"),
        "with a piece of a profile": _saved(_noise(), "JPEG", icc_profile=profile).replace(
            b"ICC_PROFILE\0\1\1", b"ICC_PROFILE\0\3\2"
        ),
        "with odd parameters of its scan": plain[: end - 1] + b"\5" + plain[end:],
    }


@pytest.mark.parametrize("what", _odd_headers())
def test_odd_headers_of_a_jpeg_are_no_damage_and_hide_none(what: str) -> None:
    odd = _odd_headers()[what]
    with pytest.raises(ValueError, match=r"JFIF|ICC|SOS"):
        simplejpeg.decode_jpeg(odd)
    decoded = _decoded(odd)
    assert decoded.changed == ()
    np.testing.assert_array_equal(_pixels(decoded), _pillow(odd))
    with pytest.raises(Undecodable, match=r"damaged JPEG: .*premature end"):
        _decoded(odd[: len(odd) - 1_000] + b"\xff\xd9")


def _transparent(mode: str) -> tuple[bytes, np.ndarray]:
    """Make a PNG that is transparent on its left and red below it; return what it looks like on white, too."""
    image = Image.new("RGB", (8, 8), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 4, 8))
    seen = np.asarray(image).copy()
    alpha = Image.new("L", (8, 8), 255)
    alpha.paste(0, (0, 0, 4, 8))
    seen[:, :4] = 255
    if mode == "RGBA":
        image.putalpha(alpha)
        return _saved(image, "PNG"), seen
    if mode == "LA":
        gray = image.convert("L")
        seen[:, 4:] = np.asarray(gray)[:, 4:, None]
        gray.putalpha(alpha)
        return _saved(gray, "PNG"), seen
    if mode == "P":
        palette = image.quantize(2)
        return _saved(palette, "PNG", transparency=palette.getpixel((0, 0))), seen
    if mode == "L":
        gray = image.convert("L")
        seen[:, 4:] = np.asarray(gray)[:, 4:, None]
        return _saved(gray, "PNG", transparency=gray.getpixel((0, 0))), seen
    return _saved(image, "PNG", transparency=(255, 0, 0)), seen


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_what_is_under_transparent_pixels_is_never_seen(mode: str) -> None:
    data, seen = _transparent(mode)
    decoded = _decoded(data)
    assert decoded.changed == (TRANSPARENT,)
    np.testing.assert_array_equal(_pixels(decoded), seen)
    black = _pixels(_decoded(data, (0, 0, 0)))
    assert black[:, :4].max() == 0
    np.testing.assert_array_equal(black[:, 4:], seen[:, 4:])


def test_half_transparent_pixels_are_mixed_with_the_background() -> None:
    image = Image.new("RGBA", (4, 4), (200, 0, 100, 51))
    mixed = [round(0.2 * colour + 0.8 * 255) for colour in (200, 0, 100)]
    for kind in ("PNG", "WEBP", "TIFF"):
        data = _saved(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
        assert np.abs(_pixels(_decoded(data)).astype(int) - mixed).max() <= 1


def test_an_alpha_channel_of_opaque_pixels_changes_nothing() -> None:
    decoded = _decoded(_saved(quadrants().convert("RGBA"), "PNG"))
    assert decoded.changed == ()
    np.testing.assert_array_equal(_pixels(decoded), np.asarray(quadrants()))


def test_changed_images_are_counted_and_their_setting_is_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = _jpeg("plain")
    files = {"a.png": _transparent("RGBA")[0], "b.png": _transparent("P")[0], "c.jpg": whole}
    files["d.jpg"] = whole[: len(whole) // 2] + b"\xff\xd9"
    source = write_files(tmp_path / "images", files)
    options = ["--source", str(source), "--resolution", "8", "--split", "all", "--workers", "1"]
    counts = {}
    for output, more in (
        ("strict", ["--max-rejects", "1"]),
        ("lenient", ["--accept-damaged", "--background", "#102030"]),
    ):
        assert main(["folder", "--output", str(tmp_path / output), *options, *more]) == 0
        manifest = load_manifest(str(tmp_path / output))
        sidecar = load_sidecar(str(tmp_path / output), "train-000000.tar")
        counts[output] = sidecar.changed
        printed = capsys.readouterr().out
        params = manifest.preprocessing["params"]
        assert f"2 with transparent pixels, shown on {params['background']}" in printed
        assert ("1 damaged" in printed) == (output == "lenient")
        assert (params["background"], params.get("accept_damaged", False), len(sidecar.rejects)) == {
            "strict": ("#ffffff", False, 1),
            "lenient": ("#102030", True, 0),
        }[output]
    assert counts == {"strict": {TRANSPARENT: 2}, "lenient": {TRANSPARENT: 2, DAMAGED: 1}}


def test_a_background_that_is_no_colour_is_refused() -> None:
    with pytest.raises(DataError, match="background must be a colour"):
        Preprocess(8, background="see-through")


def test_postscript_under_the_name_of_an_image_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(*arguments: Any, **more: Any) -> None:
        raise AssertionError("Ghostscript")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ran)
    eps = _saved(quadrants(), "EPS")
    with Image.open(io.BytesIO(eps)) as image, pytest.raises(AssertionError, match="Ghostscript"):
        image.load()  # this is what would happen
    with pytest.raises(Undecodable, match="no image of a known format"):
        fit(eps, "image.png", Preprocess(8))


def test_every_place_that_opens_an_image_names_the_formats() -> None:
    opened = 0
    for folder in ("eiwtrain", "data_prep", "benchmarks", "cluster"):
        for path in (ROOT / folder).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text())):
                if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("Image.open"):
                    opened += 1
                    assert "formats" in [keyword.arg for keyword in call.keywords], f"{path}:{call.lineno}"
    assert opened > 3


def _flat_png(width: int, height: int, more: int = 0) -> bytes:
    """Make a PNG that says it has that size, with pixels of `more` rows of zeros."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes((3 * width + 1) * more))),
        (b"IEND", b""),
    )
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _jpeg_of_size(width: int, height: int) -> bytes:
    data = bytearray(_jpeg("plain"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def test_an_image_far_larger_than_its_file_is_rejected_before_it_is_decoded() -> None:
    """177 million pixels are just within the bound of Pillow, which also warns of fewer than half as many."""
    bombs = {
        "PNG": _flat_png(13_300, 13_300, 10),
        "PNG below Pillow's warning": _flat_png(9_000, 9_000, 10),
        "JPEG": _jpeg_of_size(13_300, 13_300),
        "JPEG below Pillow's warning": _jpeg_of_size(60_000, 1_400),
        "padded": _flat_png(13_300, 13_300) + bytes(3_000_000),
        "GIF": _saved(Image.new("L", (1, 1)), "GIF").replace(b"\1\0\1\0", struct.pack("<HH", 13_300, 13_300)),
    }
    for name, data in bombs.items():
        start = time.process_time()
        with pytest.raises(Undecodable, match=r"pixels in [0-9,]+ bytes"):
            _decoded(data, accept_damaged=True)
        assert time.process_time() - start < 0.5, name


def test_a_large_image_of_one_colour_is_decoded() -> None:
    flat = _saved(Image.new("L", (5_000, 5_000)), "PNG")
    assert fit(flat, "", Preprocess(8)).max() == 0


def _tiled_tiff(side: int) -> bytes:
    """Make a TIFF of 16 x 16 gray pixels in a tile of that side."""
    data = zlib.compress(bytes(999))
    data += bytes(len(data) % 2)
    fields = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(fields)) + entries + bytes(4)


def test_a_tile_larger_than_its_image_is_rejected_before_it_is_decoded() -> None:
    assert _pixels(_decoded(_tiled_tiff(16))).shape == (16, 16, 3)
    with pytest.raises(Undecodable, match="30000x30000 pixels in"):
        _decoded(_tiled_tiff(30_000))


def test_a_progressive_jpeg_of_very_many_scans_is_rejected() -> None:
    data = _jpeg("progressive")
    at = data.rindex(b"\xff\xda")
    scan = data[at:-2]
    with pytest.raises(Undecodable, match="scans"):
        _decoded(data[:-2] + b"".join([scan[:12]] * 2_000) + b"\xff\xd9", accept_damaged=True)
    filled = data[:2] + b"\xff" + data[2:]
    np.testing.assert_array_equal(_pixels(_decoded(filled)), _pillow(data))


def test_a_jpeg_2000_of_very_many_tiles_is_rejected() -> None:
    whole = _saved(_noise(), "JPEG2000", no_jp2=True, tile_size=(16, 16))
    assert np.abs(_pixels(_decoded(whole)).astype(int) - np.asarray(_noise())).max() <= 1
    at = whole.index(b"\xff\x4f\xff\x51") + 8
    for size, message in (
        ((5_000, 5_000, 0, 0, 20, 20, 0, 0), "62,500 tiles"),
        ((60_000, 60_000, 0, 0, 60_000, 60_000, 0, 0), "pixels"),
    ):
        with pytest.raises(Undecodable, match=message):
            _decoded(whole[:at] + struct.pack(">8I", *size) + whole[at + 32 :])


def test_a_file_too_large_for_an_image_is_a_reject_and_is_not_read() -> None:
    def read() -> bytes:
        raise AssertionError("it was read")

    loaded = load(Item(0, "a.png", 1 << 40, read))
    assert isinstance(loaded, NotRead)
    with pytest.raises(Undecodable, match="a file of 1,099,511,627,776 bytes"):
        fit(loaded, "a.png", Preprocess(8))


def test_a_sidecar_without_counts_is_read(tmp_path: Path) -> None:
    source = write_files(tmp_path / "images", {"a.png": _saved(quadrants(), "PNG")})
    output = tmp_path / "set"
    arguments = ["--source", str(source), "--output", str(output), "--resolution", "8", "--split", "all"]
    assert main(["folder", *arguments, "--workers", "1"]) == 0
    assert "changed" not in json.loads((output / "train-000000.json").read_text())
    assert load_sidecar(str(output), "train-000000.tar").changed == {}


@pytest.mark.parametrize(
    ("content", "tool"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"/annex/objects/SHA256E-1.jpg\n", "annex"),
    ],
)
def test_a_pointer_in_place_of_an_image_is_named_with_what_fetches_it(content: bytes, tool: str) -> None:
    with pytest.raises(Undecodable, match=tool):
        fit(content, "a.jpg", Preprocess(8))


def test_large_images_of_a_remote_source_are_not_all_loaded_ahead() -> None:
    loaded: list[int] = []

    def read(number: int) -> bytes:
        loaded.append(number)
        return b""

    numbered = tuple((n, Item(0, "x", 100 << 20, partial(read, n))) for n in range(40))
    task = ShardTask("", "train", "", "", Preprocess(8), numbered, remote=True)
    for count, (number, _, _) in enumerate(shard._load(task)):
        assert number == count
        assert len(loaded) <= count + 3
    assert sorted(loaded) == list(range(40))


def test_too_little_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def decoded(*arguments: Any) -> Decoded:
        raise MemoryError

    monkeypatch.setattr("data_prep.pixels.decode", decoded)
    source = write_files(tmp_path / "images", {"a.png": _saved(quadrants(), "PNG")})
    options = ["--source", str(source), "--resolution", "8", "--split", "all", "--workers", "1"]
    assert main(["folder", "--output", str(tmp_path / "set"), *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1
