"""A real MLflow server in which exported models are registered, of this machine and of a bucket; one that serves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pytest
from helpers import free_port
from mlflow import MlflowClient
from small_run import commit, small_flow

from eiwtrain import export
from eiwtrain.exporting import models
from eiwtrain.exporting.pyfunc import Scorer

pytestmark = pytest.mark.cluster

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)


@contextlib.contextmanager
def process(command, log, healthy, env=None):
    """A server until the end of the block, once its address answers."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # `mlflow models serve` looks for uvicorn
    with open(log, "wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *map(str, command)],
            stdout=file,
            stderr=file,
            env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "PATH": path} | (env or {}),
            start_new_session=True,  # it has children, which are ended with it
        )
    try:
        end = time.monotonic() + 240
        while not answers(healthy):
            assert server.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < end, log.read_text()[-2000:]
            time.sleep(0.1)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server, and the folder that it keeps artifacts in."""
    folder, uri = tmp_path_factory.mktemp("mlflow"), f"http://127.0.0.1:{free_port()}"
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", folder / "artifacts"]
    where = ["--host", "127.0.0.1", "--port", uri.rpartition(":")[2], "--workers", 1]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with process(["server", *store, *where], folder / "log", f"{uri}/health", quiet):
        yield uri, folder / "artifacts"


@pytest.fixture
def run_id(server, tmp_path):
    client = MlflowClient(server[0])
    return client.create_run(client.create_experiment(tmp_path.name)).info.run_id


def file_of_version(uri, **query):
    with urllib.request.urlopen(
        f"{uri}/model-versions/get-artifact?{urllib.parse.urlencode(query)}", timeout=60
    ) as answer:
        return answer.read().decode()


def expected(step):
    return Scorer(small_flow(seed=step)).predict(IMAGES)


def test_a_model_of_this_machine_is_registered_and_served(server, run_id, tmp_path, monkeypatch):
    uri, artifacts = server
    commit(tmp_path / "local", 3, 4.5, mlflow_run_id=run_id)
    commit(tmp_path / "local", 6, 4.0, mlflow_run_id=run_id)
    for step in (3, 6):
        command = [str(step), "--run", str(tmp_path / "local"), "--tracking-uri", uri]
        assert export.main(command) == 0
    assert len(list(artifacts.rglob("model.safetensors"))) == 2
    version = MlflowClient(uri).get_model_version_by_alias("local", "best")
    assert (str(version.version), version.run_id) == ("2", run_id)
    # what the page of the version shows the signature from
    assert "tensor-spec" in file_of_version(uri, name="local", version=2, path="MLmodel")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert models.open_model("models:/local@best").metadata["step"] == 6
    np.testing.assert_allclose(mlflow.pyfunc.load_model("models:/local@best").predict(IMAGES), expected(6), 1e-5)

    serving = f"http://127.0.0.1:{free_port()}"
    where = ["--host", "127.0.0.1", "--port", serving.rpartition(":")[2], "--workers", 1]
    command = ["models", "serve", "-m", "models:/local@best", "--env-manager", "local", *where]
    with process(command, tmp_path / "serve.log", f"{serving}/ping"):
        asked = {"inputs": IMAGES.tolist(), "params": {"draws": 1}}
        request = urllib.request.Request(
            f"{serving}/invocations", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            np.testing.assert_allclose(json.load(answer)["predictions"], expected(6), 1e-5)
        request.data = json.dumps({"inputs": (IMAGES / 255).tolist()}).encode()
        with pytest.raises(urllib.error.HTTPError) as e:
            urllib.request.urlopen(request, timeout=120)
        assert e.value.code == 400
        assert b"whole numbers from 0 to 255" in e.value.read()


def test_a_model_in_a_bucket_is_registered_where_it_is(server, run_id, s3, tmp_path, monkeypatch):
    uri, artifacts = server
    before = list(artifacts.rglob("*"))
    commit(f"{s3}/remote", 3, 4.5, mlflow_run_id=run_id)
    output = f"{s3}/models/three"
    assert export.main(["best", "--run", f"{s3}/remote", "--output", output, "--tracking-uri", uri]) == 0
    assert list(artifacts.rglob("*")) == before  # nothing went through the server
    version = MlflowClient(uri).get_model_version_by_alias("remote", "best")
    assert (version.source, version.run_id) == (output, run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert models.open_model("models:/remote@best").metadata["step"] == 3
    np.testing.assert_allclose(mlflow.pyfunc.load_model("models:/remote/1").predict(IMAGES), expected(3), 1e-5)
