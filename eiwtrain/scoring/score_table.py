"""The scores of single images: computed in one pass over a split, and written as a Parquet table.

Not for figures computed from them: means are in `eiwtrain.scoring.scores`, AUROC in `eiwtrain.scoring.outliers`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from eiwtrain import data, flow
from eiwtrain.scoring import scores, yardsticks

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ScoreTable:
    """One row an image, arrays of (n,); bits are bits/dim.

    Attributes:
        index: of the image within its split.
        label: its class, -1 for none.
        first_draw: bound from one draw of noise (ELBO).
        bound: importance-weighted bound from all draws (IWBO); the same if there is one draw.
        coders: file size by lossless coder.
        draws: draws of noise for each image.
    """

    index: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    first_draw: Numbers
    bound: Numbers
    coders: dict[str, Numbers]
    draws: int

    def __len__(self) -> int:
        return len(self.index)


def score_images(
    model: flow.EIWFlow,
    reader: data.ShardReader,
    *,
    images: int,
    batch: int,
    seed: int = 0,
    draws: int = 1,
    at_once: int = 1,
) -> ScoreTable:
    """Score the first `images` of a split, or all if it has fewer. On a terminal, progress goes to stderr.

    Noise depends on (seed, draw, index) alone: another `batch` or `at_once` changes the scores by rounding only.

    Args:
        batch: images in a batch.
        draws: draws of noise for each image.
        at_once: draws in a forward pass, each of the whole batch.

    Raises:
        ValueError: a size below 1.
        DataError: a shard is missing or damaged, or an image has no class and the model has some.
        StorageError: storage cannot be reached.
    """
    total = min(images, len(reader))
    parts = []
    with tqdm(total=total, unit=" images", desc=reader.split.name, disable=None, leave=False) as bar:  # None: no tty
        for first in data.eval_batches(reader, images=total, seed=seed, micro_batch=min(batch, total)):
            others = (data.redraw(first, seed, draw) for draw in range(1, draws))
            real = first.indices >= 0
            coders = yardsticks.image_bits_per_dim(list(first.images[real].numpy()), model.config.n_bits)
            bits = torch.stack(scores.image_bits(model, [first, *others], at_once))[:, real].numpy()
            parts.append((first.indices[real].numpy(), first.labels[real].numpy(), *bits, *coders.values()))
            bar.update(int(real.sum()))
    index, label, one, bound, *sizes = (np.concatenate(column) for column in zip(*parts, strict=True))
    return ScoreTable(index, label, one, bound, dict(zip(yardsticks.CODERS, sizes, strict=True)), draws)


def to_parquet(sets: Mapping[str, ScoreTable], metadata: Mapping[str, str]) -> bytes:
    """Return a Parquet file of one or more tables, one below the other.

    Columns: `set` (the key of each table, if there are several), `index`, `label` (null for none), `bits_per_dim` (one
    draw), `iwbo_bits_per_dim` (if there are more draws), and `png_bits_per_dim`, `webp_bits_per_dim`.

    Args:
        metadata: for the schema, in addition to what Arrow keeps there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for name, table in sets.items():
        columns: dict[str, pa.Array] = {"set": pa.array([name] * len(table))} if len(sets) > 1 else {}
        columns |= {"index": table.index, "label": pa.array(table.label, mask=table.label < 0)}
        columns |= {"bits_per_dim": table.first_draw}
        if table.draws > 1:
            columns["iwbo_bits_per_dim"] = table.bound
        columns |= {f"{coder}_bits_per_dim": sizes for coder, sizes in table.coders.items()}
        tables.append(pa.table(columns))
    file = io.BytesIO()
    pq.write_table(pa.concat_tables(tables).replace_schema_metadata(dict(metadata)), file)
    return file.getvalue()
