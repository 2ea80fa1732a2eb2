"""What an attempt asks the cluster for while it runs."""

from types import SimpleNamespace

from eiwtrain.driver.attempt import Attempt
from eiwtrain.on_ray import session
from eiwtrain.terminal.console import Console
from eiwtrain.terminal.signals import Stop


def test_an_attempt_renews_the_jobs_request_for_nodes(monkeypatch):
    monkeypatch.setattr(session, "own_node_drains", lambda: False)
    renewed = []
    attempt = Attempt.__new__(Attempt)  # without workers
    attempt._asked, attempt._looked_at, attempt._nodes = None, float("-inf"), []
    attempt._node_request = SimpleNamespace(renew=lambda: renewed.append(True))
    assert attempt._request(Stop(Console())) is None
    assert renewed == [True]
