"""data_prep on real Ray: workers that are killed, a source that goes away."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data_prep
from cluster.local import LocalCluster

pytestmark = pytest.mark.cluster

TASK = "ray::_run_in_worker"  # what Ray calls a process that does one of data_prep's tasks


WAITING = """
import sys
from ray._raylet import GcsClient
from ray.autoscaler.v2.sdk import get_cluster_resource_state
state = get_cluster_resource_state(GcsClient(address=sys.argv[1]))
print([(dict(r.request.resources_bundle), r.count) for r in state.pending_resource_requests])
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """1,500 files, large for what becomes of them, so that there is time to kill somebody."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    for n in range(50):
        Image.fromarray(np.roll(noise, n, 0)).save(folder / f"{n:04d}.png", compress_level=0)
    for n in range(50, 1500):
        (folder / f"{n:04d}.png").hardlink_to(folder / f"{n % 50:04d}.png")
    return folder


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """The bytes of the data set as one process writes them."""
    output = tmp_path_factory.mktemp("whole") / "set"
    data_prep.prepare("folder", str(output), 16, path=str(pictures), shard_size=100)
    return contents(output)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def command(pictures, output, *more):
    base = [sys.executable, "-m", "data_prep", "folder", "--source", str(pictures), "--resolution", "16"]
    return [*base, "--shard-size", "100", "--output", str(output), *more]


def processes(title, group):
    """Processes of that title in a process group or below one of it."""
    found = []
    for stat in Path("/proc").glob("[0-9]*"):
        try:
            name = (stat / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            environ = (stat / "environ").read_bytes()
        except OSError:
            continue
        if name.startswith(title) and f"TEST_GROUP={group}".encode() in environ.split(b"\0"):
            found.append(int(stat.name))
    return found


def test_a_worker_that_is_killed_is_replaced_and_nothing_differs(pictures, whole, tmp_path):
    group = tmp_path.name
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(
            command(pictures, tmp_path / "set", "--workers", "2"),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TEST_GROUP": group},
        )
        try:
            end = time.monotonic() + 120
            while not (busy := processes(TASK, group)):
                assert job.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < end
                time.sleep(0.02)
            os.kill(busy[0], signal.SIGKILL)
            assert job.wait(180) == 0, (tmp_path / "log").read_text()
        finally:
            job.kill()
    assert contents(tmp_path / "set") == whole


def test_a_source_that_goes_away_ends_all_workers_in_one_line(pictures, tmp_path):
    source, output = tmp_path / "pictures", tmp_path / "set"
    source.mkdir()
    for picture in pictures.iterdir():
        (source / picture.name).hardlink_to(picture)
    with open(tmp_path / "err", "w") as err:
        job = subprocess.Popen(command(source, output, "--workers", "2"), stdout=subprocess.DEVNULL, stderr=err)
        try:
            end = time.monotonic() + 120
            while not list(output.glob("*.json")):
                assert job.poll() is None, (tmp_path / "err").read_text()
                assert time.monotonic() < end
                time.sleep(0.02)
            shutil.rmtree(source)
            assert job.wait(180) == 2
        finally:
            job.kill()
    lines = [line for line in (tmp_path / "err").read_text().splitlines() if " of 1,500 images" not in line]
    assert len(lines) == 1, lines
    assert re.fullmatch(rf"data_prep: source {source}/\d+\.png cannot be read: No such file or directory", lines[0])
    assert not (output / "manifest.json").exists()


def test_a_cluster_without_cpus_is_waited_for_and_used_as_it_grows(pictures, whole, tmp_path):
    """The cluster starts nodes when a task waits for them."""
    impatient = "import sys, data_prep.parallel as p, data_prep.__main__ as m; p._WAITING_SECONDS = 1.0"
    program = [sys.executable, "-c", f"{impatient}; sys.exit(m.main())"]
    log, job = tmp_path / "log", None
    with LocalCluster(tmp_path / "cluster", nodes=0, cpus=2, s3=False, mlflow=False) as cluster:
        try:
            with log.open("w") as out:
                job = subprocess.Popen(
                    [*program, *command(pictures, tmp_path / "set")[3:]],
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=os.environ | cluster.env,
                )
            end = time.monotonic() + 120
            while "waiting: no node of the cluster has CPUs for tasks yet" not in log.read_text():
                assert job.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.1)
            program = [sys.executable, "-c", WAITING, cluster.env["RAY_ADDRESS"]]
            while (found := subprocess.check_output(program, env=os.environ | cluster.env, text=True)).strip() == "[]":
                assert time.monotonic() < end, "nothing waits, for which a node would be started"
            assert found.strip() == "[({'CPU': 1.0}, 2)]"
            cluster.add_node()
            assert job.wait(180) == 0, log.read_text()
        finally:
            if job:
                job.kill()
    assert contents(tmp_path / "set") == whole
