"""What an attempt asks the cluster and its workers for while it runs, and how a stop ends it."""

import signal
from types import SimpleNamespace

import pytest

from eiwtrain.driver import attempt as attempts
from eiwtrain.driver.attempt import Attempt
from eiwtrain.on_ray import session
from eiwtrain.on_ray.messages import Again, Crashed, Stopped, Training
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


class Workers:
    """Workers that train, as the driver sees them: what they say, and what they are asked for."""

    def __init__(self, *said, answer=None):
        self.said, self.answer, self.asked, self.alive = list(said), answer, [], True

    def is_alive(self):
        return self.alive

    def join(self, timeout):
        self.alive = False

    def take(self):
        said, self.said = self.said, []
        return said

    def ask(self, request):
        self.asked.append(request)
        if self.answer is not None:
            self.said.append(self.answer)


def attempt_of(workers):
    attempt = Attempt.__new__(Attempt)
    attempt._fit = attempt._driver_end = workers
    attempt._lease, attempt._node_request = SimpleNamespace(lost=None), SimpleNamespace(renew=lambda: None)
    attempt._looked_at, attempt._asked_at, attempt._nodes = float("-inf"), 0.0, []
    attempt._asked, attempt._heard = None, False
    return attempt


@pytest.fixture
def stop(monkeypatch):
    """A stop that comes while the driver looks at the cluster; a run that has been up for longer than anything."""
    stop = Stop(Console())

    def drains():
        stop.number = signal.SIGTERM
        return False

    monkeypatch.setattr(session, "own_node_drains", drains)
    monkeypatch.setattr(session, "draining", set)
    monkeypatch.setattr(session, "room", lambda *args, **options: 0)
    return stop


def test_a_stop_during_a_look_at_the_cluster_reaches_the_workers(stop):
    answer = Stopped("", 7, "x")
    workers = Workers(Training(0, 9, ["node"]), answer=answer)
    attempt = attempt_of(workers)
    attempt._workers, attempt._config = 1, SimpleNamespace(max_workers=1)
    assert attempt.follow(Console(), stop) == Stopped("SIGTERM", 7, "x")
    assert [request.kind for request in workers.asked] == ["stop"]


def test_processes_are_made_ready_for_the_next_attempt_once_this_one_trains(monkeypatch):
    monkeypatch.setattr(session, "own_node_drains", lambda: False)
    monkeypatch.setattr(session, "draining", set)
    ready = []
    monkeypatch.setattr(session, "keep_ready", ready.append)
    attempt = attempt_of(Workers(Training(0, 9, ["node", "node"])))
    attempt._workers, attempt._config = 2, SimpleNamespace(max_workers=2)
    begins = attempts.time.monotonic()
    assert attempt._look(begins + 1000) is None  # they still start
    attempt._read(Console(), Stop(Console()))
    for seconds in (1, 20, 40, 60):
        assert attempt._look(begins + seconds) is None
        assert ready == ([2] if seconds > 30 else [])


def test_workers_cost_from_when_they_are_asked_for_until_they_have_ended(stop, monkeypatch):
    attempt = attempt_of(Workers(Training(0, 9, ["node", "node"], 7200.0), answer=Stopped("", 7, "x")))
    attempt._workers, attempt._config = 2, SimpleNamespace(max_workers=2)
    attempt._lease.cost = attempt._cost_before = 5.0
    attempt._price, attempt._hired = 9999.0, attempts.time.monotonic() - 100.0  # they started for so long
    began = attempts.time.monotonic()
    attempt.follow(Console(), stop)
    assert attempt._lease.cost == pytest.approx(5.0 + 2.0 * (100.0 + attempts.time.monotonic() - began), abs=0.1)


def test_workers_that_never_hear_of_a_stop_have_crashed(stop, monkeypatch):
    monkeypatch.setattr(attempts, "_HEAR_SECONDS", 0.1)
    attempt = attempt_of(Workers(Training(0, 9, ["node"])))
    attempt._workers, attempt._config = 1, SimpleNamespace(max_workers=1)
    assert attempt.follow(Console(), stop) == Crashed("no worker heard of the stop")


def test_a_stop_while_later_workers_start_is_no_failure(stop):
    stop.training = True
    assert attempt_of(Workers()).follow(Console(), stop) == Again("SIGTERM")


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ([Training(0, 9, ["node"])], Crashed("Ray of this machine has died")),
        ([Training(0, 9, ["node"]), Stopped("SIGTERM", 7, "x")], Stopped("SIGTERM", 7, "x")),
    ],
    ids=["training", "stopped"],
)
def test_a_ray_that_dies_ends_the_attempt_at_once(stop, monkeypatch, said, outcome):
    monkeypatch.setattr(session, "has_died", lambda: True)
    workers = Workers(*said)
    workers.join = lambda timeout: pytest.fail("it waited")
    assert attempt_of(workers).follow(Console(), stop) == outcome
