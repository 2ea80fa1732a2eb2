"""Logging to a real MLflow server that is killed, stopped, or whose answers are lost; and drivers that are killed."""

import json
import signal
import subprocess
import sys

import pytest
from faults import FaultyProxy
from helpers import free_port, tiny_config
from mlflow import MlflowClient
from mlflow_server import Server
from PIL import Image
from watchers import wait_until

from eiwtrain import tracking
from eiwtrain.config import Config
from eiwtrain.tracking import backlog

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def server(started):
    if started.process is None:
        started.start()
    return started


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("eiwtrain.tracking.tracker._RETRY_SECONDS", 0.1)
    monkeypatch.setattr("eiwtrain.tracking.record._AGAIN_SECONDS", 0.1)
    monkeypatch.setattr("eiwtrain.tracking.tracker._DRAIN_SECONDS", 120.0)
    monkeypatch.setattr(backlog, "_GATHER_SECONDS", 0.05)


def config_for(uri, tmp_path):
    return Config.model_validate(tiny_config(tmp_path, tracking={"uri": uri, "log_every": 1}))


def values(step):
    return {f"curve{i}": step + i / 7 for i in range(4)}


def assert_each_step_once(server, run, steps):
    client = MlflowClient(server.endpoint)
    for i in range(4):
        history = [(m.step, m.value) for m in client.get_metric_history(run.run_id, f"curve{i}")]
        assert history == [(s, s + i / 7) for s in range(1, steps + 1)]


def test_a_server_that_is_killed_and_returns_has_each_step_once(server, tmp_path):
    run = tracking.begin(config_for(server.endpoint, tmp_path), {})
    said = []
    tracker = tracking.Tracker(run, warn=said.append)
    step = 0
    for outage in range(2):
        for _ in range(500):
            step += 1
            tracker.metrics(step, values(step))
            if step % 500 == 250:
                server.kill()
        wait_until(lambda n=2 * outage + 1: len(said) == n)
        tracker.image(step, "samples", Image.new("RGB", (8, 8)))
        server.start()
        wait_until(lambda n=2 * outage + 2: len(said) == n)
    tracker.close()
    assert_each_step_once(server, run, step)
    away = f"MLflow at {server.endpoint} is away (ConnectionRefusedError: [Errno 111] Connection refused)"
    assert [line.split(";")[0] for line in said] == [away, "MLflow is back"] * 2
    files = [f.path for f in MlflowClient(server.endpoint).list_artifacts(run.run_id, "images")]
    assert sorted(f.split("+")[2] for f in files if f.endswith(".png")) == ["1000", "500"]


