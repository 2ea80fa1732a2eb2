"""`ray start --head` and `ray job submit`: the commands of docs/clusters/ray.md, on a cluster of this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from helpers import free_port, tiny_config, write_shards

from eiwtrain.data.manifest import load_manifest

pytestmark = pytest.mark.cluster

REPOSITORY = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def environment(home):
    """A new user's, with the virtual environment active."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return keep | {"PATH": path, "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def address(environment, tmp_path_factory):
    """The job address of a cluster with one head node, on loopback."""
    dashboard, temp = free_port(), Path("/tmp") / f"ray-test-{os.getpid()}"  # a short path: it holds sockets
    head = subprocess.Popen(
        [
            RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={free_port()}",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=2", f"--temp-dir={temp}",
            "--disable-usage-stats", "--dashboard-agent-listen-port=0",  # of its fixed ports another Ray may have one
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    url = f"http://127.0.0.1:{dashboard}"
    try:
        end = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{url}/api/jobs/", timeout=5).read()
                break
            except OSError:
                assert head.poll() is None, "ray start ended"
                assert time.monotonic() < end, "Ray's job server is not up within 90 s"
                time.sleep(0.5)
        yield url
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(temp, ignore_errors=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    write_shards(folder / "data")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_config(folder)))
    return folder


@pytest.fixture(scope="module")
def working_dir(tmp_path_factory):
    """What a user's clone holds: the committed files, as `git` and so Ray's upload see them."""
    clone = tmp_path_factory.mktemp("clone") / "eiwtrain"
    ignore = shutil.ignore_patterns(".git", ".venv", "venv", "runs", "__pycache__", ".*_cache", ".hypothesis", "*.whl")
    shutil.copytree(REPOSITORY, clone, ignore=ignore)
    return clone


def submit(address, environment, working_dir, *command):
    return subprocess.run(
        [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", *command],
        cwd=working_dir,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_submitted_job_trains_on_that_cluster(address, environment, working_dir, folder, home):
    # a relative path would be in Ray's temporary copy of the working directory: it means ~/eiwtrain there
    command = ["python", "-m", "eiwtrain.run", str(folder / "tiny.yaml"), "run.storage=runs"]
    result = submit(address, environment, working_dir, *command)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    path = home / "eiwtrain" / "runs" / "tiny" / "summary.json"
    summary = json.loads(path.read_text())
    assert summary["steps"] == 12
    lines = output.splitlines()
    assert str(path) in lines
    assert any(line.startswith("step ") and "bits/dim" in line and "ETA" in line for line in lines), output
    assert "\r" not in output
    assert "succeeded" in output


def test_a_bad_config_fails_the_job_with_its_one_line(address, environment, working_dir, folder):
    result = submit(
        address, environment, working_dir, "python", "-m", "eiwtrain.run", str(folder / "tiny.yaml"), "train.lrr=1"
    )
    assert result.returncode != 0
    assert "error: train.lrr: no such field; did you mean train.lr?" in result.stdout + result.stderr


def test_a_submitted_job_writes_a_data_set_on_that_cluster(address, environment, working_dir, folder, home):
    images = folder / "data-images"
    command = ["python", "-m", "data_prep", "folder", "--source", str(images), "--split", "hash:0.2"]
    command += ["--resolution", "8", "--shard-size", "16", "--output", "sets/data"]
    result = submit(address, environment, working_dir, *command)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert "wrote 4 shards" in output or "wrote 5 shards" in output, output
    written = home / "eiwtrain" / "sets" / "data"
    assert load_manifest(str(written)) == load_manifest(str(folder / "data"))
