"""A training step of a flow on a GPU, walked without one: nothing leaves it, and the host never waits for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from eiwtrain.flow import conditioners


@pytest.fixture(scope="module")
def walked() -> dict[str, Any]:
    """Return what the walks found. In a process of their own: a device cannot be taken back."""
    program = Path(__file__).with_name("fake_gpu.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_no_step_leaves_the_gpu_or_waits_for_it(walked: dict[str, Any]) -> None:
    assert len(walked["flows"]) > 20
    assert {name: problems for name, problems in walked["flows"].items() if problems} == {}


def test_the_rest_of_a_step_does_not_wait_for_the_gpu(walked: dict[str, Any]) -> None:
    assert walked["updates"] == {"adamw": [], "adamax": [], "muon": []}


def test_a_walk_finds_what_leaves_the_gpu_or_waits_for_it(walked: dict[str, Any]) -> None:
    assert [name for name, problems in walked["faults"].items() if not problems] == []


def test_attention_on_a_gpu_leaves_out_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, seen = F.scaled_dot_product_attention, []

    def spy(*args: torch.Tensor) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*args)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with FakeTensorMode():
        q = torch.empty(2, 1, 16, 8, device="cuda")
        assert conditioners.attend(q, q, q).device.type == "cuda"
    assert seen == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
