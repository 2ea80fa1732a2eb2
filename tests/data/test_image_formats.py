"""Formats of image files: what Pillow decodes here and is wanted is read, and other images are known as such."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from eiwtrain.data.image_formats import image_formats, image_suffixes, is_image_name, unreadable

USUAL = (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".jp2")


@pytest.mark.parametrize("suffix", USUAL)
def test_an_image_of_every_usual_suffix_is_decoded_by_the_listed_formats(suffix: str) -> None:
    assert suffix in image_suffixes()
    buffer = io.BytesIO()
    name = Image.registered_extensions()[suffix]
    Image.new("1" if suffix == ".pbm" else "L", (8, 8), 1).convert("L").convert("RGB").save(buffer, name)
    with Image.open(buffer, formats=image_formats()) as image:
        assert np.asarray(image.convert("RGB")).shape == (8, 8, 3)


def test_formats_that_run_programs_or_lead_elsewhere_are_never_opened() -> None:
    assert not {"EPS", "WMF", "FITS", "HDF5", "GRIB", "BUFR", "MPEG", "PSD", "IPTC"} & set(image_formats())


@pytest.mark.parametrize("name", ["a.HEIC", "a.b.nef", "x/y.svg", "a.eps", "a.psd", "a.jxl", "a.dng"])
def test_other_images_are_known_by_their_names(name: str) -> None:
    assert is_image_name(name)
    assert name.rpartition(".")[2].lower() in unreadable(name)


@pytest.mark.parametrize("name", ["a.txt", "png", "a.tar", "Thumbs.db", "a.json", "heic", "a.mp4", ""])
def test_other_files_are_no_images(name: str) -> None:
    assert not is_image_name(name)
    assert unreadable(name) == ""


def test_images_that_can_be_decoded_are_readable() -> None:
    assert [unreadable(f"A{suffix.upper()}") for suffix in image_suffixes()] == [""] * len(image_suffixes())
