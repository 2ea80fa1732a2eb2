"""What MLflow says of a run whose driver is killed without a word, through a real main job."""

import os
import signal

import pytest
import yaml
from helpers import tiny_config, write_shards
from jobs import Job
from mlflow import MlflowClient
from mlflow_server import Server
from watchers import mark, wait_until, watchers

pytestmark = pytest.mark.cluster

STEPS, QUIET = 40, {"every": 1000000}


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path / "data")
    config = tiny_config(tmp_path, train={"max_steps": STEPS}, checkpoint={"every": 10}, workers={"min": 1}, eval=QUIET)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.fixture
def environment(monkeypatch):
    environment = mark()
    for name in environment.keys() - os.environ.keys():
        monkeypatch.setenv(name, environment[name])
    yield environment
    wait_until(lambda: not watchers(environment))  # whatever has happened, none is left


def of_run(uri):
    (found,) = MlflowClient(uri).search_runs(["1"])
    return found


def start(folder, *overrides):
    """A job that does not end by itself, with a checkpoint."""
    job = Job(folder, "train.max_steps=1000000", *overrides)
    job.wait_for("checkpoint at step 10:")
    return job


def kill(job):
    job.process.send_signal(signal.SIGKILL)  # the driver alone
    job.process.wait()


def assert_resumes(folder, uri, killed, *overrides):
    code, output = Job(folder, *overrides).wait()
    assert code == 0, output
    assert "resuming from step" in output
    finished = of_run(uri)
    assert (finished.info.run_id, finished.info.status) == (killed.info.run_id, "FINISHED")
    assert finished.data.tags["eiwtrain.status"] == "finished"
    assert len(finished.inputs.dataset_inputs) == 2


def test_a_run_whose_driver_is_killed_is_recorded_and_resumes(folder, environment):
    uri = f"sqlite:///{folder}/runs/mlflow.db"
    job = start(folder)
    assert (of_run(uri).info.status, len(watchers(environment))) == ("RUNNING", 1)
    kill(job)
    wait_until(lambda: of_run(uri).info.status == "KILLED")
    wait_until(lambda: "its driver died" in of_run(uri).data.tags["eiwtrain.status"])
    assert_resumes(folder, uri, of_run(uri))


def test_a_driver_killed_while_mlflow_is_away_is_recorded_later(folder, environment):
    (folder / "server").mkdir()
    server = Server(folder / "server")
    try:
        server.start()
        uri = f"tracking.uri={server.endpoint}"
        job = start(folder, uri)
        server.kill()
        kill(job)
        server.start()
        wait_until(lambda: of_run(server.endpoint).info.status == "KILLED")
        wait_until(lambda: "its driver died" in of_run(server.endpoint).data.tags["eiwtrain.status"])
    finally:
        server.kill()
