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
seed, with its standard error: a difference within that is none. From scratch, runs of one seed soon come apart by
luck. `--warm N` trains a net of each seed without a shuffle for N steps first, and all variants go on from there, which
tells smaller differences apart; what is no identity at the start, as `fixed`, is then at a disadvantage.

Every run is a process of its own, its result a line of the JSON file; the same command again runs what is missing.
Seconds a step are measured apart, the variants in turn, as CPU time of one thread: others may share the machine.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eiwtrain import data, flow
from eiwtrain.data.manifest import digest
from eiwtrain.flow.bijection import Bijection, Chain, Coupling, Transformed, without_autocast
from eiwtrain.flow.layers import mix_channels
from eiwtrain.flow.shuffle import (
    channel_descriptors,
    from_blocks,
    householder_rotation,
    make_shuffle,
    scaling_terms,
    to_blocks,
)
from eiwtrain.on_ray.session import WORKER_ENV

_LEAST_VARIANCE = 1e-6
_PENALTY = 1e-3  # the weight of the regulariser, and
_CLIP = 50.0  # the bound of the gradient norm: the defaults of training


@dataclass(frozen=True)
class Recipe:
    """What a candidate is made of. The defaults are those of `plain`."""

    turn: str = "reflect"
    """reflect; cayley or exp of a predicted skew-symmetric matrix; none for weights alone."""
    rank: int = 2
    """Pairs of reflections; for cayley and exp the rank of the skew-symmetric matrix is twice that, 0 for full."""
    weights: bool = True
    """Whether channels are scaled."""
    shift: bool = False
    """Whether a predicted constant is added to each channel."""
    descriptors: str = "plain"
    """One of `DESCRIPTORS`."""
    block: int = 0
    """Side, in pixels, of the blocks that are each described, turned and scaled for themselves; 0: the image."""
    both: bool = False
    """With blocks, whether the solver also sees the descriptors of the image."""
    earlier: bool = False
    """Whether the solver also sees the latents that left at the levels before."""
    whole: str = ""
    """After the first level: "instead" or "first", a map of all channels given the latents that left before, in
    place of the halves or before them."""
    static: str = ""
    """"identity" or "rotation", as what a learned 1x1 convolution starts that comes first; "" for none."""
    hidden: int | None = None
    """Of the solver; None for as many as the parameters of `plain` allow."""


_BASE = "plain"
"""What the others are compared with."""

CANDIDATES: dict[str, Recipe] = {
    _BASE: Recipe(hidden=32),
    "weights": Recipe(turn="none"),
    "rotation": Recipe(weights=False),
    "soft8": Recipe(rank=4),
    "soft16": Recipe(rank=8),
    "cayley": Recipe(turn="cayley", rank=0),
    "cayley-low": Recipe(turn="cayley"),
    "exp": Recipe(turn="exp", rank=0),
    "exp-low": Recipe(turn="exp"),
    "earlier": Recipe(earlier=True),
    "whole": Recipe(whole="instead"),
    "whole-first": Recipe(whole="first"),
    "static": Recipe(static="identity"),
    "static-alone": Recipe(static="identity", turn="none", weights=False, hidden=1),
    "static-rotated": Recipe(static="rotation", turn="none", weights=False, hidden=1),
    "static-exp": Recipe(static="identity", turn="exp", rank=0),
    "static-block4": Recipe(static="identity", block=4),
    "static-shift": Recipe(static="identity", shift=True),
    "static-block4-shift": Recipe(static="identity", block=4, shift=True),
    "static-block4-exp": Recipe(static="identity", turn="exp", rank=0, block=4),
    "static-block2": Recipe(static="identity", block=2),
    "edges": Recipe(descriptors="edges"),
    "grid": Recipe(descriptors="grid"),
    "shift": Recipe(shift=True),
    "block4": Recipe(block=4),
    "block2": Recipe(block=2),
    "block4-both": Recipe(block=4, both=True),
    "block4-shift": Recipe(block=4, shift=True),
    "block4-turn": Recipe(block=4, weights=False),
    "block4-weights": Recipe(block=4, turn="none"),
    "wide": Recipe(hidden=128),
}
VARIANTS = (*flow.config.SHUFFLES, *CANDIDATES)


