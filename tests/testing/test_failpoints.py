"""Fail points do nothing unless asked, and what is asked for once."""

import os
import signal
import subprocess
import sys

import pytest

from eiwtrain.testing import failpoints


@pytest.fixture(autouse=True)
def counts(monkeypatch):
    monkeypatch.setattr(failpoints, "_reached", failpoints.Counter())


@pytest.fixture
def signals(monkeypatch):
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    return sent


def test_off_by_default(monkeypatch, signals):
    monkeypatch.delenv("EIWTRAIN_FAILPOINTS", raising=False)
    failpoints.reach("here")
    assert not signals


def test_the_named_place_at_its_turn_and_no_other(monkeypatch, signals):
    monkeypatch.setenv("EIWTRAIN_FAILPOINTS", "here=kill@2; there=term")
    for place in ("elsewhere", "here", "hereafter"):
        failpoints.reach(place)
    assert not signals
    failpoints.reach("here")
    failpoints.reach("here")
    failpoints.reach("there")
    assert signals == [(os.getpid(), signal.SIGKILL), (os.getpid(), signal.SIGTERM)]


def test_once_over_all_processes(monkeypatch, signals, tmp_path):
    monkeypatch.setenv("EIWTRAIN_FAILPOINTS", "here=stop")
    monkeypatch.setenv("EIWTRAIN_FAILPOINTS_DONE", str(tmp_path / "done"))
    for _ in range(2):
        failpoints._reached.clear()  # as another process has it
        failpoints.reach("here")
    assert signals == [(os.getpid(), signal.SIGSTOP)]
    assert [p.name for p in (tmp_path / "done").iterdir()] == ["here"]


@pytest.mark.parametrize("text", ["here", "here=explode", "here=kill@soon"])
def test_what_cannot_be_read_is_said(monkeypatch, text):
    monkeypatch.setenv("EIWTRAIN_FAILPOINTS", text)
    with pytest.raises(ValueError, match="write name=action or name=action@n, actions: kill, term, stop, hang"):
        failpoints.reach("anything")


def test_a_real_process_dies():
    program = "from eiwtrain.testing import failpoints; failpoints.reach('here'); print('lived')"
    environment = os.environ | {"EIWTRAIN_FAILPOINTS": "here=kill"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")
