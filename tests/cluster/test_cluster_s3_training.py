"""A whole training run that reads its shards from a real S3 server, which goes away and comes back."""

import json
import time

import pytest
import torch
import yaml
from helpers import tiny_config, write_shards
from jobs import Job
from mlflow import MlflowClient
from s3fs import S3FileSystem

import data_prep
from cluster.s3 import S3Server
from eiwtrain import checkpoints, storage
from eiwtrain.data.manifest import load_manifest

pytestmark = pytest.mark.cluster

STEPS, AWAY = 200, 5.0


@pytest.fixture
def server(tmp_path):
    with S3Server(tmp_path / "s3", bucket="bucket") as server:
        yield server


@pytest.fixture
def on_server(server, tmp_path, monkeypatch):
    """The same shards on the server and in a local folder, and a config that reads the former with next to no cache."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # which keeps clients of the server before
    write_shards(tmp_path / "data", n=200)
    images = str(tmp_path / "data-images")
    of_source = {"split": "hash:0.2"}
    data_prep.prepare("folder", "s3://bucket/data", 8, path=images, of_source=of_source, shard_size=16, name="data")
    manifest = load_manifest("s3://bucket/data")
    assert manifest == load_manifest(str(tmp_path / "data"))
    shards = {"cache_dir": str(tmp_path / "cache"), "cache_bytes": 3 * manifest.splits["train"].shards[0].bytes}
    config = tiny_config(
        tmp_path, train={"max_steps": STEPS}, checkpoint={"every": 1000}, eval={"every": 1000}, data=shards
    )
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    return manifest


def weights(folder, name):
    return checkpoints.load(checkpoints.committed(str(folder / "runs" / name))[0])


def metric(folder, name, key):
    summary = json.loads((folder / "runs" / name / "summary.json").read_text())
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    return [m.value for m in client.get_metric_history(summary["mlflow_run_id"], key)]


def test_a_server_that_is_away_changes_nothing_in_a_run(server, on_server, tmp_path):
    job = Job(tmp_path, "data.path=s3://bucket/data", "data.loader_workers=1", name="remote")
    job.wait_for("training from step 0")
    job.wait_for("data.cache_bytes")  # this cache is too small on purpose, and the run says so
    server.stop()
    time.sleep(AWAY)
    assert job.process.poll() is None, job.log.read_text()
    server.start()
    code, output = job.wait(300)
    assert code == 0, output
    assert "storage faults retried" in output
    faults = metric(tmp_path, "remote", "time/storage_faults")
    assert faults[0] <= faults[-1]
    assert faults[-1] > 0
    code, output = Job(tmp_path, name="local").wait()
    assert code == 0, output
    assert set(metric(tmp_path, "local", "time/storage_faults")) == {0}
    remote, local = weights(tmp_path, "remote"), weights(tmp_path, "local")
    assert all(torch.equal(remote[name], local[name]) for name in local)


def test_what_is_final_ends_a_run_in_one_line_that_names_the_shard(server, on_server, tmp_path):
    shards = on_server.splits["train"].shards
    other = storage.read_bytes(f"s3://bucket/data/{shards[0].name}")
    for shard in shards[1:]:  # each of them now another shard's bytes: put there by mistake, or half a new version
        storage.write_bytes(f"s3://bucket/data/{shard.name}", other)
    code, output = Job(tmp_path, "data.path=s3://bucket/data", name="replaced").wait()
    assert code == 1, output
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "is damaged or replaced" in line
    assert any(shard.name in line for shard in shards[1:])
