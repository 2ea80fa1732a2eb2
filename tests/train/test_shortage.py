"""What follows when a GPU's memory is short."""

import pytest

from eiwtrain.train import shortage


@pytest.mark.parametrize(
    ("free", "seconds"),
    [
        ([97], 0.0),  # a GPU of one's own
        ([20, 50, 96], 2.0),  # another process lets go of it
        ([20, 50, 60], 2.0 + 2.0),  # and one that lives keeps some
        ([20], 2.0),
        (range(0, 90), 30.0),  # it has to end
    ],
)
def test_memory_is_measured_once_others_have_let_go_of_theirs(free, seconds, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(shortage.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(shortage.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))

    def look():  # it changes once a second
        return free[min(int(now[0] - 100.0), len(free) - 1)], 100

    shortage.await_growth(look)
    assert now[0] - 100.0 == pytest.approx(seconds, abs=0.3)
