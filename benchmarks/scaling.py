"""How training scales: a model of a step's time, checked here on one and two workers, and what it says of many GPUs.

    python -m benchmarks.scaling --json scaling.json      (some 5 minutes of two cores; --quick: under one)
    python -m benchmarks.scaling --no-measure --config configs/lsun.yaml --gpu H100

The formulas are `benchmarks.scaling_model`; what they mean, and what limits, is in docs/SCALING.md.

Measured here (`benchmarks.scaling_measure`): steps of the worker's own code, one process a core, alone, beside an
independent neighbour, and as a pair under gloo, in turn; and all-reduces by themselves. The fastest of all rounds
count, as what others do on the machine only adds. Predicted is the step beside a neighbour and the collectives on top.

Planned: everything about GPUs and their network is an assumption, named below with its source and set by an option:
nothing of it is measured yet.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import environments
from benchmarks.scaling_model import (
    Cluster,
    Job,
    Network,
    fetched_bytes,
    losses,
    restart_seconds,
    stall_seconds,
    step,
    write_seconds,
)
from eiwtrain.config import micro_batches

WORKERS = (1, 8, 64, 1024)
NODE = 8  # GPUs of a machine
EFFICIENCY = 0.8  # of a link's published rate that collectives get
NETWORKS = {  # bytes a second, one way: of a GPU to the others of its machine, and of the machine
    "L4": (32e9, 12.5e9),  # PCIe 4 x16; EC2 g6.48xlarge, 100 Gb/s
    "L40S": (32e9, 50e9),  # PCIe 4 x16; EC2 g6e.48xlarge, 400 Gb/s
    "A100 80 GB": (300e9, 50e9),  # NVLink 3; EC2 p4de.24xlarge, 400 Gb/s
    "H100 SXM": (450e9, 400e9),  # NVLink 4; EC2 p5.48xlarge, 3,200 Gb/s
    "H200": (450e9, 400e9),  # NVLink 4; EC2 p5en.48xlarge, 3,200 Gb/s
}
CALL, INSIDE_HOP, BETWEEN_HOP = 8.4e-6, 3.4e-6, 14e-6  # seconds; NCCL's own model, src/graph/tuning.cc (Simple)
CONNECTION = 85e6  # bytes a second of each request; Amazon S3 user guide, "Performance guidelines": 85 to 90 MB/s
COPY = 10e9  # bytes a second from a GPU to pinned memory; PCIe 4 x16 has 32e9
START = 25.6  # seconds from a killed node to the next step on a cluster that is joined (benchmarks/RESULTS.md, chaos)
SLOW_START = 120.0  # the same where images are pulled and many workers start; assumed
DECODED = {32: 22_774, 64: 7_604}  # images a second and core, PNG (benchmarks/RESULTS.md)
IMAGE_BYTES = {32: 4_148, 64: 9_883}  # in a shard of PNGs (benchmarks/RESULTS.md, writing shards)
IMAGES = {"lsun": 3_033_042, "imagenet": 1_281_149, "celeba": 162_770, "cifar": 50_000}  # for training
DAY = 86_400.0
MTBFS = {"week": 7 * DAY, "24 h": DAY, "6 h": DAY / 4}  # between two preemptions of one machine


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", action="append", help="default configs/lsun.yaml and configs/imagenet64.yaml")
    parser.add_argument("--quick", action="store_true", help="two settings, few rounds, one config: under a minute")
    parser.add_argument("--no-measure", action="store_true", help="only what the model says of GPUs")
    parser.add_argument("--rounds", type=int, help="default 6, quick 2")
    parser.add_argument("--steps", type=int, default=3, help="of each round and setting")
    parser.add_argument("--gpu", choices=[name.split()[0] for name in NETWORKS], default="A100")
    parser.add_argument(
        "--mfu", type=float, help="share of the peak that large products get (default: of driver.costs)"
    )
    parser.add_argument("--launch", type=float, help="seconds to start an operation (default: eiwtrain.driver.costs)")
    parser.add_argument("--nvlink", type=float, help="bytes/s of a GPU, one way (default: by --gpu)")
    parser.add_argument("--network", type=float, help="bytes/s of a machine, one way (default: by --gpu)")
    parser.add_argument("--connection", type=float, default=CONNECTION, help="bytes/s of a connection to the bucket")
    parser.add_argument("--start", type=float, default=START, help="seconds from a fault to the next step")
    parser.add_argument("--images-per-gpu", type=int, default=128, help="of a step, where the global batch grows")
    parser.add_argument("--json", type=Path, help="file to write everything to")
    args = parser.parse_args(argv)
    said: dict[str, Any] = {"machine": environments.machine(), "versions": environments.versions("eiwtrain", "torch")}
    if not args.no_measure:
        from benchmarks.scaling_measure import QUICK, SETTINGS, measure

        rounds = args.rounds or (2 if args.quick else 6)
        said["measured"] = measure(QUICK if args.quick else SETTINGS, rounds, args.steps, _say)
        print(measured_table(said["measured"]), end="\n\n")
    configs = args.config or ["configs/lsun.yaml", *([] if args.quick else ["configs/imagenet64.yaml"])]
    said["planned"] = []
    for path in configs:
        _say(f"counting {path}")
        job, cluster = job_of(path, args)
        planned = plan(job, cluster, args.images_per_gpu)
        said["planned"].append({"config": path, **planned})
        print(f"{path}, {args.gpu}\n\n{planned_table(planned)}", end="\n\n")
    print(environments.describe(said["machine"], said["versions"]))
    if args.json:
        args.json.write_text(json.dumps(said, indent=1) + "\n")
    return 0


def job_of(path: str, args: argparse.Namespace) -> tuple[Job, Cluster]:
    """What a config asks for, counted, and what it would run on.

    Raises:
        SystemExit: the config cannot be used.
    """
    from eiwtrain.config.file import load_config
    from eiwtrain.driver import costs
    from eiwtrain.train.engine import MOST_IN_BUCKET
    from eiwtrain.train.state import outline

    try:
        config = load_config(path)
    except (OSError, ValueError) as e:
        print(f"error: --config {path}: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    counted = costs.of(config)
    t, side = config.train, config.data.resolution
    gpu = next(gpu for gpu in costs.GPUS if gpu.name.startswith(args.gpu))
    inside, between = NETWORKS[gpu.name]
    inside, between = args.nvlink or inside * EFFICIENCY, args.network or between * EFFICIENCY
    job = Job(
        flops=counted.flops_per_image[counted.mode],
        forward_flops=counted.flops_per_image["stored"] / 3,  # backward is twice a forward
        operations=counted.operations[counted.mode],
        gradient_bytes=counted.gradient_bytes,
        buckets=math.ceil(counted.parameters / MOST_IN_BUCKET),
        tensors=len(list(outline(config, 3).parameters())),
        checkpoint_bytes=counted.checkpoint_bytes,
        zero_stage=t.zero_stage,
        image_bytes=of_side(IMAGE_BYTES, side, 2),
        images=next((n for name, n in IMAGES.items() if config.run.name.startswith(name)), 1_000_000),
        global_batch=t.global_batch,
        micro_batch=t.micro_batch,
        max_steps=t.max_steps,
        eval_every=config.eval.every,
        eval_images=config.eval.images,
        lanes=config.data.lanes,
        cache_bytes=config.data.cache_bytes,
        loader_workers=config.data.loader_workers,
        max_failures=config.run.max_failures,
        update_operations=counted.update_operations,
    )
    cluster = Cluster(
        network=Network(NODE, inside, between, CALL, INSIDE_HOP, BETWEEN_HOP),
        flops_per_second=gpu.flops_per_second * (args.mfu or costs.MFU),
        launch_seconds=args.launch or costs.LAUNCH,
        connection=args.connection,
        decoded=of_side(DECODED, side, -2),
        copy=COPY,
        start_seconds=args.start,
    )
    return job, cluster


def of_side(known: Mapping[int, float], side: int, power: int) -> float:
    """The figure of images of that side; of another than the known ones, from 64 by a power of the side."""
    return known.get(side, known[64] * (side / 64) ** power)


def plan(job: Job, cluster: Cluster, images_per_gpu: int) -> dict[str, Any]:
    """What the model says: {"fixed", "grown", "checkpoints", "losses"}, each a list of rows, and what they rest on."""
    grown = {n: replace(job, micro_batch=images_per_gpu, global_batch=n * images_per_gpu) for n in WORKERS}
    one_each = micro_batches(job.global_batch, job.micro_batch, 1)  # workers that make a step of one micro-batch each
    fixed = sorted({*(n for n in WORKERS if n <= job.global_batch), one_each, job.global_batch})
    alone = step(job, cluster, 1).images_per_second, step(grown[1], cluster, 1).images_per_second
    return {
        "job": asdict(job),
        "cluster": asdict(cluster),
        "alone": alone[1],
        "fixed": [step_row(job, cluster, n, alone[0]) for n in fixed],
        "grown": [step_row(grown[n], cluster, n, alone[1]) for n in WORKERS],
        "checkpoints": [
            {
                "workers": n,
                "bytes": job.checkpoint_bytes,
                "stall": stall_seconds(grown[n], cluster, n),
                "written": write_seconds(grown[n], cluster, n),
                "restart": restart_seconds(job, cluster),
            }
            for n in WORKERS[1:]
        ],
        "losses": [
            {"workers": n, "gpus_of_machine": node, "each": name, **_losses(grown[n], cluster, n, node, mtbf)}
            for n in WORKERS[1:]
            for node in (NODE, 1)
            for name, mtbf in MTBFS.items()
        ],
    }


def step_row(job: Job, cluster: Cluster, workers: int, alone: float) -> dict[str, Any]:
    """A step on so many workers; `alone` are the images a second of one."""
    one = step(job, cluster, workers)
    epochs = math.ceil(job.max_steps * job.global_batch / job.images)
    total, whole = job.images * job.image_bytes * epochs, fetched_bytes(job, workers, epochs, cluster.network)
    first = fetched_bytes(job, workers, 1, cluster.network) / (job.images * job.image_bytes)
    each = one.images_per_second / workers
    return asdict(one) | {
        "workers": workers,
        "global_batch": job.global_batch,
        "seconds": one.seconds,
        "efficiency": each / alone,
        "bucket": one.images_per_second * job.image_bytes * first,
        "bucket_cached": one.images_per_second * job.image_bytes * whole / total,
        "decode_cores": each / cluster.decoded,
    }


def _losses(job: Job, cluster: Cluster, workers: int, node: int, machine_mtbf: float) -> dict[str, Any]:
    """Return the losses at machines of `node` GPUs, which have that share of the network, for both start-up times."""
    network = replace(cluster.network, node=node, between=cluster.network.between * node / NODE)
    there = replace(cluster, network=network)
    slow = losses(job, replace(there, start_seconds=SLOW_START), workers, machine_mtbf)
    return asdict(losses(job, there, workers, machine_mtbf)) | {"slow_start": asdict(slow)}


def measured_table(measured: dict[str, Any]) -> str:
    """Predicted beside measured, in Markdown."""
    network, rows = measured["network"], measured["rows"]
    lines = [
        f"gloo, 2 workers: {network['call'] * 1e3:.2f} ms a collective and {network['bandwidth'] / 1e9:.2f} GB/s, by "
        "all-reduces of " + ", ".join(f"{size:,}" for size in measured["all_reduce"]) + " bytes",
        "",
        "| model | ZeRO | micro-batches | passes, calls | counted | 1 worker, s | beside another | all-reduce, s "
        "| 2, predicted | 2, measured | ratio |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        passes, calls = r["passes"], r["calls"]
        lines.append(
            f"| {r['model']} | {r['zero_stage']} | {r['accumulation']} | {passes['model']}, {calls['model']} "
            f"| {passes['counted']:.2f}, {calls['counted']} | {r['alone']:.3f} | {r['beside']:.3f} "
            f"| {r['communication']:.3f} | {r['predicted']:.3f} | {r['measured']:.3f} | {r['ratio']:.2f} |"
        )
    by = {(r["model"], r["zero_stage"], r["accumulation"]): r for r in rows}
    lines += ["", "| scaling | model | predicted | measured |", "|---|---|--:|--:|"]
    for (model, stage, accumulation), r in by.items():
        if accumulation == 1 and (twice := by.get((model, stage, 2))) is not None:
            weak = [r["alone"] / r[how] for how in ("predicted", "measured")]
            strong = [twice["alone"] / r[how] for how in ("predicted", "measured")]
            lines.append(f"| weak: share of one worker's speed | {model} | {weak[0]:.2f} | {weak[1]:.2f} |")
            lines.append(f"| strong: times one worker's speed | {model} | {strong[0]:.2f} | {strong[1]:.2f} |")
    return "\n".join(lines)


def planned_table(planned: dict[str, Any]) -> str:
    """What the model says, in Markdown."""
    job = planned["job"]
    enough = job["operations"] * planned["cluster"]["launch_seconds"] * planned["cluster"]["flops_per_second"]
    lines = [
        f"{job['flops'] / 1e9:,.0f} GFLOP an image, {job['operations']:,} operations a micro-batch "
        f"and {job['update_operations']:,} a step, "
        f"{job['gradient_bytes'] / 1e6:,.0f} MB of gradients, {job['tensors']:,} tensors. Below "
        f"{math.ceil(enough / job['flops'])} images a micro-batch the host is slower than the GPU.",
        "",
        "| GPUs | global batch | images a GPU | compute, ms | all-reduce, ms | step, ms | images/s | efficiency "
        "| bucket, GB/s | with cache | cores a GPU |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [_step_line(r) for r in planned["fixed"]]
    lines += [
        f"| {n:,} | {job['global_batch']:,} | refused: more workers than images of a step |" + " |" * 8
        for n in WORKERS
        if n > job["global_batch"]
    ]
    lines += [_step_line(r) for r in planned["grown"]]
    lines += [
        "",
        "| GPUs | checkpoint, GB | stall, s | written, s | restart, s |",
        "|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {r['workers']:,} | {r['bytes'] / 1e9:.2f} | {r['stall']:.2f} | {r['written']:.1f} | {r['restart']:.0f} |"
        for r in planned["checkpoints"]
    ]
    start = planned["cluster"]["start_seconds"]
    lines += [
        "",
        f"Goodput where workers start in {start:g} s, and in {SLOW_START:g} s:",
        "",
        "| GPUs | GPUs a machine | machine lost each | any, each | checkpoint each | goodput | with notice "
        f"| gives up after | goodput, {SLOW_START:g} s | with notice | gives up after |",
        "|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in planned["losses"]:
        cells = [f"{r['workers']:,}", str(r["gpus_of_machine"]), r["each"], _time(r["mtbf"]), _time(r["interval"])]
        for case in (r, r["slow_start"]):
            cells += [f"{case['goodput']:.0%}", f"{case['with_notice']:.0%}", _time(case["gives_up"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _step_line(r: dict[str, Any]) -> str:
    bound = " (host)" if r["host_bound"] else ""
    images = f"{r['accumulation']} x {r['rows']}" if r["accumulation"] > 1 else str(r["rows"])
    return (
        f"| {r['workers']:,} | {r['global_batch']:,} | {images} | {r['compute'] * 1e3:,.0f}{bound} "
        f"| {r['communication'] * 1e3:.1f} | {r['seconds'] * 1e3:,.0f} | {r['images_per_second']:,.0f} "
        f"| {r['efficiency']:.0%} | {r['bucket'] / 1e9:.3f} | {r['bucket_cached'] / 1e9:.3f} "
        f"| {r['decode_cores']:.2f} |"
    )


def _time(seconds: float) -> str:
    """Write seconds in a suitable unit; "never" beyond a thousand years."""
    for unit, size in (("years", 365 * DAY), ("d", DAY), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return "never" if seconds > 1000 * 365 * DAY else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
