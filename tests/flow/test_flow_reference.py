"""EIW-Flow against what its authors' program computes, from recorded weights, noise and results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import reference

FILES = sorted((Path(__file__).parent / "data").glob("*.safetensors"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
@pytest.mark.parametrize("backprop", reference.MODES)
def test_every_number_of_the_authors_program_comes_out(file: Path, backprop: str) -> None:
    found = reference.compare(reference.read(file), backprop)
    assert len([name for name in found if name.startswith("after.")]) == 12
    assert {"log_prob", "regulariser", "bits_per_dim", "gradients", "inverse"} <= set(found)
    assert max(found.values()) < 1e-11


def test_the_command_says_which_number_is_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = FILES[1]
    tensors, metadata = load_file(file), reference.read(file).metadata
    wrong = tmp_path / "wrong.safetensors"
    tensors["regulariser"] += 1e-6
    save_file(tensors, wrong, metadata)
    assert reference.main([str(file)]) == 0
    assert reference.main([str(wrong)]) == 1
    assert "| regulariser | 1.0e-06 | 1.0e-06 |" in capsys.readouterr().out
    tensors["regulariser"] = torch.full((1,), torch.nan, dtype=torch.float64)
    save_file(tensors, wrong, metadata)
    assert reference.main([str(wrong)]) == 1


def test_another_file_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    for path in (file, tmp_path / "missing", Path(__file__)):
        assert reference.main([str(path)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
