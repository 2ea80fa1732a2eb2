import pytest

from eiwtrain.config import Train
from eiwtrain.train import limits
from eiwtrain.train.goodput import Clock


@pytest.mark.parametrize(
    ("seconds", "stopped"),
    [(0.0, False), (17.9, False), (18.0, True), (3599.0, True)],
    ids=["new", "below", "at", "above"],
)
def test_a_run_stops_once_it_has_cost_what_it_may(monkeypatch, seconds, stopped):
    monkeypatch.setattr(limits.time, "time", lambda: 1000.0 + seconds)
    clock = Clock(1000.0, 0.0, 1000.0, spent=0.5, now=lambda: 1000.0 + seconds)
    clock.pay(4 * 25.0)
    assert ("train.max_cost" in limits.passed(Train(max_cost=1.0), 1000.0, clock)) == stopped
    assert limits.passed(Train(), 1000.0, clock) == ""


def test_hours_are_those_of_the_job_and_costs_those_of_the_run(monkeypatch):
    monkeypatch.setattr(limits.time, "time", lambda: 3700.0)
    clock = Clock(0.0, 0.0, 0.0, now=lambda: 0.0)
    assert "train.max_hours" in limits.passed(Train(max_hours=1.0), 0.0, clock)
    assert limits.passed(Train(max_hours=1.0), 3000.0, clock) == ""
    assert "train.max_cost" in limits.passed(
        Train(max_hours=1.0, max_cost=2.0), 3000.0, Clock(3000.0, 0.0, 3000.0, spent=2.0, now=lambda: 3000.0)
    )
