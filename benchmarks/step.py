"""One training step (forward and backward) by backpropagation mode, with and without the workers' allocator setting.

    python -m benchmarks.step [--levels 3 --steps 4 --hidden 64 --batch 16 --threads 1] [--device cuda] [--json FILE]

Every row is measured in a process of its own, round after round in turn, and reported as the median over rounds and as
its ratio to stored activations under the same allocator. On a GPU, glibc's allocator does not matter: one setting.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from eiwtrain.launch import WORKER_ENV

MODES = ("stored", "checkpointed", "invertible")


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step and the peak of memory above what stands before it, bytes; run in the child."""
    import resource

    import torch

    from eiwtrain import flow

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    config = flow.FlowConfig(
        image_shape=(3, args.resolution, args.resolution),
        levels=args.levels,
        steps=args.steps,
        conditioner=flow.ConditionerConfig(hidden=args.hidden),
        backprop=args.mode,
        conditioner_dtype=args.dtype,
    )
    model = flow.EIWFlow(config).to(device)
    x = torch.rand(args.batch, *config.image_shape, device=device) - 0.5
    model.initialize(x[:2])

    def memory() -> float:
        if device.type == "cuda":
            return float(torch.cuda.max_memory_allocated())
        return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def step() -> float:
        began = time.perf_counter()
        (-model(x).log_prob.mean()).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    before = memory()
    step()
    seconds = statistics.median(step() for _ in range(args.repeat))
    return {"seconds": seconds, "peak_bytes": memory() - before}


def main() -> None:
    """Print the table; write JSON rows if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.split("\n")[0])
    for name, default in (("levels", 3), ("steps", 4), ("hidden", 64), ("batch", 16), ("resolution", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=8, help="steps a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes a row")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the conditioners")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", help="file to write the rows to")
    parser.add_argument("--mode", help=argparse.SUPPRESS)  # the child's
    args = parser.parse_args()
    if args.mode:
        print(json.dumps(measure(args)))
        return

    allocators = {"workers' setting": WORKER_ENV} | ({"glibc's default": {}} if args.device == "cpu" else {})
    runs: dict[tuple[str, str], list[dict[str, float]]] = {(a, m): [] for a in allocators for m in MODES}
    for _ in range(args.rounds):
        for allocator, mode in runs:
            command = [sys.executable, "-m", "benchmarks.step", *sys.argv[1:], "--mode", mode]
            child = subprocess.run(command, env=os.environ | allocators[allocator], capture_output=True, text=True)
            if child.returncode:
                sys.exit(child.stderr)
            runs[allocator, mode].append(json.loads(child.stdout.splitlines()[-1]))
    rows: list[dict[str, Any]] = []
    for (allocator, mode), measured in runs.items():
        seconds = statistics.median(m["seconds"] for m in measured)
        stored = statistics.median(m["seconds"] for m in runs[allocator, "stored"])
        peak = statistics.median(m["peak_bytes"] for m in measured)
        rows.append(
            {
                "allocator": allocator,
                "mode": mode,
                "seconds": seconds,
                "to_stored": seconds / stored,
                "peak_bytes": peak,
            }
        )
    print(f"{'allocator':18} {'backprop':13} {'s/step':>8} {'to stored':>10} {'peak MB':>9}")
    for r in rows:
        cells = f"{r['seconds']:8.3f} {r['to_stored']:10.2f} {r['peak_bytes'] / 1e6:9.0f}"
        print(f"{r['allocator']:18} {r['mode']:13} {cells}")
    if args.json:
        with open(args.json, "w") as f:
            json.dump(rows, f, indent=1)


if __name__ == "__main__":
    main()
