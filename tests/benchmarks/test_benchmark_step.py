"""The benchmark of a training step: its rows hold what it promises, with peers or without, and its ratios are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measuring, peers, step
from eiwtrain import flow

TINY = step.Size(steps=1, hidden=4, batch=2, levels=2, side=8)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "installed", lambda peer: False)
        return [row for table in ("small", step.EIW) for row in step.measure(table, TINY.batch, size=TINY)]


def one(rows: list[dict[str, Any]], name: str, table: str = "small") -> dict[str, Any]:
    (row,) = (r for r in rows if (r["table"], r["name"]) == (table, name))
    return row


def test_our_rows_are_measured_and_missing_peers_say_so(rows: list[dict[str, Any]]) -> None:
    ours = [row for row in rows if row["name"] not in peers.PEERS]
    assert {row["note"] for row in ours} == {""}
    assert all(row["seconds"] > 0 and row["operations"] > 0 and row["to_normflows"] is None for row in ours)
    assert [one(rows, peer)["note"] for peer in peers.PEERS] == ["not installed"] * 4
    assert all(one(rows, peer)["seconds"] is None for peer in peers.PEERS)


def test_every_mode_and_shuffle_has_a_row(rows: list[dict[str, Any]]) -> None:
    names = {row["name"] for row in rows if row["table"] == "small"}
    assert {f"ours, {mode}" for mode in step.MODES} <= names
    assert {f"ours, {kind} shuffle" for kind in ("soft", "order", "fixed", "hard")} <= names


@pytest.mark.parametrize("table", ["small", step.EIW])
def test_inverting_starts_more_operations_and_keeps_less(rows: list[dict[str, Any]], table: str) -> None:
    stored, inverted = one(rows, step.FIRST, table), one(rows, "ours, invertible", table)
    assert inverted["operations"] > stored["operations"]
    assert inverted["flops"] > stored["flops"]
    assert inverted["kept_bytes"] < stored["kept_bytes"] <= stored["peak_bytes"]
    assert stored["to_first"] == (1, 1, 1)


def test_a_plain_prior_has_no_network(rows: list[dict[str, Any]]) -> None:
    assert one(rows, step.PLAIN)["parameters"] < one(rows, step.FIRST)["parameters"]


def test_rows_make_the_same_tables_from_a_file(
    rows: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    assert step.main(["--rows", str(file)]) == 0
    page = capsys.readouterr().out
    assert page == step.text(rows) + "\n"
    for row in rows:
        assert f"| {row['name']} |" in page


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("peer", peers.PEERS)
def test_a_peer_gives_every_parameter_a_gradient(peer: str, dtype: Any) -> None:
    if not peers.installed(peer):
        pytest.skip(f"{peer} is not installed")
    network = flow.ConditionerConfig(hidden=8)
    config = flow.FlowConfig((3, 8, 8), levels=2, steps=2, conditioner=network, shuffle="none", conditioner_dtype=dtype)
    ours = sum(p.numel() for p in flow.EIWFlow(config).parameters())
    counted = step.Candidate(config, peer, 4, torch.device("cpu")).counted()
    assert counted["note"] == ""
    assert ours / 2 < counted["parameters"] < 2 * ours


def test_candidates_take_turns_there_and_back() -> None:
    turns: list[str] = []

    def turn(name: str, seconds: float) -> float:
        turns.append(name)
        return seconds

    times = measuring.take_turns({"a": lambda: turn("a", 1.0), "b": lambda: turn("b", 2.0)}, seconds=0.0)
    assert turns == ["a", "b", "b", "a", "a", "b"]
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_a_ratio_is_within_rounds() -> None:
    assert measuring.ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0]) == (3.0, 2.5, 3.5)


def test_allocations_are_counted_to_the_byte() -> None:
    def work() -> torch.Tensor:
        first, second = torch.empty(1000), torch.empty(500)
        del first
        torch.empty(200)
        return second

    assert measuring.allocated(work, torch.device("cpu")) == (2000, 6000)
