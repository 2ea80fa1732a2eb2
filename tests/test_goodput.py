import pytest

from eiwtrain import goodput
from eiwtrain.goodput import Clock


@pytest.fixture
def now(monkeypatch):
    time = [1000.0]
    monkeypatch.setattr(goodput.time, "time", lambda: time[0])
    return time


def test_goodput_is_productive_over_wall(now):
    clock = Clock.resumed(None, began=990.0)
    clock.productive = 4.0
    assert clock.wall == 10.0
    assert clock.goodput == 0.4


def test_wall_time_adds_up_over_attempts_without_the_pause_between(now):
    first = Clock.resumed(None, began=990.0)
    first.productive = 5.0
    saved = first.to_json()
    now[0] = 5000.0
    second = Clock.resumed(saved, began=4996.0)
    assert second.wall == 14.0
    assert second.productive == 5.0


def test_workers_restarted_under_one_driver_count_its_wall_time_once(now):
    first = Clock.resumed(None, began=990.0)
    saved = first.to_json()
    now[0] = 1020.0  # ten seconds of lost work and restart later
    assert Clock.resumed(saved, began=990.0).wall == 30.0
