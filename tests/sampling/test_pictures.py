import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from eiwtrain.sampling import pictures


def plain(n, size=32, first=0):
    """Images of one colour each: their number in red, 128 in green."""
    images = torch.zeros((n, 3, size, size), dtype=torch.uint8)
    images[:, 0] = (torch.arange(n) + first).to(torch.uint8)[:, None, None]
    images[:, 1] = 128
    return images


def tiles(picture):
    """Return the places of tiles of `plain` images: {number: (left, top, width, height)}."""
    pixels = np.asarray(picture)
    found = {}
    inside = (pixels[..., 1] == 128) & (pixels[..., 2] == 0)
    for number in np.unique(pixels[..., 0][inside]):
        y, x = np.nonzero(inside & (pixels[..., 0] == number))
        assert len(x) == (np.ptp(x) + 1) * (np.ptp(y) + 1)  # one whole rectangle
        found[int(number)] = (int(x.min()), int(y.min()), int(np.ptp(x)) + 1, int(np.ptp(y)) + 1)
    return found


def columns(found):
    return [sorted(n for n in found if found[n][0] == x) for x in sorted({place[0] for place in found.values()})]


def rows(found):
    return [sorted(n for n in found if found[n][1] == y) for y in sorted({place[1] for place in found.values()})]


def ink(picture, left, top, right, bottom):
    """Return whether there is something dark."""
    return bool((np.asarray(picture)[top:bottom, left:right] < 100).all(axis=2).any())


@pytest.mark.parametrize(("size", "shown"), [(8, 64), (32, 64), (48, 96), (64, 64), (100, 100)])
def test_tiles_are_at_least_64_pixels_and_enlarged_by_a_whole_factor(size, shown):
    found = tiles(pictures.grid([("title", plain(3, size))]))
    assert {place[2:] for place in found.values()} == {(shown, shown)}
    assert shown % size == 0


def test_pixels_keep_their_values():
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = np.asarray(pictures.grid([("", image)]))
    (top, left) = (picture.shape[0] - 2 - 64, 2)
    assert (picture[top : top + 64 : 2, left : left + 64 : 2].transpose(2, 0, 1) == image[0].numpy()).all()


@pytest.mark.parametrize(
    ("n", "across", "down"), [(1, 1, 1), (5, 5, 1), (9, 8, 2), (64, 8, 8), (65, 9, 8), (200, 15, 14)]
)
def test_eight_a_row_up_to_64_images_then_a_square(n, across, down):
    found = tiles(pictures.grid([("title", plain(n, 8))]))
    assert (len(columns(found)), len(rows(found))) == (across, down)
    assert rows(found)[0] == list(range(across))


def test_panels_stand_one_above_the_other_with_their_titles():
    picture = pictures.grid([("above", plain(9, 8)), ("below", plain(3, 8, first=100))])
    found = tiles(picture)
    assert rows(found) == [list(range(8)), [8], [100, 101, 102]]
    for first in (0, 100):
        left, top, *_ = found[first]
        assert ink(picture, left, top - 18, left + 60, top - 1)


def test_panels_stand_side_by_side_with_their_titles():
    picture = pictures.grid([("left", plain(4, 8)), ("right", plain(4, 8, first=100))], side_by_side=True)
    found = tiles(picture)
    assert rows(found) == [[0, 1, 100, 101], [2, 3, 102, 103]]
    assert found[100][0] - (found[1][0] + found[1][2]) > 10
    for first in (0, 100):
        left, top, *_ = found[first]
        assert ink(picture, left, top - 18, left + 60, top - 1)


def test_a_title_wider_than_its_images_is_not_cut():
    narrow, wide = (pictures.grid([(title, plain(1, 8))]) for title in ("a", "a title of very many letters " * 3))
    assert narrow.width < 80
    assert wide.width > 400
    assert not ink(wide, wide.width - 3, 0, wide.width, 20)


def test_rows_have_titles_of_their_own():
    picture = pictures.grid([("a", plain(4, 8)), ("b", plain(4, 8, 100))], 2, ["cat", ""], side_by_side=True)
    found = tiles(picture)
    left, (top, below) = found[0][0], (found[0][1], found[2][1])
    assert ink(picture, 0, top, left - 1, top + 64)
    assert not ink(picture, 0, below, left - 1, below + 64)
    long = pictures.grid([("a", plain(1, 8))], 1, ["a class with a name that does not end " * 5])
    assert long.width < 350


@given(st.integers(1, 300), st.integers(1, 20))
def test_rows_of_classes_hold_every_image_in_its_own_rows(n, classes):
    across, down = pictures.rows_by_class(n, classes)
    arranged = pictures.by_class((torch.arange(n) % 256)[:, None, None, None].to(torch.uint8), classes)
    assert across <= 16
    assert across * down * classes == len(arranged)
    for number, block in enumerate(arranged.reshape(classes, across * down)):
        own = torch.arange(n)[number::classes]
        assert block[: len(own)].tolist() == (own % 256).tolist()
        assert (block[len(own) :] == 255).all()


@pytest.mark.parametrize(("across", "down", "fits"), [(32, 32, True), (33, 32, False), (65, 1, False), (1, 64, True)])
def test_a_grid_has_a_size_that_can_be_looked_at(across, down, fits):
    if fits:
        pictures.check_size(across, down)
        return
    with pytest.raises(ValueError, match=f"{across} images wide and {down} high"):
        pictures.check_size(across, down)


def test_a_png_is_the_picture():
    picture = pictures.grid([("title", plain(2))])
    assert Image.open(io.BytesIO(pictures.png(picture))).tobytes() == picture.tobytes()
