"""One training step, forward and backward, beside other flow libraries at equal size: speed, operations, memory.

    pip install --no-deps normflows==1.7.3 nflows==0.14 FrEIA==0.2 memcnn==1.5.2     # the peers, if you want them
    python -m benchmarks.step [--seconds 60] [--tables small large eiw] [--device cuda] [--dtype bfloat16]
                              [--batch 256] [--json FILE]
    python -m benchmarks.step --rows FILE                            # the tables of an earlier run's --json

Tables:

- small, large: Glow on 32x32 images, 3 levels of 4 steps with 64 hidden channels, and of 16 with 128, in the peers
  (see `peers`) and in our flow: with backprop in each mode, and stored with each shuffle. All have rectifiers, and no
  shuffle where a row names none. "default" is a FlowConfig as it comes: SiLU, soft shuffle, invertible. Our flow has a
  network in the prior of each split, as large as a coupling's; the peers have none, so "plain prior" leaves it out.
- eiw: the preset `eiw-small` in each mode, and in the way of its authors' program (see `backprop_subject`).

Not for "auto", any point between stored and invertible, nor for depth: `benchmarks.backprop`. Nor for the optimizer and
all else of a step of training: `benchmarks.overhead`.

The step is the mean of -log p(x) over a batch of reals (eiw: of pixels and noise), and its gradients. All rows of a
table share a process with the workers' allocator setting, and take turns, for `--seconds` a table. With `--dtype
bfloat16`, the default on a GPU, networks are bf16: ours by `conditioner_dtype`, the peers' by torch's autocast around
the forward pass.

What a row of `--json` holds; null where it could not be measured:

- table, name, note (what is missing, or wrong: a loss or gradient that is not finite, a parameter without gradient);
- parameters, batch, device, dtype;
- operations: those that a step starts, views not counted; flops, as torch counts convolutions and matrix products;
- kept_bytes: still allocated after the forward pass; peak_bytes: the most that a step has allocated at once, above the
  parameters and the batch;
- seconds: of a step, the median over rounds, on a CPU of CPU time of the one thread; images_per_second;
- to_normflows: images/s, ratio to normflows; to_first: time, ratio to the table's first row of ours. Both are
  [median, quartile, quartile] over rounds of the ratio within the round.

All but the times are counted, and on a CPU come out the same in every run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks import environments, measuring, peers
from benchmarks.backprop_subject import NETWORKS, Subject
from eiwtrain import flow
from eiwtrain.driver import counting
from eiwtrain.flow.config import BACKPROP_MODES, SHUFFLES
from eiwtrain.on_ray.session import WORKER_ENV

Row = dict[str, Any]

MODES = tuple(mode for mode in BACKPROP_MODES if mode != "auto")
FIRST, PLAIN = "ours, stored", "ours, plain prior"
ON_GPU = 16
"""How many times the batch of a CPU a GPU gets by default."""


@dataclass(frozen=True)
class Size:
    """A Glow on 32x32 images, and the images of a batch on a CPU."""

    steps: int
    hidden: int
    batch: int
    levels: int = 3
    side: int = 32


SIZES = {"small": Size(4, 64, 32), "large": Size(16, 128, 16)}
EIW = "eiw"
EIW_BATCH = 4
TABLES = (*SIZES, EIW)


def candidates(table: str, size: Size | None = None) -> dict[str, tuple[flow.FlowConfig, str]]:
    """Return the rows of a table by name: the config, and the mode of backprop, or the peer."""
    if table == EIW:
        changes: dict[str, Any] = {"image_shape": [3, 32, 32]}
        if size is not None:  # a test's
            changes = {"image_shape": [3, size.side, size.side], "levels": size.levels, "units": 1, "steps": size.steps}
            changes["conditioner"] = {"hidden": size.hidden, "depth": 1, "growth": 4}
        config = flow.FlowConfig.from_dict(flow.preset("eiw-small", changes))
        modes = (MODES[0], NETWORKS, *MODES[1:])
        return {f"ours, {mode}" if mode in MODES else f"{mode}, the authors' way": (config, mode) for mode in modes}
    size = size or SIZES[table]
    config = flow.FlowConfig(
        image_shape=(3, size.side, size.side),
        levels=size.levels,
        steps=size.steps,
        conditioner=flow.ConditionerConfig(hidden=size.hidden, activation="relu"),
        shuffle="none",
    )
    usual = replace(config, conditioner=flow.ConditionerConfig(hidden=size.hidden), shuffle=flow.FlowConfig.shuffle)
    return {
        **{f"ours, {mode}": (config, mode) for mode in MODES},
        **{f"ours, {kind} shuffle": (replace(config, shuffle=kind), "stored") for kind in SHUFFLES if kind != "none"},
        f"ours, {usual.conditioner.activation}": (replace(usual, shuffle="none"), "stored"),
        PLAIN: (config, "stored"),
        "ours, default": (usual, usual.backprop),
        **{peer: (config, peer) for peer in peers.PEERS},
    }


class Candidate:
    """A model, and its training step on a batch."""

    def __init__(self, config: flow.FlowConfig, mode: str, batch: int, device: torch.device) -> None:
        self.device = device
        subject = Subject(config, mode, batch, device)
        self.model: nn.Module = subject.model
        self.batch = subject.batch
        self.loss: Callable[..., Tensor] = subject.loss
        if mode in peers.PEERS:
            self.model = peers.glow(mode, subject.model.config).to(device)
            for module in self.model.modules():
                if isinstance(module, nn.Conv2d) and not module.weight.any():
                    nn.init.normal_(module.weight, std=0.02)  # as Subject does, and why
            peer_casts = config.conditioner_dtype == "bfloat16" and mode != "memcnn"  # which has our networks

            def loss(x: Tensor) -> Tensor:
                with torch.autocast(device.type, torch.bfloat16, enabled=peer_casts):
                    return self.model(x).mean()

            self.loss = loss
            with torch.no_grad():
                loss(*self.batch)  # actnorm starts from the first batch

    def without_prior(self) -> None:
        """Make what leaves at the splits standard normal, without a network that predicts it from what stays."""
        for level in list(cast(Any, self.model).levels)[:-1]:
            level.prior = None

    def step(self) -> Tensor:
        """Return the loss; its gradients are added to those of the parameters."""
        loss = self.loss(*self.batch)
        loss.backward()
        return loss

    def seconds(self) -> float:
        """Return the seconds of a step: by the device's clock."""
        self.model.zero_grad()
        began = measuring.now(self.device)
        self.step()
        return measuring.now(self.device) - began

    def counted(self) -> Row:
        """Return what is counted of a step, and what is wrong with it."""
        loss = self.step()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        without = sum(p.grad is None for p in trained)
        finite = all(t is None or bool(t.isfinite().all()) for t in (loss, *(p.grad for p in trained)))
        notes = ["not finite"] * (not finite) + [f"{without} parameters without gradient"] * (without > 0)
        self.model.zero_grad()
        with counting.Started() as started:
            self.step()
        self.model.zero_grad()
        kept, _ = measuring.allocated(lambda: self.loss(*self.batch), self.device)
        _, peak = measuring.allocated(self.step, self.device)
        self.model.zero_grad()
        return {
            "note": "; ".join(notes),
            "parameters": sum(p.numel() for p in trained),
            "operations": started.operations,
            "flops": started.flops,
            "kept_bytes": kept,
            "peak_bytes": peak,
        }


