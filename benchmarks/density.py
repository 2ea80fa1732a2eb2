"""Bits/dim at equal CPU time: how dense a model a configuration gives on a budget, over seeds.

    python -m data_prep folder --source cifar10.tar --output runs/data/cifar10 --resolution 32
    python -m benchmarks.density --data runs/data/cifar10 --json runs/density.jsonl [--seconds 100 --seeds 3 --jobs 2]
    python -m benchmarks.density --data runs/data/cifar10 --json runs/density.jsonl order none mine='{"preset": "glow"}'

Each run is a process of one thread that trains for `--seconds` of CPU time, so that others may share the machine: the
same images in the same order for every variant, AdamW (or the variant's `optimizer`) with a warm-up and half a cosine
over the budget, gradients clipped, weights averaged. Then, outside the clock, bits/dim of held-out images: an ELBO of
one draw of all noise. A variant is one of `VARIANTS`, or NAME=JSON: fields of `FlowConfig`, with a `preset`, and
`optimizer`, `lr`, `batch`, `published` (parts of the authors' program in place of ours: see `_publish`).

Its result is a line of the JSON file; the same command again makes the missing ones and prints the table: the mean over
seeds, its standard error, and the mean difference to the first variant over the seeds that both have.
Not for time to a step (`benchmarks.backprop`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measuring
from benchmarks.reference import PublishedAttention
from eiwtrain import data, flow

Row = dict[str, Any]

TINY = {"preset": "eiw-tiny", "lr": 5e-3}
DENSE = {**TINY, "conditioner": {"kind": "dense", "hidden": 24, "depth": 1, "growth": 24, "activation": "relu"}}
GLOW = {"levels": 3, "steps": 4, "conditioner": {"kind": "conv", "hidden": 64}}
VARIANTS: dict[str, dict[str, Any]] = {
    "order": TINY,
    "none": {**TINY, "shuffle": "none"},
    "fixed": {**TINY, "shuffle": "fixed"},
    "soft": {**TINY, "shuffle": "soft"},
    "glow, soft": {**GLOW, "shuffle": "soft"},
    "glow, order": {**GLOW, "shuffle": "order"},
    "input 1": {**TINY, "order_input": "one"},
    "true KL": {**TINY, "kl": "true"},
    "variational": {
        **TINY,
        "dequantization": "variational",
        "dequantizer": {"couplings": 2, "hidden": 16, "growth": 16},
    },
    "dense networks": DENSE,
    "dense networks, attention as published": {**DENSE, "published": ["attention"]},
    "dense networks, batch normalisation": {**DENSE, "published": ["norm"]},
    "dense networks, no attention": {**DENSE, "conditioner": {**DENSE["conditioner"], "attention": "none"}},
}
_TRAINING = {"optimizer": "adamw", "lr": 2e-3, "batch": 32, "published": []}
_WARMUP, _CLIP, _EMA, _SIGMA = 0.05, 50.0, 0.99, 1e-3


def train(url: str, fields: dict[str, Any], seed: int, seconds: float, held_out: int) -> Row:
    """Train one variant with one seed in this process; return its row without the names of the run."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    settings = {name: fields.get(name, default) for name, default in _TRAINING.items()}
    described = {name: value for name, value in fields.items() if name not in _TRAINING}
    manifest = data.load_manifest(url)
    images, test = _read(url, manifest, "train"), _read(url, manifest, "test", held_out)
    shape = tuple(images.shape[1:])
    model = flow.EIWFlow.from_config({"image_shape": list(shape), "backprop": "stored", **described})
    _publish(model, settings["published"])
    order = torch.Generator().manual_seed(seed)

    def batch(n: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(images), (n,), generator=order)
        flipped = torch.rand(n, generator=order) < 0.5
        chosen = images[rows]
        chosen[flipped] = chosen[flipped].flip(3)
        return chosen, torch.rand(n, *model.config.noise_shape, generator=order)

    model.initialize(*batch(256))
    averaged = flow.EIWFlow.from_config(model.config)
    _publish(averaged, settings["published"])
    averaged.load_state_dict(model.state_dict())
    kinds: dict[str, Any] = {"adamw": torch.optim.AdamW, "adamax": torch.optim.Adamax}
    optimizer = kinds[settings["optimizer"]](model.parameters(), lr=0.0, weight_decay=0.0)
    parameters = list(model.parameters())
    steps, begin = 0, time.process_time()
    while (done := (time.process_time() - begin) / seconds) < 1:
        rate = min(1.0, done / _WARMUP) * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = settings["lr"] * max(rate, 1e-3)
        out = model(*batch(settings["batch"]))
        loss = (flow.bits_per_dim(out.log_prob, model.dims, model.config.n_bits) + _SIGMA * out.penalty).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, _CLIP)
        if norm.isfinite():
            optimizer.step()
        _average(averaged, model, min(_EMA, (1 + steps) / (10 + steps)))
        steps += 1
    bits = _score(averaged.eval(), test)
    return {
        "bits_per_dim": bits.mean().item(),
        "error": (bits.std() / math.sqrt(len(bits))).item(),
        "steps": steps,
        "parameters": sum(p.numel() for p in parameters),
        "cpu_seconds": time.process_time() - begin,
    }


