import math
import time
from statistics import median_low

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eiwtrain.train import stragglers
from eiwtrain.train.stragglers import Own, Speeds, Stopwatch, Watch


def test_a_stopwatch_without_an_end_knows_nothing():
    stopwatch = Stopwatch(torch.device("cpu"))
    stopwatch.begin()
    assert math.isnan(stopwatch.seconds())
    time.sleep(0.02)
    stopwatch.end()
    found = stopwatch.seconds()
    time.sleep(0.02)
    assert 0.02 <= found == stopwatch.seconds()  # and not what came later
    stopwatch.begin()
    assert math.isnan(stopwatch.seconds())


TIMES = st.sampled_from([0.0, 1.0, 1.25, 2.0, 8.0])
LOOKS = st.integers(1, 5).flatmap(
    lambda ranks: st.lists(st.tuples(st.lists(TIMES, min_size=ranks, max_size=ranks), st.sampled_from([60.0, 300.0])))
)


@given(LOOKS)
def test_a_rank_is_named_once_after_ten_minutes_in_which_it_was_always_slow(looks):
    watch, named = Watch(), []
    for number, (own, seconds) in enumerate(looks, 1):
        found = watch.look(own, seconds)
        for rank in range(len(own)):
            slow = 0.0
            for times, length in reversed(looks[:number]):
                if not times[rank] >= 1.5 * median_low(times) > 0:
                    break
                slow += length
            assert (rank in found) == (slow >= 600 and rank not in named)
        named += found


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_equal_ranks_and_the_faster_half_are_never_named(ranks):
    watch = Watch()
    own = [1.0] * (ranks // 2) + [0.1] * (ranks - ranks // 2)
    assert {rank for _ in range(100) for rank in watch.look(own, 60.0)} == set(range(ranks // 2))
    assert not [rank for _ in range(100) for rank in Watch().look([1.0] * ranks, 6e9)]


@pytest.fixture
def speeds(monkeypatch):
    """Make what rank 0 has of these ranks (node, host); with the lines that it prints."""
    monkeypatch.setattr(stragglers.dist, "get_rank", lambda: 0)
    said = []

    def of(*ranks):
        return Speeds(ranks, said.append), said

    return of


def compared(monkeypatch, made, *ranks):
    """Return the points of ranks that each had these times."""

    def gather(_mean, gathered, dst):
        gathered[:] = ranks

    monkeypatch.setattr(stragglers.dist, "gather_object", gather)
    made.add(ranks[0].data, ranks[0].compute, worked=60.0 - ranks[0].data)
    return made.compare()


def test_ranks_are_named_by_node_and_so_are_their_curves(monkeypatch, speeds):
    made, said = speeds(("b7", "one"), ("a9", "two"), ("a9", "two"))
    assert made.nodes == ["one", "two"]
    points = compared(monkeypatch, made, Own(0.5, 2.0), Own(0.0, 1.0), Own(0.25, 4.0))
    assert points == {
        "speed/compute_fastest": 1.0, "speed/compute_median": 2.0, "speed/compute_slowest": 4.0,
        "speed/data_fastest": 0.0, "speed/data_median": 0.25, "speed/data_slowest": 0.5,
        "speed/node0/compute": 2.0, "speed/node0/data": 0.5, "speed/node1/compute": 4.0, "speed/node1/data": 0.25,
    }  # fmt: skip
    (line,) = said
    for part in ("fastest 1.000 (rank 1 on two)", "slowest 4.000 (rank 2 on two)", "slowest 0.500 (rank 0 on one)"):
        assert part in line
    for _ in range(12):
        compared(monkeypatch, made, Own(0.5, 2.0), Own(0.0, 1.0), Own(0.25, 4.0))
    (named,) = [line for line in said if "slower" in line]
    assert named.startswith("rank 2 on two has been 1.7 times slower than the median rank for 10 minutes")


def test_nodes_of_one_host_have_names_of_their_own(speeds):
    made, _ = speeds(("a" * 56, "host"), ("b" * 56, "host"), ("c" * 56, "other"))
    assert made.nodes == ["host/aaaaaaaa", "host/bbbbbbbb", "other"]


def test_where_ranks_cannot_tell_what_they_compute_they_have_data_alone(monkeypatch, speeds):
    made, said = speeds(("a", "one"), ("a", "one"))
    for _ in range(12):
        points = compared(monkeypatch, made, Own(0.0, math.nan), Own(9.0, math.nan))
    assert points == {"speed/data_fastest": 0.0, "speed/data_median": 0.0, "speed/data_slowest": 9.0}
    assert not [line for line in said if "slower" in line or "nan" in line]


def test_ranks_are_compared_once_a_minute_and_never_where_there_is_one(monkeypatch, speeds):
    now = [100.0]
    monkeypatch.setattr(stragglers.time, "monotonic", lambda: now[0])
    (made, _), (alone, _) = speeds(("a", "one"), ("a", "one")), speeds(("a", "one"))
    due = []
    for now[0] in range(100, 301, 20):
        due.append(made.due())
        assert not alone.due()
        if made.due():
            compared(monkeypatch, made, Own(0.0, 1.0), Own(0.0, 1.0))
    assert due == [False] * 3 + [True] + [False] * 2 + [True] + [False] * 2 + [True] + [False]
