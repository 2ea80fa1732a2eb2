"""The sources by name. Each is a module of its own with one function that makes a `Source`."""

from __future__ import annotations

from data_prep.folder import folder
from data_prep.items import Source
from data_prep.photos import photos
from eiwtrain.data.manifest import DataError

SOURCES = ("folder", "photos")
MAX_RESOLUTION = 1024  # pixels; beyond it a typing error is likelier than an image model


def read_source(name: str, resolution: int, path: str | None = None, eval_fraction: float = 0.1) -> Source:
    """The items of the source called `name`, without decoding any.

    Args:
        name: one of `SOURCES`.
        resolution: of the images to come; `photos` cuts patches of it.
        path: where the images are; `photos` takes none.
        eval_fraction: share of the images for the split `test`, where the source has no splits of its own.

    Raises:
        DataError: an argument is wrong, or there are no images.
    """
    if not 1 <= resolution <= MAX_RESOLUTION:
        raise DataError(f"resolution must be 1 to {MAX_RESOLUTION}, not {resolution}")
    if not 0 <= eval_fraction < 1:
        raise DataError(f"eval fraction must be at least 0 and below 1, not {eval_fraction}")
    if name == "photos":
        if path is not None:
            raise DataError("the photos source takes no path: it cuts photographs of installed packages")
        return photos(resolution)
    if name == "folder":
        if path is None:
            raise DataError("the folder source needs the path of a folder or a tar")
        return folder(path, eval_fraction)
    raise DataError(f"no source called '{name}'; there are {', '.join(SOURCES)}")
