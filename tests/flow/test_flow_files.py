"""A flow as files, and what importing it pulls in."""

from __future__ import annotations

import doctest
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flow_helpers import images, make_flow
from safetensors.torch import load_file, save_file

import eiwtrain.flow
from eiwtrain.flow import load, save
from eiwtrain.flow.config import SHUFFLES


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_flow_comes_back_to_the_bit(tmp_path: Path, shuffle: str, dtype: torch.dtype) -> None:
    flow = make_flow(dtype=dtype, shuffle=shuffle)
    save(flow, tmp_path / "model")
    torch.manual_seed(99)
    before = torch.get_rng_state()
    back = load(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)
    assert not back.training
    assert back.config == flow.config
    assert all(p.requires_grad for p in back.parameters())
    assert all(t.data_ptr() % 64 == 0 for t in back.state_dict().values())  # or products may round otherwise
    x = images(2, dtype=dtype)
    assert torch.equal(back.log_prob(x), flow.log_prob(x))
    seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert torch.equal(back.sample(2, generator=seeds[0]), flow.sample(2, generator=seeds[1]))


def test_the_model_file_can_travel_alone(tmp_path: Path) -> None:
    flow = make_flow()
    save(flow, tmp_path / "there")
    alone = Path(shutil.copy(tmp_path / "there" / "model.safetensors", tmp_path / "renamed.safetensors"))
    assert torch.equal(load(alone).log_prob(images(1)), flow.log_prob(images(1)))
    assert torch.equal(load(str(alone)).log_prob(images(1)), flow.log_prob(images(1)))


def test_config_json_tells_people_what_the_model_is(tmp_path: Path) -> None:
    flow = make_flow()
    save(flow, tmp_path, {"run": "celeba", "bits_per_dim": 2.5})
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["config"] == json.loads(json.dumps(flow.config.to_dict()))
    assert described["metadata"] == {"run": "celeba", "bits_per_dim": 2.5}


def header(**changes: object) -> dict[str, str]:
    return {"eiwtrain": json.dumps({"format": "eiwtrain.flow/1", "config": make_flow().config.to_dict(), **changes})}


def test_what_is_no_flow_is_refused_with_the_reason(tmp_path: Path) -> None:
    save(make_flow(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    cases: list[tuple[dict[str, torch.Tensor], dict[str, str] | None, str]] = [
        ({k: v for k, v in tensors.items() if k != name}, header(), f"1 tensors are missing, the first is {name}"),
        ({**tensors, "extra": torch.zeros(1)}, header(), "1 tensors are unknown, the first is extra"),
        ({**tensors, name: torch.zeros(3)}, header(), f"{name} is"),
        (tensors, None, "not a flow of eiwtrain"),
        (tensors, {"eiwtrain": "{"}, "cannot be read"),
        (tensors, {"eiwtrain": "[]"}, "cannot be read"),
        (tensors, header(format="eiwtrain.flow/2"), "format 'eiwtrain.flow/2' is unknown"),
        (tensors, header(config={"image_shape": [3, 8, 8], "widths": 1}), "unknown field 'widths'"),
        (tensors, header(config=None), "not a mapping"),
    ]
    for content, described, message in cases:
        save_file(content, file, described)
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_a_damaged_or_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load(tmp_path)
    save(make_flow(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a safetensors file"):
        load(file)


def test_the_example_of_the_package_runs() -> None:
    results = doctest.testmod(eiwtrain.flow)
    assert results.attempted > 5
    assert results.failed == 0


def test_importing_the_flow_pulls_in_nothing_of_the_stack() -> None:
    code = "import sys, eiwtrain.flow; eiwtrain.flow.EIWFlow; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = set(done.stdout.split())
    assert {"torch", "safetensors", "eiwtrain"} <= loaded
    assert not loaded & {"ray", "deepspeed", "mlflow", "webdataset", "fsspec", "pydantic", "yaml", "PIL"}
