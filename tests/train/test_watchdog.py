"""A worker that makes no progress reports its stacks and is killed; others are left alone."""

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
    """Run a process with a watchdog that prints its report; return exit status and output."""
    program = f"""
        import threading, time
        from eiwtrain.train import watchdog
        watchdog._OTHERS_SECONDS, watchdog._STUCK_SECONDS, watchdog.START_SECONDS = 0.5, 1.0, 1.5
        {body}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=seconds, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_a_process_that_hangs_reports_where_and_is_killed():
    status, said, _ = run("""
        def stuck_in_a_collective():
            threading.Event().wait()
        dog = watchdog.Watchdog(0.5, lambda what: print(what, flush=True))
        dog.beat("step 12")
        stuck_in_a_collective()
    """)
    assert status == -signal.SIGKILL
    assert said.startswith("no progress for 0.5 s in step 12\nthread MainThread:\n")
    assert "stuck_in_a_collective" in said


def test_a_process_whose_interpreter_hangs_exits_without_it():
    # a regular expression that never ends, in C, with the interpreter's lock held
    status, said, stacks = run("""
        import re
        dog = watchdog.Watchdog(0.5, lambda what: print(what, flush=True))
        dog.beat("step 12")
        re.match("(a+)+$", "a" * 60 + "b")
    """)
    assert status == 1
    assert said == ""
    assert "Timeout" in stacks
    assert "re/__init__.py" in stacks or "re.py" in stacks


def test_a_report_that_does_not_return_blocks_nothing():
    status, _, _ = run("""
        watchdog.Watchdog(0.5, lambda what: threading.Event().wait())
        threading.Event().wait()
    """)
    assert status == -signal.SIGKILL


@pytest.mark.parametrize("end", ["close", "beat"])
def test_a_process_lives_that_makes_progress_or_is_not_watched(end):
    status, said, stacks = run(f"""
        dog = watchdog.Watchdog(2.0, lambda what: print(what, flush=True))
        if {end!r} == "close":
            dog.close()
        for step in range(40):
            if {end!r} == "beat":
                dog.beat(f"step {{step}}")
            time.sleep(0.15)
        print("done")
    """)
    assert (status, said, stacks) == (0, "done\n", "")


def test_the_limit_is_checked_often_enough(monkeypatch):
    killed = []
    monkeypatch.setattr(watchdog, "_OTHERS_SECONDS", 0.0)
    monkeypatch.setattr(os, "kill", lambda *what: killed.append(what))
    said = []
    dog = Watchdog(0.2, said.append)
    dog.beat("step 1")
    end = time.monotonic() + 30
    while not killed and time.monotonic() < end:
        time.sleep(0.01)
    dog.close()
    assert killed == [(os.getpid(), signal.SIGKILL)]
    assert len(said) == 1


def test_a_start_has_a_longer_limit():
    status, said, _ = run("""
        dog = watchdog.Watchdog(0.2, lambda what: print(what, flush=True))
        time.sleep(0.8)
        print("lives", flush=True)
        threading.Event().wait()
    """)
    assert status == -signal.SIGKILL
    assert said.startswith("lives\nno progress for 1.5 s in the start\n")
