import os
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_config, write_shards
from small_run import export_model, small_flow

from eiwtrain import evaluate, sample
from eiwtrain.config import Config
from eiwtrain.exporting import pyfunc
from eiwtrain.train import device, engine


@pytest.fixture(autouse=True)
def rounding(monkeypatch):
    """Let PyTorch round float32 to TensorFloat-32 wherever it can, and let cuDNN choose convolutions by a race."""
    before = rounds()
    set_to(True, True)
    assert rounds() == (True, True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    yield
    set_to(*before)


def set_to(convolutions, products):
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


def rounds():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_worker_rounds_no_float32_and_repeats_its_kernels(deterministic, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is taken back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.get_num_threads()
    try:
        config = Config.model_validate(tiny_config(tmp_path, train={"deterministic": deterministic}))
        assert device.of_worker(config) == torch.device("cpu")
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == deterministic
        flow = small_flow().train()  # every kernel that it needs has a deterministic kind
        flow(torch.rand(2, 3, 8, 8) - 0.5).log_prob.sum().backward()
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)
    assert rounds() == (False, False)
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize(("index", "rank"), [("cuda:11", "11"), ("cpu", "3")])
def test_deepspeed_takes_the_workers_own_gpu(index, rank, monkeypatch):
    world = SimpleNamespace(_get_backend=lambda _device: SimpleNamespace(options=SimpleNamespace(_timeout="as long")))
    groups = SimpleNamespace(_WORLD_GROUP=None)
    for name, module in (("deepspeed", SimpleNamespace()), ("deepspeed.utils", SimpleNamespace(groups=groups))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(engine.dist, "group", SimpleNamespace(WORLD=world))
    monkeypatch.setattr(engine.dist, "new_group", lambda timeout: f"a group that waits {timeout}")
    monkeypatch.setenv("LOCAL_RANK", "3")
    engine._use(torch.device(index))
    assert (os.environ["LOCAL_RANK"], groups._WORLD_GROUP) == (rank, "a group that waits as long")


@pytest.mark.parametrize("there_is_one", [False, True])
def test_a_command_uses_the_named_device_and_rounds_no_float32(there_is_one, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there_is_one)
    assert device.of_command("auto").type == ("cuda" if there_is_one else "cpu")
    assert rounds() == (False, False)
    assert not torch.backends.cudnn.benchmark
    assert device.of_command("cpu").type == "cpu"
    if there_is_one:
        assert device.of_command("cuda").type == "cuda"
    else:
        with pytest.raises(ValueError, match="--device: cuda was asked for"):
            device.of_command("cuda")


@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_the_commands_round_no_float32(command, tmp_path):
    export_model(small_flow(), tmp_path / "model", step=1)
    if command == "sample":
        assert sample.main([str(tmp_path / "model"), "--n", "1", "--output", str(tmp_path / "x.png")]) == 0
    else:
        write_shards(tmp_path / "data", n=20)
        assert evaluate.main([str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--images", "2"]) == 0
    assert rounds() == (False, False)


def test_a_loaded_model_rounds_no_float32_and_keeps_settings(monkeypatch):
    flow = small_flow()
    iwbo, seen = flow.iwbo, []
    monkeypatch.setattr(flow, "iwbo", lambda *args: (seen.append(torch.backends.cudnn.allow_tf32), iwbo(*args))[1])
    channels, height, width = flow.config.image_shape
    scorer = pyfunc.Scorer(flow)
    scorer.predict(torch.zeros(2, height, width, channels, dtype=torch.uint8).numpy())
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32
    with pytest.raises(ValueError, match="uint8"):
        scorer.predict([0])
    assert torch.backends.cudnn.allow_tf32
