"""Images to shards: sources (where the images are), one writer (the shards), and a command line.

Not for reading shards: that is `eiwtrain.data`, which shares the manifest with this package.
Both stand on `eiwtrain.storage`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eiwtrain.data.manifest import Manifest

__all__ = ["prepare"]


def prepare(source: str, output: str, resolution: int, **options: Any) -> Manifest:
    """Write the data set of `source` ("photos" or "folder") at `output`, or find it written, and return its
    manifest.

    Args:
        source: a name in `data_prep.sources.SOURCES`.
        output: folder of the data set; a path or any fsspec URL.
        resolution: height and width of the images, in pixels.
        options: `path` and `eval_fraction` for the source; all else as for `data_prep.writer.write_shards`.

    Raises:
        DataError: the source cannot be read, holds no images, or the output holds another data set.
        StorageError: the output cannot be reached or written.
    """
    from data_prep.sources import read_source
    from data_prep.writer import write_shards

    of_source = {k: options.pop(k) for k in ("path", "eval_fraction") if k in options}
    return write_shards(read_source(source, resolution, **of_source), output, resolution, **options)
