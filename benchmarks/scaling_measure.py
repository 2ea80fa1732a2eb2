"""Steps of one and of two workers on this machine, and what their collectives take, for `benchmarks.scaling`.

Four processes wait for orders: two alone (a gloo group of one each) and a pair (a group of two), each with every
setting's training state. So in each round every setting is timed alone, with an independent neighbour that computes
the same (what the machine's memory and other users take, without any communication), and as a pair, one right after
the other. A step is the worker's: the batch from the sample stream, DeepSpeed's step, the average, the agreed numbers.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import data_prep
from benchmarks.scaling_model import Network, calls, passes, transfer_seconds
from eiwtrain import data
from eiwtrain.config import Config, batching
from eiwtrain.train import agreed
from eiwtrain.train.engine import MOST_IN_BUCKET
from eiwtrain.train.objective import MicroBatch
from eiwtrain.train.state import TrainState, flow_config

RESOLUTION = 16
MODELS: dict[str, tuple[dict[str, Any], int]] = {  # the model, and images of a micro-batch
    "small": ({"levels": 2, "steps": 4, "conditioner": {"hidden": 64}}, 32),
    "large": ({"levels": 3, "steps": 4, "conditioner": {"hidden": 512}}, 1),
}
BYTES = (8, 2**12, 2**16, 2**20, 2**22, 2**24)  # of the collectives that are timed
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """What is trained: a model of `MODELS`, at a ZeRO stage, with so many micro-batches of each worker in a step."""

    model: str
    zero_stage: int
    accumulation: int


SETTINGS = (
    Setting("small", 1, 1),
    Setting("small", 1, 2),
    Setting("large", 0, 1),
    Setting("large", 1, 1),
    Setting("large", 1, 2),
    Setting("large", 2, 2),
    Setting("large", 3, 1),
)
QUICK = (Setting("large", 1, 1), Setting("large", 1, 2))


class Counting(TorchDispatchMode):
    """Counts the collectives that are started in its block."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: Counter[tuple[str, int]] = Counter()
        """Number of collectives by name and by bytes of the largest tensor."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "c10d":
            tensors = [t for t in _pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.collectives[name.strip("_"), max((t.nbytes for t in tensors), default=0)] += 1
        return function(*args, **(kwargs or {}))


def measure(settings: tuple[Setting, ...], rounds: int, steps: int, say: Callable[[str], None]) -> dict[str, Any]:
    """What was measured and what the model says of it: {"network", "all_reduce", "rows"}; see `row_of`.

    Args:
        rounds, steps: of each setting, alone, beside and as a pair: the number of rounds, and of steps in a round.
        say: called with a text about what is under way.
    """
    timed: dict[Setting, dict[str, list[float]]] = {s: {"alone": [], "beside": [], "pair": []} for s in settings}
    collectives: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder:
        say("writing images")
        data_prep.prepare("photos", str(Path(folder, "data")), RESOLUTION, workers=1)
        say("starting four processes")
        with _processes(Path(folder), settings) as (alone, pair):
            counted = {s: _ask(pair, "count", s)[0] for s in settings}
            for turn in range(rounds):
                say(f"round {turn + 1} of {rounds}")
                collectives.append(_ask(pair, "collectives", None, steps)[0])
                for s in settings:
                    timed[s]["alone"] += _ask(alone[:1], "steps", s, steps)[0]
                    both = _ask(alone, "steps", s, steps)
                    timed[s]["beside"] += [max(one) for one in zip(*both, strict=True)]
                    timed[s]["pair"] += _ask(pair, "steps", s, steps)[0]
    seconds = [min(column) for column in zip(*collectives, strict=True)]
    network = fit(BYTES, seconds)
    rows = [row_of(s, timed[s], counted[s], network) for s in settings]
    found = {"call": network.call, "bandwidth": network.between}
    return {"network": found, "all_reduce": dict(zip(BYTES, seconds, strict=True)), "rows": rows}


def fit(sizes: tuple[int, ...], seconds: list[float]) -> Network:
    """The network over which two workers' all-reduces of these bytes take so long; errors count relatively."""
    times = np.array(seconds)
    columns = np.stack([np.ones(len(sizes)), np.array(sizes, float)], axis=1) / times[:, None]
    call, each = np.linalg.lstsq(columns, np.ones(len(sizes)), rcond=None)[0]
    # of two workers each sends as much as it has: 2 (n - 1) / n is 1
    return Network(node=1, inside=math.inf, between=1.0 / max(float(each), 1e-15), call=max(float(call), 0.0))


def row_of(
    setting: Setting, timed: dict[str, list[float]], counted: dict[str, Any], network: Network
) -> dict[str, Any]:
    """What the model says of a setting beside what was measured; seconds of a step, the fastest of all rounds.

    Predicted is the slower of two workers that compute beside each other, with the collectives on top.
    """
    sent, stage, accumulation = counted["gradient_bytes"], setting.zero_stage, setting.accumulation
    count = calls(stage, accumulation, counted["tensors"], math.ceil(sent / 4 / MOST_IN_BUCKET))
    communication = transfer_seconds(sent, passes(stage, accumulation), count, 2, network)
    alone, beside, measured = (min(timed[how]) for how in ("alone", "beside", "pair"))
    return asdict(setting) | {
        "gradient_bytes": sent,
        "passes": {"model": passes(stage, accumulation), "counted": counted["passes"]},
        "calls": {"model": count, "counted": counted["calls"]},
        "alone": alone,
        "beside": beside,
        "communication": communication,
        "predicted": beside + communication,
        "measured": measured,
        "ratio": measured / (beside + communication),
        "medians": {how: statistics.median(times) for how, times in timed.items()},
    }


