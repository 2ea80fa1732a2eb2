"""Bits per dimension of held-out images, and what PNG needs for the same images.

    python -m eiwtrain.evaluate runs/quickstart/model --data runs/data/photos-32 --split test

Not for training: the loop calls `score` on batches of its own.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from eiwtrain import data, flow, storage, yardsticks


@dataclass(frozen=True)
class Score:
    """A held-out score."""

    bits_per_dim: float
    """Mean over images."""
    standard_error: float
    """Of that mean, over images."""
    images: int


@torch.no_grad()
def score(
    model: flow.EIWFlow,
    batches: Iterable[data.Batch],
    stopped: Callable[[], bool] = lambda: False,
    more_draws: Sequence[Iterable[data.Batch]] = (),
) -> Score | None:
    """Mean bits/dim over batches; over all ranks' batches when there is a process group (then collective).

    An upper bound of what the model needs to code the images: of one draw of dequantization noise an image (the ELBO
    if that is variational), or the tighter importance-weighted one of several.

    Args:
        model: a flow, on the device to use.
        batches: uint8 images with their dequantization noise; rows of weight zero do not count.
        stopped: asked before each batch, on every rank with the same answer; True ends the evaluation.
        more_draws: the same batches with other noise.

    Returns:
        The score, or None if stopped.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64)  # images, sum of bits/dim, sum of their squares
    for batch, *more in zip(batches, *more_draws, strict=True):
        if stopped():
            return None
        images, noise, labels = data.flow_inputs(batch, model.config.classes, device)
        bound = model.iwbo(images, [noise, *(b.noise(device) for b in more)], labels)
        bits = flow.bits_per_dim(bound, model.dims, model.config.n_bits).double().cpu()
        weight = batch.weight.double()
        sums += torch.stack([weight.sum(), (weight * bits).sum(), (weight * bits.square()).sum()])
    if dist.is_initialized():
        sums = sums.to(device)
        dist.all_reduce(sums)
    count, total, squares = sums.tolist()
    if not count:
        raise ValueError("no images to score")
    mean = total / count
    variance = max(0.0, squares / count - mean * mean)
    return Score(mean, math.sqrt(variance / max(1.0, count - 1)), int(count))


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m eiwtrain.evaluate", description="Held-out bits per dimension.")
    parser.add_argument("model", help="folder or URL of an exported model")
    parser.add_argument("--data", required=True, help="folder or URL of a data set written by data_prep")
    parser.add_argument("--split", default="test")
    parser.add_argument("--images", type=int, default=10_000, help="at most so many, the first of the split")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the dequantization noise")
    parser.add_argument(
        "--iwbo", type=int, default=1, metavar="K", help="draws of noise an image, for the importance-weighted bound"
    )
    args = parser.parse_args(argv)
    try:
        with storage.local_folder(args.model) as folder:
            model = flow.load(folder)
        reader = data.ShardReader(args.data, data.load_manifest(args.data), args.split)
        if args.iwbo < 1:
            raise ValueError(f"--iwbo: {args.iwbo} draws; give at least 1")
        if model.config.classes and model.config.classes != len(reader.manifest.classes):
            raise ValueError(
                f"--data: {len(reader.manifest.classes)} classes, and the model was trained on {model.config.classes}"
            )
        draws = [
            data.eval_batches(reader, images=args.images, seed=args.seed, micro_batch=args.batch, draw=draw)
            for draw in range(args.iwbo)
        ]
        result = score(model, draws[0], more_draws=draws[1:])
        assert result is not None
        coders = yardsticks.bits_per_dim((reader[i] for i in range(result.images)), model.config.n_bits)
    except (ValueError, OSError, storage.StorageError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    kind = f"IWBO({args.iwbo})" if args.iwbo > 1 else "ELBO" if model.dequantizer else "one draw of uniform noise"
    print(
        f"bits/dim {result.bits_per_dim:.4f} ± {result.standard_error:.4f} ({kind}) on {result.images} images "
        f"of {reader.manifest.title}, split {args.split}; PNG {coders['png']:.4f}, "
        f"WebP {coders['webp']:.4f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
