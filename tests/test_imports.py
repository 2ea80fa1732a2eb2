"""What a process does not import because it does not need it: a heavy library takes a second or two of each start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {
    "torch",
    "deepspeed",
    "mlflow",
    "ray",
    "pandas",
    "scipy",
    "sklearn",
    "skimage",
    "matplotlib",
    "s3fs",
    "pyarrow",
}
COMPILER = "torch._inductor.lowering"  # a part of torch's compiler that `torch.compile` imports


def imported(*words: str) -> set[str]:
    """Return the names of all modules that Python imports when it is started with these words."""
    started = subprocess.run([sys.executable, "-X", "importtime", *words], cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in started.stderr.splitlines() if line.startswith("import time:")]
    assert started.returncode in (0, 2), started.stderr
    return {line.rpartition("|")[2].strip() for line in lines}


@pytest.mark.parametrize(
    "words",
    [
        ("eiwtrain.run", "--help"),
        ("eiwtrain.run", "--fields"),
        ("eiwtrain.run", "configs/quickstart.yaml", "train.steps=1"),
        ("data_prep", "--help"),
        ("eiwtrain.doctor", "--help"),
        ("eiwtrain.evaluate", "--help"),
        ("eiwtrain.sample", "--help"),
        ("eiwtrain.export", "--help"),
        ("eiwtrain.report", "--help"),
    ],
    ids=" ".join,
)
def test_a_command_answers_without_heavy_libraries(words):
    assert not imported("-m", *words) & HEAVY


def test_data_prep_does_without_the_config_of_training():
    assert "eiwtrain.config" not in imported("-m", "data_prep", "--help")


def test_a_watcher_that_waits_is_small():
    assert not imported("-c", "import eiwtrain.driver.watcher") & (HEAVY | {"numpy", "fsspec", "yaml"})


def test_deepspeed_brings_neither_mlflow_nor_the_compiler():
    found = imported(
        "-c",
        "from eiwtrain.train.engine import _import_deepspeed\n"
        "_import_deepspeed()\n"
        "from deepspeed.runtime.zero import stage3\n"
        "from deepspeed.runtime.zero.muon import muon_optimizer  # by all ranks at ZeRO 1 to 3",
    )
    assert "deepspeed" in found
    assert not found & {"mlflow.tracking", "torch._dynamo", COMPILER}


def test_a_training_step_does_without_the_compiler():
    found = imported(
        "-c",
        "import os, tempfile, torch\n"
        "from eiwtrain.config import Train\n"
        "from eiwtrain.train.engine import Engine\n"
        "os.environ['LOCAL_RANK'] = '0'\n"
        "store = f'file://{tempfile.mkdtemp()}/store'\n"
        "torch.distributed.init_process_group('gloo', init_method=store, rank=0, world_size=1)\n"
        "for stage in (0, 1, 2):\n"
        "    engine = Engine(torch.nn.Linear(2, 1), Train(zero_stage=stage), 1, 1, 1)\n"
        "    engine.step([lambda module: module(torch.ones(1, 2)).sum()], 0.1)\n"
        "    engine.load_moments(dict(engine.moments()), 1, lambda module: module(torch.ones(1, 2)).sum())\n"
        "from torch.utils.checkpoint import checkpoint\n"
        "x = torch.ones(2, requires_grad=True)\n"
        "checkpoint(torch.sin, x, use_reentrant=False).sum().backward()\n"
        "assert torch.equal(x.grad, x.cos())",
    )
    assert "deepspeed" in found
    assert "torch._dynamo" not in found


@pytest.mark.parametrize(
    ("config", "overrides"),
    [("quickstart", []), ("lsun", []), ("quickstart", ["model.conditioner.kind=transformer"])],
    ids=str,
)
def test_an_outline_of_a_flow_does_without_the_compiler(config, overrides):
    found = imported(
        "-c",
        "from eiwtrain.config.file import load_config\n"
        "from eiwtrain.train.state import outline\n"
        f"outline(load_config('configs/{config}.yaml', {overrides}), 3)",
    )
    assert "torch" in found
    assert not found & {"torch._dynamo", "sympy"}
