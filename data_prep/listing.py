"""Sorts the files of a source: images, images that are known to be rejects, and others with the reason.

Not for listing them: that is in `data_prep.formats.files`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from data_prep.formats.files import LOST, FoundFile
from eiwtrain.data.image_formats import image_suffixes, is_image_name, other_suffixes, unreadable
from eiwtrain.data.left_out import LeftOut, count_left_out, suffix_of
from eiwtrain.data.manifest import DataError

ARCHIVES = (".tar", ".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".lz4")
OUTSIDE = "an image outside the layout"
_FETCH = "git annex get, datalad get or dvc pull fetch such files"


def all_image_suffixes() -> tuple[str, ...]:
    """Return the suffixes of images, of formats that can be decoded here and of others."""
    return (*image_suffixes(), *other_suffixes())


def take_lost(found: list[FoundFile], others: Sequence[FoundFile]) -> tuple[list[FoundFile], list[FoundFile]]:
    """Return the files found together with the images among `others` that are only links to nothing, and the rest."""
    lost = [file for file in others if file.flaw == LOST and is_image_name(file.parts[-1])]
    if not lost:
        return found, list(others)
    rest = [file for file in others if file.flaw != LOST or not is_image_name(file.parts[-1])]
    return sorted(found + lost, key=lambda file: file.parts), rest


def refuse_lost(path: str, others: Iterable[FoundFile]) -> None:
    """Check that no file or folder is only a link to nothing, where a whole class or batch could be missing with it.

    Raises:
        DataError: there is such a link.
    """
    if lost := next((file for file in others if file.flaw == LOST), None):
        raise DataError(f"source {path}: {'/'.join(lost.parts)} is {LOST}; fetch or remove it ({_FETCH})")


def flaw_of(file: FoundFile) -> str:
    """Return why an image is a reject without being tried; "" if it is to be tried."""
    return file.flaw or unreadable(file.parts[-1])


def notes_on_lost(images: Iterable[FoundFile]) -> list[str]:
    """Return a note on images that are only links to nothing, if there are any."""
    lost = [file for file in images if file.flaw == LOST]
    if not lost:
        return []
    first = "/".join(lost[0].parts)
    return [f"{len(lost):,} images are links to files that are not there; the first: {first}; {_FETCH}"]


def count_others(files: Iterable[FoundFile]) -> tuple[LeftOut, ...]:
    """Count files that are left out, by suffix and reason."""
    return count_left_out(("/".join(file.parts), _reason(file)) for file in files)


def _reason(file: FoundFile) -> str:
    if file.flaw:
        return file.flaw
    if suffix_of(file.parts[-1]) in ARCHIVES:
        return "an archive in the source"
    return OUTSIDE if is_image_name(file.parts[-1]) else "no suffix of an image"
