import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eiwtrain.config.interval import Every, parse
from eiwtrain.train.pace import FIRST_SECONDS, LONGEST, SHORTEST, Pace, young_daly

SECONDS = st.floats(0, 1e9)


@pytest.mark.parametrize(
    ("value", "every"),
    [
        (500, Every("steps", 500)),
        ("500", Every("steps", 500)),  # as an environment variable gives it
        ("90s", Every("seconds", 90)),
        ("10m", Every("seconds", 600)),
        ("1.5 h", Every("seconds", 5400)),
        ("auto", Every("auto", 0)),
    ],
)
def test_an_interval_is_steps_a_time_or_auto(value, every):
    assert parse(value) == every


@pytest.mark.parametrize("value", [0, -5, "", "0s", "90 sec", "1e3s", "-1m", "m", "1.5", "Auto", "10m30s", True, 2.5])
def test_what_is_no_interval_is_refused_with_what_would_be(value):
    with pytest.raises(
        ValueError, match=r"is not an interval: write steps \(500\), a time with its unit \(90s, 10m, 1.5h\)"
    ):
        parse(value)


@given(st.integers(1, 20), st.integers(0, 100))
def test_steps_are_due_at_their_multiples_whatever_the_time(every, resumed_at):
    pace = Pace(every, 6.0, resumed_at, now=0.0)
    assert pace.interval is None
    due = [step for step in range(resumed_at, resumed_at + 60) if pace.due(step, now=step**3)]
    assert due == [step for step in range(resumed_at + 1, resumed_at + 60) if step % every == 0]


def test_a_step_that_was_saved_for_another_reason_is_not_due():
    pace = Pace(10, 6.0, 0, now=0.0)
    pace.committed(20, now=5.0, stall=0.1, seconds=1.0, wall=5.0, failures=0)
    assert pace.interval is None
    assert not pace.due(20, now=6.0)
    assert pace.due(30, now=6.0)


def test_a_time_is_due_once_an_interval_however_long_the_checkpoint_takes():
    pace = Pace("90s", 6.0, 0, now=1000.0)
    assert pace.interval == 90
    assert [now for now in range(1000, 1300) if pace.due(1, float(now))] == [1090, 1180, 1270]


def test_an_interval_begins_with_the_checkpoint_before_not_at_its_end():
    pace = Pace("90s", 6.0, 0, now=0.0)
    pace.committed(5, now=50.0, stall=1.0, seconds=20.0, wall=50.0, failures=0)  # after an evaluation, say
    assert [now for now in range(200) if pace.due(6, float(now))] == [120]
    pace.committed(5, now=160.0, stall=1.0, seconds=10.0, wall=160.0, failures=0)  # begun late, at 150
    assert [now for now in range(160, 300) if pace.due(7, float(now))] == [240]
    pace.committed(5, now=250.0, stall=1.0, seconds=100.0, wall=250.0, failures=0)  # begun before another was due
    assert [now for now in range(250, 400) if pace.due(8, float(now))] == [330]


def test_auto_learns_from_its_checkpoints_and_from_failures():
    pace = Pace("auto", 1.0, 0, now=0.0)
    assert pace.interval == FIRST_SECONDS == 60
    assert [now for now in range(10_000) if pace.due(1, float(now))] == [60]  # and waits until that one is written
    pace.committed(5, now=10_000.0, stall=2.0, seconds=5.0, wall=3600.0, failures=1)
    assert pace.interval == pytest.approx(math.sqrt(2 * 2.0 * (3600 + 3600) / 2))  # 120 s
    assert not pace.due(2, 10_000.0 + 114.9)  # it was begun at 9,995
    assert pace.due(2, 10_000.0 + 115.1)
    pace.committed(5, now=10_200.0, stall=6.0, seconds=300.0, wall=7200.0, failures=3)
    mtbf, stall, write = (3600 + 7200) / 4, (2.0 + 6.0) / 2, (5.0 + 300.0) / 2
    assert pace.interval == write > math.sqrt(2 * stall * mtbf)


@given(SECONDS, SECONDS, SECONDS, SECONDS, SECONDS)
def test_the_interval_grows_with_cost_and_with_time_between_failures_within_its_bounds(cost, mtbf, write, more, longer):
    interval = young_daly(cost, mtbf, write)
    assert max(SHORTEST, write) <= interval <= max(LONGEST, write)
    assert young_daly(cost + more, mtbf, write) >= interval
    assert young_daly(cost, mtbf + longer, write) >= interval


@given(st.floats(0.1, 100), st.floats(1000, 60_000))
def test_between_its_bounds_no_other_interval_loses_less_to_first_order(cost, mtbf):
    def lost(interval):  # share of the time: stalls, and half an interval at each failure
        return cost / interval + interval / (2 * mtbf)

    interval = young_daly(cost, mtbf, write=0.0)
    if SHORTEST < interval < LONGEST:
        assert lost(interval) <= min(lost(interval * 1.1), lost(interval / 1.1))
