import json
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eiwtrain.train import goodput
from eiwtrain.train.goodput import KINDS, Clock


class Time:
    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


def resumed(saved, *args, **kwargs):
    clock = Clock(*args, **kwargs)
    if saved is not None:
        clock.resume(saved)
    return clock


@pytest.fixture
def time():
    return Time(1000.0)


def test_an_attempt_starts_up_and_trains_and_the_rest_is_other(time):
    clock = Clock(began=990.0, earlier=0.0, attempt_began=990.0, now=time)
    assert (clock.wall, clock.goodput, clock.shares()["other"]) == (10.0, 0.0, 1.0)
    clock.training()
    time.passes(26.0)
    clock.spend("productive", 24.0)
    clock.spend("data_wait", 1.0)
    clock.training()  # at the second step, which adds no start-up
    assert [clock.seconds(kind) for kind in KINDS] == [24.0, 10.0, 1.0, 0.0, 0.0, 0.0]
    time.passes(4.0)
    assert clock.wall == 40.0
    assert clock.goodput == 0.6
    assert clock.shares() == {
        "productive": 0.6, "startup": 0.25, "data_wait": 0.025, "checkpoint": 0.0, "evaluation": 0.0, "lost": 0.0,
        "other": 0.125,
    }  # fmt: skip


def test_time_spent_before_the_first_step_is_not_start_up(time):
    clock = Clock(1000.0, 0.0, 1000.0, now=time)
    time.passes(3.0)
    with clock.spending("evaluation"):
        time.passes(5.0)
    time.passes(2.0)
    clock.training()
    assert (clock.seconds("startup"), clock.seconds("evaluation")) == (5.0, 5.0)


def test_time_inside_a_block_is_counted_once_even_if_it_fails(time):
    clock = Clock(1000.0, 0.0, 1000.0, now=time)

    def evaluate():
        with clock.spending("evaluation"):
            time.passes(2.0)
            with clock.spending("checkpoint"):
                time.passes(3.0)
            time.passes(1.0)
            raise OSError("storage is gone")

    with pytest.raises(OSError, match="gone"):
        evaluate()
    assert (clock.seconds("evaluation"), clock.seconds("checkpoint"), clock.wall) == (3.0, 3.0, 6.0)


def test_work_after_the_checkpoint_is_lost(time):
    first = Clock(1000.0, 0.0, 1000.0, now=time)
    first.training()
    time.passes(6.0)
    first.spend("productive", 6.0)
    saved = json.loads(json.dumps(first.to_json()))
    time.passes(3.0)
    first.spend("productive", 3.0)
    time.passes(1.0)  # the workers crash, and are started again by the same driver
    second = resumed(saved, began=1000.0, earlier=0.0, attempt_began=1010.0, now=time)
    time.passes(10.0)
    second.training()
    assert (second.seconds("productive"), second.seconds("lost"), second.seconds("startup")) == (6.0, 4.0, 10.0)
    assert second.wall == 20.0
    time.passes(5000.0)  # the driver is killed also, and another is started much later
    third = resumed(saved, began=time.now, earlier=22.0, attempt_began=time.now, now=time)
    assert (third.wall, third.seconds("productive"), third.seconds("lost")) == (22.0, 6.0, 16.0)


def test_a_run_without_a_checkpoint_has_lost_all_earlier_time(time):
    clock = Clock(began=990.0, earlier=30.0, attempt_began=995.0, now=time)
    assert (clock.seconds("lost"), clock.wall) == (35.0, 40.0)


def test_seconds_that_a_driver_did_not_record_are_not_negative(time):
    saved = Clock(960.0, 0.0, 960.0, now=time).to_json()
    clock = resumed(saved, began=1000.0, earlier=35.0, attempt_began=1000.0, now=time)
    assert (clock.seconds("lost"), clock.wall) == (0.0, 40.0)


def test_clocks_that_differ_do_not_make_time_negative(time):
    clock = Clock(1003.0, 0.0, 1003.0, now=time)  # the driver's clock is ahead
    clock.training()
    time.passes(2.0)
    clock.spend("productive", 2.0)
    assert (clock.seconds("startup"), clock.goodput, clock.shares()["other"]) == (0.0, 1.0, 0.0)


QUARTERS = st.integers(0, 400).map(lambda n: n / 4)  # seconds whose sums are exact
ACTIONS = st.one_of(
    st.tuples(st.sampled_from([kind for kind in KINDS if kind not in ("startup", "lost")]), QUARTERS),
    st.tuples(st.just("other"), QUARTERS),
    st.tuples(st.just("save"), st.just(0.0)),
)
ATTEMPTS = st.lists(
    st.tuples(
        st.sampled_from(["same driver", "new driver"]),
        QUARTERS,  # pause between two drivers
        QUARTERS,  # start-up
        st.lists(ACTIONS, max_size=8),
    ),
    min_size=1,
    max_size=5,
)


@given(ATTEMPTS)
@example([("new driver", 0.0, 1.0, [("save", 0.0), ("productive", 2.0)]), ("same driver", 0.0, 1.0, [])])
def test_every_second_is_counted_once_whatever_crashes(attempts):
    time = Time(1e6)
    wall = earlier = 0.0
    began = time.now
    saved, known = None, Counter()  # content of the last checkpoint, and the times it should hold
    for number, (driver, pause, startup, actions) in enumerate(attempts):
        if driver == "new driver" and number:
            time.passes(pause)
            began, earlier = time.now, wall
        clock = resumed(saved, began, earlier, attempt_began=time.now, now=time)
        spent = known + Counter(lost=wall - known.total())
        time.passes(startup)
        clock.training()
        spent["startup"] += startup
        wall += startup
        for what, seconds in actions:
            if what == "save":
                saved, known = clock.to_json(), spent.copy()
            elif what == "checkpoint":
                with clock.spending("checkpoint"):
                    time.passes(seconds)
            else:
                time.passes(seconds)
                if what != "other":
                    clock.spend(what, seconds)
            spent[what] += seconds
            wall += seconds
            assert clock.wall == wall
            assert {kind: clock.seconds(kind) for kind in KINDS} == {kind: spent[kind] for kind in KINDS}
            shares = clock.shares()
            assert min(shares.values()) >= 0
            assert sum(shares.values()) == pytest.approx(1)
            assert shares["other"] * wall == pytest.approx(spent["other"]) or not wall
            assert clock.goodput == shares["productive"]


