"""What --dry-run prints, and that the heads of the configs say the same."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers import tiny_config, write_shards

from eiwtrain import run
from eiwtrain.config import batching
from eiwtrain.config.file import load_config
from eiwtrain.driver import costs, dry_run, preflight

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
MEANT = re.compile(
    r"^# Meant for: (?:(?P<gpus>\d+) x (?P<gpu>[^,]+), about (?P<hours>[\d.]+) hours, (?P<gb>[\d.]+) GB a GPU"
    r"|(?P<cores>\d+) CPU cores, (?P<flops>[\d.e+]+) FLOPs, (?P<cpu_gb>[\d.]+) GB of tensors a worker)"
    r", as --dry-run works out:\n"
    r"#   (?P<millions>[\d.]+) M parameters; (?P<gflop>[\d.]+) GFLOP an image",
    re.MULTILINE,
)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("EIWTRAIN_STORAGE", "EIWTRAIN_DATA", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_config(tmp_path)))
    return str(file)


def printed(capsys, *argv: str) -> tuple[int, str, str]:
    code = run.main([*argv, "--dry-run"])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_plan_stands_where_the_data_set_is_missing(path, capsys):
    code, out, err = printed(capsys, path)
    assert code == 2
    assert err.startswith("error: data.path: ")
    assert len(err.splitlines()) == 1
    for word in ("run:\n", "parameters", "GFLOP/image", "stored", "checkpointed", "* invertible", "resume"):
        assert word in out
    assert "no speed is assumed for CPUs" in out
    assert "epochs" not in out


def test_the_plan_stands_where_gpus_are_missing(path, capsys, monkeypatch):
    monkeypatch.setattr("eiwtrain.driver.preflight.gpus_here", lambda: 0)
    code, out, err = printed(capsys, path, "workers.gpus=1", "workers.min=1", "workers.max=4")
    assert code == 2
    assert err.startswith("error: workers.gpus: ")
    assert all(gpu.name in out for gpu in costs.GPUS)


def test_with_data_the_plan_counts_epochs_and_checks_follow(path, tmp_path, capsys):
    write_shards(tmp_path / "data")
    code, out, err = printed(capsys, path)
    assert (code, err) == (0, "")
    train = load_config(path).train
    images = int(re.search(r"([\d,]+) train", out)[1].replace(",", ""))
    assert f"{train.max_steps * train.global_batch / images:,.1f} epochs" in out
    assert out.index("memory    ") < out.index("data      ") < out.index("tracking  ")


def test_a_config_that_cannot_be_read_has_no_plan(path, capsys):
    assert printed(capsys, path, "train.lrr=1")[:2] == (2, "")


def a_plan(path, operations: int, *given: str) -> list[str]:
    """Return the plan of a million steps of 8 images at 156 GFLOP, in micro-batches of 4 with these operations."""
    config = load_config(path, ["workers.gpus=1", "workers.min=1", "train.max_steps=1000000", *given])
    flops = dict.fromkeys(costs.COUNTED_MODES, 156e9)
    found = replace(costs.of(config), flops_per_image=flops, update_operations=0)
    return dry_run.lines(config, replace(found, operations=dict.fromkeys(costs.COUNTED_MODES, operations)), None)


def test_hours_are_the_steps_at_the_images_that_each_worker_has(path):
    (line,) = [text.split() for text in a_plan(path, 1, "workers.max=8") if "A100" in text]
    # 312 TFLOP/s at a quarter are 500 images/s; 8,000,000 images are 4.4 hours of that
    assert line[-5:] == ["500", "0.6", "4", "4.4", "4"]


def test_the_plan_says_what_workers_and_the_run_cost(path):
    said = a_plan(path, 1, "workers.max=8", "workers.price_per_hour=2.5")
    assert "cost      20.00 an hour on 8, 2.50 an hour on 1 workers" in said
    (line,) = [text.split() for text in said if "A100" in text]
    assert line[-6:] == ["0.6", "4", "11.11", "4.4", "4", "11.11"]  # 4.44 GPU-hours
    said = a_plan(path, 1, "workers.max=1", "workers.price_per_hour={spot: 1, other: 2.5}")
    (line,) = [text.split() for text in said if "A100" in text]
    assert line[-1] == "4.44-11.11"
    assert not [text for text in a_plan(path, 1, "workers.max=1") if "cost" in text]


def test_more_workers_than_micro_batches_gain_nothing(path):
    three_hours = round(3 * 3600 / 1e6 / costs.LAUNCH)  # to start a million micro-batches
    for most, gpu_hours in ((8, "24"), (2, "6")):
        said = a_plan(path, three_hours, f"workers.max={most}")
        (line,) = [text.split() for text in said if "A100" in text]
        assert line[-4:] == ["3.0", gpu_hours, "6.0", "6"]
        warned = "          2 can have a step of one micro-batch each; 8 get 1 images each" in "\n".join(said)
        assert warned == (most > 2)


def test_a_data_set_that_is_there_is_looked_up_once(path, tmp_path, capsys, monkeypatch):
    write_shards(tmp_path / "data")
    found, calls = preflight.find_data, []
    monkeypatch.setattr("eiwtrain.driver.preflight.find_data", lambda config: calls.append(1) or found(config))
    assert printed(capsys, path)[0] == 0
    assert calls == [1]


def test_a_gpu_that_is_too_small_is_named_as_such(path):
    config = load_config(path, ["workers.gpus=1", "model.backprop=stored"])
    found = costs.of(config)
    each = found.activation_bytes | {"stored": 8 * 10**9}  # 4 a micro-batch
    text = dry_run.lines(config, replace(found, activation_bytes=each), None)
    assert [line.split()[0] for line in text if "does not fit" in line] == ["L4"]


def test_no_speed_is_assumed_for_fp32(path):
    config = load_config(path, ["workers.gpus=1", "train.precision=fp32"])
    assert "train.precision=bf16 alone" in dry_run.lines(config, costs.of(config), None)[-1]


@pytest.mark.parametrize(
    ("steps", "warmup", "schedule", "rate"),
    [
        (100, 10, "cosine", "rises to 0.001 in 10 steps, then falls to 0 by half a cosine"),
        (100, 10, "constant", "rises to 0.001 in 10 steps, then stays"),
        (100, 0, "constant", "0.001, stays"),
        (100, 101, "cosine", "rises over 101 steps (train.warmup_steps), so train.lr = 0.001 is not reached"),
        (100, 10, "exponential", "rises to 0.001 in 10 steps, then times 0.5 after each epoch, to 0.00025"),
    ],
)
def test_the_plan_says_how_the_learning_rate_changes(path, steps, warmup, schedule, rate):
    given = [f"train.max_steps={steps}", f"train.warmup_steps={warmup}", f"train.schedule={schedule}", "train.lr=1e-3"]
    t = load_config(path, [*given, "train.lr_decay=0.5"]).train
    assert dry_run._rate(t, 300) == rate
    if schedule == "exponential":
        assert dry_run._rate(t, None) == rate.removesuffix(", to 0.00025")
    tuned = t.model_copy(update={"max_steps": steps + 7, "finetune_steps": 7})
    assert dry_run._rate(tuned, 300) == f"{rate}; 2e-05 in the last 7 steps"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_each_config_says_what_it_is_meant_for_and_where_things_are(path, monkeypatch):
    assert MEANT.search(path.read_text())
    config = load_config(str(path))
    assert Path(config.run.storage) == Path.cwd() / "runs"
    assert Path(config.data.path).parent == Path.cwd() / "runs" / "data"
    monkeypatch.setitem(os.environ, "EIWTRAIN_STORAGE", "s3://bucket/runs")
    monkeypatch.setitem(os.environ, "EIWTRAIN_DATA", "s3://bucket/data")
    monkeypatch.setitem(os.environ, "MLFLOW_TRACKING_URI", "http://mlflow:5000")
    moved = load_config(str(path))
    assert moved.root == f"s3://bucket/runs/{config.run.name}"
    assert moved.data.path == f"s3://bucket/data/{Path(config.data.path).name}"
    assert moved.tracking.uri == "http://mlflow:5000"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_have_one_full_micro_batch_a_worker(path):
    config = load_config(str(path))
    assert batching(config.train, config.max_workers) == (config.train.micro_batch, 1)
    assert config.max_workers * config.train.micro_batch == config.train.global_batch


@pytest.mark.cluster  # a minute or so for a flow of full size; celeba, imagenet and lsun128 have the same one
@pytest.mark.parametrize("name", ["quickstart", "cifar10-cpu", "cifar10", "lsun"])
def test_the_head_of_a_config_agrees_with_its_plan(name):
    path = next(path for path in CONFIGS if path.stem == name)
    meant = MEANT.search(path.read_text())
    config = load_config(str(path))
    found = costs.of(config)
    images = config.train.max_steps * config.train.global_batch
    assert float(meant["millions"]) == pytest.approx(found.parameters / 1e6, rel=0.01)
    assert float(meant["gflop"]) == pytest.approx(found.flops_per_image[found.mode] / 1e9, rel=0.01)
    memory = found.worker_bytes(found.mode, config.max_workers) / 1e9
    if not config.workers.gpus:
        assert int(meant["cores"]) == config.max_workers * config.workers.cpus
        assert float(meant["flops"]) == pytest.approx(images * found.flops_per_image[found.mode], rel=0.05)
        assert float(meant["cpu_gb"]) == pytest.approx(memory, abs=0.005)
        return
    gpu = next(gpu for gpu in costs.GPUS if gpu.name == meant["gpu"])
    assert int(meant["gpus"]) == config.max_workers
    hours = config.train.max_steps * found.step_seconds(gpu, config.max_workers) / 3600
    assert float(meant["hours"]) == pytest.approx(hours, abs=0.06)
    assert float(meant["gb"]) == pytest.approx(memory, abs=0.06)
    assert found.fits(gpu, config.max_workers)


def test_a_stage_at_which_a_model_fits_is_named(path):
    config = load_config(path, ["workers.gpus=1", "workers.max=8"])
    found = replace(costs.of(config), parameters=10**9)  # 20 GB of state, for 24 GB of an L4
    text = dry_run.lines(config, found, None)
    assert ["on 8 it does with train.zero_stage=1" in line for line in text if "does not fit" in line] == [True]
