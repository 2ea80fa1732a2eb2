"""The shuffle before a split, kind by kind, over seeds, with its spread: held-out bits/dim, parameters, seconds a step.

    python -m data_prep folder --source cifar10.tar --output runs/data/cifar10 --resolution 32
    python -m benchmarks.shuffle --data runs/data/cifar10 --json runs/shuffle.jsonl [--seeds 0-3 --steps 600 --jobs 2]
    python -m benchmarks.shuffle --data runs/data/cifar10 --quick

`cifar10.tar` is any tar (or folder) of CIFAR-10 as image files in class folders, with or without a train and a test
folder above them. Beside the kinds of `eiwtrain.flow.shuffle` it tries `CANDIDATES`, which are not in the package.
Each is a bijection whose inverse needs its output and latents alone (`tests/test_benchmark_shuffle.py`), is the
identity at the start (but for `static-rotated`), and has its solver made as wide as the parameters of `plain` allow,
unless its recipe gives the width.

`plain` is what `soft` was before this comparison: one rotation for the whole image and nothing before it. `soft` has
since become `static-block4`, the best of them; with `model.shuffle_block=0` it is `static`.

Runs of one seed are paired: the rest of the net starts from the same numbers and sees the same images with the same
noise in the same order. "to plain" is the mean over seeds of a variant's bits/dim less that of `plain` with the same
seed, with its standard error: a smaller difference means nothing. From scratch, runs of one seed soon diverge by
chance. `--warm N` trains a net of each seed without a shuffle for N steps first, and all variants continue from there,
which shows smaller differences; a variant that does not start as the identity, such as `fixed`, is then at a
disadvantage.

Every run is a process of its own, its result a line of the JSON file; the same command again makes the missing ones.
Seconds a step are measured separately, the variants in turn, as CPU time of one thread, so others may share the
machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.shuffle_candidates import BASE, VARIANTS, BenchmarkFlow, parameters, recipe_of
from eiwtrain import data, flow
from eiwtrain.data.fingerprint import digest
from eiwtrain.on_ray.session import WORKER_ENV

_PENALTY = 1e-3  # the weight of the regulariser, and
_CLIP = 50.0  # the bound of the gradient norm: the defaults of training


def train(args: argparse.Namespace, variant: str, seed: int, warm: str = "", save: str = "") -> dict[str, Any]:
    """Train once, in the child; return a row of the JSON file without the names of the run.

    Args:
        warm: file of the weights to start from, if not from scratch; its steps have seen the first images.
        save: file to write weights to, after `args.warm` steps and not `args.steps`.
    """
    manifest = data.load_manifest(args.data)
    images = data.ShardReader(args.data, manifest, "train")
    held_out = data.ShardReader(args.data, manifest, "test")
    torch.manual_seed(seed)
    model = BenchmarkFlow(make_config(args, images.image_shape), variant)
    chance = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=chance)

    def batch(step: int) -> Tensor:
        pixels = torch.from_numpy(images.read(order[torch.arange(step, step + args.batch) % len(order)].tolist()))
        return flow.dequantize(pixels, torch.rand(pixels.shape, generator=chance))

    model.initialize(batch(0))
    if warm:
        model.load_state_dict(torch.load(warm, weights_only=True), strict=False)  # it has no shuffles
    seen = args.warm * args.batch if warm else 0
    steps = args.warm if save else args.steps
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    began = time.perf_counter()
    recent: list[float] = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = args.lr * learning_rate(step, steps, falls=not save)
        recent = [*recent[-49:], take_step(model, optimizer, batch(seen + step * args.batch))]
    seconds = time.perf_counter() - began
    if save:
        torch.save(model.state_dict(), save)

    # The same images with the same noise for all seeds, too.
    chance = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(held_out), generator=chance)[: args.images].split(256)
    bits = []
    with torch.no_grad():
        for indices in chosen:
            pixels = torch.from_numpy(held_out.read(indices.tolist()))
            bits.append(model.bits_per_dim(flow.dequantize(pixels, torch.rand(pixels.shape, generator=chance))))
    return {
        "bits_per_dim": torch.cat(bits).double().mean().item(),
        "train_bits_per_dim": statistics.fmean(recent),
        "parameters": parameters(model),
        "seconds": seconds,
    }


def learning_rate(step: int, steps: int, falls: bool) -> float:
    """Return the share of the full rate: a warm-up over a twelfth of the steps, then, if it falls, a cosine to zero."""
    rises = max(1, steps // 12)
    if step < rises or not falls:
        return min(1.0, (step + 1) / rises)
    return 0.5 + 0.5 * math.cos(math.pi * (step - rises) / (steps - rises))


def take_step(model: BenchmarkFlow, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    """Take one step of training, as the workers do; return the batch's bits/dim."""
    out = model(x)
    bits = flow.bits_per_dim(out.log_prob, model.dims).mean()
    optimizer.zero_grad()
    (bits + _PENALTY * out.penalty.mean()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
    optimizer.step()
    return bits.item()


def measure_times(args: argparse.Namespace, variants: Sequence[str]) -> dict[str, float]:
    """Return median CPU seconds of a step of each variant, the variants in turn; run in the child."""
    shape = data.ShardReader(args.data, data.load_manifest(args.data), "train").image_shape
    chance = torch.Generator().manual_seed(0)
    x = torch.rand(args.batch, *shape, generator=chance) - 0.5
    models = {variant: BenchmarkFlow(make_config(args, shape), variant) for variant in variants}
    optimizers = {}
    for variant, model in models.items():
        model.initialize(x)
        optimizers[variant] = torch.optim.Adam(model.parameters(), lr=0.0, fused=True)
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(args.rounds):
        for variant, model in models.items():
            began = time.process_time()
            take_step(model, optimizers[variant], x)
            seconds[variant].append(time.process_time() - began)
    return {variant: statistics.median(measured) for variant, measured in seconds.items()}


def make_config(args: argparse.Namespace, shape: tuple[int, int, int]) -> flow.FlowConfig:
    """Return the config of the flow that carries the shuffles."""
    conditioner = flow.ConditionerConfig(hidden=args.hidden)
    return flow.FlowConfig(shape, 3, 4, conditioner, conditioner_dtype="bfloat16")


def summarize(rows: Sequence[dict[str, Any]], times: dict[str, float]) -> list[dict[str, Any]]:
    """Return a row for each variant, the best first; `rows` are those of one setting."""
    bits: dict[str, dict[int, float]] = {}
    for row in rows:
        bits.setdefault(row["variant"], {})[row["seed"]] = row["bits_per_dim"]
    base = bits.get(BASE, {})
    table = []
    for variant, of_seed in bits.items():
        differences = [value - base[seed] for seed, value in of_seed.items() if seed in base]
        table.append(
            {
                "variant": variant,
                "parameters": next(row["parameters"] for row in rows if row["variant"] == variant),
                "time": times.get(variant, math.nan),
                "seeds": len(of_seed),
                "bits_per_dim": mean_and_error(list(of_seed.values())),
                "to_plain": mean_and_error(differences),
                "better": sum(d < 0 for d in differences),
            }
        )
    return sorted(table, key=lambda row: (math.isnan(row["to_plain"][0]), row["to_plain"][0], row["bits_per_dim"][0]))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error; NaN where there are too few values."""
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def print_table(table: Sequence[dict[str, Any]]) -> None:
    """Print the summary as plain text."""
    print(f"{'variant':20} {'parameters':>10} {'time':>5} {'seeds':>5} {'bits/dim':>15} {'to plain':>17} {'better':>6}")
    for row in table:
        (mean, error), (difference, spread) = row["bits_per_dim"], row["to_plain"]
        cells = f"{mean:.4f} ± {error:.4f} {difference:+.4f} ± {spread:.4f} {row['better']:6}"
        print(f"{row['variant']:20} {row['parameters']:10} {row['time']:5.2f} {row['seeds']:5} {cells}")


def main() -> None:
    """Run what is missing of (variants x seeds), then print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shuffle", description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="runs/data/cifar10", help="shards with splits train and test")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated; default: all")
    parser.add_argument("--seeds", default="0-3", help="first-last, or one")
    for name, default in (("steps", 600), ("batch", 64), ("hidden", 64), ("images", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warm", type=int, default=0, help="steps without a shuffle before; 0: start from scratch")
    parser.add_argument("--rounds", type=int, default=30, help="of timing, a step of each variant; 0 for none")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument("--json", help="file to append results to, one a line; what it holds is not run again")
    parser.add_argument("--quick", action="store_true", help="a smoke run: tiny, and three variants unless given")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch, args.hidden, args.images, args.rounds = 12, 16, 16, 128, 5
        args.variants = "none,plain,soft" if args.variants == parser.get_default("variants") else args.variants
        args.seeds = "0-1" if args.seeds == parser.get_default("seeds") else args.seeds
    if args.child:
        torch.set_num_threads(1)
        work = json.loads(args.child)
        print(json.dumps(measure_times(args, work) if isinstance(work, list) else train(args, **work)))
        return

    variants = args.variants.split(",")
    if unknown := set(variants) - set(VARIANTS):
        parser.error(f"unknown variants {', '.join(sorted(unknown))}; known are {', '.join(VARIANTS)}")
    first, _, last = args.seeds.partition("-")
    results = Results(args)
    done = {(row["variant"], row["seed"]) for row in results.runs()}
    # Seed by seed, so that what is cut short is still paired.
    wanted = [(variant, seed) for seed in range(int(first), int(last or first) + 1) for variant in variants]
    missing = [run for run in wanted if run not in done]
    with ThreadPoolExecutor(args.jobs) as pool:
        if args.warm:
            list(pool.map(results.warm_up, sorted({seed for _, seed in missing})))
        list(pool.map(results.run, missing))
    if args.rounds and set(variants) - set(results.times()):
        results.run_times(sorted({*variants, BASE}))
    print_table(summarize(results.runs(), results.times()))


class Results:
    """The JSON-lines file, and the child processes whose results go there.

    A line is known by its settings (and the data's fingerprint), and by the recipe of its variant: change either, and
    it is run again.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.file = Path(args.json) if args.json else Path(tempfile.mkdtemp()) / "shuffle.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.settings = {name: getattr(args, name) for name in ("steps", "batch", "hidden", "images", "lr", "warm")}
        self.settings["data"] = data.load_manifest(args.data).fingerprint
        self.lock = threading.Lock()

    def warm_up(self, seed: int) -> None:
        """Train the net that all variants of a seed start from, unless it is there."""
        file = self._warm_file(seed)
        if not file.exists():
            self._child({"variant": "none", "seed": seed, "save": f"{file}.part"})
            Path(f"{file}.part").rename(file)

    def run(self, which: tuple[str, int]) -> None:
        """One run, in a child."""
        variant, seed = which
        warm = {"warm": str(self._warm_file(seed))} if self.settings["warm"] else {}
        result = self._child({"variant": variant, "seed": seed, **warm})
        self._append({"variant": variant, "recipe": recipe_of(variant), "seed": seed, **result})

    def run_times(self, variants: Sequence[str]) -> None:
        """Seconds a step of the variants, in one child."""
        for variant, seconds in (times := self._child(variants)).items():
            row = {"variant": variant, "recipe": recipe_of(variant), "seconds_a_step": seconds}
            self._append({**row, "time_to_plain": seconds / times[BASE]})

    def runs(self) -> list[dict[str, Any]]:
        """Return the rows of finished runs."""
        return [row for row in self._rows() if "seed" in row]

    def times(self) -> dict[str, float]:
        """Time of a step of each variant, that of `plain` being 1."""
        return {row["variant"]: row["time_to_plain"] for row in self._rows() if "time_to_plain" in row}

    def _warm_file(self, seed: int) -> Path:
        key = digest({k: v for k, v in self.settings.items() if k not in ("steps", "images")})[:12]
        return self.file.with_name(f"{self.file.stem}-{key}-{seed}.pt")

    def _rows(self) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        return [r for r in rows if r["settings"] == self.settings and r["recipe"] == recipe_of(r["variant"])]

    def _append(self, row: dict[str, Any]) -> None:
        with self.lock, open(self.file, "a") as f:
            f.write(json.dumps({**row, "settings": self.settings}) + "\n")
        shown = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items() if k != "recipe"}
        print(*(f"{k}={v}" for k, v in shown.items()), flush=True)

    def _child(self, work: Any) -> dict[str, Any]:
        command = [sys.executable, "-m", "benchmarks.shuffle", *sys.argv[1:], "--child", json.dumps(work)]
        environment = os.environ | WORKER_ENV | {"OMP_NUM_THREADS": "1"}
        child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if child.returncode:
            sys.exit(f"a run failed: {work}")
        return cast(dict[str, Any], json.loads(child.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
