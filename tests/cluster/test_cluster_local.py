"""`cluster.local`: a real Ray, S3 and MLflow on this machine, by its command and by its Python API."""

import contextlib
import ipaddress
import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from cluster.local import LocalCluster, LocalError, status
from cluster.local.state import read

pytestmark = pytest.mark.cluster

RAY = str(Path(sys.executable).with_name("ray"))
PLAIN = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_", "MLFLOW_"))}


def until(condition, what):
    end = time.monotonic() + 120
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.2)
    return found


def drive(env, code, seconds=180):
    """The last line that a driver prints, in words; `nodes()` in it are the worker nodes that Ray has for alive."""
    begin = (
        "import ray, sys, time\n"
        "ray.init(log_to_driver=False, logging_level='ERROR')\n"
        "def nodes():\n"
        "    return [n['NodeID'] for n in ray.nodes() if n['Alive'] and 'CPU' in n['Resources']]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", begin + code], env=PLAIN | env, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


WAIT = "end = time.time() + 60\nwhile len(nodes()) != int({n}) and time.time() < end: time.sleep(0.1)\nprint(*nodes())"


def listeners(folder):
    """(address, port) of all that the cluster's processes listen on."""
    found = []
    for process in read(folder):
        for member in process.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                connections = member.net_connections("tcp")
                found += [c.laddr for c in connections if c.status == psutil.CONN_LISTEN]
    return found


def assert_only_loopback(folder):
    found = listeners(folder)
    assert len(found) > 10
    for ip, port in found:
        address = ipaddress.ip_address(ip)
        mapped = getattr(address, "ipv4_mapped", None) or address
        assert mapped.is_loopback, f"{ip} port {port}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with LocalCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


def test_a_task_runs_on_each_node_and_all_listen_on_loopback(cluster):
    release = cluster.folder / "release"
    code = (
        "@ray.remote(num_cpus=1)\n"
        "def where():\n"
        "    import pathlib\n"
        f"    end = time.time() + 120\n"
        f"    while not pathlib.Path({str(release)!r}).exists() and time.time() < end: time.sleep(0.1)\n"
        "    return ray.get_runtime_context().get_node_id()\n"
        "refs = [where.remote() for _ in range(2)]\n"
        f"open({str(release)!r} + '.begun', 'w').close()\n"
        "print(*ray.get(refs))"
    )
    begin = "import ray, time\nray.init(log_to_driver=False, logging_level='ERROR')\n"
    command = [sys.executable, "-c", begin + code]
    with subprocess.Popen(command, env=PLAIN | cluster.env, stdout=subprocess.PIPE, text=True) as driver:
        try:
            until(release.with_name("release.begun").exists, "the driver has begun")
            for node in cluster.nodes:
                until(lambda node=node: working(node), "each node has a worker")
            assert_only_loopback(cluster.folder)
            for connection in psutil.Process(driver.pid).net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    assert connection.laddr.ip.endswith("127.0.0.1")
            release.touch()
            assert sorted(driver.communicate(timeout=120)[0].split()) == sorted(n.node_id for n in cluster.nodes)
        finally:
            driver.kill()


def working(node):
    """Whether a task runs on the node: Ray names its process after it."""
    return any("ray::where" in " ".join(p.cmdline()) for p in node.process.family())


def test_without_the_token_nothing_is_answered(cluster):
    with pytest.raises(urllib.error.HTTPError) as e:
        urllib.request.urlopen(f"{cluster.job_address}/api/jobs/", timeout=30)
    assert e.value.code in (401, 403)
    wrong = cluster.folder / "wrong-token"
    wrong.write_text("0" * 64)
    for env in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN_PATH": str(wrong)}):
        code = "import ray; ray.init(logging_level='ERROR'); print('joined')"
        done = subprocess.run(
            [sys.executable, "-c", code], env=PLAIN | cluster.env | env, capture_output=True, text=True, timeout=180
        )
        assert done.returncode != 0
        assert "joined" not in done.stdout


def test_what_is_secret_is_for_its_owner_alone(cluster):
    for path in (cluster.folder, cluster._temp, cluster.folder / "ray-token", cluster.folder / "s3" / "s3.json"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    secret = [(cluster.folder / "ray-token").read_text(), cluster.env["AWS_SECRET_ACCESS_KEY"]]
    for process in read(cluster.folder):
        for member in process.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                assert not any(s in " ".join(member.cmdline()) for s in secret)


def test_s3_works_with_the_environment(cluster):
    code = "import fsspec, sys; fs = fsspec.filesystem('s3'); fs.pipe(sys.argv[1], b'1'); print(fs.cat(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, f"{cluster.bucket}/f"], env=PLAIN | cluster.env, capture_output=True, text=True
    )
    assert done.stdout == "b'1'\n", done.stderr


