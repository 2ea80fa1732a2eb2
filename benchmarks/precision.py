"""What low precision costs, and what inverting adds: drift and gradient errors by dtypes, depth, weights, anchors.

    python -m benchmarks.precision [--data FOLDER] [--json FILE] [--quick] [--activation relu] [--device cuda]

One level of `depth` steps (affine couplings; SiLU in the conditioners, or `--activation`) is trained in float32 with
stored activations on patches of the images of `--data` (shards from `data_prep`; by default the photographs that it
can write), then its gradients are compared on images that it did not see. Weights are those after the data-dependent
initialisation ("initial"), after training ("trained"), and the trained ones with the last layer of every conditioner
multiplied ("trained x 2"), for a flow with wider scales than so short a training gives it. All errors are relative, in
the 2-norm over all parameters:

- drift: `EIWFlow.drift`, of images through the flow and back.
- own: gradients with stored activations against those in float64 throughout: what the precision itself costs.
- inverted: gradients with reconstructed activations against stored ones in the same precision: what inverting adds.

"to own" is their ratio: above 1 the reconstruction costs more than the low precision does.
Not for time or memory (`benchmarks.backprop`).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import data_prep
from eiwtrain import data, flow

SIDE = 16  # of a patch, in pixels
BATCH = 16
DTYPES = [(trunk, conditioner) for trunk in ("float32", "float64") for conditioner in ("float32", "bfloat16")]
ANCHORS = (0, 8)
FULL: dict[str, Any] = {"depths": (8, 32, 100), "updates": 150, "factors": (1.5, 2.0, 2.25, 2.5)}
QUICK: dict[str, Any] = {"depths": (4, 12), "updates": 40, "factors": (2.0,)}

Row = dict[str, Any]
Weights = dict[str, Tensor]


class Images:
    """Random patches of the images of a data set, dequantized."""

    def __init__(self, url: str, device: torch.device) -> None:
        manifest = data.load_manifest(url)
        self.device = device
        self.pixels: dict[str, Tensor] = {}
        for split in ("train", "test"):
            reader = data.ShardReader(url, manifest, split)
            self.pixels[split] = torch.from_numpy(reader.read(range(min(4096, len(reader)))))
        self.generator = torch.Generator().manual_seed(0)

    def batch(self, split: str, n: int) -> Tensor:
        """(n, 3, SIDE, SIDE), float32."""
        pixels = self.pixels[split]
        chosen = pixels[torch.randint(len(pixels), (n,), generator=self.generator)]
        top, left = (int(torch.randint(s - SIDE + 1, (), generator=self.generator)) for s in pixels.shape[2:])
        patches = chosen[:, :, top : top + SIDE, left : left + SIDE]
        return flow.dequantize(patches, torch.rand(patches.shape, generator=self.generator)).to(self.device)


def shape_of(depth: int, activation: str) -> flow.FlowConfig:
    """Return a flow of one level with this number of steps."""
    conditioner = flow.ConditionerConfig(hidden=32, activation=activation)
    return flow.FlowConfig((3, SIDE, SIDE), levels=1, steps=depth, conditioner=conditioner, backprop="stored")


def loss(model: flow.EIWFlow, x: Tensor) -> Tensor:
    """Nats per dimension."""
    return (-model.log_prob(x) / model.dims).mean()


def train(shape: flow.FlowConfig, images: Images, updates: int, factors: tuple[float, ...]) -> dict[str, Weights]:
    """The weights of which the table tells, by name."""
    torch.manual_seed(0)
    model = flow.EIWFlow(shape).to(images.device)
    model.initialize(images.batch("train", 256))
    weights = {"initial": {name: t.clone() for name, t in model.state_dict().items()}}
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (update + 1) / 20)
        optimizer.zero_grad()
        loss(model, images.batch("train", BATCH)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    trained = model.state_dict()
    weights["trained"] = trained
    for factor in factors:
        scaled = {name: factor * t if ".conditioner.last." in name else t for name, t in trained.items()}
        weights[f"trained x {factor:g}"] = scaled
    return weights


def flow_at(weights: Weights, config: flow.FlowConfig, dtype: torch.dtype, device: torch.device) -> flow.EIWFlow:
    """A flow with these weights, its parameters in `dtype`."""
    model = flow.EIWFlow(config)
    model.load_state_dict(weights)
    return model.to(device, dtype)


def gradients(model: flow.EIWFlow, x: Tensor) -> Tensor:
    """Return the gradients of all parameters as one float64 vector."""
    model.zero_grad()
    loss(model, x).backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return ((a - b).norm() / b.norm()).item()


def measure(weights: Weights, shape: flow.FlowConfig, x: Tensor) -> Iterator[Row]:
    """A row for each precision and `anchor_every`, at these weights and images."""

    def at(dtype: torch.dtype = torch.float32, **changes: Any) -> flow.EIWFlow:
        return flow_at(weights, replace(shape, **changes), dtype, x.device)

    exact = gradients(at(torch.float64), x)
    for trunk, conditioner in DTYPES:
        precision: dict[str, Any] = {"trunk_dtype": trunk, "conditioner_dtype": conditioner}
        model = at(**precision)
        with torch.no_grad():
            bits = model.bits_per_dim(x).mean().item()
        drift, stored = model.drift(x), gradients(model, x)
        own = relative_error(stored, exact)
        for anchor_every in ANCHORS:
            inverted = gradients(at(backprop="invertible", anchor_every=anchor_every, **precision), x)
            yield precision | {
                "anchor_every": anchor_every,
                "bits_per_dim": bits,
                "drift": drift,
                "own_error": own,
                "inverted_error": relative_error(inverted, stored),
                "inverted_to_exact": relative_error(inverted, exact),
            }


def print_row(rows: list[Row]) -> None:
    """The rows of one precision, which differ in `anchor_every`, as one line of the table."""
    first = rows[0]
    line = f"| {first['depth']} | {first['weights']} | {first['trunk_dtype']} | {first['conditioner_dtype']} "
    line += f"| {first['drift']:.0e} | {first['own_error']:.0e} "
    for row in rows:
        line += f"| {row['inverted_error']:.0e} | {row['inverted_error'] / row['own_error']:.2f} "
    print(line + "|", flush=True)


def main() -> None:
    """Print the table, in Markdown; write JSON rows if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder or URL of shards; default: the photographs of data_prep")
    parser.add_argument("--json", help="file to write the rows to")
    parser.add_argument("--quick", action="store_true", help="less of everything, under a minute")
    parser.add_argument("--activation", choices=("relu", "gelu", "silu"), default="silu", help="of the conditioners")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = QUICK if args.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            data_prep.prepare("photos", folder, 2 * SIDE)
        images = Images(args.data or folder, torch.device(args.device))

    held_out = images.batch("test", BATCH)
    print(
        "| depth | weights | trunk | conditioners | drift | own |" + "".join(f" anchor {a} | to own |" for a in ANCHORS)
    )
    print("|---" * (6 + 2 * len(ANCHORS)) + "|")
    rows: list[Row] = []
    for depth in size["depths"]:
        shape = shape_of(depth, args.activation)
        for name, weights in train(shape, images, size["updates"], size["factors"]).items():
            measured = [{"depth": depth, "weights": name} | row for row in measure(weights, shape, held_out)]
            for first in range(0, len(measured), len(ANCHORS)):
                print_row(measured[first : first + len(ANCHORS)])
            rows += measured
    if args.json:
        finite = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()} for r in rows]
        Path(args.json).write_text(json.dumps(finite, indent=1))


if __name__ == "__main__":
    main()
