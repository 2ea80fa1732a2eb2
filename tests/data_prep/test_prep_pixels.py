"""Pixels: how awkward images are read, where squares are cut, and that the same image gives the same bytes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from awkward import QUADRANTS, deep_png, oriented, write_awkward
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data_prep
from data_prep.pixels import CROPS, Preprocess, Undecodable, digest, encode, fit
from eiwtrain.data.manifest import DataError, load_manifest, load_sidecar

TOLERANCE = 6  # of a channel, for what JPEG and WebP lose
GRAY = [(round(0.299 * r + 0.587 * g + 0.114 * b),) * 3 for r, g, b in QUADRANTS]
TURNED = [QUADRANTS[n] for n in (2, 0, 3, 1)]  # a quarter to the right
LAST, RIGHT = [QUADRANTS[3]] * 4, [QUADRANTS[1]] * 4  # of an image of one pixel, of one that is one pixel wide
COLOURS = {  # of the four corners, where they are not those of `QUADRANTS`
    "gray.jpg": GRAY,
    "gray-alpha.png": GRAY,
    "exif-2.jpg": [QUADRANTS[n] for n in (1, 0, 3, 2)],
    "exif-3.jpg": [QUADRANTS[n] for n in (3, 2, 1, 0)],
    "exif-4.jpg": [QUADRANTS[n] for n in (2, 3, 0, 1)],
    "exif-5.jpg": [QUADRANTS[n] for n in (0, 2, 1, 3)],
    "exif-6.jpg": TURNED,
    "exif-7.jpg": [QUADRANTS[n] for n in (3, 1, 2, 0)],
    "exif-8.jpg": [QUADRANTS[n] for n in (1, 3, 0, 2)],
    "odd-exif.jpg": TURNED,
    "cut-exif.jpg": TURNED,
    "turned.tiff": TURNED,
    "deep-rgb.png": [(0x80,) * 3] * 4,
    "one.png": LAST,
    "thin.png": RIGHT,
}
TURNS: dict[int, Any] = {  # what EXIF's orientations ask for
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pytest's filters stand before those of the package
some = settings(max_examples=60, deadline=None, derandomize=True)
sizes = st.integers(1, 70)


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder of awkward images, and what each must become."""
    folder = tmp_path_factory.mktemp("awkward")
    return folder, write_awkward(folder)


def _places(height: int, width: int) -> np.ndarray:
    """Make an image whose pixels hold their own places."""
    rows, columns = np.indices((height, width), np.uint8)
    return np.stack([rows, columns, np.full_like(rows, 7)], axis=-1)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _on_white(corners: Any, file: Path) -> Any:
    """Return the colours of an image's corners as they are seen on white."""
    with Image.open(file) as image:
        alpha = np.asarray(image.convert("RGBA").getchannel("A").resize((8, 8), Image.Resampling.BOX)) / 255
    seen = alpha[[1, 1, -2, -2], [1, -2, 1, -2]][:, None]
    return seen * np.asarray(corners) + (1 - seen) * 255


def test_awkward_images_look_as_they_should(awkward: tuple[Path, dict[str, str]]) -> None:
    folder, expected = awkward
    for name in (n for n, kind in expected.items() if kind == "image" and n != "one-bit.png"):
        pixels = fit((folder / name).read_bytes(), name, Preprocess(8))
        assert pixels.shape == (8, 8, 3)
        assert pixels.dtype == np.uint8
        corners = pixels[[1, 1, -2, -2], [1, -2, 1, -2]].astype(int)
        expected_corners = _on_white(COLOURS.get(name, QUADRANTS), folder / name)
        assert np.abs(corners - expected_corners).max() <= TOLERANCE, ascii(name)


def test_black_and_white_stay_different() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.eye(8, dtype=bool)).save(buffer, "PNG")
    np.testing.assert_array_equal(fit(buffer.getvalue(), "", Preprocess(8))[:, :, 1], 255 * np.eye(8))


def test_awkward_files_are_rejected_for_a_reason_of_one_line(awkward: tuple[Path, dict[str, str]]) -> None:
    folder, expected = awkward
    for name in (n for n, kind in expected.items() if kind == "reject"):
        reasons = set()
        for _ in range(2):
            with pytest.raises(Undecodable) as caught:
                fit((folder / name).read_bytes(), name, Preprocess(8))
            reasons.add(str(caught.value))
        (reason,) = reasons
        assert "\n" not in reason
        assert " at 0x" not in reason  # an address in memory, which another run does not repeat
    for name, part in {"text.png": "no image of a known format", "deep-gray.png": "more than 8 bits"}.items():
        with pytest.raises(Undecodable, match=part):
            fit((folder / name).read_bytes(), name, Preprocess(8))


