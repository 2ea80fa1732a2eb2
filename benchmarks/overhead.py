"""A step of training by the whole system, beside a bare loop on tensors in memory: the ratio, and where it goes.

    python -m benchmarks.overhead [--rounds 12 --steps 8] [--clock thread] [--json FILE] [SECTION.FIELD=VALUE ...]

The system is a run of the quick start with one worker and AdamW: driver, Ray, loader, DeepSpeed, the average of
weights, the numbers that ranks agree on, the tracker. Between its steps the same thread makes steps of a bare loop: a
copy of the flow, the system's last micro-batches, gradients added up and clipped by torch, torch's fused AdamW. A round
is `--steps` of the one, then of the other, so that other load of the machine meets both. Steps are timed from the end
of one to the end of the next, so nothing that the loop does is left out; checkpoints and evaluations are, as none is
made meanwhile (`benchmarks.checkpoint`). Not for a step's own speed: `benchmarks.step`.

On a machine with other load, `--clock thread` counts the CPU time of that thread, without what it waits for.

A row of `--json` is a round: seconds of a step of each, by part. The parts are exclusive:

- data: the batch from the loader; inputs: from its batch to tensors, with the noise of each image by its key;
- forward: the losses of the micro-batches;
- backward: and clipping and optimizer, by DeepSpeed or by torch;
- average; collectives, which includes the agreed numbers; other: audit, tracker, training line.

The quick start's loader works within the worker, so all that it does counts. With `data.loader_workers=1` it has a
process of its own, whose queue fills while the bare loop runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from benchmarks import environments, measuring
from benchmarks.environments import ROOT
from eiwtrain import data, flow
from eiwtrain.train import loop
from eiwtrain.train.engine import Engine
from eiwtrain.train.objective import MicroBatch
from eiwtrain.train.state import TrainState

Row = dict[str, Any]
T = TypeVar("T")

PARTS = {
    "data": "data from the loader",
    "inputs": "inputs, noise by key",
    "forward": "forward",
    "backward": "backward, clip, optimizer",
    "average": "average of weights",
    "collectives": "collectives, agreed numbers",
    "other": "all else",
}
CLOCKS = {"wall": time.perf_counter, "thread": time.thread_time}
WARM_UP = 6
"""Steps of each before the first round: the first are slower."""


class Watch:
    """Seconds by part, each without the parts inside it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._open = clock, ["other"]
        self._since = clock()
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the block as this part's."""
        self._lap()
        self._open.append(name)
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def timed(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        """Return the function, with its time counted as this part's."""

        def call(*args: Any, **kwargs: Any) -> T:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def take(self) -> dict[str, float]:
        """Return what was counted since the last call."""
        self._lap()
        taken, self.seconds = dict(self.seconds), Counter()
        return taken

    def _lap(self) -> None:
        now = self._clock()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now


class Bare:
    """A bare loop on the micro-batches that it is given, with a flow of its own."""

    def __init__(self, state: TrainState, watch: Watch) -> None:
        t = state.config.train
        self._config, self._watch = state.config, watch
        self.flow = flow.EIWFlow(state.flow.config).to(state.device)
        self.flow.load_state_dict(state.flow.state_dict())
        self._parameters = list(self.flow.parameters())
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=t.lr, betas=t.betas, weight_decay=t.weight_decay, fused=True
        )

    def step(self, batches: list[tuple[Any, ...]]) -> None:
        """Make one step; a batch is (weight, pixels, noise, labels)."""
        with self._watch.part("backward"):
            self._optimizer.zero_grad()
            for batch in batches:
                with self._watch.part("forward"):
                    loss = MicroBatch(batch[0], self._config, *batch[1:]).loss(self.flow)
                loss.backward()
            nn.utils.clip_grad_norm_(self._parameters, self._config.train.clip)
            self._optimizer.step()


class Beside:
    """In the worker: takes turns with the training loop, at the places where that asks for its next batch."""

    def __init__(self, steps: int, watch: Watch, done: Callable[[list[Row]], None]) -> None:
        """
        Args:
            steps: of the system, then of the bare loop, in a round.
            done: is given all rounds so far after each.
        """
        self._steps, self._watch, self._done = steps, watch, done
        self.rows: list[Row] = []
        self.batches: list[tuple[Any, ...]] = []
        """The micro-batches of the system's step under way."""
        self.bare: Callable[[list[tuple[Any, ...]]], None] | None = None
        """Makes a step of the bare loop; known once the system has made one."""

    def around(self, system: Iterator[T]) -> Iterator[T]:
        """Yield the batches of the training loop, with a turn of the bare loop after each turn of it."""
        made, least = 0, WARM_UP
        while True:
            if made == least and self.bare is not None:
                own = self._watch.take()
                for _ in range(made):
                    self.bare(self.batches)
                theirs = self._watch.take()
                if least == self._steps:
                    self.rows.append({"system": _each(own, made), "bare": _each(theirs, made)})
                    self._done(self.rows)
                made, least = 0, self._steps
                self._watch.take()
            self.batches = []
            with self._watch.part("data"):
                try:
                    batch = next(system)
                except StopIteration:
                    return
            yield batch
            made += 1