def test_the_summary_names_the_losses_that_count_largest_first(time):
    clock = Clock(1000.0, 0.0, 1000.0, now=time)
    time.passes(7800.0)
    clock.spend("productive", 6474.0)
    clock.spend("startup", 936.0)
    clock.spend("checkpoint", 23.4)
    clock.spend("evaluation", 7.0)
    clock.spend("lost", 359.6)
    assert goodput.describe(clock) == "83% of 2:10:00; start-up 12%, lost work 4.6%, checkpoints 0.3%"
    assert goodput.describe(Clock(time.now, 0.0, time.now, now=time)) == "0% of 0:00; other 100%"


def test_the_curves_add_up_to_one(time):
    clock = Clock(990.0, 10.0, 990.0, now=time)
    clock.training()
    time.passes(20.0)
    clock.spend("productive", 15.0)
    curves = goodput.curves(clock)
    assert curves == {
        "time/goodput": 0.375, "time/lost/startup": 0.25, "time/lost/data_wait": 0.0, "time/lost/checkpoint": 0.0,
        "time/lost/evaluation": 0.0, "time/lost/work": 0.25, "time/lost/other": 0.125,
    }  # fmt: skip


HIRINGS = st.lists(
    st.tuples(
        st.sampled_from(["same driver", "new driver"]),
        QUARTERS,  # waiting for room
        st.integers(1, 8),  # workers
        st.sampled_from([0.0, 900.0, 7200.0]),  # price of one an hour
        QUARTERS,  # start-up
        st.lists(ACTIONS, max_size=8),
    ),
    min_size=1,
    max_size=5,
)


@given(HIRINGS)
@example(
    [
        ("new driver", 4.0, 3, 900.0, 1.0, [("save", 0.0), ("productive", 2.0)]),
        ("same driver", 9.0, 1, 900.0, 1.0, [("productive", 1.0)]),
    ]
)
def test_costs_add_up_over_attempts_of_any_number_of_workers_whatever_crashes(attempts):
    time = Time(1e6)
    wall = earlier = 0.0
    began = time.now
    saved, known, paid = None, Counter(), 0.0  # content of the last checkpoint, its costs; all that was paid
    for number, (driver, waiting, workers, price, startup, actions) in enumerate(attempts):
        if driver == "new driver" and number:
            time.passes(1000.0)
            began, earlier = time.now, wall
        attempt_began = time.now
        time.passes(waiting)
        clock = resumed(saved, began, earlier, attempt_began, spent=paid, hired=time.now, now=time)
        clock.pay(workers * price)
        rate = workers * price / 3600
        costs = known + Counter(lost=paid - known.total())
        time.passes(startup)
        clock.training()
        costs["startup"] += rate * startup
        paid += rate * startup
        wall += waiting + startup
        for what, seconds in actions:
            if what == "save":
                saved, known = json.loads(json.dumps(clock.to_json())), costs.copy()
            else:
                time.passes(seconds)
                if what != "other":
                    clock.spend(what, seconds)
            costs[what] += rate * seconds
            paid += rate * seconds
            wall += seconds
            assert clock.cost == pytest.approx(paid)
            assert [clock.cost_of(kind) for kind in KINDS] == pytest.approx([costs[kind] for kind in KINDS])
            useful = costs["productive"] + costs["evaluation"] + costs["other"]
            assert clock.wasted == pytest.approx(paid - useful)
            assert clock.cost_after(60.0) == pytest.approx(paid + 60 * rate)


def test_a_checkpoint_from_before_there_were_costs_is_taken(time):
    saved = {k: v for k, v in Clock(960.0, 0.0, 960.0, now=time).to_json().items() if k not in ("cost", "costs")}
    clock = resumed(saved, began=1000.0, earlier=40.0, attempt_began=1000.0, spent=5.0, now=time)
    assert (clock.cost, clock.cost_of("lost")) == (5.0, 5.0)


def test_what_a_driver_did_not_record_of_its_cost_is_in_its_checkpoint(time):
    first = Clock(1000.0, 0.0, 1000.0, now=time)
    first.pay(3600.0)
    time.passes(10.0)
    second = resumed(first.to_json(), time.now, 10.0, time.now, spent=6.0, now=time)
    assert (second.cost, second.cost_of("lost")) == (10.0, 0.0)


def test_the_summary_names_the_cost_and_what_of_it_was_wasted(time):
    clock = Clock(1000.0, 0.0, 1000.0, now=time)
    clock.pay(36.0)
    time.passes(600.0)
    clock.spend("startup", 100.0)
    clock.spend("lost", 50.0)
    clock.spend("productive", 450.0)
    assert goodput.describe_cost(clock) == "6.00; wasted 1.50 (25%): start-up 1.00, lost work 0.50"
    assert goodput.cost_curves(clock, 100.0) == {"cost/spent": 6.0, "cost/at_end": 7.0, "cost/wasted": 1.5}
    assert goodput.describe_cost(Clock(time.now, 0.0, time.now, now=time)) == "0.00; wasted 0.00 (0%)"