def test_mlflow_keeps_its_runs_and_its_artifacts_on_s3(cluster, tmp_path):
    begin = "import mlflow, sys; from mlflow import MlflowClient; c = MlflowClient(); "
    write = (
        "e = c.create_experiment('e'); r = c.create_run(e).info.run_id; c.log_metric(r, 'm', 0.5); "
        "c.log_text(r, 'hello', 'a.txt'); print(r)"
    )
    run = mlflow(cluster, begin + write)
    see = f"print(c.get_run({run!r}).data.metrics['m'], mlflow.artifacts.load_text(f'runs:/{run}/a.txt'))"
    for end in (cluster.stop_mlflow, cluster.kill_mlflow):
        uri = cluster.mlflow_uri
        end()
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(f"{uri}/health", timeout=10)
        cluster.start_mlflow()
        assert cluster.mlflow_uri == uri
        assert mlflow(cluster, begin + see) == "0.5 hello"
    code = f"import fsspec; print(len(fsspec.filesystem('s3').find('{cluster.bucket}/mlflow')))"
    assert mlflow(cluster, code) == "1"


def mlflow(cluster, code):
    done = subprocess.run(
        [sys.executable, "-c", code], env=PLAIN | cluster.env, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_doctor_finds_all_well_and_leaves_nothing(cluster, tmp_path):
    config = {
        "run": {"name": "checked", "storage": f"{cluster.bucket}/doctor"},
        "data": {"path": str(tmp_path / "data"), "resolution": 32, "prepare": "photos"},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "eiwtrain.doctor", str(tmp_path / "c.yaml")],
        env=PLAIN | cluster.env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    states = {line[6:26].strip(): line[:4].strip() for line in done.stdout.splitlines()}
    wanted = ("run.storage lease", "artifacts", "Ray", "workers", "node versions", "node clocks", "node ports", "nodes")
    wanted += ("node disks",)
    assert {states[subject] for subject in wanted} == {"ok"}, done.stdout
    secret = cluster.env["AWS_SECRET_ACCESS_KEY"]
    assert secret not in done.stdout + done.stderr
    code = f"import fsspec; print([f for f in fsspec.filesystem('s3').find('{cluster.bucket}') if 'doctor' in f])"
    assert mlflow(cluster, code) == "[]"


def test_a_submitted_job_finds_ray_and_s3(cluster, tmp_path):
    code = (
        "import ray, fsspec; ray.init(logging_level='ERROR'); "
        f"print('in the job:', fsspec.filesystem('s3').exists('{cluster.bucket}'), ray.cluster_resources()['CPU'])"
    )
    (tmp_path / "job.py").write_text(code)
    command = [RAY, "job", "submit", "--working-dir", ".", "--", "python", "job.py"]
    done = subprocess.run(command, cwd=tmp_path, env=PLAIN | cluster.env, capture_output=True, text=True, timeout=180)
    assert "in the job: True 2.0" in done.stdout, done.stdout + done.stderr


def test_a_killed_node_disappears_and_another_comes(cluster):
    killed = cluster.nodes[-1]
    family = killed.process.family()
    assert killed.alive
    killed.kill()
    assert not killed.alive
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family)
    assert killed.node_id not in drive(cluster.env, WAIT.format(n=1))
    added = cluster.add_node()
    assert added.alive
    assert added is cluster.nodes[-1]
    assert added.node_id in drive(cluster.env, WAIT.format(n=2))


