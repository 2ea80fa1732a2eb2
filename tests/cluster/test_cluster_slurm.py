"""`sbatch cluster/slurm.sh` on a real Slurm of one node, in a network of its own. Needs root, and Debian's slurmctld,
slurmd, slurm-client, munge and iproute2."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from helpers import tiny_config, write_shards

from eiwtrain import checkpoints

REPOSITORY = Path(__file__).parents[2]
NAMESPACES = ["--net", "--uts", "--mount", "--pid"]
START = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
STEPS = 400

UP = """
set -e
ip link set lo up
ip address add 10.7.0.1/32 dev lo
hostname node
mount --bind {folder}/hosts /etc/hosts
munged --force --key-file={folder}/munge.key --socket={folder}/munge --pid-file={folder}/munge.pid \
    --log-file={folder}/munge.log --seed-file={folder}/munge.seed
export SLURM_CONF={folder}/slurm.conf
slurmctld
slurmd
exec sleep infinity
"""
CONF = """
ClusterName=test
SlurmctldHost=node(10.7.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
NodeName=node NodeAddr=10.7.0.1 CPUs={cpus} RealMemory=1000
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def missing():
    """Why there can be no Slurm here; empty if there can."""
    wanted = ["slurmctld", "slurmd", "munged", "sbatch", "unshare", "nsenter", "ip"]
    if absent := [name for name in wanted if not shutil.which(name)]:
        return f"apt-get install slurmctld slurmd slurm-client munge iproute2 (no {', '.join(absent)})"
    if os.geteuid() or subprocess.run([*START, "ip", "link", "set", "lo", "up"], capture_output=True).returncode:
        return "needs root, and namespaces"
    return ""


pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(why := missing()), reason=why)]


class Slurm:
    """Daemons that nobody but their own namespaces can reach, and that end with them."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        (folder / "hosts").write_text("127.0.0.1 localhost\n10.7.0.1 node\n")
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, cpus=os.cpu_count()))
        with (folder / "up.log").open("w") as log:
            self.process = subprocess.Popen(
                [*START, "bash", "-c", UP.format(folder=folder)], stdout=log, stderr=subprocess.STDOUT
            )
        self.wait_for(lambda: self("sinfo", "--noheader", "--format=%t", check=False).strip() == "idle", 60)

    def __call__(self, *command, check=True):
        """What the command prints that runs where the daemons are."""
        (init,) = psutil.Process(self.process.pid).children() or [self.process]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_"))}
        env = own | {"PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        command = ["nsenter", f"--target={init.pid}", *NAMESPACES, f"--wd={REPOSITORY}", *command]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def wait_for(self, condition, seconds, log=None):
        end = time.monotonic() + seconds
        while not condition():
            said = (log or self.folder / "up.log").read_text() if (log or self.folder / "up.log").exists() else ""
            assert self.process.poll() is None, said
            assert time.monotonic() < end, said
            time.sleep(0.5)

    def stop(self):
        self.process.kill()  # and with it all that lives in its namespaces
        self.process.wait()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    yield slurm
    slurm.stop()


@pytest.fixture
def submit(slurm, tmp_path):
    write_shards(tmp_path / "data", n=100)
    config = tiny_config(
        tmp_path, workers={"min": 1}, train={"max_steps": STEPS}, checkpoint={"every": 20}, eval={"every": 1000}
    )
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))

    def submit(*overrides):
        options = ["--nodes=1", "--gpus-per-node=0", "--mem=500", f"--output={tmp_path / 'log'}", "--parsable"]
        job = ["cluster/slurm.sh", str(tmp_path / "tiny.yaml"), *overrides]
        return slurm("sbatch", *options, *job).strip(), tmp_path / "log"

    return submit


def state(slurm, job):
    about = slurm("scontrol", "--oneliner", "show", "job", job)
    return dict(word.split("=", 1) for word in about.split() if "=" in word)


def test_a_preempted_job_queues_itself_and_resumes(slurm, submit, tmp_path):
    job, log = submit("train.max_steps=100000")
    slurm.wait_for(lambda: log.exists() and "checkpoint at step 20:" in log.read_text(), 300, log)
    processes = slurm("ps", "-eo", "args")
    assert "--address" in processes or "--head" in processes
    assert "AUTH_TOKEN" not in processes
    slurm("scancel", "--batch", "--signal=TERM", job)
    slurm.wait_for(lambda: "back into the queue" in log.read_text(), 300, log)
    saved = checkpoints.newest(str(tmp_path / "runs" / "tiny"))
    assert f"stopped at step {saved.step:,} of 100,000 by SIGTERM" in log.read_text()
    slurm.wait_for(lambda: state(slurm, job)["JobState"] == "PENDING", 120, log)
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm itself waits two minutes
    slurm.wait_for(lambda: f"training from step {saved.step:,} " in log.read_text(), 300, log)
    assert state(slurm, job)["Restarts"] == "1"
    slurm("scancel", "--batch", "--signal=INT", job)
    slurm.wait_for(lambda: state(slurm, job)["JobState"] == "FAILED", 300, log)  # ended, and not queued again
    assert state(slurm, job)["ExitCode"] == "143:0"
    assert log.read_text().count("back into the queue") == 1


def test_a_job_that_finishes_or_cannot_run_is_not_queued_again(slurm, submit, tmp_path):
    job, log = submit("train.max_steps=5", "checkpoint.every=5")
    slurm.wait_for(lambda: state(slurm, job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), 300, log)
    assert state(slurm, job)["JobState"] == "COMPLETED", log.read_text()
    assert json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())["steps"] == 5
    job, log = submit("train.lrr=1")
    slurm.wait_for(lambda: state(slurm, job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), 300, log)
    assert (state(slurm, job)["JobState"], state(slurm, job)["ExitCode"]) == ("FAILED", "2:0")
    assert "did you mean train.lr?" in log.read_text()
