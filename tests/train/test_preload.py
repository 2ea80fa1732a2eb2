"""The processes that a Ray of one program keeps ready: how many, and what they have imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_config

from eiwtrain.config import Config
from eiwtrain.on_ray import session

LOOK = "import sys, eiwtrain.train.preload; print({'torch', 'deepspeed', 'eiwtrain.train.loop'} & set(sys.modules))"


@pytest.mark.parametrize(
    ("cpus", "gpus", "found"),
    [
        ("2", "0", {"torch", "deepspeed", "eiwtrain.train.loop"}),
        (
            "2",
            "1",
            {"torch", "eiwtrain.train.loop"},
        ),  # DeepSpeed would look for GPUs too early
        ("", "", set()),
    ],
)
def test_a_process_that_waits_for_a_worker_has_its_imports(cpus, gpus, found):
    environment = os.environ | {session.PRELOAD: cpus, session.PRELOAD_GPUS: gpus}
    environment.pop("OMP_NUM_THREADS", None)
    code = LOOK + "; import os; print(os.environ.get('OMP_NUM_THREADS'))"
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    modules, threads = said.stdout.splitlines()[-2:]
    assert eval(modules) == found
    assert threads == (cpus or "None")


def test_nothing_looks_at_gpus_before_a_worker_has_its_own():
    code = (
        "import sys, torch\n"
        "for name in ('is_available', 'device_count', 'init', 'current_device', '_lazy_init'):\n"
        "    setattr(torch.cuda, name, lambda *args, name=name: print(name, 'was called'))\n"
        "import eiwtrain.train.preload\n"
        "print('eiwtrain.train.loop' in sys.modules)"
    )
    environment = os.environ | {session.PRELOAD: "1", session.PRELOAD_GPUS: "1"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split("\n")[-2:] == ["True", ""]
    assert "was called" not in said.stdout


@pytest.mark.parametrize("joins", [True, False])
def test_only_workers_import_what_workers_need(tmp_path, monkeypatch, joins):
    for name in (session.PRELOAD, session.PRELOAD_GPUS, session.PRELOADED, FIRST):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    session._preload(None)
    assert not {session.PRELOADED, FIRST} & os.environ.keys()
    session._preload(Config.model_validate(tiny_config(tmp_path, workers={"min": 2, "cpus": 3})))
    assert os.environ[session.PRELOADED] == "eiwtrain.train.preload"
    assert (os.environ[session.PRELOAD], os.environ[session.PRELOAD_GPUS]) == ("3", "0")
    monkeypatch.setattr(session, "joins_cluster", lambda: joins)
    assert session.light() == (None if joins else {"env_vars": {session.PRELOAD: ""}})


def test_preload_is_found_by_its_name():
    assert Path(session.__file__).parents[1].joinpath("train", "preload.py").is_file()


FIRST = "RAY_prestart_worker_first_driver"
TAKEN = """
import os, sys, time
import psutil
from eiwtrain.config import Config
from eiwtrain.on_ray import session

session.start(2, Config.model_validate_json(sys.argv[1]))
import ray


@ray.remote(num_cpus=1)
class Worker:
    def look(self):
        return os.getpid(), "colorsys" in sys.modules


def waiting():
    family = psutil.Process().children(recursive=True)
    return {p.pid for p in family if p.cmdline() and p.cmdline()[0].startswith("ray::IDLE")}


def until(true):
    end = time.monotonic() + 60
    while not true() and time.monotonic() < end:
        time.sleep(0.1)
    assert true()


until(lambda: len(waiting()) == 2)
first = [Worker.remote() for _ in range(2)]
assert all(ray.get([worker.look.remote() for worker in first])[i][1] for i in range(2))
assert not waiting()
session.keep_ready(2)
until(lambda: len(waiting()) == 2)
time.sleep(3)  # by itself Ray ends a process that has waited for a second, and for which there is no CPU
ready = waiting()
for worker in first:
    ray.kill(worker)
second = [Worker.remote() for _ in range(2)]
assert dict(ray.get([worker.look.remote() for worker in second])) == dict.fromkeys(ready, True)
session.stop()
"""


@pytest.mark.cluster
def test_processes_that_wait_are_taken_by_the_workers_of_the_next_attempt(tmp_path):
    config = Config.model_validate(tiny_config(tmp_path, workers={"min": 2}))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {session.PRELOADED: "colorsys"}
    command = [sys.executable, "-c", TAKEN, config.model_dump_json()]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert said.returncode == 0, said.stderr