def test_pillow_prints_no_warnings(awkward: tuple[Path, dict[str, str]]) -> None:
    """Run in a process of its own, as pytest has its own filters of warnings."""
    folder, expected = awkward
    code = (
        "import sys, pathlib; from data_prep.pixels import Preprocess, fit\n"
        "for path in sys.argv[1:]: fit(pathlib.Path(path).read_bytes(), path, Preprocess(8))"
    )
    paths = [folder / name for name, kind in expected.items() if kind == "image"]
    run = subprocess.run([sys.executable, "-W", "always", "-c", code, *paths], capture_output=True)
    assert (run.returncode, run.stderr) == (0, b"")


@pytest.mark.parametrize("encoding", ["png", "npy"])
def test_the_same_image_gives_the_same_bytes(awkward: tuple[Path, dict[str, str]], encoding: str) -> None:
    folder, expected = awkward
    for name in (n for n, kind in expected.items() if kind == "image"):
        data = (folder / name).read_bytes()
        preprocess = Preprocess(8, encoding=encoding, crop="random")
        once, again = (encode(fit(data, name, preprocess), encoding) for _ in range(2))
        assert once == again


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_says(orientation: int) -> None:
    with Image.open(io.BytesIO(oriented(1))) as image:
        stored = np.asarray(image)
    upright = TURNS[orientation](stored)
    top, left = (upright.shape[0] - 32) // 2, (upright.shape[1] - 32) // 2
    square = upright[top : top + 32, left : left + 32]
    np.testing.assert_array_equal(fit(oriented(orientation), "", Preprocess(32)), square)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_a_jpeg_has_the_pixels_that_pillow_sees(subsampling: int, progressive: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (37, 37, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=80, subsampling=subsampling, progressive=progressive)
    with Image.open(buffer) as image:
        np.testing.assert_array_equal(fit(buffer.getvalue(), "", Preprocess(37)), np.asarray(image))


def test_rgb_images_of_16_bits_keep_the_upper_8() -> None:
    assert fit(deep_png(2, value=0x12FF), "", Preprocess(4)).tolist() == [[[0x12] * 3] * 4] * 4
    with pytest.raises(Undecodable, match="more than 8 bits"):
        fit(deep_png(0, value=0x12FF), "", Preprocess(4))


@some
@given(sizes, sizes)
def test_the_centre_is_cut_to_the_pixel(height: int, width: int) -> None:
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    expected = _places(height, width)[top : top + side, left : left + side]
    np.testing.assert_array_equal(fit(_png(_places(height, width)), "a", Preprocess(side)), expected)


@some
@given(sizes, sizes, st.integers(1, 70), st.integers(0, 9), st.text(max_size=3))
def test_a_random_square_lies_inside_and_follows_from_seed_and_name(
    height: int, width: int, resolution: int, seed: int, name: str
) -> None:
    short = min(height, width)
    resolution = min(resolution, short)
    preprocess = Preprocess(resolution, crop="random", short_side=short, seed=seed)  # nothing is resized
    cut = fit(_places(height, width), name, preprocess)
    top, left = map(int, cut[0, 0, :2])
    np.testing.assert_array_equal(cut, _places(height, width)[top : top + resolution, left : left + resolution])
    np.testing.assert_array_equal(fit(_png(_places(height, width)), name, preprocess), cut)


def test_random_squares_reach_all_edges_and_differ_by_name() -> None:
    def corners(seed: int) -> list[tuple[int, int]]:
        preprocess = Preprocess(8, crop="random", short_side=10, seed=seed)
        cuts = [fit(_places(10, 12), f"image {n}", preprocess) for n in range(300)]
        return [(int(cut[0, 0, 0]), int(cut[0, 0, 1])) for cut in cuts]

    assert set(corners(0)) == {(top, left) for top in range(3) for left in range(5)}
    assert corners(0) != corners(1)


@some
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(1, 32),
    st.integers(0, 40),
    st.sampled_from(CROPS),
)
def test_any_size_gives_the_resolution(height: int, width: int, resolution: int, more: int, crop: str) -> None:
    pixels = np.full((height, width, 3), 9, np.uint8)
    for short_side in (None, resolution + more):
        cut = fit(pixels, "a", Preprocess(resolution, crop=crop, short_side=short_side))
        assert cut.shape == (resolution, resolution, 3)
        assert cut.min() == cut.max() == 9


