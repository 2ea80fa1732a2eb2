"""A run on a real cluster of two nodes, one of which dies, is drained, comes back; runs that hang, or are doubled."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from helpers import tiny_config, write_shards
from jobs import Job
from mlflow import MlflowClient

from cluster.local import LocalCluster
from eiwtrain import checkpoints
from eiwtrain.on_ray.address import CLUSTERS_OF_MANY

pytestmark = pytest.mark.cluster

STEPS, BATCH = 260, 8


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with LocalCluster(tmp_path_factory.mktemp("cluster"), nodes=2, cpus=1, s3=False, mlflow=False) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    write_shards(folder / "data", n=100)
    config = tiny_config(
        folder,
        train={"max_steps": STEPS},
        checkpoint={"every": 20},
        eval={"every": 1000},
        workers={"min": 1, "max": 2, "grow_seconds": 2.0},
    )
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def on_cluster(cluster, folder, monkeypatch):
    """The environment of a driver that joins the cluster and audits its samples."""
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(CLUSTERS_OF_MANY)  # as from another shell: the job finds out that the head is on loopback alone
    monkeypatch.setenv("RAY_ADDRESS", cluster.env["RAY_ADDRESS"].replace("127.0.0.1", "localhost"))
    while sum(node.alive for node in cluster.nodes) < 2:
        cluster.add_node()

    def start(name, *overrides):
        monkeypatch.setenv("EIWTRAIN_AUDIT", str(folder / "audit" / name))
        return Job(folder, *overrides, name=name)

    return start


TARGET = """
import json
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL as KEY
from ray._raylet import GcsClient
print((GcsClient(address="%s").internal_kv_get(KEY, namespace=None) or b"[]").decode())
"""


def target(cluster):
    """Return what Ray's autoscaler would make the cluster fit; there is none here."""
    program = TARGET % cluster.env["RAY_ADDRESS"]
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | cluster.env, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def samples(folder, name):
    """step -> the samples that it was made of, as of the last time that it was made; and the world sizes seen."""
    rows = []
    for file in (folder / "audit" / name).iterdir():
        rows += [json.loads(line) for line in file.read_text().splitlines()]
    made, sizes = defaultdict(dict), set()
    for row in sorted(rows, key=lambda r: r["time"]):
        if "restored" in row:
            made = defaultdict(dict, {s: ranks for s, ranks in made.items() if s < row["restored"]})
            sizes.add(row["world_size"])
        else:
            made[row["step"]][row["rank"]] = row["indices"]
    return {step: sorted(i for share in ranks.values() for i in share) for step, ranks in made.items()}, sizes


def losses(folder, name):
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    (run,) = client.search_runs(["1"], f"attributes.run_name = '{name}'")
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/bits_per_dim")
    assert [m.step for m in history] == list(range(1, STEPS + 1))
    return torch.tensor([m.value for m in history])


@pytest.fixture(scope="module")
def whole(folder):
    """A run that nothing happens to, on this machine."""
    os.environ["EIWTRAIN_AUDIT"] = str(folder / "audit" / "whole")
    try:
        code, output = Job(folder, "workers.min=2", name="whole").wait()
    finally:
        del os.environ["EIWTRAIN_AUDIT"]
    assert code == 0, output
    return samples(folder, "whole")[0], losses(folder, "whole")


def assert_as_whole(folder, name, whole):
    made, sizes = samples(folder, name)
    assert sizes == {1, 2}
    assert made == whole[0]  # the same samples in every step, at any number of workers
    torch.testing.assert_close(losses(folder, name), whole[1], rtol=2e-2, atol=2e-2)  # sums in another order


def test_a_run_continues_without_a_lost_node_and_takes_it_back(cluster, folder, on_cluster, whole):
    job = on_cluster("lost")
    job.wait_for("on 2 workers")
    job.wait_for("checkpoint at step 20:")
    cluster.nodes[-1].kill()
    job.wait_for("the workers failed")
    job.wait_for("on 1 workers")
    assert target(cluster) == [{"CPU": 1}] * 2  # also while an attempt runs on fewer, for which Ray Train would ask
    cluster.add_node()
    job.wait_for("there is room for 2 workers: a checkpoint first")
    code, output = job.wait(300)
    assert code == 0, output
    assert target(cluster) == []
    assert output.count(f"to {STEPS} on 2 workers") == 2
    assert_as_whole(folder, "lost", whole)


