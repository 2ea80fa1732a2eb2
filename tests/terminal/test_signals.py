import os
import signal
import subprocess
import sys

import pytest

from eiwtrain.terminal.console import Console
from eiwtrain.terminal.signals import Interrupted, Stop


def test_a_signal_while_nothing_is_trained_ends_the_job():
    with pytest.raises(Interrupted, match="SIGTERM") as e, Stop(Console()):
        os.kill(os.getpid(), signal.SIGTERM)
    assert e.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_no_library_catches_a_stop():
    assert not issubclass(Interrupted, Exception)


def test_a_signal_in_training_is_noted_and_only_noted(capsys):
    with Stop(Console()) as stop:
        stop.training = True
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
    first, second = capsys.readouterr().out.splitlines()
    assert "a checkpoint first" in first
    assert "once more" in second


def test_a_signal_that_comes_while_one_is_answered_is_the_second(capsys, monkeypatch):
    real, sent = signal.Signals, []

    def name_of(number):
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), signal.SIGINT)
        return real(number)

    with Stop(Console()) as stop:
        stop.training = True
        monkeypatch.setattr(signal, "Signals", name_of)
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.undo()
    said = capsys.readouterr().out.splitlines()
    assert sorted("a checkpoint first" in line for line in said) == [False, True]


def test_a_polled_signal_is_left_to_the_block():
    with Stop(Console()) as stop:
        with stop.polled():
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM


def test_a_held_signal_takes_effect_after_the_block():
    done = []
    with pytest.raises(Interrupted), Stop(Console()) as stop, stop.held():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        done.append(1)
    assert done == [1]


def test_the_third_signal_ends_the_process_at_once():
    script = """
import os, signal, time
from eiwtrain.terminal.console import Console
from eiwtrain.terminal.signals import Stop
with Stop(Console()) as stop:
    stop.training = True
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGINT)
    print("still here")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 130
    assert "still here" not in result.stdout


def test_a_terminal_that_closes_stops_the_job_once(capsys):
    with Stop(Console()) as stop:
        stop.training = True
        for _ in range(4):  # the kernel's and the shell's
            os.kill(os.getpid(), signal.SIGHUP)
        assert (stop.number, stop.reason) == (signal.SIGHUP, "SIGHUP")
    assert "a checkpoint first" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_under_nohup_a_closed_terminal_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop(Console()) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
