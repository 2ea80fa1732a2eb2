"""What is said of an attempt that Ray gave up on, and what is asked for while it runs."""

from types import SimpleNamespace

from eiwtrain.driver.attempt import Attempt, _cause
from eiwtrain.on_ray import session
from eiwtrain.terminal.console import Console
from eiwtrain.terminal.signals import Stop


def test_the_jobs_request_for_nodes_is_renewed_while_an_attempt_runs(monkeypatch):
    monkeypatch.setattr(session, "own_node_drains", lambda: False)
    renewed = []
    attempt = Attempt.__new__(Attempt)  # without workers
    attempt._asked, attempt._looked_at, attempt._nodes = None, float("-inf"), []
    attempt._node_request = SimpleNamespace(renew=lambda: renewed.append(True))
    assert attempt._request(Stop(Console())) is None
    assert renewed == [True]


class Failed(Exception):
    def __init__(self, failures):
        super().__init__("Training failed due to worker errors:\n[Rank 0 Error Snippet]:\n...")
        self.worker_failures = failures


def test_a_rank_that_died_is_named_before_those_that_lost_their_connection_to_it():
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:3293: Connection reset by peer")
    died = RuntimeError(
        "A worker health check failed.\nThe actor died unexpectedly before finishing this task.\n\tpid: 12\n"
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
        "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: ..."
    )
    said = _cause(Failed({0: lost, 1: died}))
    assert said == "the process of rank 1 is gone (Worker unexpectedly exits with a connection error code 2)"
    assert _cause(Failed({0: lost})) == f"rank 0: {lost}"


def test_of_a_traceback_its_last_line_is_told():
    raised = RuntimeError('Traceback (most recent call last):\n  File "x.py"\n    f()\nValueError: no such thing\n')
    assert _cause(Failed({3: raised})) == "rank 3: ValueError: no such thing"
    assert _cause(raised) == "ValueError: no such thing"
    assert _cause(None) == "NoneType"
    assert len(_cause(RuntimeError("x" * 1000))) == 300
