"""The precision benchmark: its numbers say what its page claims they say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import write_shards

from benchmarks import precision


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_table_tells_precisions_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, written = tmp_path / "shards", tmp_path / "rows.json"
    write_shards(shards, resolution=20)
    monkeypatch.setattr(precision, "QUICK", {"depths": (4,), "updates": 8, "factors": (2.0,)})
    monkeypatch.setattr(precision, "ANCHORS", (0, 1))
    monkeypatch.setattr("sys.argv", ["precision", "--quick", "--data", str(shards), "--json", str(written)])
    precision.main()

    rows = json.loads(written.read_text())
    by = {tuple(r[k] for k in ("weights", "trunk_dtype", "conditioner_dtype", "anchor_every")): r for r in rows}
    assert len(rows) == len(by) == 3 * 4 * 2  # weights, dtypes, anchors
    for weights in ("trained", "trained x 2"):
        single, low = by[weights, "float32", "float32", 0], by[weights, "float32", "bfloat16", 0]
        assert 1e-8 < single["drift"] < low["drift"] < 0.1
        assert 1e-8 < single["own_error"] < 0.1 * low["own_error"] < 0.05
        assert by[weights, "float32", "bfloat16", 1]["inverted_error"] < low["inverted_error"] < low["own_error"]
        assert by[weights, "float64", "bfloat16", 0]["drift"] < 1e-12
        assert by[weights, "float64", "bfloat16", 0]["inverted_error"] < 1e-6
        assert low["inverted_to_exact"] == pytest.approx(low["own_error"], abs=low["inverted_error"])
    assert (
        by["initial", "float32", "float32", 0]["bits_per_dim"] > by["trained", "float32", "float32", 0]["bits_per_dim"]
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 4 |")]
    assert len(lines) == 3 * 4


def test_a_drift_that_is_no_number_is_valid_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, written = tmp_path / "shards", tmp_path / "rows.json"
    write_shards(shards, resolution=20)
    monkeypatch.setattr(precision, "QUICK", {"depths": (2,), "updates": 4, "factors": (float("inf"),)})
    monkeypatch.setattr("sys.argv", ["precision", "--quick", "--data", str(shards), "--json", str(written)])
    precision.main()
    assert "NaN" not in written.read_text()
    assert any(row["drift"] is None for row in json.loads(written.read_text()))


def test_the_conditioners_have_the_activation_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = tmp_path / "shards"
    write_shards(shards, resolution=20)
    monkeypatch.setattr(precision, "QUICK", {"depths": (2,), "updates": 4, "factors": ()})
    bits: dict[str, float] = {}
    for activation in ("", "silu", "relu"):
        written = tmp_path / f"{activation}.json"
        chosen = ["--activation", activation] if activation else []
        monkeypatch.setattr(
            "sys.argv", ["precision", "--quick", "--data", str(shards), "--json", str(written), *chosen]
        )
        precision.main()
        bits[activation] = json.loads(written.read_text())[-1]["bits_per_dim"]
    assert bits[""] == bits["silu"] != bits["relu"]
