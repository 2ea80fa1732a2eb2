"""Print bits per dimension of images under a trained flow, beside those of lossless coders; on request also scores of
single images, how well they separate another data set, FID and KID.

    python -m eiwtrain.evaluate runs/quickstart --data runs/data/photos-32 --split test --iwbo 8 --scores s.parquet
    python -m eiwtrain.evaluate runs/quickstart --data runs/data/photos-32 --against runs/data/cifar10 --complexity png
    python -m eiwtrain.evaluate runs/quickstart --data runs/data/photos-32 --fid-weights weights-inception....pth

The work is done by `eiwtrain.scoring.evaluation`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from eiwtrain import storage
from eiwtrain.exporting import models
from eiwtrain.exporting.command import add_model_options, check_new, check_numbers, run_command
from eiwtrain.scoring import FID_SAMPLES, yardsticks
from eiwtrain.scoring.estimator import Estimator
from eiwtrain.scoring.published import Figure, Published
from eiwtrain.terminal.output import protect


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    return run_command(_evaluate, _arguments(argv))


def _evaluate(args: argparse.Namespace) -> int:
    _check(args)
    from eiwtrain.scoring import evaluation  # not earlier: torch takes a second, which `--help` need not
    from eiwtrain.train import device

    found = models.open_model(args.model)
    found.flow.to(device.of_command(args.device))
    readers = [models.open_split(found, args.data, args.split)]
    if args.against is not None:
        readers.append(models.open_split(found, args.against, args.against_split or args.split, "against"))
        a, b = (reader.manifest.classes for reader in readers)
        if found.flow.config.classes and a != b:
            raise ValueError(
                "--against: the model scores an image under its class, and these data sets have other classes; "
                "train one with model.classes=0 to compare them"
            )
    request = evaluation.Request(
        images=args.images,
        batch=args.batch,
        seed=args.seed,
        draws=args.iwbo,
        batch_draws=args.batch_draws,
        scores=args.scores,
        histogram=args.histogram,
        coder=args.complexity,
        fid_weights=args.fid_weights,
        fid_samples=args.fid_samples,
        temperature=args.temperature or 1.0,
    )
    result = evaluation.evaluate(found, readers, request)
    if args.json is not None:
        text = json.dumps(storage.without_nan(result), indent=1, allow_nan=False)
        storage.write_bytes(args.json, f"{text}\n".encode())
    print("\n".join(_lines(result)))
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eiwtrain.evaluate", description="Bits per dimension of images under a trained flow."
    )
    add_model_options(parser)
    parser.add_argument("--data", required=True, help="folder or URL of a data set written by data_prep")
    parser.add_argument("--split", default="test")
    parser.add_argument("--images", type=int, default=10_000, help="the most images, the first of the split")
    parser.add_argument(
        "--iwbo",
        type=int,
        default=1,
        metavar="K",
        help="also the importance-weighted bound IWBO(K), of K draws of all noise that the model adds to an image",
    )
    parser.add_argument(
        "--batch-draws",
        type=int,
        default=1,
        metavar="B",
        help="draws of each image of a batch in one forward pass; changes nothing but rounding, memory and time",
    )
    parser.add_argument("--scores", metavar="FILE", help="Parquet file of each image's scores to write: path or URL")
    parser.add_argument("--json", metavar="FILE", help="file of the result to write: path or URL")
    others = parser.add_argument_group("separation of images of another data set by their bits/dim")
    others.add_argument("--against", metavar="DATA", help="the other data set")
    others.add_argument("--against-split", metavar="SPLIT", help="split of the other data set (default: as --split)")
    others.add_argument(
        "--complexity", choices=tuple(yardsticks.CODERS), help="also score by bits/dim minus this coder's"
    )
    others.add_argument(
        "--histogram", metavar="FILE", help="PNG to write: path or URL (default with --against: outliers.png)"
    )
    fid = parser.add_argument_group("FID and KID of samples")
    fid.add_argument("--fid-weights", metavar="FILE", help="weights of the feature network: .pth or .safetensors")
    most = f"{FID_SAMPLES:,}"
    fid.add_argument("--fid-samples", type=int, metavar="N", help=f"(default: as many as images, at most {most})")
    fid.add_argument("--temperature", type=float, help="of the samples (default: 1)")
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> None:
    """Check what can be checked before anything is opened, and fill in the histogram's name."""
    check_numbers(args, images=1, batch=1, iwbo=1, batch_draws=1, fid_samples=2)
    needs = dict.fromkeys(("against_split", "complexity", "histogram"), "against")
    needs |= dict.fromkeys(("fid_samples", "temperature"), "fid_weights")
    for name, needed in needs.items():
        if getattr(args, name) is not None and getattr(args, needed) is None:
            raise ValueError(f"--{name.replace('_', '-')}: it goes with --{needed.replace('_', '-')}")
    if args.against is not None:
        args.histogram = args.histogram or "outliers.png"
    for name in ("scores", "json", "histogram"):  # before hours of scoring
        if getattr(args, name) is not None:
            with models.about_option(name):
                storage.check_file_writable(getattr(args, name))
                check_new(getattr(args, name), args.overwrite)


def _said(estimator: dict[str, Any]) -> str:
    """Return the words for an estimator of the result."""
    return str(Estimator(**estimator))


def _lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield the result as lines for people."""
    trained = result["trained_on"]
    step = "" if result["step"] is None else f", step {result['step']:,}"
    on = "" if trained["data"] is None else f", trained on {trained['data']}"
    yield f"model: {result['model']}{step}{on}"
    for s in result["sets"]:
        few = "" if result["n_bits"] == 8 else f", of {result['n_bits']}-bit images"
        yield (
            f"bits/dim {s['bits_per_dim']:.4f} ± {s['standard_error']:.4f} ({_said(result['estimator'])}{few}) "
            f"on {s['images']:,} images of {s['data']}, split {s['split']}; "
            + ", ".join(f"{title} {s[f'{coder}_bits_per_dim']:.4f}" for coder, title in yardsticks.TITLES.items())
        )
        if of_all := result.get("iwbo_estimator"):
            yield f"bits/dim {s['iwbo_bits_per_dim']:.4f} ± {s['iwbo_standard_error']:.4f} ({_said(of_all)}{few})"
    first = result["sets"][0]
    if trained["data_fingerprint"] not in (None, first["fingerprint"]):
        yield (
            f"note: the model was trained on another data set: {trained['data']} (fingerprint "
            f"{trained['data_fingerprint'][:12]}), these images are of {first['data']} ({first['fingerprint'][:12]})"
        )
    elif trained["data_fingerprint"] and trained["train_split"] == first["split"]:
        yield f"note: the model was trained on these images: split {first['split']} of {first['data']}"
    published = result["published"]
    figures = tuple(Figure(**figure) for figure in published["figures"])
    yield "published: " + "\n".join(Published(figures, published["reason"]).lines())
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
    protect()
    sys.exit(main())
