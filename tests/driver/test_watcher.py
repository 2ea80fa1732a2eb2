"""The watcher of a driver that is killed, exits in order, or is replaced by another: real processes, sqlite."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from helpers import tiny_config
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from watchers import mark, marked, wait_until, watchers

from eiwtrain import storage, tracking
from eiwtrain.config import Config
from eiwtrain.driver import watcher
from eiwtrain.storage.lease import Lease

DRIVER = """
import subprocess, sys
from eiwtrain import tracking
from eiwtrain.driver import watcher
uri, experiment_id, run_id, root, owner = sys.argv[1:]
watching = watcher.Watcher(tracking.TrackedRun(uri, experiment_id, run_id), root, owner)
children = [subprocess.Popen(["sleep", "600"])]
print("ready", flush=True)
for line in sys.stdin:
    word, _, rest = line.strip().partition(" ")
    getattr(watching, word)(*rest.split())
    print("done", flush=True)
"""


class Driver:
    """A process that holds a lease, as far as its watcher knows, and has a child that outlives it."""

    def __init__(self, run, root, owner):
        self.environment = mark()
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, run.uri, run.experiment_id, run.run_id, root, owner],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
            cwd=Path(__file__).parents[2],
        )
        assert self.process.stdout.readline() == "ready\n"
        self.tree = psutil.Process(self.process.pid).children(recursive=True)
        (self.watcher,) = self.watchers()

    def watchers(self):
        return watchers(self.environment)

    def send(self, words):
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def config(tmp_path, database):
    config = Config.model_validate(tiny_config(tmp_path))
    Path(config.run.storage).mkdir()
    shutil.copy(database, config.run.storage)
    return config


@pytest.fixture
def run(config):
    return tracking.begin(config, {})


@pytest.fixture
def held(config):
    lease = Lease.acquire(config.root, config.run.name, lambda line: None)
    yield lease
    lease.release("stopped")


@pytest.fixture
def driver(config, run, held):
    driver = Driver(run, config.root, held.owner)
    yield driver
    for process in marked(driver.environment):
        process.kill()
    driver.process.wait()


def state(run):
    found = MlflowClient(run.uri).get_run(run.run_id)
    return found.info.status, found.data.tags["eiwtrain.status"]


def test_a_killed_driver_leaves_a_killed_run_and_no_watcher(run, driver):
    began = time.time()
    driver.kill()
    wait_until(lambda: state(run)[0] == "KILLED")
    wait_until(lambda: not driver.watchers())
    text = state(run)[1]
    assert text.startswith("its driver died, last sign of life 2")
    assert text.endswith(" UTC; resumes with the same command")
    assert began - 1 <= MlflowClient(run.uri).get_run(run.run_id).info.end_time / 1000 <= time.time()
    assert driver.tree[0].is_running()  # a child that lives on has not held it up


def test_a_watcher_is_out_of_reach_of_what_ends_the_driver(driver):
    """`ray job stop` signals the driver and all below it; a terminal signals the driver's session."""
    assert driver.watcher.pid not in [p.pid for p in driver.tree]
    assert os.getsid(driver.watcher.pid) != os.getsid(driver.process.pid)
    assert {fd.name for fd in Path(f"/proc/{driver.watcher.pid}/fd").iterdir()} == {"0", "1", "2"}


def test_a_watcher_that_is_dismissed_ends_and_leaves_the_run_alone(run, driver):
    driver.send("dismiss")
    wait_until(lambda: not driver.watchers())
    driver.send("dismiss")
    driver.send("will_end FINISHED too-late")
    driver.kill()
    assert state(run) == ("RUNNING", "running")


def test_a_watcher_reports_what_its_driver_could_not(run, driver):
    driver.send("will_end FINISHED at-last")
    driver.process.stdin.close()
    driver.process.wait()
    wait_until(lambda: state(run) == ("FINISHED", "at-last"))
    wait_until(lambda: not driver.watchers())


def test_a_watcher_of_a_replaced_driver_writes_nothing(config, run, held, driver):
    held.release("stopped")
    Lease.acquire(config.root, config.run.name, lambda line: None).release("finished")
    driver.kill()
    wait_until(lambda: not driver.watchers())
    assert state(run) == ("RUNNING", "running")


def test_a_watcher_that_waits_has_loaded_next_to_nothing():
    heavy = "{'mlflow', 'torch', 'fsspec', 'pydantic'}"
    code = f"import sys, eiwtrain.driver.watcher; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_a_watcher_that_cannot_be_started_is_no_error(run, monkeypatch):
    for executable in ("/nowhere/python", "false"):
        monkeypatch.setattr(sys, "executable", executable)
        watching = watcher.Watcher(run, "root", "owner")
        watching.will_end("FINISHED", "")
        watching.dismiss()


WORDS = {"uri": "sqlite://", "experiment_id": "1", "run_id": "a", "root": "b", "owner": "c"}


@pytest.mark.parametrize(
    ("errors", "calls"),
    [
        ([ConnectionError(), storage.StorageError()], 3),
        ([ConnectionError()] * 1000, 6),  # 1 + 2 + 4 + 8 + 15 seconds, and no time for 15 more
        ([MlflowException("deleted", RESOURCE_DOES_NOT_EXIST)], 1),  # which the server has refused for good
    ],
)
def test_what_is_away_is_tried_again_for_a_while(monkeypatch, errors, calls):
    left, made, now = list(errors), [], [0.0]

    def settle(*args):
        made.append(args)
        if left:
            raise left.pop(0)

    monkeypatch.setattr(watcher, "_PATIENCE", 40.0)
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(watcher, "time", clock)
    monkeypatch.setattr(tracking, "settle", settle)
    watcher._settle(WORDS, 1.5e9)
    assert made == [(tracking.TrackedRun("sqlite://", "1", "a"), "c", "b", 1.5e9, None, "")] * calls