def _read(url: str, manifest: data.Manifest, split: str, most: int | None = None) -> Tensor:
    reader = data.ShardReader(url, manifest, split)
    return torch.from_numpy(reader.read(range(len(reader) if most is None else min(most, len(reader)))))


def _publish(model: flow.EIWFlow, parts: list[str]) -> None:
    """Put parts of the authors' program in place of ours: `attention`, whose tokens are runs of one channel's numbers,
    and `norm`, batch normalisation."""
    for module in list(model.modules()):
        if isinstance(module, flow.DenseConditioner):
            hidden = module.first.out_channels
            if "attention" in parts:
                module.attention = PublishedAttention(hidden, hidden // 2)  # type: ignore[assignment]
            if "norm" in parts:
                module.norm = nn.BatchNorm2d(2 * hidden)  # type: ignore[assignment]


@torch.no_grad()
def _average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    for own, other in zip(averaged.parameters(), model.parameters(), strict=True):
        own.lerp_(other, 1 - decay)
    for mine, its in zip(averaged.buffers(), model.buffers(), strict=True):
        mine.copy_(its)


@torch.no_grad()
def _score(model: flow.EIWFlow, images: Tensor) -> Tensor:
    """Return bits/dim of each image, float64: an ELBO of one draw of all noise, the same for every run."""
    generator = torch.Generator().manual_seed(0)
    bits = [
        model.bits_per_dim(some, torch.rand(len(some), *model.config.noise_shape, generator=generator))
        for some in images.split(100)
    ]
    return torch.cat(bits).double()


def run_missing(args: argparse.Namespace, wanted: dict[str, dict[str, Any]]) -> list[Row]:
    """Run in processes of their own what the JSON file lacks; return its rows of this budget and these variants."""
    rows = [json.loads(line) for line in args.json.read_text().splitlines()] if args.json.exists() else []
    made = {(row["variant"], row["seed"], row["seconds"], json.dumps(row["fields"], sort_keys=True)) for row in rows}
    todo = [
        {"variant": name, "seed": seed, "seconds": args.seconds, "fields": fields}
        for seed in range(args.seeds)
        for name, fields in wanted.items()
        if (name, seed, args.seconds, json.dumps(fields, sort_keys=True)) not in made
    ]

    def one(job: Row) -> None:
        command = [sys.executable, "-m", "benchmarks.density", "--data", args.data, "--json", str(args.json)]
        command += ["--images", str(args.images), "--one", json.dumps(job)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        if done.returncode:
            print(f"{job['variant']}, seed {job['seed']}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
            return
        row = json.loads(done.stdout.splitlines()[-1])
        with args.json.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        print(f"{row['variant']}, seed {row['seed']}: {row['bits_per_dim']:.4f}", file=sys.stderr, flush=True)

    args.json.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, todo))
    return [row for row in rows if row["seconds"] == args.seconds and wanted.get(row["variant"]) == row["fields"]]


def table(rows: list[Row], variants: list[str]) -> str:
    """Return the rows as a Markdown table, in the order of the variants; differences are to the first."""
    lines = []
    first = {row["seed"]: row["bits_per_dim"] for row in rows if row["variant"] == variants[0]}
    for name in variants:
        own = {row["seed"]: row for row in rows if row["variant"] == name}
        if not own:
            continue
        bits = [row["bits_per_dim"] for row in own.values()]
        paired = [row["bits_per_dim"] - first[seed] for seed, row in own.items() if seed in first]
        steps = statistics.mean(row["steps"] for row in own.values())
        parameters = next(iter(own.values()))["parameters"]
        lines.append([name, f"{parameters:,}", f"{steps:,.0f}", _mean(bits), _mean(paired, "+")])
    return measuring.markdown(("variant", "parameters", "steps", "bits/dim", f"difference to {variants[0]}"), lines)


def _mean(values: list[float], sign: str = "") -> str:
    if not values:
        return ""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{error}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "variants", nargs="*", metavar="VARIANT", help=f"of {', '.join(VARIANTS)}, or NAME=JSON; default: all"
    )
    parser.add_argument("--data", required=True, help="folder or URL of a data set that data_prep wrote")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="file of results, one a line")
    parser.add_argument("--seconds", type=float, default=100, help="CPU seconds of training, of one thread")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--images", type=int, default=2000, help="held-out images")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        job = json.loads(args.one)
        print(json.dumps(job | train(args.data, job["fields"], job["seed"], job["seconds"], args.images)))
        return 0
    wanted = {}
    for given in args.variants or VARIANTS:
        name, is_new, described = given.partition("=")
        if not is_new and name not in VARIANTS:
            parser.error(f"{name} is not one of {', '.join(VARIANTS)}; a new one is NAME=JSON")
        wanted[name] = json.loads(described) if is_new else VARIANTS[name]
    rows = run_missing(args, wanted)
    print(f"{args.seconds:g} CPU seconds of one thread, {args.images} held-out images, ELBO of one draw\n")
    print(table(rows, list(wanted)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
