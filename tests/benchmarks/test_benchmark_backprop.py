"""The benchmark of backpropagation: it runs, its rows hold what it promises, and what is counted is what is claimed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.backprop import count
from benchmarks.backprop_subject import METHODS, NETWORKS, Setting

pytestmark = pytest.mark.cluster  # a benchmark that takes its time

KEYS = {
    *("model", "mode", "depth", "budget", "budget_bytes", "allocator", "device"),
    *("seconds", "to_stored", "rss_bytes", "peak_bytes", "gradient_bytes", "saved_bytes"),
    *("flops", "flops_to_stored", "conditioner_forwards", "gradient_error"),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("backprop")
    sizes = ["--depths", "2", "4", "--hidden", "8", "--batch", "2", "--resolution", "8"]
    out = ["--json", str(folder / "rows.json"), "--plot", str(folder / "plot.png")]
    command = [sys.executable, "-m", "benchmarks.backprop", "--quick", *sizes, *out]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (folder / "plot.png").stat().st_size > 10_000
    return json.loads((folder / "rows.json").read_text())


def one(rows: list[dict[str, Any]], mode: str, depth: int = 4, budget: float | None = None) -> dict[str, Any]:
    (row,) = (r for r in rows if (r["mode"], r["depth"], r["budget"]) == (mode, depth, budget))
    return row


def test_each_row_has_the_promised_keys(rows: list[dict[str, Any]]) -> None:
    assert {frozenset(r) for r in rows} == {frozenset(KEYS)}
    by_mode = {m: sum(r["mode"] == m for r in rows) for m in METHODS["glow"]}
    assert by_mode == dict.fromkeys(METHODS["glow"], 2) | {"auto": 6}
    assert all(r["seconds"] > 0 for r in rows)


def test_conditioners_run_once_or_twice_a_step(rows: list[dict[str, Any]]) -> None:
    assert [one(rows, m)["conditioner_forwards"] for m in ("stored", "checkpointed", "invertible")] == [1, 2, 2]
    by_budget = [one(rows, "auto", budget=b)["conditioner_forwards"] for b in (0, 0.25, 0.5, 0.75, 1)]
    assert by_budget[0] == 2
    assert by_budget[-1] == 1
    assert by_budget == sorted(by_budget, reverse=True)


@pytest.mark.parametrize("mode", ["checkpointed", "invertible"])
def test_recomputing_costs_a_third_more_arithmetic(rows: list[dict[str, Any]], mode: str) -> None:
    for depth in (2, 4):
        assert 1.3 <= one(rows, mode, depth)["flops"] / one(rows, "stored", depth)["flops"] <= 1.37


def test_only_invertible_keeps_the_same_at_any_depth(rows: list[dict[str, Any]]) -> None:
    kept = {
        (mode, depth): one(rows, mode, depth)["saved_bytes"] for mode in ("stored", "invertible") for depth in (2, 4)
    }
    assert kept["invertible", 2] == kept["invertible", 4]
    assert kept["stored", 4] > 1.8 * kept["stored", 2] > 3 * kept["invertible", 2]
    for row in rows:
        assert row["peak_bytes"] > row["saved_bytes"]


def test_auto_keeps_no_more_than_its_budget_beyond_invertible(rows: list[dict[str, Any]]) -> None:
    least = one(rows, "invertible")["saved_bytes"]
    for budget in (0, 0.25, 0.5, 0.75, 1):
        row = one(rows, "auto", budget=budget)
        assert row["budget_bytes"] == round(budget * one(rows, "stored")["saved_bytes"])
        assert row["saved_bytes"] <= least + row["budget_bytes"]


def test_all_have_the_gradients_of_stored(rows: list[dict[str, Any]]) -> None:
    assert all(r["gradient_error"] < 1e-3 for r in rows)


def test_modes_of_eiw_have_the_gradients_of_stored_and_keep_less() -> None:
    one: dict[str, Any] = {"depth": 13, "hidden": 6, "batch": 2, "resolution": 8, "dtype": "float32", "device": "cpu"}
    modes = ("stored", NETWORKS, "invertible")
    rows = count([Setting("eiw", mode, budget=None, budget_bytes=None, repeat=1, **one) for mode in modes])
    assert all(row["gradient_error"] < 1e-3 for row in rows)
    assert [row["conditioner_forwards"] for row in rows] == [1, 2, 2]
    kept = [row["saved_bytes"] for row in rows]
    assert kept == sorted(kept, reverse=True)
    assert 1.3 <= rows[-1]["flops_to_stored"] <= 1.4  # the matrices of so small a flow count
