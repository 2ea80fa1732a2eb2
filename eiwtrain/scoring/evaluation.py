"""The work of `eiwtrain.evaluate`: score splits of data sets, and compute what was asked for beside their bits/dim.

Not for what is printed, nor for training: the loop calls `eiwtrain.scoring.scores.score` on batches of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eiwtrain import data, storage
from eiwtrain.exporting.models import LoadedModel
from eiwtrain.sampling import series
from eiwtrain.scoring import FID_SAMPLES
from eiwtrain.scoring.estimator import Estimator, estimator_of
from eiwtrain.scoring.published import Published, Scored, comparable
from eiwtrain.scoring.score_table import ScoreTable, score_images, to_parquet
from eiwtrain.scoring.scores import mean

if TYPE_CHECKING:
    from eiwtrain.scoring import fidelity

_FIGURES = ("bits_per_dim", "standard_error")


@dataclass(frozen=True)
class Request:
    """What to compute, and the files (paths or URLs) to write.

    Attributes:
        images: the most images of a split, the first ones.
        batch: images at a time.
        seed: of the dequantization noise and of samples.
        draws: of noise, an image.
        batch_draws: draws in a forward pass.
        scores: Parquet file of each image's scores.
        histogram: PNG of the scores of two sets; needs a second set.
        coder: whose bits/dim are subtracted for a second score; None: no such score.
        fid_weights: file of the weights of the feature network; None: no FID.
        fid_samples: samples for FID; None: as many as images, at most `FID_SAMPLES`.
        temperature: of the samples.
    """

    images: int
    batch: int
    seed: int
    draws: int
    batch_draws: int
    scores: str | None
    histogram: str | None
    coder: str | None
    fid_weights: str | None
    fid_samples: int | None
    temperature: float


def evaluate(found: LoadedModel, readers: Sequence[data.ShardReader], request: Request) -> dict[str, Any]:
    """Score one or two splits and return all results as JSON data; write the files that the request names.

    Args:
        readers: the model's kind of data, and the data set to tell from it, if any.

    Raises:
        ValueError: FID cannot be computed.
        DataError: a shard is missing or damaged.
        StorageError: storage cannot be used.
    """
    network = None
    if request.fid_weights is not None:
        from eiwtrain.scoring import fidelity  # which not every installation can import

        network = fidelity.load_network(request.fid_weights, next(found.flow.parameters()).device)
    how = {"images": request.images, "batch": request.batch, "seed": request.seed}
    how |= {"draws": request.draws, "at_once": request.batch_draws}
    tables = [score_images(found.flow, reader, **how) for reader in readers]
    result = {
        "model": found.source,
        "step": found.metadata.get("step"),
        "trained_on": {key: found.metadata.get(key) for key in ("data", "data_fingerprint", "train_split")},
        "n_bits": found.flow.config.n_bits,
        **{name: asdict(estimator) for name, estimator in _estimators(found, request.draws).items()},
        "seed": request.seed,
        "sets": [_set(reader, table) for reader, table in zip(readers, tables, strict=True)],
        "published": asdict(_published(found, readers[0], len(tables[0]), request.draws)),
    }
    if request.scores is not None:
        names = ("in", "out")[: len(readers)]
        file = to_parquet(dict(zip(names, tables, strict=True)), _schema(found, readers, request))
        storage.write_bytes(request.scores, file)
    if request.histogram is not None:
        name = estimator_of(found.flow.config, request.draws).name
        result["outliers"] = _outliers(readers, tables, name, request.coder, request.histogram)
    if network is not None:
        result["fidelity"] = _fidelity(network, found, readers[0], len(tables[0]), request)
    return result


def _estimators(found: LoadedModel, draws: int) -> dict[str, Estimator]:
    """Return the estimator of every figure `bits_per_dim`, and of `iwbo_bits_per_dim` if there are several draws."""
    config = found.flow.config
    estimators = {"estimator": estimator_of(config)}
    return estimators if draws == 1 else estimators | {"iwbo_estimator": estimator_of(config, draws)}


def _published(found: LoadedModel, reader: data.ShardReader, images: int, draws: int) -> Published:
    """Return the published figures that the score of the first split can be compared with."""
    known, config = found.metadata, found.flow.config
    trained_on = known.get("data_fingerprint"), known.get("train_split")
    scored = Scored(reader.manifest, reader.split.name, images, trained_on, config.n_bits, config.classes)
    return comparable(scored, [estimator.name for estimator in _estimators(found, draws).values()])


def _set(reader: data.ShardReader, table: ScoreTable) -> dict[str, Any]:
    """Return the means over a split."""
    manifest = reader.manifest
    result: dict[str, Any] = {"data": manifest.title, "url": reader.url, "fingerprint": manifest.fingerprint}
    result |= {"split": reader.split.name} | asdict(mean(torch.from_numpy(table.first_draw)))
    if table.draws > 1:
        bound = asdict(mean(torch.from_numpy(table.bound)))
        result |= {f"iwbo_{key}": bound[key] for key in _FIGURES}
    return result | {f"{coder}_bits_per_dim": float(sizes.mean()) for coder, sizes in table.coders.items()}


def _schema(found: LoadedModel, readers: Sequence[data.ShardReader], request: Request) -> dict[str, str]:
    """Return the metadata in the schema of a Parquet file of scores."""
    about = {"model": found.source, "step": str(found.metadata.get("step")), "seed": str(request.seed)}
    about |= {"draws": str(request.draws), "n_bits": str(found.flow.config.n_bits)}
    about |= {name: str(estimator) for name, estimator in _estimators(found, request.draws).items()}
    for prefix, reader in zip(("", "against_"), readers, strict=False):
        manifest = reader.manifest
        facts = {"data": manifest.title, "fingerprint": manifest.fingerprint, "split": reader.split.name}
        about |= {prefix + key: value for key, value in facts.items()}
    return about


def _outliers(
    readers: Sequence[data.ShardReader],
    tables: Sequence[ScoreTable],
    estimator: str,
    coder: str | None,
    histogram: str,
) -> dict[str, Any]:
    """Return the AUROC of each score, and write the histogram."""
    from eiwtrain.scoring import outliers  # whose libraries take a second to import

    panels = {outliers.score_title(estimator): [table.bound for table in tables]}
    if coder is not None:
        panels[outliers.score_title(estimator, coder)] = [outliers.corrected(table, coder) for table in tables]
    areas = {title: outliers.auroc(*scored) for title, scored in panels.items()}
    inside, outside = (f"{reader.manifest.title}, split {reader.split.name}" for reader in readers)
    storage.write_bytes(histogram, outliers.histogram(panels, areas, inside, outside))
    return {"auroc": {title: asdict(area) for title, area in areas.items()}, "histogram": histogram}


def _fidelity(
    network: fidelity.Network, found: LoadedModel, real: data.ShardReader, images: int, request: Request
) -> dict[str, Any]:
    """Return FID and KID of samples to the images that were scored, with as many bits as the model has."""
    from eiwtrain.scoring import fidelity

    count, batch = request.fid_samples or min(images, FID_SAMPLES), request.batch
    if images < 2 or count < 2:
        raise ValueError(f"--fid-weights: {images} images and {count} samples; FID needs two of either")
    shift = 8 - found.flow.config.n_bits

    def pictures() -> Iterator[Tensor]:
        for some in data.eval_batches(real, images=images, seed=request.seed, micro_batch=min(batch, images)):
            yield (some.images[some.indices >= 0] >> shift) << shift

    drawn = series.render(found.flow, series.samples(found.flow, count, request.seed), request.temperature, batch)
    there, here = fidelity.features(network, pictures()), fidelity.features(network, drawn)
    return {
        "fid": fidelity.frechet_distance(there, here),
        "kid": asdict(fidelity.kernel_distance(there, here, request.seed)),
        "images": images,
        "samples": count,
        "temperature": request.temperature,
        "weights_sha256": network.sha256,
        "published_weights": network.is_published,
    }
