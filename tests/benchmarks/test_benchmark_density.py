"""The benchmark of density: what it trains, that it repeats, and what its table says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import write_shards

from benchmarks import density
from eiwtrain import flow

SMALL = {"levels": 2, "units": 1, "steps": 1, "conditioner": {"hidden": 4, "depth": 1, "growth": 2}}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    write_shards(folder)
    return str(folder)


@pytest.mark.parametrize("name", density.VARIANTS)
def test_every_variant_is_a_flow(name: str) -> None:
    fields = {k: v for k, v in density.VARIANTS[name].items() if k not in density._TRAINING}
    model = flow.EIWFlow.from_config({"image_shape": [3, 16, 16], **fields})
    density._publish(model, density.VARIANTS[name].get("published", []))
    noise = torch.rand(2, *model.config.noise_shape)
    assert model.bits_per_dim(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), noise).isfinite().all()


def test_a_run_is_a_row_and_is_not_made_twice(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    variant = "mine=" + json.dumps({**density.TINY, **SMALL, "published": ["attention", "norm"]})
    command = ["--data", url, "--json", str(file), "--seconds", "0.2", "--seeds", "1", "--images", "4", variant]
    for _ in range(2):
        assert density.main(command) == 0
        assert "| mine |" in capsys.readouterr().out
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 1
    assert rows[0]["steps"] >= 1
    assert 5 < rows[0]["bits_per_dim"] < 20


def test_differences_are_between_runs_of_one_seed() -> None:
    def row(variant: str, seed: int, bits: float) -> dict[str, Any]:
        return {"variant": variant, "seed": seed, "bits_per_dim": bits, "steps": 10, "parameters": 5}

    rows = [row("a", 0, 4.0), row("a", 1, 5.0), row("b", 0, 4.1), row("b", 1, 5.1), row("b", 2, 9.0)]
    text = density.table(rows, ["a", "b"])
    assert "| a | 5 | 10 | 4.500 ± 0.500 | +0.000 ± 0.000 |" in text
    assert text.endswith("| +0.100 ± 0.000 |")
