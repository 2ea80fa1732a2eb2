import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import lone_group, tiny_config, write_shards
from hypothesis import given
from hypothesis import strategies as st

from eiwtrain import data, flow
from eiwtrain.config import Config, Train, batching
from eiwtrain.on_ray.messages import Assignment, Crashed, Failed, Finished, Stopped
from eiwtrain.train import device, loop
from eiwtrain.train.objective import MicroBatch, learning_rate
from eiwtrain.train.state import flow_config

CONFIG = Config.model_validate(tiny_config(Path("/x")))


@given(global_batch=st.integers(1, 300), micro_batch=st.integers(1, 300), world_size=st.integers(1, 20))
def test_batching_spares_less_than_one_row_a_micro_batch(global_batch, micro_batch, world_size):
    micro_batch = min(micro_batch, global_batch)
    rows, accumulation = batching(Train(global_batch=global_batch, micro_batch=micro_batch), world_size)
    assert rows <= micro_batch
    places = rows * accumulation * world_size
    assert global_batch <= places < global_batch + accumulation * world_size


def test_learning_rate_warms_up_and_comes_down():
    train = Train(lr=2.0, warmup_steps=4, max_steps=14)
    assert [learning_rate(s, train, 99) for s in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert learning_rate(4, train, 99) == 2.0
    assert learning_rate(9, train, 99) == pytest.approx(1.0)
    assert learning_rate(14, train, 99) == pytest.approx(0.0)
    rates = [learning_rate(s, train, 99) for s in range(4, 15)]
    assert rates == sorted(rates, reverse=True)


def test_a_constant_schedule_is_constant_and_no_warm_up_is_none():
    train = Train(lr=2.0, warmup_steps=0, schedule="constant")
    assert {learning_rate(s, train, 99) for s in (0, 1, 999, 5000)} == {2.0}


def test_an_exponential_schedule_falls_after_each_epoch():
    train = Train(lr=2.0, warmup_steps=2, max_steps=14, schedule="exponential", lr_decay=0.5, global_batch=10)
    rates = [learning_rate(s, train, 40) for s in range(14)]
    assert rates == [1.0, 2.0, 2.0, 2.0, *[1.0] * 4, *[0.5] * 4, 0.25, 0.25]
    # 25 images are two and a half steps: the third one begins in epoch 0, the fourth in epoch 1
    assert [learning_rate(s, train, 25) for s in range(6)] == [1.0, 2.0, 2.0, 1.0, 1.0, 0.5]


def test_the_rate_of_a_published_recipe_is_as_published():
    """CIFAR-10 in DenseFlow: 50,000 images in batches of 64, 400 epochs at 0.9975 each, then 20 at 2e-5."""
    steps, tuned = 420 * 50_000 // 64, 20 * 50_000 // 64
    recipe = {"lr": 1e-3, "warmup_steps": 5000, "schedule": "exponential", "lr_decay": 0.9975, "global_batch": 64}
    train = Train(**recipe, max_steps=steps, finetune_steps=tuned)
    assert learning_rate(4999, train, 50_000) == 1e-3
    assert learning_rate(steps - tuned - 1, train, 50_000) == pytest.approx(1e-3 * 0.9975**399)
    assert {learning_rate(s, train, 50_000) for s in (steps - tuned, steps - 1)} == {2e-5}


@pytest.mark.parametrize("schedule", ["constant", "cosine", "exponential"])
def test_the_last_steps_fine_tune_after_any_schedule(schedule):
    train = Train(lr=2.0, warmup_steps=2, max_steps=14, schedule=schedule, finetune_steps=4, finetune_lr=0.125)
    shorter = Train(lr=2.0, warmup_steps=2, max_steps=10, schedule=schedule)
    rates = [learning_rate(s, train, 99) for s in range(14)]
    assert rates == [learning_rate(s, shorter, 99) for s in range(10)] + [0.125] * 4


def test_the_model_config_reaches_the_flow():
    changed = tiny_config(
        Path("/x"), model={"shuffle": "hard", "backprop": "stored", "trunk_dtype": "float64", "n_bits": 5}
    )
    built = flow_config(Config.model_validate(changed), 3)
    assert built.image_shape == (3, 8, 8)
    assert (built.levels, built.steps, built.conditioner.hidden) == (2, 2, 8)
    assert (built.shuffle, built.backprop, built.trunk_dtype, built.n_bits) == ("hard", "stored", "float64", 5)
    assert built.conditioner_dtype == "bfloat16"


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = Config.model_validate(tiny_config(Path("/x"), train={"precision": "fp32"}))
    model = flow.EIWFlow(flow_config(config, 3))
    model.initialize(torch.rand(16, 3, 8, 8) - 0.5)
    return model.double()


def test_losses_of_micro_batches_sum_to_the_mean(model):
    x = torch.rand(8, 3, 8, 8, dtype=torch.float64) - 0.5
    whole = MicroBatch(torch.ones(8, dtype=torch.float64), CONFIG, x)
    expected = whole.loss(model).detach()
    assert float(expected) == pytest.approx(
        float((model.bits_per_dim(x).mean() + CONFIG.train.shuffle_penalty * model(x).penalty.mean()).detach())
    )
    padded = [(x[:3], [1, 1, 1]), (x[3:6], [1, 1, 1]), (torch.cat([x[6:], x[:1]]), [1, 1, 0])]
    parts = [MicroBatch(torch.tensor(weight, dtype=torch.float64), CONFIG, images) for images, weight in padded]
    assert float(sum(p.loss(model).detach() for p in parts)) == pytest.approx(float(expected), rel=1e-12)
    assert sum(p.sums for p in parts).tolist() == pytest.approx(whole.sums.tolist(), rel=1e-12)
    assert float(whole.sums[0]) / 8 == pytest.approx(float(model.bits_per_dim(x).mean().detach()))


def test_nothing_is_read_from_the_device_before_backward():
    on = torch.device("meta")  # whose tensors have no numbers to read
    out = flow.FlowOutput(torch.empty(4, device=on), torch.empty(4, device=on), torch.empty(2, 2, device=on))
    micro = MicroBatch(torch.empty(4, device=on), CONFIG, torch.empty(4, 3, 8, 8, device=on))
    assert micro.loss(lambda *_: out).is_meta
    assert micro.sums.is_meta


class Driver:
    """The driver's end of the mailbox."""

    request = None

    def __init__(self, _mailbox):
        self.said = []
        Driver.last = self

    def say(self, message):
        self.said.append(message)

    finish = say


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start the only worker of a run; return what it sends to its driver."""
    monkeypatch.setattr(loop, "WorkerEnd", Driver)
    monkeypatch.setattr(device, "of_worker", lambda _config: torch.device("cpu"))  # and this process keeps its threads
    write_shards(tmp_path / "data")

    def start(fingerprint="", failures=0, shortages=0, **sections):
        config = Config.model_validate(tiny_config(tmp_path, **sections))
        fingerprint = fingerprint or data.load_manifest(config.data.path).fingerprint
        assignment = Assignment(config, fingerprint, None, None, None, {}, 0.0, 0.0, 0.0, failures, None, shortages)
        loop.train_worker({"assignment": assignment})
        return Driver.last.said

    with lone_group(tmp_path):
        yield start


def test_a_data_set_that_was_replaced_ends_the_run(start, tmp_path):
    (said,) = start(fingerprint="0123456789abcdef")
    now = data.load_manifest(str(tmp_path / "data")).fingerprint[:12]
    assert isinstance(said, Failed)
    assert said.reason.startswith(f"data.path: {tmp_path}/data was replaced during the run")
    assert f"(fingerprint {now}, was 0123456789ab); put back" in said.reason
    assert not (tmp_path / "runs").exists()


OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 3.50 GiB of which 1.25 GiB "
    "is free.\nIncluding non-PyTorch memory, this process has 2 GiB memory in use. Of the allocated"
)
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


def ended(start, **options):
    """What a worker says at its end, and whether it dies for another attempt."""
    try:
        return start(**options)[-1], False
    except RuntimeError:
        return Driver.last.said[-1], True


@pytest.mark.parametrize(
    ("model", "rows", "remedies"),
    [
        ({"backprop": "stored"}, 4, "use a train.micro_batch below 4 or model.backprop=invertible, or"),
        ({"backprop": "auto"}, 4, "below 4 or a model.memory_budget (bytes) or model.backprop=invertible, or"),
        ({"backprop": "auto", "memory_budget": 9}, 1, "use a lower model.memory_budget or model.backprop=invertible,"),
        ({}, 4, "use a train.micro_batch below 4, or"),
        ({}, 1, "use a smaller model, or"),
    ],
)
def test_a_worker_without_enough_gpu_memory_says_what_takes_less(model, rows, remedies, start, monkeypatch):
    def no_room(*_args, **_kwargs):
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    monkeypatch.setattr(loop, "TrainState", no_room)
    sections = {"model": model, "train": {"micro_batch": rows}}
    said, again = ended(start, **sections)
    takes_less = model.get("backprop") == "auto"  # in the next attempt
    assert said == (Crashed(said.reason, short_of_memory=True) if takes_less else Failed(said.reason))
    assert again == takes_less
    assert said.reason.startswith("out of GPU memory: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    assert said.reason.splitlines() == [said.reason]
    assert "1.25 GiB is free" in said.reason
    assert remedies in said.reason
    # a dead worker may still hold it
    assert ended(start, failures=1, **sections) == (Crashed(said.reason, short_of_memory=True), True)


def test_what_did_fit_is_tried_again(start, monkeypatch):
    class Fits:
        first_step, state = 3, SimpleNamespace(step=3)

        def __init__(self, *_args):
            pass

        def run(self):
            self.state.step += self.steps
            raise self.error

    monkeypatch.setattr(loop, "Worker", Fits)
    for error in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CUBLAS)):
        Fits.steps, Fits.error, Fits.state.step = 0, error, 3
        assert isinstance(ended(start)[0], Failed)
        Fits.steps = 1
        said, again = ended(start)
        assert again
        assert said == Crashed(said.reason, short_of_memory=True)
        assert "use a train.micro_batch below 4" in said.reason


def test_an_error_of_another_kind_is_no_lack_of_memory(start, monkeypatch):
    def fails(*_args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(loop, "Worker", fails)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        start()
    assert Driver.last.said == []


def test_after_shortages_activations_may_take_less(start, monkeypatch):
    shares = []

    def state(*_args, memory_share, **_kwargs):
        shares.append(memory_share)
        raise loop.Fatal("enough")

    monkeypatch.setattr(loop, "TrainState", state)
    for shortages in range(3):
        start(shortages=shortages)
    assert shares == [1.0, 0.75, 0.75**2]


def test_a_padded_row_gives_no_gradient(model):
    x = (torch.rand(3, 3, 8, 8, dtype=torch.float64) - 0.5).requires_grad_()
    MicroBatch(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64), CONFIG, x).loss(model).backward()
    assert x.grad is not None
    assert x.grad[:2].abs().amax(dim=(1, 2, 3)).min() > 0
    assert float(x.grad[2].abs().max()) == 0.0


def test_a_uniform_model_of_8_bit_images_costs_8_bits_per_dim():
    log_prob = torch.zeros(1)  # density 1 on a unit cube
    assert float(flow.bits_per_dim(log_prob, 192, 8)) == 8.0
    assert math.isclose(float(flow.bits_per_dim(torch.tensor([192 * math.log(2)]), 192, 8)), 7.0)


@pytest.mark.parametrize("untaken", ["", "3 points and 1 images"])
def test_a_run_whose_last_points_mlflow_did_not_take_ends_as_one_to_resume(monkeypatch, untaken):
    worker = loop.Worker.__new__(loop.Worker)
    newest = SimpleNamespace(step=5, url="runs/x/checkpoints/step-5")
    worker.state, worker.watchdog = SimpleNamespace(step=5, newest=newest), SimpleNamespace(beat=lambda _what: None)
    worker.tracker = SimpleNamespace(close=lambda: untaken)
    worker.held_out = worker.clock = None
    worker.job = SimpleNamespace(tracked=None, guard=None)
    monkeypatch.setattr(loop, "finish", lambda *_: "the summary")
    ended = worker._finish(None)
    if untaken:
        assert ended == Stopped(f"MLflow, which did not take {untaken}", 5, newest.url)
    else:
        assert ended == Finished("the summary")
