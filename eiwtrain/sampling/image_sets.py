"""Sets of generated images as files that programs read: an npz array, or a folder of PNG files, at any fsspec URL.

Not for pictures that people look at (`eiwtrain.sampling.pictures`), nor for data sets to train on (`data_prep`).
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from eiwtrain import storage
from eiwtrain.sampling.pictures import png

if TYPE_CHECKING:
    from torch import Tensor

_WRITERS = 8  # files written at a time: an object store answers slowly, and many at once


def kind(url: str) -> str:
    """Return the kind of file that `url` names: `grid` (x.png), `npz` (x.npz) or `folder` (x/).

    Raises:
        ValueError: it names another kind of file.
    """
    if url.endswith("/"):
        return "folder"
    suffix = PurePosixPath(url).suffix.lower()
    if suffix == ".png":
        return "grid"
    if suffix == ".npz":
        return "npz"
    lossy = f"{suffix} may lose detail of the images; " if suffix in (".jpg", ".jpeg", ".webp") else ""
    raise ValueError(
        f"{url}: {lossy}give x.png for a grid to look at, x.npz for one array, or a folder, ending in /, for PNG files"
    )


def check(url: str, overwrite: bool = False) -> None:
    """Check that a grid or a set can be written to `url`, where no file may be; the folder of PNG files must be new or
    empty.

    Args:
        overwrite: allow a file to be replaced. A folder is not, as two sets would mix.

    Raises:
        ValueError: the file is there, or the folder holds files already.
        storage.StorageError: nothing can be written there, for example because it is a folder.
    """
    if kind(url) == "folder":
        if storage.listdir(url):
            raise ValueError(f"{url}: the folder is not empty, and two sets would mix; give a new one")
        storage.check_writable(url)
        return
    storage.check_file_writable(url)
    if not overwrite and storage.exists(url):
        raise ValueError(f"{url} is there already; give another name, or --overwrite to replace it")


def write_npz(url: str, batches: Iterable[Tensor], n: int, labels: Tensor | None = None) -> None:
    """Publish images as uint8 `arr_0`, (n, H, W, 3), and their classes, if any, as int64 `arr_1`, (n,): the file
    that guided-diffusion's evaluation (Dhariwal and Nichol, arXiv 2105.05233) and tools that follow it read.

    No more than a batch is ever in memory; the file is first written in the temporary folder.

    Args:
        batches: uint8 (b, 3, H, W) each, n images in all.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "set.npz")
        with zipfile.ZipFile(file, "w") as archive:
            _write_images(archive, batches, n)
            if labels is not None:
                with archive.open("arr_1.npy", "w") as member:
                    np.lib.format.write_array(member, labels.numpy(), allow_pickle=False)
        storage.put_file(file, url)


def write_folder(url: str, batches: Iterable[Tensor]) -> None:
    """Write images, uint8 (b, 3, H, W) each batch, as `000000.png`, `000001.png` and so on. Each file appears whole;
    an interrupted set has fewer of them."""
    begin = 0
    with ThreadPoolExecutor(_WRITERS) as pool:
        for images in batches:
            urls = [storage.join(url, f"{begin + i:06d}.png") for i in range(len(images))]
            list(pool.map(_write_png, urls, _by_rows(images)))
            begin += len(images)


def _write_images(archive: zipfile.ZipFile, batches: Iterable[Tensor], n: int) -> None:
    with archive.open("arr_0.npy", "w", force_zip64=True) as member:
        for number, images in enumerate(batches):
            pixels = _by_rows(images)
            if number == 0:
                header = {"descr": "|u1", "fortran_order": False, "shape": (n, *pixels.shape[1:])}
                np.lib.format.write_array_header_1_0(member, header)
            member.write(pixels.tobytes())


def _write_png(url: str, pixels: npt.NDArray[np.uint8]) -> None:
    storage.write_bytes(url, png(Image.fromarray(pixels)))


def _by_rows(images: Tensor) -> npt.NDArray[np.uint8]:
    """Return images as (b, H, W, 3), the order in files."""
    return images.permute(0, 2, 3, 1).contiguous().numpy()
