"""The benchmark of the system's overhead: it alternates, its parts are exclusive, and its bare loop trains."""

from __future__ import annotations

from collections import Counter
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny_config

from benchmarks import overhead
from eiwtrain import flow
from eiwtrain.config import Config
from eiwtrain.train.state import flow_config


class Clock:
    """A clock that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_part_does_not_count_the_parts_inside_it() -> None:
    clock = Clock()
    watch = overhead.Watch(clock)
    clock.now = 1
    with watch.part("backward"):
        clock.now = 3
        with watch.part("forward"):
            clock.now = 7
        clock.now = 8
    clock.now = 16
    assert watch.take() == {"other": 1 + 8, "backward": 2 + 1, "forward": 4}
    assert watch.take() == {"other": 0}


def test_a_part_that_fails_is_closed() -> None:
    clock = Clock()
    watch = overhead.Watch(clock)
    with pytest.raises(ZeroDivisionError):
        watch.timed("data", lambda: 1 / 0)()
    clock.now = 2
    assert watch.take()["other"] == 2


def test_system_and_bare_loop_take_turns_of_as_many_steps() -> None:
    clock = Clock()
    turns: list[str] = []

    def bare(batches: list[Any]) -> None:
        turns.append("bare")
        clock.now += 2

    rows: list[list[dict[str, Any]]] = []
    beside = overhead.Beside(3, overhead.Watch(clock), lambda found: rows.append(list(found)))
    beside.bare = bare
    steps = overhead.WARM_UP + 2 * 3 + 1
    for _, number in zip(beside.around(iter(range(99))), range(steps), strict=False):
        turns.append(f"system {number}")
        clock.now += 2.5
    system = [f"system {number}" for number in range(steps)]
    w = overhead.WARM_UP
    expected = [*system[:w], *["bare"] * w, *system[w : w + 3], *["bare"] * 3, *system[w + 3 : w + 6], *["bare"] * 3]
    assert turns == [*expected, system[-1]]
    assert len(rows[-1]) == 2
    assert [sum(row[who].values()) for row in rows[-1] for who in ("system", "bare")] == [2.5, 2, 2.5, 2]
    assert overhead.text(rows[-1]).startswith("whole system to bare loop: 1.250 (1.250 to 1.250) over 2 rounds")


def test_the_bare_loop_trains_its_own_flow_from_the_systems_weights() -> None:
    config = Config.model_validate(tiny_config(Path("/x"), train={"precision": "fp32"}))
    torch.manual_seed(0)
    model = flow.EIWFlow(flow_config(config, 3))
    state: Any = SimpleNamespace(config=config, flow=model, device=torch.device("cpu"))
    ticks = count()
    watch = overhead.Watch(lambda: float(next(ticks)))
    bare = overhead.Bare(state, watch)
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    bare.step([(torch.ones(4), pixels, torch.rand(4, *model.config.noise_shape), None)] * 2)
    assert all(t.equal(before[name]) for name, t in model.state_dict().items())
    moved = Counter(not p.equal(before[name]) for name, p in bare.flow.named_parameters())
    assert moved[True] > moved[False]
    assert set(watch.take()) == {"other", "forward", "backward"}
