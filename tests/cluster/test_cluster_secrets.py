"""What listens, and where secrets get to, while the whole of it runs: a cluster, a job that stops and resumes."""

import base64
import contextlib
import ipaddress
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest
import yaml
from helpers import free_port, tiny_config, write_images, write_shards
from jobs import Job

from cluster.local import LocalCluster
from cluster.local.state import read

pytestmark = pytest.mark.cluster

PLANTED = {name: f"planted-{name}-5e7c31d09ab2" for name in ("mlflow", "azure", "nccl", "other")}
USER = "somebody"
OURS = ("RAY_", "AWS_", "MLFLOW_")
HOME = ("ray-token", "s3/s3.json", "s3/data/")  # where a cluster keeps its secrets, for its owner's eyes
SECONDS = 400


class Witness(threading.Thread):
    """Record, until it ends, every command line of the machine, and where the descendants of some processes listen."""

    def __init__(self, roots):
        super().__init__(daemon=True)
        self.roots, self.secrets = roots, list(PLANTED.values())
        self.exposed, self.listening, self.looks = set(), set(), 0
        self._ended = threading.Event()

    def run(self):
        while not self._ended.wait(0.05):
            self.looks += 1
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    said = " ".join(process.cmdline())
                    self.exposed |= {(secret, said) for secret in self.secrets if secret in said}
            if self.looks % 10 == 1:
                for process in [member for root in self.roots() for member in root]:
                    self.look_at_sockets(process)

    def look_at_sockets(self, process):
        with contextlib.suppress(psutil.Error):
            for c in process.net_connections("inet"):
                if c.status == psutil.CONN_LISTEN:
                    self.listening.add((c.laddr, " ".join(process.cmdline()).strip()))

    def end(self):
        self._ended.set()
        self.join(60)

    def not_on_loopback(self):
        return {(at, who) for at, who in self.listening if not is_loopback(at.ip)}


def is_loopback(ip):
    address = ipaddress.ip_address(ip)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def family(pid):
    """A process and its living descendants; none where it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@contextlib.contextmanager
def guarded(upstream):
    """Yield the URL of a server that asks for the user's password, and the paths that were asked for without it.

    Requests with the password go to `upstream`.
    """
    wanted = "Basic " + base64.b64encode(f"{USER}:{PLANTED['mlflow']}".encode()).decode()
    turned_away = []

    class Handler(BaseHTTPRequestHandler):
        def handle_one(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Authorization") != wanted:
                turned_away.append(self.path)
                code, answer = 401, b"who are you?"
            else:
                kept = {k: v for k, v in self.headers.items() if k.lower() in ("content-type", "accept")}
                request = urllib.request.Request(upstream + self.path, body or None, kept, method=self.command)
                try:
                    with urllib.request.urlopen(request, timeout=60) as response:
                        code, answer = response.status, response.read()
                except urllib.error.HTTPError as e:
                    code, answer = e.code, e.read()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = handle_one

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", free_port()), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", turned_away
    finally:
        server.shutdown()


def command(env, folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", *arguments], env=env, cwd=folder, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    """A user's day on a cluster whose secrets the test knows, and what was seen of it."""
    folder = tmp_path_factory.mktemp("day")
    write_images(folder / "images", 60)
    jobs = []
    with (
        pytest.MonkeyPatch.context() as patch,
        LocalCluster(folder / "cluster") as cluster,
        guarded(cluster.mlflow_uri) as (tracking, turned_away),
    ):
        witness = Witness(
            lambda: [p.family() for p in read(cluster.folder)] + [family(job.process.pid) for job in jobs]
        )
        witness.secrets += [(cluster.folder / "ray-token").read_text(), cluster.env["AWS_SECRET_ACCESS_KEY"]]
        witness.start()
        for name in [name for name in os.environ if name.startswith(OURS)]:
            patch.delenv(name)
        given = cluster.env | {
            "MLFLOW_TRACKING_URI": tracking,
            "MLFLOW_TRACKING_USERNAME": USER,
            "MLFLOW_TRACKING_PASSWORD": PLANTED["mlflow"],
            "AZURE_STORAGE_KEY": PLANTED["azure"],
            "NCCL_PLANTED": PLANTED["nccl"],
            "DATABASE_PASSWORD": PLANTED["other"],
        }
        for name, value in given.items():
            patch.setenv(name, value)
        env, bucket = dict(os.environ), f"s3://{cluster.bucket}"
        said = []
        try:
            prepare = ["--source", "images", "--split", "hash:0.2", "--resolution", "8", "--shard-size", "16"]
            said.append(command(env, folder, "data_prep", "folder", *prepare, "--output", f"{bucket}/data"))
            config = tiny_config(
                folder,
                run={"storage": f"{bucket}/runs"},
                data={"path": f"{bucket}/data", "cache_dir": str(folder / "cache")},
                train={"max_steps": 1000},
                checkpoint={"every": 1000},
                eval={"every": 1000},
            )
            (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
            said.append(command(env, folder, "eiwtrain.run", "tiny.yaml", "--dry-run"))
            jobs.append(Job(folder))
            jobs[-1].wait_for("training from step 0", SECONDS)
            jobs[-1].process.send_signal(signal.SIGINT)
            code, output = jobs[-1].wait(SECONDS)
            assert code == 130, output
            step = int(output.partition("stopped at step ")[2].split()[0].replace(",", ""))
            jobs.append(Job(folder, f"train.max_steps={step + 5}"))
            code, output = jobs[-1].wait(SECONDS)
            assert code == 0, output
            run = f"{bucket}/runs/tiny"
            scores = ["--scores", f"{bucket}/scores.parquet", "--json", f"{bucket}/result.json"]
            said.append(
                command(env, folder, "eiwtrain.evaluate", run, "--data", f"{bucket}/data", "--split", "test", *scores)
            )
            said.append(command(env, folder, "eiwtrain.sample", run, "--n", "2", "--output", f"{bucket}/grid.png"))
            said.append(command(env, folder, "eiwtrain.export", "best", "--run", run, "--output", f"{bucket}/exported"))
            said += [job.log.read_text() for job in jobs]
        finally:
            for job in jobs:
                if job.process.poll() is None:
                    os.killpg(job.process.pid, signal.SIGKILL)
            witness.end()
        (folder / "said.log").write_text("\n".join(said))
        yield folder, cluster, witness, turned_away


def test_all_of_it_listens_on_loopback_alone(day):
    _, _, witness, _ = day
    who = " ".join(who for _, who in witness.listening)
    for expected in ("gcs_server", "raylet", "dashboard", "mlflow", "weed", "ray::RayTrainWorker", "eiwtrain.run"):
        assert expected in who
    assert witness.not_on_loopback() == set()


def test_no_secret_was_ever_in_a_command_line(day):
    _, _, witness, _ = day
    assert witness.looks > 50
    assert witness.exposed == set()


def test_the_password_of_mlflow_reaches_workers(day):
    _, cluster, _, turned_away = day
    assert turned_away == []
    code = (
        "from mlflow import MlflowClient as C\n"
        "(r,) = C().search_runs([e.experiment_id for e in C().search_experiments()])\n"
        "print(r.info.status, len(C().get_metric_history(r.info.run_id, 'train/bits_per_dim')) > 3)"
    )
    env = dict(os.environ) | {"MLFLOW_TRACKING_URI": cluster.mlflow_uri}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=SECONDS)
    assert done.stdout.split() == ["FINISHED", "True"], done.stderr


