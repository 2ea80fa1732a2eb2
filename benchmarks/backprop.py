"""Memory and time of a training step against depth, by backpropagation mode. Not for peers, which are in `step`.

    python -m benchmarks.backprop [--model eiw] [--quick] [--device cuda] [--json FILE] [--plot FILE] [--allocators]
                                  [--depths 8 16 32 64 --hidden 128 --batch 32 --resolution 32 --dtype float32]
    python -m benchmarks.backprop --rows FILE [--plot FILE]    # the table and the picture of an earlier run's --json

Models, and what is their depth, the number of couplings:

- glow: a level of Glow steps (actnorm, invertible 1x1 convolution, affine coupling) under a standard normal prior. A
  second table goes through budgets of "auto".
- eiw: the preset `eiw` on pixels and noise, whole at depth 74; at 34 and 13 its units are shorter and nothing else
  differs. "checkpointed nets" is the way of the authors' program: the network of each coupling runs again, and the rest
  is stored. "checkpointed", ours, runs whole steps again, cross-unit networks, and the dequantizer.

A training step is the loss and its gradients, without an optimizer. Rows of "auto" have a budget: a share of what
"stored" keeps.

What a row of `--json` holds; null where it does not apply:

- model, mode, depth, budget (the share), budget_bytes, allocator, device;
- seconds: of a step; on a CPU those of the process's one thread, as others may share the machine. Every row has
  processes of its own, one a round, and the rows take turns (with `--quick`, they share one); this is the median over
  rounds of the process's median;
- to_stored: the median over rounds of the ratio to the same round's "stored";
- rss_bytes: what steps added to their process's high-water mark, with the allocator's slack and the convolutions'
  workspace; CPU only, not with `--quick`;
- peak_bytes: the most that a step has allocated at once through torch, above what stood before it (parameters and
  batch). The parameters' gradients, gradient_bytes, are in it: they alone make it grow with depth when nothing is kept;
- saved_bytes: what is still allocated after the forward pass, no matter what holds it: tensors for the backward pass,
  and the loss. Saved-tensor hooks would not see what an autograd function keeps on its own;
- flops: of forward and backward, as torch counts convolutions and matrix products; flops_to_stored;
- conditioner_forwards: how often a coupling's network is run in a step, the mean over couplings;
- gradient_error: of the networks' gradients, relative to those of "stored"; one relu that rounding turns is 1e-4.

From peak_bytes on it is counted, once, in another process, and on a CPU comes out the same each time.

The rows are measured with glibc set to keep freed memory, as in the workers; `--allocators` adds rows without. On
a GPU it does not matter.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks import backprop_report as report
from benchmarks.backprop_subject import EIW_STEPS, METHODS, Setting, Subject, subject_of
from benchmarks.measuring import allocated, now
from eiwtrain.driver import counting
from eiwtrain.on_ray.session import WORKER_ENV

BUDGETS = (0.0, 0.25, 0.5, 0.75, 1.0)
SIZES: dict[str, dict[str, tuple[Any, Any]]] = {
    "glow": {
        "depths": ([8, 16, 32, 64], [4, 8]),
        "hidden": (128, 64),
        "batch": (32, 16),
        "resolution": (32, 32),
        "repeat": (4, 2),
        "rounds": (3, 1),
    },
    "eiw": {
        "depths": ([*EIW_STEPS], [min(EIW_STEPS)]),
        "hidden": (48, 6),
        "batch": (2, 2),
        "resolution": (32, 16),
        "repeat": (2, 1),
        "rounds": (1, 1),
    },
}
"""Sizes of each model by default, and with --quick."""


def clock(setting: Setting) -> dict[str, Any]:
    """Return seconds of a step, and what steps add to the process's high-water mark, if this is the first in it."""
    subject = subject_of(setting)

    def seconds(*batch: Any) -> float:
        subject.model.zero_grad()
        began = now(subject.device)
        subject.loss(*batch).backward()
        return now(subject.device) - began

    if setting.batch > 2:
        seconds(*(t[:2] for t in subject.batch))  # loads code
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds(*subject.batch)  # the first is slower
    measured = statistics.median(seconds(*subject.batch) for _ in range(setting.repeat))
    return {"seconds": measured, "rss_bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)}


def count(settings: list[Setting]) -> list[dict[str, Any]]:
    """Return the counted values of each setting; the "stored" of a depth must come before the others."""
    counted = []
    stored: dict[str, Any] = {}
    exact: list[torch.Tensor] = []
    for setting in settings:
        if setting.budget is not None:
            setting = replace(setting, budget_bytes=round(setting.budget * stored["saved_bytes"]))
        measured, gradients = _count(subject_of(setting))
        if setting.mode == "stored":
            stored, exact = measured, gradients
        measured["budget_bytes"] = setting.budget_bytes
        measured["flops_to_stored"] = measured["flops"] / stored["flops"]
        measured["gradient_error"] = _relative_error(gradients, exact)
        counted.append(measured)
        gc.collect()
    return counted


def _count(subject: Subject) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Return the counted values of a setting by itself, and the gradients of its networks."""
    saved, _ = allocated(lambda: subject.loss(*subject.batch), subject.device)
    _, peak = allocated(lambda: subject.loss(*subject.batch).backward(), subject.device)
    named = subject.model.named_parameters()
    gradients = [cast(torch.Tensor, p.grad) for name, p in named if ".conditioner." in name]
    subject.model.zero_grad()

    runs = 0

    def counted(network: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            nonlocal runs
            runs += 1
            return network(*inputs)

        return run

    for conditioner in subject.networks:
        cast(Any, conditioner).network = counted(conditioner.network)  # no hook, which a checkpoint would pass over
    with counting.Started() as started:
        subject.loss(*subject.batch).backward()
    measured = {
        "peak_bytes": peak,
        "gradient_bytes": sum(p.nbytes for p in subject.model.parameters()),
        "saved_bytes": saved,
        "flops": started.flops,
        "conditioner_forwards": runs / len(subject.networks),
    }
    return measured, gradients


def _relative_error(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    difference = sum((a.double() - b.double()).square().sum() for a, b in zip(ours, exact, strict=True))
    return float((difference / sum(b.double().square().sum() for b in exact)) ** 0.5)


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """Return the settings to measure, in the order that `count` needs."""
    sizes = {name: getattr(args, name) for name in Setting.__annotations__ if hasattr(args, name) and name != "budget"}
    found = []
    for depth in args.depths:
        through = args.model == "glow" and depth == args.depths[-1]
        budgets = {args.budget, *(BUDGETS if through else ())}
        plan: list[tuple[str, float | None]] = [(mode, None) for mode in METHODS[args.model] if mode != "auto"]
        plan += [("auto", budget) for budget in sorted(budgets)]
        found += [Setting(mode=mode, depth=depth, budget=budget, budget_bytes=None, **sizes) for mode, budget in plan]
    return found


def rows_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure and return every row."""
    settings = settings_of(args)
    _say("counting")
    counted = _child("count", [asdict(s) for s in settings], WORKER_ENV)
    settings = [replace(s, budget_bytes=c["budget_bytes"]) for s, c in zip(settings, counted, strict=True)]

    allocators = {"cuda": {}} if args.device == "cuda" else {"workers' setting": WORKER_ENV}
    if args.allocators:
        allocators |= {"glibc's default": {}}
    clocked: dict[tuple[str, Setting], list[dict[str, Any]]] = {(a, s): [] for a in allocators for s in settings}
    for turn in range(args.rounds):
        for allocator, environment in allocators.items():
            for group in [settings] if args.quick else [[s] for s in settings]:
                _say(f"round {turn + 1} of {args.rounds}, {allocator}, depth {group[0].depth}, {group[0].mode}")
                times = _child("clock", [asdict(s) for s in group], environment)
                for setting, measured in zip(group, times, strict=True):
                    clocked[allocator, setting].append(measured)
    _say("")

    rows = []
    for allocator in allocators:
        seconds = {s: [run["seconds"] for run in clocked[allocator, s]] for s in settings}
        stored = {s.depth: seconds[s] for s in settings if s.mode == "stored"}
        for setting, counts in zip(settings, counted, strict=True):
            ratios = [a / b for a, b in zip(seconds[setting], stored[setting.depth], strict=True)]
            rss = [run["rss_bytes"] for run in clocked[allocator, setting]]
            has_rss = not args.quick and args.device == "cpu"
            measured = {
                "seconds": statistics.median(seconds[setting]),
                "to_stored": statistics.median(ratios),
                "rss_bytes": statistics.median(rss) if has_rss else None,
            }
            known = {name: getattr(setting, name) for name in ("model", "mode", "depth", "budget", "device")}
            rows.append(known | {"allocator": allocator} | measured | counts)
    order = {mode: i for i, mode in enumerate(METHODS[args.model])}
    return sorted(rows, key=lambda r: (r["allocator"] != rows[0]["allocator"], r["depth"], order[r["mode"]]))


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _child(what: str, task: Any, environment: dict[str, str]) -> Any:
    command = [sys.executable, "-m", "benchmarks.backprop", f"--{what}", json.dumps(task)]
    others = {name: value for name, value in os.environ.items() if name not in WORKER_ENV}
    child = subprocess.run(command, env=others | environment, capture_output=True, text=True)
    if child.returncode:
        sys.exit(f"{what} {task}\n{child.stderr}")
    return json.loads(child.stdout.splitlines()[-1])


def main() -> None:
    """Print the tables; write the rows and the plot if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backprop", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=tuple(SIZES), default="glow")
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute")
    for name in SIZES["glow"]:
        nargs = "+" if name == "depths" else None
        defaults = "; ".join("{}: {}, quick {}".format(model, *SIZES[model][name]) for model in SIZES)
        parser.add_argument(f"--{name}", type=int, nargs=nargs, help=f"default of {defaults}")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="of the conditioners")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--budget", type=float, default=0.5, help="of auto at every depth, a share")
    parser.add_argument("--allocators", action="store_true", help="also under glibc's default setting")
    parser.add_argument("--json", help="file to write the rows to")
    parser.add_argument("--plot", help="file to draw to")
    parser.add_argument("--rows", help="file that --json wrote: print and draw it, and measure nothing")
    parser.add_argument("--count", type=json.loads, help=argparse.SUPPRESS)  # a child's
    parser.add_argument("--clock", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.count:
        print(json.dumps(count([Setting(**s) for s in args.count])))
        return
    if args.clock:
        print(json.dumps([clock(Setting(**s)) for s in args.clock]))
        return
    if args.allocators and args.device == "cuda":
        parser.error("--allocators is about glibc, which does not matter on a GPU")
    for name, (full, quick) in SIZES[args.model].items():
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
    if args.model == "eiw" and (unknown := set(args.depths) - set(EIW_STEPS)):
        parser.error(f"--depths: {min(unknown)} is not one of {', '.join(map(str, EIW_STEPS))}, those of eiw")
    rows = json.loads(Path(args.rows).read_text()) if args.rows else rows_of(args)
    print(report.tables(rows, args.budget))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    if args.plot:
        report.plot(rows, args.budget, args.plot)


if __name__ == "__main__":
    main()