def describe_edges(a: Tensor) -> Tensor:
    """As `describe`, and the log-variance of the differences of neighbours: (B, C, H, W) to (B, 4C)."""
    down, right = a.diff(dim=2).square().mean((2, 3)), a.diff(dim=3).square().mean((2, 3))
    return torch.cat((channel_descriptors(a), (0.5 * (down + right) + _LEAST_VARIANCE).log()), dim=1)


def describe_grid(a: Tensor) -> Tensor:
    """As `describe`, and the means of the four quarters: (B, C, H, W) to (B, 7C)."""
    return torch.cat((channel_descriptors(a), F.adaptive_avg_pool2d(a, 2).flatten(1)), dim=1)


DESCRIPTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": channel_descriptors,
    "edges": describe_edges,
    "grid": describe_grid,
}


class Memory:
    """Descriptors (B, 3C) of the latents that have left, level by level; what the inverse knows from the start."""

    def __init__(self) -> None:
        self.left: list[Tensor] = []

    def before(self, level: int, like: Tensor, size: int) -> Tensor:
        """Of all levels before `level`, (B, size); zeros at initialisation, when there are none yet."""
        known = self.left[:level]
        return torch.cat(known, dim=1).to(like.dtype) if known else like.new_zeros(len(like), size)


@dataclass(frozen=True)
class Place:
    """Where a shuffle stands: its level, how many descriptors of earlier latents there are, and where they lie."""

    memory: Memory
    level: int = 0
    earlier: int = 0

    def known(self, like: Tensor) -> Tensor:
        """Those descriptors, (B, earlier)."""
        return self.memory.before(self.level, like, self.earlier)


