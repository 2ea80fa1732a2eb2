"""Makes shards of images: sources (where the images are), one writer (the shards), and a command line.

Not for reading shards: that is `eiwtrain.data`, which shares the manifest with this package. Both use
`eiwtrain.storage`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eiwtrain.data.manifest import Manifest

__all__ = ["prepare"]


def prepare(
    source: str,
    output: str,
    resolution: int,
    *,
    path: str | None = None,
    of_source: Mapping[str, Any] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    shard_size: int = 1000,
    drop_duplicates: bool = False,
    **run: Any,
) -> Manifest:
    """Write the data set of `source` at `output`, unless it is there already, and return its manifest.

    Args:
        source: a name in `data_prep.sources.SOURCES`.
        output: folder of the data set; a path or any fsspec URL.
        resolution: height and width of the images, in pixels.
        path: where the source's images are; a path or any fsspec URL.
        of_source: `split`, `only` and the source's own options, as for `data_prep.sources.read_source`.
        preprocess: other fields of `data_prep.pixels.Preprocess`.
        shard_size, drop_duplicates: as for `data_prep.writer.make_plan`.
        run: `workers`, `max_rejects`, ... as for `data_prep.writer.run_plan`.

    Raises:
        DataError: the source cannot be read, holds no images, or the output holds another data set.
        StorageError: the output cannot be reached or written.
    """
    from data_prep.pixels import Preprocess
    from data_prep.sources import read_source
    from data_prep.writer import make_plan, run_plan

    pixels = Preprocess(resolution, **(preprocess or {}))
    items = read_source(source, resolution, path, **(of_source or {}))
    return run_plan(make_plan(items, output, pixels, shard_size, drop_duplicates), **run).manifest
