"""Bits per dimension of images under a trained flow, and what lossless coders need for the same images; on request
the scores of single images, how well they tell another data set, FID and KID.

    python -m eiwtrain.evaluate runs/quickstart --data runs/data/photos-32 --split test --iwbo 8 --scores s.parquet
    python -m eiwtrain.evaluate runs/quickstart --data runs/data/photos-32 --against runs/data/cifar10 --complexity png
    python -m eiwtrain.evaluate runs/quickstart --data runs/data/photos-32 --fid-weights weights-inception....pth

Not for training: the loop calls `eiwtrain.scoring.scores.score` on batches of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from eiwtrain import data, storage
from eiwtrain.checkpoints import DamagedCheckpoint
from eiwtrain.exporting import models
from eiwtrain.sampling import series
from eiwtrain.scoring import yardsticks
from eiwtrain.scoring.score_table import ScoreTable, score_images, to_parquet
from eiwtrain.scoring.scores import mean
from eiwtrain.train import device

_FID_SAMPLES = 10_000
_FIGURES = ("bits_per_dim", "standard_error")


@dataclass(frozen=True)
class _Set:
    """A split of a data set, and the option that named it."""

    option: str
    reader: data.ShardReader

    @property
    def title(self) -> str:
        return f"{self.reader.manifest.title}, split {self.reader.split.name}"


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    args = _arguments(argv)
    try:
        _check(args)
        found = models.open_model(args.model)
        found.flow.to(device.of_command(args.device))
        sets = [_Set("data", models.open_split(found, args.data, args.split))]
        if args.against is not None:
            other = models.open_split(found, args.against, args.against_split or args.split, "against")
            sets.append(_Set("against", other))
            _check_classes(sets, found)
        result = _evaluate(args, found, sets)
        if args.json is not None:
            text = json.dumps(_without_nan(result), indent=1, allow_nan=False)
            storage.write_bytes(args.json, f"{text}\n".encode())
    except (ValueError, OSError, storage.StorageError, DamagedCheckpoint) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print(f"error: --batch: {args.batch} images do not fit the GPU; give fewer", file=sys.stderr)
        return 2
    print("\n".join(_lines(result)))
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eiwtrain.evaluate", description="Bits per dimension of images under a trained flow."
    )
    parser.add_argument("model", help="an exported model, a checkpoint or a run (folder or URL), or models:/NAME@best")
    parser.add_argument("--data", required=True, help="folder or URL of a data set written by data_prep")
    parser.add_argument("--split", default="test")
    parser.add_argument("--images", type=int, default=10_000, help="at most so many, the first of the split")
    parser.add_argument("--batch", type=int, default=64, help="images at a time; changes nothing but rounding")
    parser.add_argument("--seed", type=int, default=0, help="of the dequantization noise and of samples")
    parser.add_argument(
        "--iwbo", type=int, default=1, metavar="K", help="draws of noise an image, for the importance-weighted bound"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--scores", metavar="FILE", help="Parquet file of each image's scores to write: path or URL")
    parser.add_argument("--json", metavar="FILE", help="file of the result to write: path or URL")
    others = parser.add_argument_group("telling images of another data set by their bits/dim")
    others.add_argument("--against", metavar="DATA", help="the other data set")
    others.add_argument("--against-split", metavar="SPLIT", help="of it (default: as --split)")
    others.add_argument(
        "--complexity", choices=tuple(yardsticks.CODERS), help="also score by bits/dim minus this coder's"
    )
    others.add_argument(
        "--histogram", metavar="FILE", help="PNG to write: path or URL (default with --against: outliers.png)"
    )
    fid = parser.add_argument_group("FID and KID of samples")
    fid.add_argument("--fid-weights", metavar="FILE", help="weights of the feature network: .pth or .safetensors")
    fid.add_argument(
        "--fid-samples", type=int, metavar="N", help=f"(default: as many as images, at most {_FID_SAMPLES:,})"
    )
    fid.add_argument("--temperature", type=float, help="of the samples (default: 1)")
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> None:
    """What can be told before anything is opened; fills in the histogram's name."""
    for name, least in (("images", 1), ("batch", 1), ("iwbo", 1), ("fid_samples", 2)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')}: {value} is too few; give at least {least}")
    needs = dict.fromkeys(("against_split", "complexity", "histogram"), "against")
    needs |= dict.fromkeys(("fid_samples", "temperature"), "fid_weights")
    for name, needed in needs.items():
        if getattr(args, name) is not None and getattr(args, needed) is None:
            raise ValueError(f"--{name.replace('_', '-')}: it goes with --{needed.replace('_', '-')}")
    if args.temperature is not None and not 0 < args.temperature < math.inf:
        raise ValueError(f"--temperature: {args.temperature} is not a number above 0")
    if args.against is not None:
        args.histogram = args.histogram or "outliers.png"
    for name in ("scores", "json", "histogram"):  # before hours of scoring
        if getattr(args, name) is not None:
            try:
                storage.check_file_writable(getattr(args, name))
            except storage.StorageError as e:
                raise ValueError(f"--{name}: {e}") from None


def _check_classes(sets: list[_Set], found: models.Model) -> None:
    a, b = (s.reader.manifest.classes for s in sets)
    if found.flow.config.classes and a != b:
        raise ValueError(
            "--against: the model scores an image under its class, and these data sets have other classes; "
            "train one with model.classes=0 to compare them"
        )


def _evaluate(args: argparse.Namespace, found: models.Model, sets: list[_Set]) -> dict[str, Any]:
    """All that was asked for, as JSON data; files but that of --json are written."""
    if args.fid_weights is not None:
        from eiwtrain.scoring import fidelity  # which not every installation can

        network = fidelity.load_network(args.fid_weights, next(found.flow.parameters()).device)
    tables = [
        score_images(found.flow, s.reader, images=args.images, batch=args.batch, seed=args.seed, draws=args.iwbo)
        for s in sets
    ]
    result = {
        "model": found.source,
        "step": found.metadata.get("step"),
        "trained_on": {key: found.metadata.get(key) for key in ("data", "data_fingerprint", "train_split")},
        "n_bits": found.flow.config.n_bits,
        "kind": "ELBO" if found.flow.dequantizer else "one draw of uniform noise",
        "seed": args.seed,
        "sets": [_of_set(s, table) for s, table in zip(sets, tables, strict=True)],
    }
    if args.scores is not None:
        names = ("in", "out")[: len(sets)]
        file = to_parquet(dict(zip(names, tables, strict=True)), _about(args, found, sets))
        storage.write_bytes(args.scores, file)
    if len(sets) > 1:
        result["outliers"] = _outliers(args, sets, tables)
    if args.fid_weights is not None:
        result["fidelity"] = _fidelity(args, network, found, sets[0], len(tables[0]))
    return result


def _of_set(s: _Set, table: ScoreTable) -> dict[str, Any]:
    """Means over a split."""
    manifest = s.reader.manifest
    result: dict[str, Any] = {"data": manifest.title, "url": s.reader.url, "fingerprint": manifest.fingerprint}
    result |= {"split": s.reader.split.name} | asdict(mean(torch.from_numpy(table.first_draw)))
    if table.draws > 1:
        bound = asdict(mean(torch.from_numpy(table.bound)))
        result |= {"iwbo_draws": table.draws} | {f"iwbo_{key}": bound[key] for key in _FIGURES}
    return result | {f"{coder}_bits_per_dim": float(sizes.mean()) for coder, sizes in table.coders.items()}


def _about(args: argparse.Namespace, found: models.Model, sets: list[_Set]) -> dict[str, str]:
    """What the schema of a Parquet file of scores says."""
    about = {"model": found.source, "step": str(found.metadata.get("step")), "seed": str(args.seed)}
    about |= {"draws": str(args.iwbo), "n_bits": str(found.flow.config.n_bits)}
    for s in sets:
        prefix = "" if s.option == "data" else "against_"
        about |= {
            prefix + "data": s.reader.manifest.title,
            prefix + "fingerprint": s.reader.manifest.fingerprint,
            prefix + "split": s.reader.split.name,
        }
    return about


def _outliers(args: argparse.Namespace, sets: list[_Set], tables: list[ScoreTable]) -> dict[str, Any]:
    """AUROC of each score; writes the histogram."""
    from eiwtrain.scoring import outliers  # whose libraries take a second to import

    panels = {outliers.score_title(): [table.bound for table in tables]}
    if args.complexity is not None:
        panels[outliers.score_title(args.complexity)] = [outliers.corrected(t, args.complexity) for t in tables]
    areas = {title: outliers.auroc(*scored) for title, scored in panels.items()}
    picture = outliers.histogram(panels, areas, *(s.title for s in sets))
    storage.write_bytes(args.histogram, picture)
    return {"auroc": {title: asdict(area) for title, area in areas.items()}, "histogram": args.histogram}


def _fidelity(args: argparse.Namespace, network: Any, found: models.Model, real: _Set, images: int) -> dict[str, Any]:
    """FID and KID of samples to the images that were scored, with as many bits as the model has."""
    from eiwtrain.scoring import fidelity

    count = args.fid_samples or min(images, _FID_SAMPLES)
    temperature = args.temperature or 1.0
    if images < 2 or count < 2:
        raise ValueError(f"--fid-weights: {images} images and {count} samples; FID needs two of either")
    shift = 8 - found.flow.config.n_bits

    def pictures() -> Iterator[Tensor]:
        for batch in data.eval_batches(real.reader, images=images, seed=args.seed, micro_batch=min(args.batch, images)):
            yield (batch.images[batch.indices >= 0] >> shift) << shift

    drawn = series.render(found.flow, series.samples(found.flow, count, args.seed), temperature, args.batch)
    there, here = fidelity.features(network, pictures()), fidelity.features(network, drawn)
    return {
        "fid": fidelity.frechet_distance(there, here),
        "kid": asdict(fidelity.kernel_distance(there, here, args.seed)),
        "images": images,
        "samples": count,
        "temperature": temperature,
        "weights_sha256": network.sha256,
        "published_weights": network.is_published,
    }


def _without_nan(value: Any) -> Any:
    """JSON data with null where a number is not finite."""
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(result: dict[str, Any]) -> Iterator[str]:
    """The result, for people."""
    trained = result["trained_on"]
    step = "" if result["step"] is None else f", step {result['step']:,}"
    on = "" if trained["data"] is None else f", trained on {trained['data']}"
    yield f"model: {result['model']}{step}{on}"
    for s in result["sets"]:
        few = "" if result["n_bits"] == 8 else f", of {result['n_bits']}-bit images"
        yield (
            f"bits/dim {s['bits_per_dim']:.4f} ± {s['standard_error']:.4f} ({result['kind']}{few}) on {s['images']:,} "
            f"images of {s['data']}, split {s['split']}; "
            + ", ".join(f"{title} {s[f'{coder}_bits_per_dim']:.4f}" for coder, title in yardsticks.TITLES.items())
        )
        if draws := s.get("iwbo_draws"):
            yield f"bits/dim {s['iwbo_bits_per_dim']:.4f} ± {s['iwbo_standard_error']:.4f} (IWBO({draws}))"
    first = result["sets"][0]
    if trained["data_fingerprint"] not in (None, first["fingerprint"]):
        yield (
            f"note: the model was trained on another data set: {trained['data']} (fingerprint "
            f"{trained['data_fingerprint'][:12]}), these images are of {first['data']} ({first['fingerprint'][:12]})"
        )
    elif trained["data_fingerprint"] and trained["train_split"] == first["split"]:
        yield f"note: the model was trained on these images: split {first['split']} of {first['data']}"
    if outliers := result.get("outliers"):
        for title, area in outliers["auroc"].items():
            below = "; below 1/2: lower for the other images" if area["value"] < 0.5 else ""
            yield f"AUROC {area['value']:.4f} ± {area['standard_error']:.4f} by {title}{below}"
        yield f"histogram: {outliers['histogram']}"
    if f := result.get("fidelity"):
        kid = f["kid"]
        over = f" ± {kid['deviation']:.5f} over {kid['subsets']} subsets" if kid["subsets"] > 1 else ""
        weights = "" if f["published_weights"] else f"; not the published weights: SHA-256 {f['weights_sha256'][:8]}"
        yield (
            f"FID {f['fid']:.3f}, KID {kid['mean']:.5f}{over} of {kid['size']:,}: {f['samples']:,} samples at "
            f"temperature {f['temperature']:g}, {f['images']:,} images; FID is larger with fewer{weights}"
        )


if __name__ == "__main__":
    sys.exit(main())
