"""A flow as files, and what importing it pulls in."""

from __future__ import annotations

import doctest
import json
import re
import shutil
import subprocess
import sys
import time
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


def described(**changes: object) -> dict[str, str]:
    return header(config=make_flow().config.to_dict() | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 10**9},
        {"steps": 10**30},
        {"steps": 60_000},
        {"levels": 10**12},
        {"levels": 40_000},
        {"classes": 10**9},
        {"classes": 60_000},
        {"image_shape": [3, 1 << 40, 1 << 40]},
        {"image_shape": [3, 1 << 15, 1 << 15]},
        {"image_shape": [10**9, 8, 8]},
        {"image_shape": [3, 8, "8"]},
        {"image_shape": [[3], 8, 8]},
        {"conditioner": {"kind": "conv", "hidden": 10**9}},
        {"conditioner": {"kind": "conv", "hidden": 60_000}},
        {"conditioner": {"kind": "residual", "depth": 10**9}},
        {"conditioner": {"kind": "residual", "depth": 60_000}},
        {"conditioner": {"kind": "transformer", "hidden": 60_000, "heads": 60_000, "patch": 1}},
        {"conditioner": [1]},
        {"conditioner": {"hidden": {"a": 1}}},
        {"shuffle_block": 10**30},
        {"bins": float("nan")},
        {"steps": [10**9, 1]},
        {"coupling": ["affine"]},
    ],
    ids=str,
)
def test_a_config_that_is_larger_than_its_file_costs_nothing(tmp_path: Path, changes: dict[str, object]) -> None:
    save(make_flow(), tmp_path)
    file = tmp_path / "model.safetensors"
    for tensors in (load_file(file), {"a": torch.zeros(1)}):
        save_file(tensors, file, described(**changes))
        began = time.monotonic()
        with pytest.raises(ValueError, match=re.escape(str(file))) as e:
            load(tmp_path)
        assert time.monotonic() - began < 5
        assert len(str(e.value).splitlines()) == 1
        assert len(str(e.value)) < 1000


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"format": "eiwtrain.flow/1", "config": ' + "[" * 9000]
)
def test_nested_json_in_a_header_is_refused(tmp_path: Path, text: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", {"eiwtrain": text})
    for read in (load, eiwtrain.flow.metadata):
        with pytest.raises(ValueError, match="cannot be read"):
            read(tmp_path)


def test_weights_of_types_that_no_flow_has_are_refused(tmp_path: Path) -> None:
    save(make_flow(dtype=torch.float32), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    floats = [name for name, t in tensors.items() if t.is_floating_point()]
    orders = [name for name, t in tensors.items() if t.dtype == torch.int64]
    some = floats[0]
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({some: tensors[some].double()}, "several types"),
        ({some: tensors[some].bfloat16()}, "several types"),
        ({some: tensors[some].int()}, "several types"),
        ({name: tensors[name].int() for name in floats}, "weights are int32"),
        ({name: tensors[name].bool() for name in floats}, "weights are bool"),
        ({name: tensors[name].half() for name in floats}, "weights are float16"),
        ({name: tensors[name].bfloat16() for name in floats}, "weights are bfloat16"),
        ({orders[0]: tensors[orders[0]].float()}, f"{orders[0]} is float32, and should be int64"),
        ({orders[0]: tensors[orders[0]].int()}, f"{orders[0]} is int32, and should be int64"),
        ({orders[0]: tensors[orders[0]] + 1}, f"{orders[0]} is no order"),
        ({orders[0]: torch.zeros_like(tensors[orders[0]])}, f"{orders[0]} is no order"),
    ]
    for changed, message in cases:
        save_file(tensors | changed, file, described())
        with pytest.raises(ValueError, match=message) as e:
            load(tmp_path)
        assert len(str(e.value).splitlines()) == 1


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    flow = make_flow()
    name, parameter = next(iter(flow.named_parameters()))
    with torch.no_grad():
        parameter.view(-1)[0] = torch.nan
    save(flow, tmp_path)
    with pytest.warns(RuntimeWarning, match=f"1 of .* weights are not finite, the first in {name}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"/annex/objects/SHA256E-s1--0.safetensors\n", "git annex get"),
        (b"<!DOCTYPE html><html>", "page of the web"),
        (b"\n<?xml version='1.0'?><Error>", "page of the web"),
        (b"PK\x03\x04 and so on", "torch.save"),
        (b"\x80\x02}q\x00.", "a pickle"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"", "it is empty"),
        ((1000).to_bytes(8, "little") + b"{}", "ends early"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        (b"\x00" * 192, "not a safetensors file"),
        ((192).to_bytes(8, "little") + b"[" * 192, "not a safetensors file"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("url", ["s3://bucket/m", "hf://org/m", "https://host/m/model.safetensors", "models:/m@best"])
def test_a_url_is_no_local_path(url: str) -> None:
    for path in (url, Path(url)):
        with pytest.raises(ValueError, match="this takes a folder or file of this machine"):
            load(path)


def test_a_file_url_is_a_local_path(tmp_path: Path) -> None:
    save(make_flow(), tmp_path)
    assert load(f"file://{tmp_path}").config == load(tmp_path).config


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