def test_a_drained_node_shows_as_draining_until_it_is_idle(cluster):
    node = cluster.nodes[-1]
    code = (
        "from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On\n"
        "@ray.remote(num_cpus=1)\n"
        "class Busy:\n"
        "    def ping(self): return 1\n"
        f"a = Busy.options(scheduling_strategy=On('{node.node_id}', soft=False)).remote()\n"
        "ray.get(a.ping.remote())\n"
        "print('busy', flush=True)\n"
        "sys.stdin.readline()\n"
        "(found, deadline), = ray._private.state.state.get_draining_nodes().items()\n"
        "print(found, deadline / 1000 - time.time(), found in nodes(), ray.get(a.ping.remote()))\n"
    )
    begin = (
        "import ray, sys, time\nray.init(log_to_driver=False, logging_level='ERROR')\n"
        "def nodes():\n    return [n['NodeID'] for n in ray.nodes() if n['Alive']]\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", begin + code], env=PLAIN | cluster.env, **pipes) as driver:
        try:
            assert driver.stdout.readline() == "busy\n"
            node.drain(600, "a test")
            found, left, alive, answer = driver.communicate("\n", timeout=120)[0].splitlines()[-1].split()
        finally:
            driver.kill()
    assert found == node.node_id
    assert 0 < float(left) <= 600
    assert (alive, answer) == ("True", "1")  # it runs on meanwhile
    until(lambda: not node.alive, "Ray ends a drained node that has nothing to do")
    cluster.add_node()


def test_a_node_that_is_gone_cannot_be_drained(cluster):
    gone = cluster.add_node()
    gone.terminate()
    until(lambda: not gone.alive, "a terminated node ends")
    assert gone.node_id not in drive(cluster.env, WAIT.format(n=2))
    with pytest.raises(LocalError, match=f"node {gone.node_id} cannot be drained: it is dead"):
        gone.drain(1)


STRAY = "import os, time; os.setsid(); os.fork() and os._exit(0); time.sleep(600)"  # as the watcher of a driver
LEAVE = f"""
@ray.remote
def leave():
    import fsspec, subprocess
    subprocess.run([sys.executable, "-c", {STRAY!r}], check=True)
    fsspec.filesystem("s3").pipe("eiwtrain/f", b"1")
ray.get(leave.remote())
import fsspec
print(len(nodes()), "node,", fsspec.filesystem("s3").cat("eiwtrain/f"))
"""
SESSION = {"AWS_SESSION_TOKEN": "x", "AWS_CREDENTIAL_EXPIRATION": "2020-01-01T00:00:00Z"}  # in the user's shell


def command(folder, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "cluster.local", *arguments, "--folder", str(folder)],
        env=PLAIN | SESSION,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


def test_the_command_starts_a_cluster_says_what_lives_and_ends_all_of_it(tmp_path):
    folder = tmp_path / "home"
    try:
        done = command(folder, "up", "--nodes", "1")
        assert done.returncode == 0, done.stderr
        said = command(folder, "status")
        assert said.returncode == 0, said.stdout
        assert [line.split()[0] for line in said.stdout.splitlines()[:4]] == ["head", "node-1", "mlflow", "s3"]
        exports = [line.removeprefix("export ") for line in done.stdout.splitlines() if line.startswith("export ")]
        env = dict(shlex.split(export)[0].split("=", 1) for export in exports)
        assert drive(SESSION | env, LEAVE) == ["1", "node,", "b'1'"]
        assert stat.S_IMODE((folder / "env").stat().st_mode) == 0o600
        refused = command(folder, "up")
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1
        assert_only_loopback(folder)
        ports = {port for _, port in listeners(folder)}
        members = [member for process in read(folder) for member in process.family()]
        assert any(STRAY in member.cmdline() for member in members)
    finally:
        ended = command(folder, "down")
    assert ended.stdout == "ended: head, node-1, mlflow, s3\n", ended.stderr
    assert not any(m.is_running() and m.status() != psutil.STATUS_ZOMBIE for m in members)
    assert not ports & {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert status(folder) == []
    assert command(folder, "status").returncode == 1
    assert command(folder, "down").stdout == f"{folder}: nothing runs\n"


def test_an_up_that_is_interrupted_leaves_nothing(tmp_path):
    env = PLAIN | {"PYTHONUNBUFFERED": "1"}
    arguments = ["up", "--folder", str(tmp_path / "home"), "--no-mlflow"]
    with subprocess.Popen([sys.executable, "-m", "cluster.local", *arguments], env=env) as up:
        try:
            until(lambda: len(read(tmp_path / "home")) >= 2, "the head is being started")
            members = [member for process in read(tmp_path / "home") for member in process.family()]
            up.send_signal(signal.SIGHUP)  # as when its terminal is closed
            assert up.wait(60) == 128 + signal.SIGHUP
        finally:
            up.kill()
    assert not any(m.is_running() and m.status() != psutil.STATUS_ZOMBIE for m in members)
    assert status(tmp_path / "home") == []