def test_a_server_that_hangs_while_it_is_asked_has_each_step_once(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    run = tracking.begin(config_for(server.endpoint, tmp_path), {})
    said = []
    tracker = tracking.Tracker(run, warn=said.append)
    tracker.metrics(1, values(1))
    tracker.flush()
    server.signal(signal.SIGSTOP)
    try:
        for step in range(2, 50):
            tracker.metrics(step, values(step))
        wait_until(lambda: said)
    finally:
        server.signal(signal.SIGCONT)
    tracker.close()
    assert_each_step_once(server, run, 49)
    assert [line.split(" ")[2] for line in said] == [server.endpoint, "back;"]


def test_points_whose_answer_is_lost_are_there_once(server, tmp_path):
    with FaultyProxy(server.endpoint) as proxy:
        run = tracking.begin(config_for(proxy.endpoint, tmp_path), {})
        tracker = tracking.Tracker(run)
        step = 0
        for fault in (
            lambda p: p.reset(after=0, times=3, matching="log-batch"),
            lambda p: p.truncate(after=1, times=2, matching="log-batch"),
            lambda p: p.cut_upload(after=100, matching="log-batch"),
            lambda p: p.answer(503, "SlowDown", times=3, matching="log-batch"),
        ):
            fault(proxy)
            for _ in range(300):
                step += 1
                tracker.metrics(step, values(step))
            wait_until(lambda: proxy.pending == 0)
        proxy.reset(after=0, matching="artifacts")
        tracker.image(step, "samples", Image.new("RGB", (8, 8)))
        tracker.close()
        assert proxy.pending == 0
    assert_each_step_once(server, run, step)
    files = [f.path for f in MlflowClient(server.endpoint).list_artifacts(run.run_id, "images")]
    assert len(files) == 2


ATTEMPT = """
import json, os, signal, sys
from eiwtrain import tracking
uri, run_id, saved, journal, first, last = sys.argv[1:]
run = tracking.TrackedRun(uri, "1", run_id)
tracker = tracking.Tracker(run, backlog=json.load(open(saved)), journal=journal)
for step in range(int(first), int(last) + 1):
    tracker.metrics(step, {f"curve{i}": step + i / 7 for i in range(4)})
    tracker.tags({"step": str(step)})
json.dump(tracker.pending(), open(saved, "w"), allow_nan=False)
for step in range(int(last) + 1, int(last) + 20):  # beyond the checkpoint
    tracker.metrics(step, {f"curve{i}": step + i / 7 for i in range(4)})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_killed_attempts_had_not_logged_the_next_one_logs(server, tmp_path):
    """Two attempts run and are killed while the server is away; a third is killed while it logs; the fourth ends."""
    run = tracking.begin(config_for(server.endpoint, tmp_path), {})
    saved, journal = tmp_path / "pending.json", tmp_path / "metrics.jsonl"
    saved.write_text("{}")

    def attempt(first, last):
        args = [sys.executable, "-c", ATTEMPT, server.endpoint, run.run_id, *map(str, (saved, journal, first, last))]
        assert subprocess.run(args, timeout=300, check=False).returncode == -signal.SIGKILL

    attempt(1, 10)
    server.kill()
    attempt(11, 700)
    attempt(701, 1400)
    waiting = sum(len(curves) for _, _, curves in json.loads(saved.read_text())["points"])
    assert waiting == 1400 * 4
    server.start()
    said = []
    tracking.Tracker(run, warn=said.append, backlog=json.loads(saved.read_text()), guard=killing_after(3))
    wait_until(lambda: any("nothing more is written" in line for line in said))  # it has sent a part, and is no more
    tracker = tracking.Tracker(run, backlog=json.loads(saved.read_text()), journal=str(journal))
    for step in range(1401, 1501):
        tracker.metrics(step, values(step))
    tracker.close()
    assert_each_step_once(server, run, 1500)
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [(r["step"], r["curve3"]) for r in lines] == [(s, s + 3 / 7) for s in range(1, 1501)]
    assert MlflowClient(server.endpoint).get_run(run.run_id).data.tags["eiwtrain.step"] == "1400"


def killing_after(calls):
    """A guard that lets so many calls through."""
    left = iter(range(calls))

    def guard():
        if next(left, None) is None:
            raise RuntimeError("killed")

    return guard


def test_a_run_begins_and_ends_though_answers_are_lost(server, tmp_path):
    with FaultyProxy(server.endpoint) as proxy:
        config = config_for(proxy.endpoint, tmp_path)
        proxy.reset(after=0, matching="runs/create")
        proxy.reset(after=0, matching="log-batch")
        run = tracking.begin(config, {})
        (found,) = MlflowClient(server.endpoint).search_runs([run.experiment_id], f"run_id = '{run.run_id}'")
        assert found.data.params["train.max_steps"] == "12"
        again = tracking.begin(config, {})
        assert again == run
        proxy.reset(times=3, matching="runs/update")
        tracking.end(run, "KILLED", "stopped by SIGTERM; resumes with the same command")
        assert proxy.pending == 0
    found = MlflowClient(server.endpoint).get_run(run.run_id)
    assert found.info.status == "KILLED"
    assert found.data.tags["eiwtrain.status"] == "stopped by SIGTERM; resumes with the same command"
    uid = found.data.tags["eiwtrain.uid"]
    assert len(MlflowClient(server.endpoint).search_runs([run.experiment_id], f"tags.`eiwtrain.uid` = '{uid}'")) == 1


def test_a_server_that_is_away_at_the_start_is_one_line(tmp_path):
    config = config_for(f"http://127.0.0.1:{free_port()}", tmp_path)
    for call in (lambda: tracking.begin(config, {}), lambda: tracking.check(config)):
        with pytest.raises(tracking.TrackingError, match=r"tracking.uri: http://.* cannot be used") as e:
            call()
        assert len(str(e.value).splitlines()) == 1