def _each(seconds: dict[str, float], steps: int) -> dict[str, float]:
    return {part: seconds.get(part, 0.0) / steps for part in PARTS}


def train_beside(answer: str, steps: int, clock: str, settings: dict[str, Any]) -> None:
    """Do as `train_worker`, with a bare loop beside it; write the rows to the file `answer`. In a worker of its own."""
    watch = Watch(CLOCKS[clock])
    beside = Beside(steps, watch, lambda rows: _write(answer, rows))
    train_batches, flow_inputs, advance = data.train_batches, data.flow_inputs, TrainState.advance
    timed_step = watch.timed("backward", Engine.step)

    def inputs(batch: Any, *args: Any) -> Any:
        with watch.part("inputs"):
            made = flow_inputs(batch, *args)
        beside.batches.append((batch.weight, *made))
        return made

    def step(engine: Engine, losses: Any, *args: Any, **kwargs: Any) -> Any:
        return timed_step(engine, [watch.timed("forward", loss) for loss in losses], *args, **kwargs)

    def advance_(state: TrainState, *args: Any, **kwargs: Any) -> Any:
        with watch.part("average"):  # without the engine's step, which has parts of its own
            made = advance(state, *args, **kwargs)
        beside.bare = beside.bare or Bare(state, watch).step
        return made

    patched: Any = data
    patched.train_batches = lambda *args, **kwargs: beside.around(train_batches(*args, **kwargs))
    patched.flow_inputs = inputs
    patched = Engine
    patched.step = step
    patched = TrainState
    patched.advance = advance_
    patched = torch.distributed
    patched.all_reduce = watch.timed("collectives", torch.distributed.all_reduce)
    loop.train_worker(settings)


def _write(answer: str, rows: list[Row]) -> None:
    Path(answer).write_text(json.dumps(rows))


def measure(rounds: int, steps: int, clock: str, overrides: list[str]) -> list[Row]:
    """Return the rows of a run of the quick start with these fields changed."""
    import benchmarks.overhead as here  # the worker finds the function by its module, which is not __main__
    from eiwtrain import run
    from eiwtrain.driver import attempt

    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "rows.json")
        patched: Any = attempt
        patched.train_worker = partial(here.train_beside, str(answer), steps, clock)
        fields = {
            "run.storage": f"{folder}/runs",
            "data.path": f"{folder}/data",
            "workers.min": 1,
            "train.max_steps": WARM_UP + rounds * steps + 1,
            "train.warmup_steps": 1,
            "train.optimizer": "adamw",  # the bare loop's
            "eval.every": 10**6,
            "eval.images": 16,
            "eval.samples": 4,
            "checkpoint.every": 10**6,
        }
        given = [f"{name}={value}" for name, value in fields.items()]
        code = run.main([str(ROOT / "configs" / "quickstart.yaml"), *given, *overrides])
        if code or not answer.exists():
            sys.exit(code or "error: the run made too few steps for a round")
        rows: list[Row] = json.loads(answer.read_text())
        return rows


def text(rows: list[Row]) -> str:
    """Return the rows as text: the ratio of a step, and a table of its parts."""
    whole = {who: [sum(row[who].values()) for row in rows] for who in ("system", "bare")}
    bare = statistics.median(whole["bare"])
    ratio = measuring.ratio(whole["system"], whole["bare"])
    lines = []
    for part, name in PARTS.items():
        system, own = (statistics.median(row[who][part] for row in rows) for who in ("system", "bare"))
        lines.append([name, f"{1e3 * system:.2f}", f"{1e3 * own:.2f}", f"{(system - own) / bare:+.1%}"])
    system = statistics.median(whole["system"])
    lines.append(["step", f"{1e3 * system:.2f}", f"{1e3 * bare:.2f}", f"{ratio.median - 1:+.1%}"])
    head = (
        f"whole system to bare loop: {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) over {len(rows)} rounds"
    )
    return f"{head}\n\n{measuring.markdown(('ms', 'system', 'bare loop', 'of a bare step'), lines)}"


def main(arguments: list[str] | None = None) -> int:
    """Print the table; write the rows if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=8, help="of each in a round")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("overrides", nargs="*", help="fields of the config, as eiwtrain.run takes them")
    args = parser.parse_args(arguments)
    rows = measure(args.rounds, args.steps, args.clock, args.overrides)
    print(f"\n{text(rows)}\n")
    print(environments.describe(environments.machine(), environments.versions("torch", "deepspeed", "ray")))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