def test_a_drained_node_is_left_with_a_checkpoint_before_it_goes(cluster, folder, on_cluster, whole):
    job = on_cluster("drained", "checkpoint.every=100000")
    job.wait_for("on 2 workers")
    job.wait_for("bits/dim")
    cluster.nodes[-1].drain(60, "a test")
    job.wait_for("Ray drains node")
    job.wait_for("on 1 workers")
    code, output = job.wait(300)
    assert code == 0, output
    assert "the workers failed" not in output
    first, second = (line for line in output.splitlines() if line.startswith("training from step"))
    saved = next(line for line in output.splitlines() if line.startswith("checkpoint at step"))
    assert first.startswith("training from step 0 ")
    assert second.startswith(f"training from step {saved.split()[3].rstrip(':')} ")  # no step was lost
    assert_as_whole(folder, "drained", whole)


def test_a_rank_that_hangs_is_found_and_replaced(cluster, folder, on_cluster):
    job = on_cluster("hung", "workers.hang_seconds=15", "workers.min=2")
    job.wait_for("checkpoint at step 20:")
    workers = [
        p
        for node in cluster.nodes
        if node.alive
        for p in psutil.Process(node.pid).children(recursive=True)
        if "RayTrainWorker" in " ".join(p.cmdline())
    ]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGSTOP)
    job.wait_for("no progress for 15 s in step")
    code, output = job.wait(300)
    assert code == 0, output
    assert "all_reduce" in output  # where the other rank waited
    assert output.count("training from step") >= 2
    losses(folder, "hung")


def test_a_second_job_of_the_same_name_is_refused_while_the_first_lives(folder, on_cluster):
    first = on_cluster("doubled", "train.max_steps=100000", "workers.max=1")
    first.wait_for("bits/dim")
    code, output = Job(folder, name="doubled").wait()
    assert code == 2, output
    assert output.strip().splitlines()[-1].startswith("error: run.name: 'doubled' is being trained by ")
    first.process.kill()  # without a word: its lease stays, and its process is seen to be gone
    first.process.wait()
    second = Job(folder, "train.max_hours=0.0001", "workers.max=1", name="doubled")
    code, output = second.wait()
    assert code == 75, output
    assert "training from step" in output
    saved = checkpoints.newest(str(folder / "runs" / "doubled"))
    assert f"stopped at step {saved.step:,} of {STEPS} by its time limit (train.max_hours)" in output


def test_a_submitted_job_that_is_stopped_resumes(cluster, folder, on_cluster):
    ray = str(Path(sys.executable).with_name("ray"))
    environment = os.environ | {"RAY_ADDRESS": cluster.job_address}
    command = [sys.executable, "-m", "eiwtrain.run", str(folder / "tiny.yaml"), "run.name=submitted"]

    def submit(*overrides):
        done = subprocess.run(
            [ray, "job", "submit", "--no-wait", "--submission-id", f"job-{time.time_ns()}", "--", *command, *overrides],
            env=environment, capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        return next(word.strip("'") for word in done.stdout.split() if word.strip("'").startswith("job-"))

    def job(action, name, timeout=180):
        return subprocess.run(
            [ray, "job", action, name], env=environment, capture_output=True, text=True, timeout=timeout, check=False
        ).stdout

    def wait_for(name, text):
        end = time.monotonic() + 120
        while text not in (logs := job("logs", name)):
            assert time.monotonic() < end, logs
            time.sleep(1)
        return logs

    first = submit("train.max_steps=100000")
    wait_for(first, "bits/dim")
    job("stop", first)
    logs = wait_for(first, "resume with")
    assert "by SIGTERM" in logs
    saved = checkpoints.newest(str(folder / "runs" / "submitted"))
    assert f"checkpoint  {saved.url}" in logs
    second = submit("train.max_steps=100000", "train.max_hours=0.0001")
    assert f"training from step {saved.step:,} " in wait_for(second, "its time limit")
