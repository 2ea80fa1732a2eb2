"""A worker that makes no progress tells its stacks and is gone; one that does is left alone."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from eiwtrain.train import watchdog
from eiwtrain.train.watchdog import Watchdog


def run(body, seconds=60):
    """A process with a watchdog that prints what it tells; its exit status and output."""
    program = f"""
        import threading, time
        from eiwtrain.train import watchdog
        watchdog._OTHERS_SECONDS, watchdog._STUCK_SECONDS, watchdog._START_SECONDS = 0.5, 1.0, 1.5
        {body}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=seconds, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_a_process_that_hangs_tells_where_and_is_killed():
    status, told, _ = run("""
        def stuck_in_a_collective():
            threading.Event().wait()
        dog = watchdog.Watchdog(0.5, lambda what: print(what, flush=True))
        dog.beat("step 12")
        stuck_in_a_collective()
    """)
    assert status == -signal.SIGKILL
    assert told.startswith("no progress for 0.5 s in step 12\nthread MainThread:\n")
    assert "stuck_in_a_collective" in told


def test_a_process_whose_interpreter_hangs_is_ended_without_it():
    # a regular expression that never ends, in C, with the interpreter's lock held
    status, told, stacks = run("""
        import re
        dog = watchdog.Watchdog(0.5, lambda what: print(what, flush=True))
        dog.beat("step 12")
        re.match("(a+)+$", "a" * 60 + "b")
    """)
    assert status == 1
    assert told == ""
    assert "Timeout" in stacks
    assert "re/__init__.py" in stacks or "re.py" in stacks


def test_a_tell_that_does_not_return_holds_nothing_up():
    status, _, _ = run("""
        watchdog.Watchdog(0.5, lambda what: threading.Event().wait())
        threading.Event().wait()
    """)
    assert status == -signal.SIGKILL


@pytest.mark.parametrize("end", ["close", "beat"])
def test_a_process_that_makes_progress_or_has_closed_its_watchdog_lives(end):
    status, told, stacks = run(f"""
        dog = watchdog.Watchdog(2.0, lambda what: print(what, flush=True))
        if {end!r} == "close":
            dog.close()
        for step in range(40):
            if {end!r} == "beat":
                dog.beat(f"step {{step}}")
            time.sleep(0.15)
        print("done")
    """)
    assert (status, told, stacks) == (0, "done\n", "")


def test_the_limit_is_looked_at_often_enough(monkeypatch):
    killed = []
    monkeypatch.setattr(watchdog, "_OTHERS_SECONDS", 0.0)
    monkeypatch.setattr(os, "kill", lambda *what: killed.append(what))
    told = []
    dog = Watchdog(0.2, told.append)
    dog.beat("step 1")
    end = time.monotonic() + 30
    while not killed and time.monotonic() < end:
        time.sleep(0.01)
    dog.close()
    assert killed == [(os.getpid(), signal.SIGKILL)]
    assert len(told) == 1


def test_a_start_is_given_longer_and_not_for_ever():
    status, told, _ = run("""
        dog = watchdog.Watchdog(0.2, lambda what: print(what, flush=True))
        time.sleep(0.8)
        print("lives", flush=True)
        threading.Event().wait()
    """)
    assert status == -signal.SIGKILL
    assert told.startswith("lives\nno progress for 1.5 s in the start\n")
