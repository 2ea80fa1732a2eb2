"""The driver's decisions, without Ray: `tests/cluster` has the whole."""

import os
import signal
from pathlib import Path

import pytest
import yaml
from helpers import tiny_config, write_shards
from mlflow import MlflowClient

from eiwtrain import launch, run, tracking


@pytest.fixture
def path(tmp_path):
    write_shards(tmp_path / "data")
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_config(tmp_path)))
    return file


@pytest.fixture(autouse=True)
def handlers():
    """Whatever a job does with signals, this process gets its own back."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def status(path: Path) -> str:
    (found,) = MlflowClient(f"sqlite:///{path.parent}/runs/mlflow.db").search_runs(["1"])
    return found.info.status


@pytest.mark.parametrize(
    ("outcome", "code", "state"),
    [
        ({"stopped": "its time limit", "step": 3, "checkpoint": "x"}, 75, "KILLED"),
        ({"failed": "why"}, 1, "FAILED"),
    ],
)
def test_how_it_ended_is_the_exit_code_and_the_status(path, monkeypatch, capsys, outcome, code, state):
    monkeypatch.setattr(launch, "train", lambda *args: outcome)
    assert run.main([str(path)]) == code
    assert status(path) == state


def test_a_stop_while_the_run_is_begun_ends_it_as_killed(path, monkeypatch, capsys):
    real = tracking.begin

    def slow(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(tracking, "begin", slow)
    monkeypatch.setattr(launch, "train", lambda *args: pytest.fail("training began after the stop"))
    assert run.main([str(path)]) == 143
    assert status(path) == "KILLED"
    assert "stopped by SIGTERM before training began" in capsys.readouterr().out


def test_an_exception_that_nobody_foresaw_leaves_no_run_running(path, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(launch, "train", broken)
    with pytest.raises(ZeroDivisionError):
        run.main([str(path)])
    assert status(path) == "FAILED"


def test_the_command_that_goes_on_is_the_one_that_was_given(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert run._command(["a.yaml", "run.name=x y"]).endswith("-m eiwtrain.run a.yaml 'run.name=x y'")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert run._command(["a.yaml"]) == "ray job submit --working-dir . -- python -m eiwtrain.run a.yaml"
