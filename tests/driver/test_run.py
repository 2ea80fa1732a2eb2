"""The driver's decisions, without Ray: `tests/cluster` has the whole."""

import os
import pickle
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import lone_group, tiny_config, write_shards
from mlflow import MlflowClient
from small_run import commit

from eiwtrain import run, storage, tracking
from eiwtrain.config import ConfigError
from eiwtrain.data import load_manifest
from eiwtrain.driver import launch, main_job
from eiwtrain.driver.main_job import resume_command
from eiwtrain.on_ray.messages import Crashed, Failed, Lost, Stopped
from eiwtrain.storage import lease
from eiwtrain.train import restore


@pytest.fixture
def path(tmp_path, database):
    write_shards(tmp_path / "data")
    (tmp_path / "runs").mkdir()
    shutil.copy(database, tmp_path / "runs")
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_config(tmp_path)))
    return file


@pytest.fixture(autouse=True)
def ray_starts(monkeypatch):
    """Start no Ray; the list says when it would have been started."""
    starts = []
    monkeypatch.setattr(launch, "start_ray", lambda config: starts.append(config.run.name))
    return starts


@pytest.fixture(autouse=True)
def handlers():
    """Give this process its own signal handlers back, whatever a job did with them."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def fingerprint(path: Path) -> str:
    return load_manifest(f"{path.parent}/data").fingerprint


def status(path: Path) -> str:
    (found,) = MlflowClient(f"sqlite:///{path.parent}/runs/mlflow.db").search_runs(["1"])
    return found.info.status


@pytest.mark.parametrize(
    ("outcome", "code", "state", "how"),
    [
        (Stopped("its time limit", 3, "x"), 75, "KILLED", "stopped"),
        (Failed("why"), 1, "FAILED", "failed"),
    ],
)
def test_how_it_ended_is_the_exit_code_the_status_and_in_the_lease(
    path, monkeypatch, capsys, outcome, code, state, how
):
    monkeypatch.setattr(launch, "run_attempts", lambda *args: outcome)
    assert run.main([str(path)]) == code
    assert status(path) == state
    _, last = lease.look(f"{path.parent}/runs/tiny")
    assert (last.outcome, last.why) == (how, outcome.reason)


def test_a_stop_while_the_run_is_begun_ends_it_as_killed(path, monkeypatch, capsys):
    real = tracking.begin

    def slow(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(tracking, "begin", slow)
    monkeypatch.setattr(launch, "run_attempts", lambda *args: pytest.fail("training began after the stop"))
    assert run.main([str(path)]) == 143
    assert status(path) == "KILLED"
    assert "stopped by SIGTERM before training began" in capsys.readouterr().out


def test_an_exception_that_nobody_foresaw_leaves_no_run_running(path, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(launch, "run_attempts", broken)
    with pytest.raises(ZeroDivisionError):
        run.main([str(path)])
    assert status(path) == "FAILED"


def test_the_command_that_resumes_is_the_one_that_was_given(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert resume_command(["a.yaml", "run.name=x y"]).endswith("-m eiwtrain.run a.yaml 'run.name=x y'")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert resume_command(["a.yaml"]) == "ray job submit --working-dir . -- python -m eiwtrain.run a.yaml"


class Watched:
    """A stand-in for the watcher that keeps what it is sent."""

    heard: list[tuple[str, ...]]

    def __init__(self, tracked, root, owner):
        Watched.heard = [("watches", tracked.run_id, root, owner)]

    def will_end(self, status, detail):
        Watched.heard.append(("will end", status, detail))

    def dismiss(self):
        Watched.heard.append(("dismissed",))


STOPPED = Stopped("SIGTERM", 3, "x")
WILL_END = ("will end", "KILLED", "stopped by SIGTERM; resumes with the same command")


def test_the_watcher_goes_when_mlflow_knows_how_the_run_ended(path, monkeypatch):
    def train(config, data_fingerprint, newest, tracked, lease, *rest):
        assert data_fingerprint == load_manifest(config.data.path).fingerprint
        assert Watched.heard == [("watches", tracked.run_id, config.root, lease.owner)]
        return STOPPED

    monkeypatch.setattr(launch, "run_attempts", train)
    monkeypatch.setattr(main_job, "Watcher", Watched)
    assert run.main([str(path)]) == 75
    assert Watched.heard[1:] == [WILL_END, ("dismissed",)]


def test_the_watcher_stays_when_mlflow_does_not_answer(path, monkeypatch):
    monkeypatch.setattr(launch, "run_attempts", lambda *args: STOPPED)
    monkeypatch.setattr(main_job, "Watcher", Watched)
    monkeypatch.setattr(tracking, "end", lambda *args: False)
    run.main([str(path)])
    assert Watched.heard[1:] == [WILL_END]


def test_a_run_that_another_driver_has_is_not_ended(path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "run_attempts", lambda *args: Lost("taken over"))
    monkeypatch.setattr(main_job, "Watcher", Watched)
    assert run.main([str(path)]) == 1
    assert Watched.heard[-1] == ("dismissed",)
    assert status(path) == "RUNNING"


def test_the_page_of_a_run_names_data_model_and_command(path, monkeypatch):
    monkeypatch.setattr(launch, "run_attempts", lambda *args: STOPPED)
    run.main([str(path)])
    client = MlflowClient(f"sqlite:///{path.parent}/runs/mlflow.db")
    (found,) = client.search_runs(["1"])
    assert [i.tags[0].value for i in found.inputs.dataset_inputs] == ["training", "evaluation"]
    command = resume_command([str(path)])
    assert found.data.tags["eiwtrain.command"] == command
    assert f"`{command}`" in found.data.tags["mlflow.note.content"]
    assert "2 levels of 2 steps" in found.data.tags["mlflow.note.content"]
    assert {a.path for a in client.list_artifacts(found.info.run_id)} >= {"config.yaml", "environment.json"}


def test_a_start_says_which_runs_nobody_trains(path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "run_attempts", lambda *args: STOPPED)
    monkeypatch.setattr(tracking, "end", lambda *args: False)
    monkeypatch.setattr(main_job, "Watcher", Watched)  # a real one might be faster
    run.main([str(path), "run.name=other"])  # its lease says that it was stopped
    run.main([str(path)])
    assert "MLflow had 'other' as RUNNING, and nobody trains it: now KILLED" in capsys.readouterr().out


@pytest.fixture
def meanwhile(monkeypatch):
    """Do something between the first checks of a job and the moment at which it gets the lease."""

    def do(act):
        real = lease.Lease.acquire

        def late(root, *args):
            monkeypatch.setattr(lease.Lease, "acquire", real)
            act(root)
            return real(root, *args)

        monkeypatch.setattr(lease.Lease, "acquire", late)

    return do


def test_what_the_holder_before_left_is_what_a_run_resumes_from(path, monkeypatch, meanwhile):
    resumed = []
    data = fingerprint(path)
    meanwhile(lambda root: commit(root, 5, None, data_fingerprint=data))
    monkeypatch.setattr(launch, "run_attempts", lambda config, data, known, *rest: resumed.extend(known) or STOPPED)
    assert run.main([str(path)]) == 75
    assert [checkpoint.step for checkpoint in resumed] == [5]


def test_a_start_reads_each_manifest_once_and_a_restart_reads_new_ones_alone(path, tmp_path, monkeypatch):
    data, root = fingerprint(path), f"{path.parent}/runs/tiny"
    for step in (2, 5, 7):
        commit(root, step, None, data_fingerprint=data)
    read, find, read_bytes = [], storage.find, storage.read_bytes

    def count(function, wanted):
        def counted(url, *args):
            if url.startswith(root) and wanted in url:
                read.append(url.removeprefix(root))
            return function(url, *args)

        return counted

    monkeypatch.setattr(storage, "find", count(find, root))
    monkeypatch.setattr(storage, "read_bytes", count(read_bytes, "/manifest.json"))
    outcomes, starts = [Crashed("a rank"), STOPPED], []

    def attempt(*arguments):
        there = pickle.loads(pickle.dumps(arguments[-1]))
        with lone_group(tmp_path):
            saved, _ = restore.newest_intact(root, torch.device("cpu"), print, False, there)
        starts.append((saved.step, sorted(read)))
        read.clear()
        commit(root, 9, None, data_fingerprint=data)
        return SimpleNamespace(follow=lambda *_: outcomes.pop(0), holds_on=False)

    monkeypatch.setattr("eiwtrain.driver.attempt.Attempt", attempt)
    monkeypatch.setattr(launch, "_wait_for_room", lambda *_: 1)
    monkeypatch.setattr(launch, "NodeRequest", lambda _config: SimpleNamespace(end=lambda: None))
    assert run.main([str(path)]) == 75
    before = [f"/checkpoints/step-{step:08d}-{step:08x}/manifest.json" for step in (2, 5, 7)]
    listings = ["/checkpoints"] * 3  # before the lease, under it, and just before the workers
    assert starts[0] == (7, [*listings, *before])
    # after the crash, and before the workers
    assert starts[1] == (9, [*listings[:2], "/checkpoints/step-00000009-00000009/manifest.json"])


@pytest.mark.parametrize(
    ("override", "field"),
    [("train.seed=7", "train.seed: 7 here"), ("train.max_steps=12", "data.path: the data set at")],
)
def test_a_run_that_became_another_meanwhile_is_refused(path, monkeypatch, meanwhile, capsys, override, field):
    meanwhile(lambda root: commit(root, 5, None))  # of other images
    monkeypatch.setattr(launch, "run_attempts", lambda *args: pytest.fail("it trained"))
    assert run.main([str(path), override]) == 2
    assert capsys.readouterr().err.startswith(f"error: {field}")
    assert lease.look(f"{path.parent}/runs/tiny")[1].outcome == "stopped"  # which is no failure
    assert not MlflowClient(f"sqlite:///{path.parent}/runs/mlflow.db").search_experiments(
        filter_string="name != 'Default'"
    )


def test_data_replaced_meanwhile_is_what_the_workers_must_find(path, monkeypatch, meanwhile):
    found = []
    before = fingerprint(path)

    def replace(root):
        for folder in ("data", "data-images"):
            shutil.rmtree(path.parent / folder)
        write_shards(path.parent / "data", n=40)

    meanwhile(replace)
    monkeypatch.setattr(launch, "run_attempts", lambda config, data, *rest: found.append(data) or STOPPED)
    assert run.main([str(path)]) == 75
    assert found == [fingerprint(path)] != [before]


def test_fewer_steps_than_were_made_are_refused(path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "run_attempts", lambda *args: STOPPED)
    commit(f"{path.parent}/runs/tiny", 5, None, data_fingerprint=fingerprint(path))
    assert run.main([str(path), "train.max_steps=4"]) == 2
    assert "train.max_steps: 4, and the run has made 5 steps" in capsys.readouterr().err
    assert run.main([str(path), "train.max_steps=5"]) == 75


def test_a_run_that_has_cost_what_it_may_is_refused_before_it_starts(path, monkeypatch, capsys):
    def spend(config, data, newest, tracked, lease, *rest):
        lease.cost = 12.5
        return STOPPED

    monkeypatch.setattr(launch, "run_attempts", spend)
    command = [str(path), "workers.price_per_hour=2"]
    assert run.main([*command, "train.max_cost=12"]) == 75
    assert run.main([*command, "train.max_cost=12"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: train.max_cost: 12, and the run has cost 12.50 so far; ")
    assert run.main([*command, "train.max_cost=13"]) == 75
    assert run.main(command) == 75


@pytest.mark.parametrize("passing", [True, False])
def test_a_server_that_does_not_answer_leaves_the_job_in_a_queue(path, monkeypatch, passing):
    def refuse(_url):
        error = storage.StorageError("x: ConnectionRefusedError")
        error.passing = passing
        raise error

    monkeypatch.setattr(storage, "check_writable", refuse)
    assert run.main([str(path)]) == (75 if passing else 2)
    assert run.main([str(path), "--dry-run"]) == 2


def test_the_record_of_a_run_that_cannot_join_ray_has_the_reason(path, monkeypatch):
    def refused(*_args):
        raise ConfigError("RAY_ADDRESS: nothing answers there")

    monkeypatch.setattr(launch, "run_attempts", refused)
    assert run.main([str(path)]) == 2
    client = MlflowClient(f"sqlite:///{path.parent}/runs/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("eiwtrain").experiment_id])
    assert found.info.status == "FAILED"
    assert found.data.tags["eiwtrain.status"] == "failed: RAY_ADDRESS: nothing answers there"


def test_ray_starts_before_a_run_in_a_database_and_after_a_server_has_taken_it(path, monkeypatch, ray_starts, capsys):
    real = tracking.begin
    seen = []
    monkeypatch.setattr(launch, "run_attempts", lambda *args: STOPPED)
    monkeypatch.setattr(tracking, "begin", lambda *args: seen.append(list(ray_starts)) or real(*args))
    assert run.main([str(path)]) == 75
    assert seen == [["tiny"]]
    (path.parent / "other.db").write_bytes(b"no database" * 100)
    assert run.main([str(path), f"tracking.uri=sqlite:///{path.parent}/other.db"]) == 2
    assert "other.db cannot be used" in capsys.readouterr().err
    assert ray_starts == ["tiny"]


def test_an_mlflow_that_does_not_answer_leaves_the_job_in_a_queue(path, monkeypatch, capsys, ray_starts):
    monkeypatch.setattr("eiwtrain.tracking.record._BEGIN_SECONDS", 0.0)
    assert run.main([str(path), "tracking.uri=http://127.0.0.1:9"]) == 75
    said = capsys.readouterr().err
    assert "tracking.uri: http://127.0.0.1:9 cannot be used: ConnectionRefusedError" in said
    assert said.rstrip().endswith("the same command may work later")
    assert ray_starts == []
