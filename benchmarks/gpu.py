"""What a GPU makes of the presets: speed as a share of its peak, and the largest batch and depth in a given memory.

    python -m benchmarks.gpu speed [--presets eiw eiw-small glow jet] [--seconds 2] [--peak 989]
    python -m benchmarks.gpu largest [--gigabytes 8] [--seconds 30]

A part of `benchmarks/gpu.sh`. It needs torch and safetensors alone, and prints a table in Markdown:

- speed: forward and backward with conditioners in bfloat16, at batches that are halved until they fit. FLOPs are
  those of convolutions and matrix products in one step as it ran. MFU is the share of the peak that "stored" needs:
  what other modes compute again does not count as useful.
- largest: batches of the preset `eiw-small`, and steps a level of a Glow at batch 64, doubled until this process has
  used `--gigabytes`, or a doubling has taken a fourth of `--seconds`: then the last one that was tried is the answer.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from eiwtrain import flow

MODES = ("stored", "checkpointed", "invertible")
BATCHES = {"eiw": 64, "eiw-small": 256, "eiw-tiny": 256, "glow": 256, "jet": 64}
SIDES = {"jet": 64}  # of the data set that the preset is for; else 32
BLOCK_BATCH = 64  # of the depths that are tried
DRY = 3  # doublings without a GPU, whose memory would never end


class Flops(TorchDispatchMode):
    """Counts the FLOPs of convolutions and matrix products, in the backward pass too."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="What a GPU makes of the presets.")
    parser.add_argument("what", choices=("speed", "largest"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--presets", nargs="+", choices=BATCHES, default=["eiw", "eiw-small", "glow", "jet"])
    parser.add_argument("--batch", type=int, help="images, whatever the preset")
    parser.add_argument("--seconds", type=float, help="of each row of speed (2), or of largest in all (30)")
    parser.add_argument("--peak", type=float, help="of the GPU in dense bfloat16, TFLOP/s (default: as published)")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="that largest may use")
    args = parser.parse_args(argv)
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = False
    device = torch.device(args.device)
    if args.what == "speed":
        print(speed(args.presets, device, args.batch, args.seconds or 2.0, args.peak or peak_of(device)))
    else:
        print(largest(device, args.gigabytes, args.seconds or 30.0))
    return 0


def peak_of(device: torch.device) -> float | None:
    """Return the published peak of a GPU, TFLOP/s; None for another, or where the package's table is not there."""
    if device.type == "cpu":
        return None
    with contextlib.suppress(ImportError):
        from eiwtrain.driver.costs import GPUS

        name = torch.cuda.get_device_name(device)
        found = [gpu.flops_per_second / 1e12 for gpu in GPUS if gpu.name.split()[0] in name]
        return found[-1] if found else None
    return None


def speed(presets: list[str], device: torch.device, batch: int | None, seconds: float, peak: float | None) -> str:
    """Return the table of speeds."""
    lines = [
        "| preset | mode | batch | images/s | ms a step | GFLOP an image | TFLOP/s | MFU | peak GB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in presets:
        useful = 0.0
        for mode in ("stored", "invertible"):
            side = SIDES.get(name, 32)
            changes = {"image_shape": [3, side, side], "backprop": mode, "conditioner_dtype": "bfloat16"}
            config = flow.FlowConfig.from_dict(flow.preset(name, changes))
            images = batch or BATCHES[name]
            while (row := _fits(measured, config, images, device, seconds)) is None and images > 1:
                images //= 2
            if row is None:
                lines.append(f"| {name} | {mode} | | out of memory | | | | | |")
                continue
            each, flops, gigabytes = row
            flops /= images
            useful = flops if mode == "stored" else useful
            share = f"{useful * images / each / 1e12 / peak:.1%}" if peak and useful else ""
            lines.append(
                f"| {name} | {mode} | {images} | {images / each:,.0f} | {1e3 * each:,.1f} | {flops / 1e9:,.2f} | "
                f"{flops * images / each / 1e12:,.2f} | {share} | {gigabytes:.2f} |"
            )
    return "\n".join(lines)


def measured(config: flow.FlowConfig, images: int, device: torch.device, seconds: float) -> tuple[float, float, float]:
    """Return the seconds and FLOPs of a step, and the most memory that it needed, GB (of a GPU)."""
    step = step_of(config, images, device)
    with Flops() as flops:
        step()
    _wait(device)
    times: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    while not times or sum(times) < seconds:
        began = time.perf_counter()
        step()
        _wait(device)
        times.append(time.perf_counter() - began)
    used = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    return sorted(times)[len(times) // 2], float(flops.total), used


def largest(device: torch.device, gigabytes: float, seconds: float) -> str:
    """Return the table of the largest batch and depth."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total), device)
    lines = [
        f"In {gigabytes:g} GB.",
        "",
        "| mode | images of `eiw-small` | steps a level of a Glow, batch 64 |",
        "|---|--:|--:|",
    ]
    each, dry = seconds / (2 * len(MODES)), device.type == "cpu"
    fields: dict[str, Any] = {"image_shape": [3, 32, 32], "conditioner_dtype": "bfloat16"}
    small = flow.FlowConfig.from_dict(flow.preset("eiw-tiny" if dry else "eiw-small", fields))
    glow = flow.FlowConfig.from_dict(
        fields | {"levels": 3, "shuffle": "none", "conditioner": {"hidden": 8 if dry else 128}}
    )

    def try_batch(mode: Any, n: int) -> None:
        step_of(replace(small, backprop=mode), n, device)()

    def try_depth(mode: Any, n: int) -> None:
        step_of(replace(glow, backprop=mode, steps=n), 2 if dry else BLOCK_BATCH, device)()

    for mode in MODES:
        images = doubled(partial(try_batch, mode), 1 if dry else 16, device, each)
        lines.append(f"| {mode} | {images} | {doubled(partial(try_depth, mode), 1, device, each)} |")
    return "\n".join(lines)


def doubled(attempt: Callable[[int], None], first: int, device: torch.device, seconds: float) -> str:
    """Return the largest n, a multiple of `first` by a power of two, for which the attempt fits; `>=` it if the time
    ended first."""

    def fits(n: int) -> bool:
        attempt(n)
        _wait(device)
        return True

    n, began = first, time.perf_counter()
    for _ in range(DRY if device.type == "cpu" else 40):
        now = time.perf_counter()
        if not _fits(fits, n):
            return f"{n // 2:,}" if n > first else f"under {n:,}"
        if time.perf_counter() - now > seconds / 4 or time.perf_counter() - began > seconds:
            break
        n *= 2
    else:
        n //= 2
    return f">= {n:,}"


def step_of(config: flow.FlowConfig, images: int, device: torch.device) -> Callable[[], None]:
    """Return a function that makes a training step of a new flow on random pixels."""
    torch.manual_seed(0)
    model = flow.EIWFlow(config).to(device)
    pixels = torch.randint(0, 256, (images, *config.image_shape), dtype=torch.uint8, device=device)
    noise = torch.rand(images, *config.noise_shape, device=device)

    def step() -> None:
        model.zero_grad()
        (-model.log_prob(pixels, noise).mean()).backward()

    return step


def _fits(work: Callable[..., Any], *args: Any) -> Any:
    """Return the result of `work`; None if memory is short."""
    try:
        return work(*args)
    except RuntimeError as e:
        if "out of memory" not in str(e) and "ALLOC" not in str(e):
            raise
    torch.cuda.empty_cache()
    return None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