def test_an_image_of_the_resolution_gets_the_short_side_too() -> None:
    pixels = _places(8, 8)
    expected = np.asarray(Image.fromarray(pixels).resize((12, 12), Image.Resampling.BOX))[2:10, 2:10]
    for loaded in (pixels, _png(pixels), Image.fromarray(pixels)):
        np.testing.assert_array_equal(fit(loaded, "", Preprocess(8, short_side=12)), expected)


def test_a_very_long_image_is_rejected_before_it_is_resized() -> None:
    with pytest.raises(Undecodable, match="60000x1 pixels are too elongated for a short side of 96"):
        fit(np.zeros((1, 60_000, 3), np.uint8), "", Preprocess(64, short_side=96))


def test_a_box_is_cut_first_and_must_be_there() -> None:
    box = (3, 2, 11, 10)
    for loaded in (_places(12, 14), _png(_places(12, 14)), Image.fromarray(_places(12, 14))):
        np.testing.assert_array_equal(fit(loaded, "", Preprocess(8, box=box)), _places(12, 14)[2:10, 3:11])
    with pytest.raises(Undecodable, match="8x8 pixels are too few"):
        fit(_places(8, 8), "", Preprocess(8, box=box))


@some
@given(st.integers(1, 9), st.integers(0, 255))
def test_encoded_pixels_are_decoded_to_the_same(side: int, value: int) -> None:
    pixels = np.random.default_rng(value).integers(0, 256, (side, side, 3), np.uint8)
    with Image.open(io.BytesIO(encode(pixels, "png"))) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
    np.testing.assert_array_equal(np.load(io.BytesIO(encode(pixels, "npy"))), pixels)


def test_a_digest_depends_on_pixels_and_nothing_else() -> None:
    pixels = _places(5, 5)
    assert digest(pixels) == digest(pixels.copy()) == digest(_places(10, 10)[:5, :5])
    changed = pixels.copy()
    changed[4, 4, 2] ^= 1
    assert digest(changed) != digest(pixels)


def test_wrong_settings_are_refused_by_name() -> None:
    for changed, message in [
        ({"resolution": 0}, "resolution must be 1 to 1024, not 0"),
        ({"resolution": 2000}, "resolution must be"),
        ({"resample": "nearest"}, "resample must be one of box, lanczos, bilinear, not 'nearest'"),
        ({"encoding": "jpg"}, "encoding must be one of"),
        ({"crop": "left"}, "crop must be one of center, random"),
        ({"short_side": 7}, "short side must be at least the resolution, 8, not 7"),
    ]:
        with pytest.raises(DataError, match=message):
            Preprocess(**{"resolution": 8} | changed)  # type: ignore[arg-type]


def test_awkward_images_become_a_data_set_and_its_rejects(
    awkward: tuple[Path, dict[str, str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, expected = awkward
    elsewhere = tmp_path / "elsewhere" / "copy"
    write_awkward(elsewhere)
    capfd.readouterr()
    for path, output in ((folder, tmp_path / "1" / "set"), (elsewhere, tmp_path / "2" / "set")):
        options: dict[str, Any] = {"of_source": {"split": "all"}, "shard_size": 16, "workers": 1, "max_rejects": 1}
        data_prep.prepare("folder", str(output), 8, path=str(path), **options)
    assert capfd.readouterr() == ("", "")
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n / "set").iterdir()} for n in "12")
    assert one == two

    output = str(tmp_path / "1" / "set")
    rejects, kept = {}, 0
    for shard in load_manifest(output).splits["train"].shards:
        sidecar = load_sidecar(output, shard.name)
        kept += len(sidecar.keys)
        rejects |= {reject["source"]: reject["reason"] for reject in sidecar.rejects}
    assert set(rejects) == {name for name, kind in expected.items() if kind == "reject"}
    assert kept == sum(kind == "image" for kind in expected.values())
    assert not any(str(path) in json.dumps(rejects) for path in (tmp_path, folder, os.sep))