def test_no_secret_is_in_anything_that_was_written(day):
    """Logs of all programs and of Ray, MLflow's database, and each object in the bucket: data, checkpoints, exports."""
    folder, cluster, witness, _ = day
    secrets = [secret.encode() for secret in witness.secrets]
    secrets += [base64.b64encode(f"{USER}:{PLANTED['mlflow']}".encode())]

    def found(content):
        return any(secret in content for secret in secrets)

    looked, leaks = 0, []
    for root in (folder, cluster._temp):
        for path in root.rglob("*"):
            name = str(path.relative_to(root))
            if not path.is_file() or path.is_symlink() or name.startswith(tuple(f"cluster/{home}" for home in HOME)):
                continue
            with contextlib.suppress(FileNotFoundError):  # a log that was just rotated
                looked += 1
                leaks += [str(path)] if found(path.read_bytes()) else []
    import fsspec

    bucket = fsspec.filesystem("s3")
    objects = bucket.find(cluster.bucket)
    leaks += [name for name in objects if found(bucket.cat(name))]
    assert any("/environment.json" in name for name in objects)
    assert any("/exported/" in name for name in objects)
    assert any("summary.json" in name for name in objects)
    assert looked > 50
    assert leaks == []


def test_ray_of_a_single_run_listens_on_loopback_with_its_own_token(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(OURS)]:
        monkeypatch.delenv(name)
    write_shards(tmp_path / "data")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path, train={"max_steps": 100000})))
    job = Job(tmp_path)
    witness = Witness(lambda: [family(job.process.pid)])
    witness.start()
    try:
        job.wait_for("training from step 0", SECONDS)
        looks = witness.looks
        end = time.monotonic() + SECONDS
        while witness.looks < looks + 12 and time.monotonic() < end:  # at the workers, too
            time.sleep(0.1)
        gcs = next(p for p in family(job.process.pid) if "gcs_server" in " ".join(p.cmdline()))
        assert gcs.environ()["RAY_AUTH_MODE"] == "token"
        token = gcs.environ()["RAY_AUTH_TOKEN"]
        job.process.send_signal(signal.SIGINT)
        code, output = job.wait(SECONDS)
    finally:
        witness.end()
        if job.process.poll() is None:
            os.killpg(job.process.pid, signal.SIGKILL)
    assert code == 130, output
    assert "ray::RayTrainWorker" in " ".join(who for _, who in witness.listening)
    assert witness.not_on_loopback() == set()
    assert len(token) == 64
    assert token not in output