class Mixer(nn.Module):
    """From descriptors to an invertible affine map of channels, predicted by a perceptron that starts at zero."""

    def __init__(self, recipe: Recipe, inputs: int, size: int, hidden: int) -> None:
        super().__init__()
        self.recipe, self.size = recipe, size
        skew = size * (size - 1) // 2 if recipe.rank == 0 else recipe.rank * size
        self.sizes = (size * recipe.weights, size * recipe.shift, 0 if recipe.turn == "none" else skew)
        self.first = nn.Linear(inputs, hidden)
        self.last = nn.Linear(hidden, sum(self.sizes))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        if recipe.turn != "none" and recipe.rank:
            self.vectors = nn.Parameter(F.normalize(torch.randn(recipe.rank, size), dim=1))

    def forward(self, described: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, inputs) to log-weights (B, size), shift (B, size), rotation (B, size, size)."""
        out = self.last(F.relu(self.first(described.to(self.first.weight.dtype)))).to(described.dtype)
        raw, shift, turn = out.split(self.sizes, dim=1)
        nothing = described.new_zeros(len(described), self.size)
        return torch.tanh(raw) if raw.numel() else nothing, shift if shift.numel() else nothing, self._rotation(turn)

    def _rotation(self, raw: Tensor) -> Tensor:
        eye = torch.eye(self.size, dtype=raw.dtype, device=raw.device)
        if self.recipe.turn == "none":
            return eye.expand(len(raw), -1, -1)
        if self.recipe.rank:
            raw = raw.view(-1, self.recipe.rank, self.size)
            learned = self.vectors.to(raw.dtype).expand_as(raw)
            if self.recipe.turn == "reflect":
                return householder_rotation(torch.stack((learned + raw, learned), dim=2).flatten(1, 2))
            skew = raw.mT @ learned
        else:
            rows, columns = torch.tril_indices(self.size, self.size, -1, device=raw.device)
            skew = raw.new_zeros(len(raw), self.size, self.size)
            skew[:, rows, columns] = raw
        skew = skew - skew.mT
        if self.recipe.turn == "exp":
            return torch.linalg.matrix_exp(skew)
        return torch.linalg.solve(eye + skew, eye - skew)


def apply(b: Tensor, params: tuple[Tensor, ...]) -> Transformed:
    """Turn, scale, shift the channels of b, (B, C, H, W)."""
    log_weights, shift, turn = params
    y = mix_channels(log_weights.exp().unsqueeze(2) * turn, b) + shift[:, :, None, None]
    return Transformed(y, *scaling_terms(b, log_weights))


def unapply(y: Tensor, params: tuple[Tensor, ...]) -> Tensor:
    """The inverse of `apply`."""
    log_weights, shift, turn = params
    return mix_channels(turn.mT * (-log_weights).exp().unsqueeze(1), y - shift[:, :, None, None])


class CandidateHalf(Coupling):
    """Turns and scales one half of the channels by what the other half, and maybe earlier latents, say."""

    def __init__(self, recipe: Recipe, channels: int, place: Place, hidden: int, mirrored: bool = False) -> None:
        super().__init__(mirrored)
        self.recipe, self.place = recipe, place
        sizes = (channels // 2, channels - channels // 2)
        given, size = reversed(sizes) if mirrored else sizes
        self.describe = DESCRIPTORS[recipe.descriptors]
        inputs = (1 + recipe.both) * self.describe(torch.zeros(1, given, 2, 2)).shape[1]
        self.mixer = Mixer(recipe, inputs + place.earlier * recipe.earlier, size, hidden)

    def condition(self, a: Tensor, kept: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        blocks = to_blocks(a, self.recipe.block) if self.recipe.block else a
        seen = [self.describe(a)] if self.recipe.both else []
        if self.recipe.earlier:
            seen.append(self.place.known(a))
        seen = [self.describe(blocks), *(s.repeat_interleave(len(blocks) // len(a), dim=0) for s in seen)]
        with without_autocast(a):
            return cast(tuple[Tensor, ...], self.mixer(torch.cat(seen, dim=1)))

    def transform(self, b: Tensor, params: tuple[Tensor, ...]) -> Transformed:
        if not self.recipe.block:
            return apply(b, params)
        out = apply(to_blocks(b, self.recipe.block), params)
        of_blocks = out.log_det.view(len(b), -1), out.penalty.view(len(b), -1)
        return Transformed(from_blocks(out.y, b.shape), of_blocks[0].sum(1), of_blocks[1].mean(1))

    def untransform(self, b: Tensor, params: tuple[Tensor, ...]) -> Tensor:
        if not self.recipe.block:
            return unapply(b, params)
        return from_blocks(unapply(to_blocks(b, self.recipe.block), params), b.shape)


class CandidateWhole(Bijection):
    """Turns and scales all channels by what earlier latents say."""

    def __init__(self, recipe: Recipe, channels: int, place: Place, hidden: int) -> None:
        super().__init__()
        self.place = place
        self.mixer = Mixer(recipe, place.earlier, channels, hidden)

    def forward(self, x: Tensor) -> Transformed:
        return apply(x, self.mixer(self.place.known(x)))

    def inverse(self, y: Tensor) -> Tensor:
        return unapply(y, self.mixer(self.place.known(y)))


def identity_conv(channels: int) -> flow.InvertibleConv1x1:
    """A learned 1x1 convolution that starts as the identity."""
    conv = flow.InvertibleConv1x1(channels)
    with torch.no_grad():
        for p in (conv.lower, conv.upper, conv.log_s):
            p.zero_()
        conv.sign.fill_(1)
        conv.rows.copy_(torch.arange(channels))
    return conv


def candidate(recipe: Recipe, channels: int, place: Place, hidden: int) -> Chain:
    """The shuffle of a recipe."""
    parts: list[Bijection] = []
    if recipe.static:
        parts.append(identity_conv(channels) if recipe.static == "identity" else flow.InvertibleConv1x1(channels))
    if recipe.whole and place.level:
        parts.append(CandidateWhole(recipe, channels, place, hidden))
    predicts = recipe.turn != "none" or recipe.weights or recipe.shift
    if predicts and (recipe.whole != "instead" or not place.level):
        parts += [CandidateHalf(recipe, channels, place, hidden, mirrored) for mirrored in (False, True)]
    return Chain(parts)


def matched(recipe: Recipe, channels: int, place: Place) -> Chain:
    """The shuffle of a recipe, its solver as wide as the parameters of `plain` allow, or as the recipe says."""

    def build(hidden: int) -> Chain:
        with torch.random.fork_rng():
            return candidate(recipe, channels, place, hidden)

    if recipe.hidden is not None:
        return build(recipe.hidden)
    budget = parameters(matched(CANDIDATES[_BASE], channels, place))
    narrow, more = parameters(build(1)), parameters(build(2)) - parameters(build(1))
    return build(max(1, 1 + (budget - narrow) // more))


def parameters(module: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in module.parameters())


class BenchmarkFlow(flow.EIWFlow):
    """An `EIWFlow` whose shuffles are of any of the `VARIANTS`. The rest starts the same whatever the variant."""

    def __init__(self, config: flow.FlowConfig, variant: str) -> None:
        super().__init__(replace(config, shuffle="none", backprop="stored"))
        self.memory = Memory()
        self.levels[0].register_forward_pre_hook(self._forget)
        channels, earlier = config.image_shape[0], 0
        for index, (leaving, _, _) in enumerate(self.latent_shapes[:-1]):
            level = cast(flow.Level, self.levels[index])
            channels *= 4
            place = Place(self.memory, index, earlier)
            with torch.random.fork_rng():
                if variant in CANDIDATES:
                    level.bijections.append(matched(CANDIDATES[variant], channels, place))
                elif (shuffle := make_shuffle(variant, channels)) is not None:
                    level.bijections.append(shuffle)
            level.register_forward_hook(self._remember)
            channels -= leaving
            earlier += 3 * leaving

    def decode(self, latents: list[Tensor], *rest: Any) -> Tensor:
        self.memory.left = [channel_descriptors(z.to(self._trunk_dtype())) for z in latents[:-1]]
        return super().decode(latents, *rest)

    def initialize(self, x: Tensor) -> None:
        self._forget()
        super().initialize(x)

    def _forget(self, *_: Any) -> None:
        self.memory.left = []

    def _remember(self, level: nn.Module, given: Any, out: tuple[Tensor, ...]) -> None:
        leaving = self.latent_shapes[len(self.memory.left)][0]
        self.memory.left.append(channel_descriptors(out[0][:, -leaving:]))


def train(args: argparse.Namespace, variant: str, seed: int, warm: str = "", save: str = "") -> dict[str, Any]:
    """One run; run in the child. Gives a row of the JSON file but for what names the run.

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
    """Of the full one: warmed up over a twelfth of the steps, then, if it falls, to zero by a cosine."""
    rises = max(1, steps // 12)
    if step < rises or not falls:
        return min(1.0, (step + 1) / rises)
    return 0.5 + 0.5 * math.cos(math.pi * (step - rises) / (steps - rises))


def take_step(model: BenchmarkFlow, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    """One step of training, as the workers take it; gives the batch's bits/dim."""
    out = model(x)
    bits = flow.bits_per_dim(out.log_prob, model.dims).mean()
    optimizer.zero_grad()
    (bits + _PENALTY * out.penalty.mean()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
    optimizer.step()
    return bits.item()


def measure_times(args: argparse.Namespace, variants: Sequence[str]) -> dict[str, float]:
    """Median CPU seconds of a step of each variant, the variants in turn; run in the child."""
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
    """The flow that carries the shuffles."""
    conditioner = flow.ConditionerConfig(hidden=args.hidden)
    return flow.FlowConfig(shape, 3, 4, conditioner, conditioner_dtype="bfloat16")


def summarize(rows: Sequence[dict[str, Any]], times: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each variant, the best first; `rows` are those of one setting."""
    bits: dict[str, dict[int, float]] = {}
    for row in rows:
        bits.setdefault(row["variant"], {})[row["seed"]] = row["bits_per_dim"]
    base = bits.get(_BASE, {})
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
    """Mean and its standard error; NaN where there are too few values."""
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def print_table(table: Sequence[dict[str, Any]]) -> None:
    """The summary, in plain text."""
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
    parser.add_argument("--quick", action="store_true", help="a smoke run: tiny, and three variants unless told")
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
        results.run_times(sorted({*variants, _BASE}))
    print_table(summarize(results.runs(), results.times()))


class Results:
    """The JSON-lines file, and the child processes whose results go there.

    A line is known by its settings (and the data's fingerprint), and by the recipe of its variant: change either, and
    it is run anew.
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
            self._append({**row, "time_to_plain": seconds / times[_BASE]})

    def runs(self) -> list[dict[str, Any]]:
        """What is known of runs."""
        return [row for row in self._rows() if "seed" in row]

    def times(self) -> dict[str, float]:
        """Time of a step of each variant, that of `plain` being 1."""
        return {row["variant"]: row["time_to_plain"] for row in self._rows() if "time_to_plain" in row}

    def _warm_file(self, seed: int) -> Path:
        told = digest({k: v for k, v in self.settings.items() if k not in ("steps", "images")})[:12]
        return self.file.with_name(f"{self.file.stem}-{told}-{seed}.pt")

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


def recipe_of(variant: str) -> dict[str, Any] | None:
    """What is not as in `plain`, as JSON holds it; None for the kinds of the package."""
    if variant not in CANDIDATES:
        return None
    return {k: v for k, v in asdict(CANDIDATES[variant]).items() if v != getattr(Recipe(), k)}


if __name__ == "__main__":
    main()
