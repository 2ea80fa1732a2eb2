"""How long a checkpoint holds training up, and how long it takes: ours, and PyTorch's distributed checkpoint.

    python -m benchmarks.checkpoint --megabytes 50 400 --ranks 1 2 [--device cuda] --json rows.json

Each rank holds the same tensors whole, as under ZeRO 1. "held": from the call to its return, when tensors may change
again, of the slowest rank; "written": until the checkpoint is committed. The ways take turns, a new checkpoint each:

- beside training: `eiwtrain.checkpoints.writer.CheckpointWriter`, which verifies and hashes what it writes;
- waited for: the same, and training waits for the commit;
- torch async: `torch.distributed.checkpoint.async_save`, which also copies first and writes in a thread;
- torch: `torch.distributed.checkpoint.save`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

OURS, WAITED, TORCH_ASYNC, TORCH = "beside training", "waited for", "torch async", "torch"
_TENSORS = 100


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description="The cost of a checkpoint.")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 400], help="of the state")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="that the tensors are on")
    parser.add_argument("--folder", type=Path, help="for checkpoints (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for megabytes in args.megabytes:
            for ranks in args.ranks:
                rows += _measure(Path(folder), megabytes, ranks, args.rounds, args.device)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Medians, and each way's time held in proportion to ours."""
    lines = ["| MB | ranks | way | held, s | to ours | written, s |", "|--:|--:|---|--:|--:|--:|"]
    for row in rows:
        ours = next(r for r in rows if (r["megabytes"], r["ranks"], r["way"]) == (row["megabytes"], row["ranks"], OURS))
        lines.append(
            f"| {row['megabytes']} | {row['ranks']} | {row['way']} | {row['held']:.3f} | "
            f"{row['held'] / ours['held']:.2f} | {row['written']:.3f} |"
        )
    return "\n".join(lines)


def _measure(folder: Path, megabytes: int, ranks: int, rounds: int, device: str) -> list[dict[str, Any]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    answer = folder / "answer.json"
    given = (ranks, port, megabytes, rounds, str(folder), str(answer), device)
    mp.start_processes(_rank, given, ranks, start_method="spawn")
    times = json.loads(answer.read_text())
    return [
        {
            "megabytes": megabytes,
            "ranks": ranks,
            "way": way,
            "held": statistics.median(held for held, _ in seconds),
            "written": statistics.median(written for _, written in seconds),
            "rounds": seconds,
        }
        for way, seconds in times.items()
    ]


def _rank(rank: int, ranks: int, port: int, megabytes: int, rounds: int, folder: str, answer: str, device: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    generator = torch.Generator().manual_seed(0)
    n = megabytes * 1_000_000 // (4 * _TENSORS)
    state = {f"weights/{i:03d}": torch.randn(n, generator=generator).to(device) for i in range(_TENSORS)}
    ways = _ways(state, folder)
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for turn in range(rounds + 1):  # the first warms up
        for way, save in ways.items():
            dist.barrier()
            held, written = save(turn)
            if turn:
                both = torch.tensor([held, written], dtype=torch.float64)
                dist.all_reduce(both, dist.ReduceOp.MAX)
                times[way].append((float(both[0]), float(both[1])))
            dist.barrier()
            if rank == 0:
                shutil.rmtree(Path(folder, "torch"), ignore_errors=True)
    if rank == 0:
        Path(answer).write_text(json.dumps(times))
    dist.destroy_process_group()


def _ways(state: dict[str, torch.Tensor], folder: str) -> dict[str, Callable[[int], tuple[float, float]]]:
    """Each way: saves a checkpoint of that number, and gives the seconds held and until it was written."""
    import torch.distributed.checkpoint as dcp

    from eiwtrain.checkpoints.writer import CheckpointWriter

    saver = CheckpointWriter(folder, keep_last=1, keep_every=0, guard=lambda: None)

    def ours(turn: int, wait: bool) -> tuple[float, float]:
        began = time.perf_counter()
        saver.begin(turn, 0, state.items(), {})
        held = time.perf_counter() - began
        outcome = saver.wait()
        assert outcome is not None
        assert outcome.checkpoint is not None, outcome.error
        return (outcome.seconds if wait else held), outcome.seconds

    def theirs(turn: int, asynchronous: bool) -> tuple[float, float]:
        where = str(Path(folder, "torch", f"{turn}-{asynchronous}"))
        began = time.perf_counter()
        if not asynchronous:
            dcp.save(dict(state), checkpoint_id=where)
            written = time.perf_counter() - began
            return written, written
        future: Any = dcp.async_save(dict(state), checkpoint_id=where)
        held = time.perf_counter() - began
        getattr(future, "upload_completion", future).result()
        return held, time.perf_counter() - began

    return {
        OURS: lambda turn: ours(2 * turn, False),
        WAITED: lambda turn: ours(2 * turn + 1, True),
        TORCH_ASYNC: lambda turn: theirs(turn, True),
        TORCH: lambda turn: theirs(turn, False),
    }


if __name__ == "__main__":
    sys.exit(main())