def measure(
    table: str,
    batch: int,
    device: str = "cpu",
    dtype: str = "float32",
    seconds: float = 0.0,
    size: Size | None = None,
) -> list[Row]:
    """Return the rows of a table, measured in this process with one thread.

    Args:
        seconds: of all rounds together; at least three are made.
        size: in place of the table's own.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # memcnn uses what torch deprecates
    rows: dict[str, Row] = {}
    made: dict[str, Candidate] = {}
    for name, (config, mode) in candidates(table, size).items():
        config = replace(config, conditioner_dtype=cast(Any, dtype))
        rows[name] = {"table": table, "name": name, "batch": batch, "device": device, "dtype": dtype}
        rows[name] |= {"note": "not installed"}
        rows[name] |= dict.fromkeys(("parameters", "operations", "flops", "kept_bytes", "peak_bytes"))
        rows[name] |= dict.fromkeys(("seconds", "images_per_second", "to_normflows", "to_first"))
        if mode not in peers.PEERS or peers.installed(mode):
            made[name] = Candidate(config, mode, batch, torch.device(device))
            if name == PLAIN:
                made[name].without_prior()
            rows[name] |= made[name].counted()
    times = measuring.take_turns({name: one.seconds for name, one in made.items()}, seconds)
    for name, of_name in times.items():
        rows[name]["seconds"] = statistics.median(of_name)
        rows[name]["images_per_second"] = batch / rows[name]["seconds"]
        rows[name]["to_first"] = measuring.ratio(of_name, times[FIRST])
        if "normflows" in times:
            rows[name]["to_normflows"] = measuring.ratio(times["normflows"], of_name)
    return list(rows.values())


HEADER = ("parameters", "operations", "GFLOP", "kept MB", "peak MB", "images/s", "to normflows", "time to stored")


def text(rows: list[Row]) -> str:
    """Return the rows as Markdown, a table each."""
    pages = []
    for table in dict.fromkeys(row["table"] for row in rows):
        own = [row for row in rows if row["table"] == table]
        title = f"{table}, batches of {own[0]['batch']}, {own[0]['dtype']} on {own[0]['device']}"
        cells = [[row["name"], *(_cells(row) if row["seconds"] else [row["note"], *[""] * 7])] for row in own]
        wrong = [f"{row['name']}: {row['note']}" for row in own if row["note"] and row["seconds"]]
        pages.append("\n\n".join([title, measuring.markdown((table, *HEADER), cells), *wrong]))
    return "\n\n".join(pages)


def _cells(row: Row) -> list[str]:
    return [
        f"{row['parameters']:,}",
        f"{row['operations']:,}",
        f"{row['flops'] / 1e9:.3g}",
        f"{row['kept_bytes'] / 1e6:.3g}",
        f"{row['peak_bytes'] / 1e6:.3g}",
        f"{row['images_per_second']:.4g}",
        *(_spread(row[name]) for name in ("to_normflows", "to_first")),
    ]


def _spread(ratio: list[float] | None) -> str:
    return "" if ratio is None else "{:.2f} ({:.2f} to {:.2f})".format(*ratio)


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; write the rows if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("task", nargs="?", type=json.loads, help=argparse.SUPPRESS)  # a child's
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--seconds", type=float, default=60, help="of the rounds of a table")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the networks; default: bfloat16 on a GPU")
    default = ", ".join(f"{table} {size.batch}" for table, size in SIZES.items())
    help_ = f"images; default on a CPU: {default}, {EIW} {EIW_BATCH}; on a GPU {ON_GPU} times as many"
    parser.add_argument("--batch", type=int, help=help_)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--rows", type=Path, help="file that --json wrote: print it, and measure nothing")
    args = parser.parse_args(arguments)
    if args.task:
        print(json.dumps(measure(**args.task)))
        return 0
    if args.rows:
        print(text(json.loads(args.rows.read_text())))
        return 0
    rows: list[Row] = []
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    for table in args.tables:
        batch = (SIZES[table].batch if table in SIZES else EIW_BATCH) * (ON_GPU if args.device == "cuda" else 1)
        task = {"table": table, "batch": args.batch or batch, "device": args.device, "dtype": dtype}
        task["seconds"] = args.seconds
        try:
            rows += environments.child(sys.executable, "benchmarks.step", task, WORKER_ENV)
        except environments.FailedError as e:
            sys.exit(f"error: {table}: {e.line}")
        print(text([row for row in rows if row["table"] == table]), end="\n\n", flush=True)
    packages = environments.versions("torch", *peers.PEERS)
    print(environments.describe(environments.machine(), packages))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
