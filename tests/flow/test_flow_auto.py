"""Backpropagation under a memory budget: any point between stored and invertible, the same gradients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_helpers import DENSE, conditioner_calls, gradients, images, make_flow, relative_error
from hypothesis import given
from hypothesis import strategies as st

from eiwtrain.flow import EIWFlow, memory
from eiwtrain.flow.memory import bytes_saved, free_bytes, how_many_fit

STEPS = 4


def kept(flow: EIWFlow) -> int:
    return bytes_saved(lambda: flow(images(6, dtype=torch.float32)), flow.parameters())[0]


def auto(budget: int | None) -> EIWFlow:
    return make_flow(dtype=torch.float32, steps=STEPS, backprop="auto", memory_budget=budget)


def budgets() -> Iterator[int]:
    """Go from nothing to all that stored keeps."""
    least, most = (
        kept(make_flow(dtype=torch.float32, steps=STEPS, backprop=mode)) for mode in ("invertible", "stored")
    )
    for share in (0.0, 0.1, 0.3, 0.5, 0.8):
        yield int(share * (most - least))


def test_a_budget_is_kept_to_and_used() -> None:
    least = kept(make_flow(dtype=torch.float32, steps=STEPS, backprop="invertible"))
    most = kept(make_flow(dtype=torch.float32, steps=STEPS, backprop="stored"))
    largest = (most - least) / STEPS  # a step of the first level keeps no more
    used = []
    for budget in budgets():
        used.append(kept(auto(budget)) - least)
        assert budget - largest < used[-1] <= budget
    assert used == sorted(set(used))
    assert kept(auto(0)) == least
    assert kept(auto(2 * most)) == most


def test_a_budget_holds_for_the_networks_of_noise_that_joins_too() -> None:
    x = images(6, DENSE, torch.float32)
    noise = torch.rand(6, *DENSE.noise_shape)

    def kept_by(**changes: Any) -> int:
        flow = make_flow(DENSE, torch.float32, **changes)
        return bytes_saved(lambda: flow(x, noise), [*flow.parameters(), *flow.buffers()])[0]

    least, most = (kept_by(backprop=mode) for mode in ("invertible", "stored"))
    for tenths in range(11):
        budget = tenths * (most - least) // 10
        assert kept_by(backprop="auto", memory_budget=budget) <= least + budget
    assert kept_by(backprop="auto", memory_budget=2 * most) > 0.9 * most


def test_a_share_of_the_budget_keeps_fewer_and_says_how_many() -> None:
    flows = [auto(60_000), auto(60_000), auto(30_000)]
    flows[1].memory_share = 0.5
    kept_by = [(kept(flow), flow.kept) for flow in flows]
    assert kept_by[1] == kept_by[2]
    assert kept_by[1][0] < kept_by[0][0]
    least, most, of = (flow.kept for flow in (auto(0), auto(10**9), auto(1)) if kept(flow) and flow.kept)
    assert (least[0], most[0]) == (0, most[1])
    assert of[1] == most[1] == sum(len(level) for level in auto(0)._costs(images(2).float(), None))


@pytest.mark.parametrize("batch", [1, 6])
def test_what_each_bijection_keeps_is_predicted_from_samples(batch: int) -> None:
    flow = make_flow(dtype=torch.float32, steps=STEPS)
    predicted = [cost for level in flow._costs(images(batch, dtype=torch.float32), None) for cost in level]
    measured = [cost for level in flow._measured(images(batch, dtype=torch.float32), None) for cost in level]
    if batch == 1:  # where halves need no copy to be contiguous, so less is kept
        assert all(0.5 * a < b <= a for (a, _), (b, _) in zip(predicted, measured, strict=True))
    else:
        assert predicted == measured


def test_a_plan_is_made_for_each_kind_of_batch() -> None:
    flow = auto(70_000)
    for x in (images(2), images(3)):
        flow(x.float())
    flow.double()
    flow(images(3))
    flow.eval()
    flow(images(3))
    stored = [sum(plan.stored for plan in plans) for plans in flow._plans.values()]
    assert len(stored) == 4
    assert stored[2] < stored[1]  # twice the bytes
    assert flow.log_prob(images(0)).shape == (0,)


def test_a_container_s_limit_is_kept_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal: 90 kB\nMemAvailable: 50 kB\nDirectMap4k: 10\n")
    assert memory._available() == 51200
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._available() == 51200
    (tmp_path / "memory.max").write_text("9000\n")
    assert memory._available() == 8000


def test_finding_out_leaves_nothing_behind() -> None:
    flow = make_flow(dtype=torch.float32, steps=STEPS)
    x = images(3, dtype=torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        flow._costs(x, None)
    assert sum(event.self_cpu_memory_usage for event in profile.key_averages()) == 0


def test_gradients_at_any_budget_are_those_of_autograd() -> None:
    x = images(3)
    stored = gradients(make_flow(steps=STEPS), x)
    for budget in (0, 30_000, 100_000, 10**9):
        flow = make_flow(steps=STEPS, backprop="auto", memory_budget=budget)
        assert relative_error(gradients(flow, x), stored) <= 1e-9


def test_each_budget_saves_conditioner_calls() -> None:
    calls = []
    for budget in (*budgets(), 10**9):
        flow = auto(budget)
        gradients(flow, images(6, dtype=torch.float32))  # where the costs are found out
        with conditioner_calls(flow) as counted:
            gradients(flow, images(6, dtype=torch.float32))
        calls.append(sum(counted.values()))
    assert calls == sorted(calls, reverse=True)
    assert len(set(calls)) >= 5
    assert (calls[0], calls[-1]) == (2 * (2 * STEPS + 1), 2 * STEPS + 1)


def test_what_a_budget_keeps_is_first_what_is_dear_and_then_all_of_the_last() -> None:
    costs = [cost for level in auto(0)._costs(images(6, dtype=torch.float32), None) for cost in level]
    all_selective = sum(selective for _, selective in costs)
    seen = set()
    for budget in (0, all_selective // 2, all_selective, 2 * all_selective, sum(stored for stored, _ in costs)):
        flow = auto(budget)
        flow(images(6, dtype=torch.float32))
        (plans,) = flow._plans.values()
        of_each = "".join(
            "i" * (len(level) - plan.stored - plan.selective) + "s" * plan.selective + "S" * plan.stored
            for level, plan in zip(flow._costs(images(6, dtype=torch.float32), None), plans, strict=True)
        )
        assert of_each == "".join(sorted(of_each, key="isS".index))
        assert not {"i", "S"} <= set(of_each)  # while one is inverted, none is stored
        seen |= set(of_each)
    assert seen == set("isS")


def test_without_a_budget_memory_that_is_free_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept(auto(None)) == kept(make_flow(dtype=torch.float32, steps=STEPS, backprop="stored"))
    monkeypatch.setattr(memory, "_available", lambda: 0)
    assert kept(auto(None)) == kept(auto(0))


def test_processes_of_a_node_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_available", lambda: 8000)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    cpu = torch.device("cpu")
    assert free_bytes(cpu, 0) == 3600
    assert free_bytes(cpu, 100) == 2000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(cpu, 0) == 900
    assert free_bytes(cpu, 100) == 0


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="not Linux")
def test_free_memory_is_less_than_all_memory() -> None:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert 0 < memory._available() <= 1024 * int(lines["MemTotal"].split()[0])


@given(costs=st.lists(st.integers(0, 50), max_size=8), budget=st.integers(-1, 300))
def test_as_many_as_fit_from_the_end(costs: list[int], budget: int) -> None:
    n = how_many_fit(costs, budget)
    assert n == 0 or sum(costs[len(costs) - n :]) <= budget
    assert n == len(costs) or sum(costs[len(costs) - n - 1 :]) > budget