def traffic(collectives: Counter[tuple[str, int]], gradient_bytes: int) -> dict[str, float]:
    """Return the traffic of a step: passes of the gradients' bytes, as in `scaling_model.passes`, and collectives."""
    twice = {"allreduce": 2}  # a reduce-scatter and an all-gather
    sent = sum(twice.get(name, 1) * size * times for (name, size), times in collectives.items())
    return {"passes": sent / gradient_bytes, "calls": sum(collectives.values())}


@contextmanager
def _processes(folder: Path, settings: tuple[Setting, ...]) -> Iterator[tuple[list[Any], list[Any]]]:
    """Two pipes to workers of their own, and two to a pair; all have made their states and a step of each."""
    from eiwtrain.on_ray.session import WORKER_ENV

    os.environ.update(WORKER_ENV, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    context = mp.get_context("spawn")
    pipes, processes = [], []
    for group, rank, world_size in (("a", 0, 1), ("b", 0, 1), ("pair", 0, 2), ("pair", 1, 2)):
        here, there = context.Pipe()
        work = context.Process(target=_serve, args=(there, folder, group, rank, world_size, settings), daemon=True)
        work.start()
        there.close()
        pipes.append(here)
        processes.append(work)
    try:
        for pipe in pipes:
            _answer(pipe)
        yield pipes[:2], pipes[2:]
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()


def _ask(pipes: list[Any], *order: Any) -> list[Any]:
    """Give the order to each at once; their answers."""
    for pipe in pipes:
        pipe.send(order)
    return [_answer(pipe) for pipe in pipes]


def _answer(pipe: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        sys.exit("error: a worker of the benchmark died; what it said stands above")


def _serve(pipe: Any, folder: Path, group: str, rank: int, world_size: int, settings: tuple[Setting, ...]) -> None:
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / group}", rank=rank, world_size=world_size)
    subjects = {s: Subject(s, folder, f"{group}-{n}") for n, s in enumerate(settings)}
    for subject in subjects.values():
        subject.step()
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        what, setting, *more = order
        if what == "steps":
            pipe.send([subjects[setting].timed() for _ in range(more[0])])
        elif what == "count":
            pipe.send(subjects[setting].counted())
        else:
            pipe.send(_collectives(*more))
    dist.destroy_process_group()


class Subject:
    """A training state and its batches, on this rank."""

    def __init__(self, setting: Setting, folder: Path, name: str) -> None:
        self.config = config_of(setting, dist.get_world_size(), folder, name)
        t = self.config.train
        rows, accumulation = batching(t, dist.get_world_size())
        manifest = data.load_manifest(self.config.data.path)
        reader = data.ShardReader(self.config.data.path, manifest, "train")
        self.flow = flow_config(self.config, manifest.channels)
        first = data.flow_inputs(data.first_batch(reader, 64, 0), self.flow, _CPU)
        self.state = TrainState(self.config, manifest, _CPU, (rows, accumulation), lambda: first, lambda _: None)
        self._batches = data.train_batches(
            reader,
            seed=0,
            start_step=0,
            global_batch=t.global_batch,
            micro_batch=rows,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
        )

    def step(self) -> None:
        """Make one as `eiwtrain.train.loop` does."""
        own = [MicroBatch(b.weight, self.config, *data.flow_inputs(b, self.flow, _CPU)) for b in next(self._batches)]
        self.state.advance([m.loss for m in own], 1e-4, lambda: agreed.pack(own, [0.0] * 6, dist.get_rank()))

    def timed(self) -> float:
        """Seconds of a step."""
        began = time.perf_counter()
        self.step()
        return time.perf_counter() - began

    def counted(self) -> dict[str, Any]:
        """What a step sends: bytes of gradients, tensors, and `traffic`."""
        shapes = [getattr(p, "ds_shape", p.shape) for p in self.state.flow.parameters()]  # ZeRO 3 shards them
        size = sum(4 * shape.numel() for shape in shapes)
        self.step()  # in its second step DeepSpeed compares the order of modules, at stage 3
        with Counting() as counting:
            self.step()
        return {"gradient_bytes": size, "tensors": len(shapes)} | traffic(counting.collectives, size)


def config_of(setting: Setting, world_size: int, folder: Path, name: str) -> Config:
    """The config of a setting, for so many workers."""
    model, micro_batch = MODELS[setting.model]
    raw = {
        "run": {"name": name, "storage": str(folder / "runs")},
        "data": {"path": str(folder / "data"), "resolution": RESOLUTION},
        "model": model,
        "train": {
            "global_batch": micro_batch * setting.accumulation * world_size,
            "micro_batch": micro_batch,
            "zero_stage": setting.zero_stage,
        },
        "workers": {"min": world_size},
    }
    return Config.model_validate(raw)


def _collectives(rounds: int) -> list[float]:
    """Seconds of an all-reduce of each of `BYTES`."""
    found = []
    for size in BYTES:
        tensor = torch.zeros(size // 4)
        times = []
        for _ in range(rounds):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            times.append(time.perf_counter() - began)
        found.append(min(times))
    return found
