import contextlib
import dataclasses
import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eiwtrain import storage
from eiwtrain.storage import holders, holdings, lease, retry, swap
from eiwtrain.storage.lease import Guard, Holding, Lease, LeaseHeld, LeaseLost

ELSEWHERE = holders.Holder("elsewhere", 1234, "", 0)


class World:
    """Time that passes by sleeping alone; what is due while somebody sleeps is done on time."""

    def __init__(self):
        self.now, self.skew, self.due, self.slept = 1_000_000.0, 0.0, [], 0.0

    def time(self):
        return self.now + self.skew

    def clock_gettime(self, clock):
        return self.now

    def at(self, when, action):
        self.due.append((when, len(self.due), action))

    def sleep(self, seconds):
        end = self.now + seconds
        self.slept += seconds
        self.due.sort(key=lambda due: due[:2])
        while self.due and self.due[0][0] <= end:
            self.now, _, action = self.due.pop(0)
            action()
        self.now = end


@pytest.fixture
def world(monkeypatch):
    """Heartbeats come when a test says so."""
    world = World()
    monkeypatch.setattr(lease, "time", world)
    monkeypatch.setattr(swap, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(Lease, "_keep", lambda held: None)
    return world


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    return str(tmp_path / "tiny") if request.param == "local" else f"memory://{tmp_path.name}/tiny"


def acquire(root, notes=None, holder=None):
    with pytest.MonkeyPatch.context() as patch:
        if holder is not None:
            patch.setattr(holders, "here", lambda: holder)
        return Lease.acquire(root, "tiny", (notes if notes is not None else []).append)


def beat(held):
    held._renew("running")


def content(root):
    return json.loads(swap.read(f"{root}/lease.json"))


def test_a_lease_that_was_given_back_is_taken_at_once_and_remembers(root, world):
    first = acquire(root)
    assert (first.earlier, first.earlier_seconds, first.failures, first.lost) == ((), 0.0, 0, None)
    world.sleep(100)
    first.release("stopped")
    world.sleep(1000)
    began, slept = world.now, world.slept
    second = acquire(root)
    assert world.slept == slept
    assert second.owner != first.owner
    assert second.earlier == (Holding(began - 1100, began - 1000, "stopped"),)
    assert (second.earlier_seconds, second.failures) == (100.0, 0)
    second.release("failed")
    third = acquire(root)
    assert [a.outcome for a in third.earlier] == ["stopped", "failed"]
    assert (third.earlier_seconds, third.failures) == (100.0, 1)


def test_a_run_remembers_why_its_drivers_ended(root, world):
    acquire(root).release("stopped", "SIGTERM")
    second = acquire(root, holder=ELSEWHERE)
    second.failed("rank 1 died\nof a signal")
    beat(second)
    world.sleep(40)  # killed
    third = acquire(root)
    third.failed("x" * 1000)
    third.failed("rank 0 died")
    third.release("failed", "no room")
    record = holdings.read_record(root)
    whys = [h.why for h in (*record.earlier, record.last)]
    assert whys == [
        "SIGTERM",
        "its workers failed: rank 1 died of a signal",
        "its workers failed: rank 0 died; no room",
    ]


def test_a_lease_of_before_there_were_reasons_is_read(root):
    acquire(root).release("stopped", "SIGTERM")
    acquire(root).release("finished")
    old = content(root)
    old["earlier"] = [entry[:4] for entry in old["earlier"]]
    del old["attempt"]["why"], old["attempt"]["cost"]
    record = holdings.parse(json.dumps(old).encode())
    assert [(h.outcome, h.why, h.cost) for h in (*record.earlier, record.last)] == [
        ("stopped", "", 0.0),
        ("finished", "", 0.0),
    ]


def test_what_a_run_has_cost_is_remembered_whatever_ended_its_drivers(root, world, monkeypatch):
    monkeypatch.setattr("eiwtrain.storage.holdings._KEPT", 1)
    for number, cost in enumerate([1.5, 0.25, 4.0]):
        lease = acquire(root, holder=ELSEWHERE)
        assert (lease.cost, lease.earlier_cost) == (0.0, [0.0, 1.5, 1.75][number])
        lease.cost = cost / 2
        beat(lease)
        lease.cost = cost
        if number == 1:
            beat(lease)
            world.sleep(40)  # killed
        else:
            lease.release("stopped")
    assert acquire(root).earlier_cost == 5.75


def test_a_holder_that_lives_is_not_replaced_and_the_refusal_is_one_line(root, world):
    first, notes = acquire(root, holder=ELSEWHERE), []
    owner = content(root)["owner"]
    world.at(world.now + 4.5, lambda: beat(first))
    with pytest.raises(LeaseHeld) as e:
        acquire(root, notes)
    assert world.slept == 5
    assert str(e.value) == (
        "run.name: 'tiny' is being trained by elsewhere, process 1234 (last sign of life just now); "
        "wait for it, stop it, or use another run.name"
    )
    assert notes == [
        "run.name 'tiny' was last trained by elsewhere, process 1234, 0:00 ago and not given back; "
        "waiting up to 30 s for a sign of life"
    ]
    assert content(root)["owner"] == owner
    assert first.lost is None


def test_a_holder_that_is_silent_is_replaced_after_the_stale_time_and_learns_of_it(root, world, monkeypatch):
    first, notes = acquire(root, holder=ELSEWHERE), []
    guard = first.guard()
    first.failed()
    world.sleep(7)
    beat(first)
    guard.check()
    world.sleep(20)
    second = acquire(root, notes)
    assert len(notes) == 1
    assert world.slept == 27 + 30
    assert second.earlier == (Holding(world.now - 57, world.now - 50, "died", 1),)
    assert (second.earlier_seconds, second.failures) == (7.0, 2)
    with pytest.raises(LeaseLost, match="'tiny' was taken over by ") as e:
        guard.check()
    assert "\n" not in str(e.value)
    before = content(root)
    for _ in range(3):
        beat(first)
        assert first.lost == str(e.value)
    monkeypatch.setattr(lease, "swap", None)
    first.release("finished")
    assert content(root) == before
    second.guard().check()


def test_a_holder_that_gives_back_while_it_is_watched_is_replaced(root, world):
    first = acquire(root, holder=ELSEWHERE)
    world.at(world.now + 4.5, lambda: first.release("finished"))
    assert acquire(root).earlier[0].outcome == "finished"
    assert world.slept == 5


def test_a_lease_that_somebody_else_takes_meanwhile_is_held(root, world, monkeypatch):
    acquire(root).release("stopped")

    def late(*args):
        monkeypatch.setattr(lease, "swap", swap.swap)
        other = acquire(root, holder=ELSEWHERE)
        world.at(world.now + 5, lambda: beat(other))
        return swap.swap(*args)

    monkeypatch.setattr(lease, "swap", late)
    with pytest.raises(LeaseHeld, match="elsewhere"):
        acquire(root)


@pytest.mark.parametrize("skew", [-3600, 660, 86400])
def test_a_taker_watches_the_lease_whatever_its_clock_says(root, world, skew):
    first = acquire(root, holder=ELSEWHERE)
    world.at(world.now + 4.5, lambda: (setattr(world, "skew", 0), beat(first), setattr(world, "skew", skew)))
    world.skew = skew
    with pytest.raises(LeaseHeld, match="elsewhere"):
        acquire(root)
    began = world.slept
    acquire(root)
    assert world.slept == began + 30


def test_a_process_of_this_machine_that_is_gone_is_not_waited_for(root, world):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = holders.here()
    there = dataclasses.replace(here, pid=process.pid, started=holders.started(process.pid))
    assert here.machine
    assert not holders.is_gone(here)
    assert not holders.is_gone(there)
    assert not holders.is_gone(dataclasses.replace(there, started=0))  # it is not known when it was started
    assert holders.is_gone(dataclasses.replace(there, started=there.started - 1))  # its number was given again
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not holders.is_gone(there):  # before it is reaped
        assert time.monotonic() < deadline
    process.wait()
    assert holders.is_gone(there)
    for other in ({"host": "elsewhere"}, {"machine": "another boot"}, {"machine": ""}):
        assert not holders.is_gone(dataclasses.replace(there, **other))
    guard = acquire(root, holder=there).guard()
    guard.check()
    assert acquire(root).earlier[0].outcome == "died"
    assert world.slept == 0
    world.sleep(3)
    with pytest.raises(LeaseLost):
        guard.check()


def test_a_process_of_somebody_else_is_there(monkeypatch):
    def refuse(pid, number):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert not holders.is_gone(holders.here())
    monkeypatch.setattr(holders, "started", lambda pid: None)
    assert not holders.is_gone(dataclasses.replace(holders.here(), started=5))


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"format": "eiwtrain-lease/1"}', b'{"format": "another"}'])
def test_what_is_no_lease_is_named(root, world, data):
    url = f"{root}/lease.json"
    storage.write_bytes(url, data)
    with pytest.raises(storage.StorageError, match=r"lease\.json is not a lease; delete it"):
        acquire(root)
    storage.delete(url)
    held = acquire(root)
    storage.write_bytes(url, data)
    beat(held)
    assert content(root)["owner"] == held.owner
    storage.delete(url)
    beat(held)
    assert content(root)["owner"] == held.owner
    assert held.lost is None


attempts = st.builds(
    lambda began, seconds, outcome, failures: Holding(began, began + seconds, outcome, failures),
    st.integers(0, 100),
    st.integers(0, 100),
    st.sampled_from(["finished", "stopped", "failed", "died", "running"]),
    st.integers(0, 3),
)


@given(st.lists(attempts, max_size=20), st.integers(1, 5))
def test_a_history_that_is_cut_keeps_its_sums(history, kept):
    record = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holdings, "_KEPT", kept)
        for attempt in (*history, Holding(0, 0, "running")):
            before = record.history() if record else {}
            record = holdings.Record("tiny", "owner", ELSEWHERE, 0, attempt, **before)
            record = holdings.parse(record.as_bytes())
    ended = [a if a.outcome != "running" else dataclasses.replace(a, outcome="died") for a in history]
    assert list(record.earlier) == ended[-kept:]
    assert record.folded_seconds + holdings.seconds_of(record.earlier) == sum(a.ended - a.began for a in history)
    failures = sum(a.failures + (a.outcome in ("failed", "died")) for a in ended)
    assert record.folded_failures + holdings.failures_of(record.earlier) == failures


def test_the_heart_beats_by_itself_and_a_failure_does_not_stop_it(tmp_path, monkeypatch):
    failures = [storage.StorageError("away"), RuntimeError("unforeseen"), storage.StorageError("away")]

    def failing(*args):
        if failures and threading.current_thread().name == "lease":
            raise failures.pop()
        return swap.swap(*args)

    monkeypatch.setattr(lease, "_BEAT_SECONDS", 0.01)
    monkeypatch.setattr(lease, "swap", failing)
    held = acquire(str(tmp_path))
    wait_until(lambda: not failures and content(tmp_path)["beat"] > 5)
    held.failed()
    held.release("finished")
    assert content(tmp_path)["attempt"]["outcome"] == "finished"
    assert content(tmp_path)["attempt"]["failures"] == 1
    assert not held._thread.is_alive()
    before = content(tmp_path)
    held.release("failed")
    assert content(tmp_path) == before


def test_a_lease_that_cannot_be_given_back_is_noted(root, world, monkeypatch):
    def refuse(*args):
        raise storage.StorageError("s3://b/lease.json: the server is away")

    notes = []
    held = acquire(root, notes)
    monkeypatch.setattr(lease, "swap", refuse)
    held.release("finished")
    assert len(notes) == 1
    assert "could not be given back (s3://b/lease.json: the server is away)" in notes[0]
    assert "\n" not in notes[0]


def test_a_renewal_whose_answer_was_lost_is_no_loss(root, world, monkeypatch):
    held = acquire(root)

    def carried_out(*args):
        assert swap.swap(*args)
        raise storage.StorageError("no answer")

    monkeypatch.setattr(lease, "swap", carried_out)
    with pytest.raises(storage.StorageError):
        beat(held)
    monkeypatch.setattr(lease, "swap", swap.swap)
    beat(held)
    assert held.lost is None
    assert content(root)["beat"] == 2


@pytest.fixture
def reads(monkeypatch):
    """How often the lease was looked at."""
    reads = []

    def counted(url):
        reads.append(url)
        return swap.read(url)

    monkeypatch.setattr(lease, "read", counted)
    return reads


def test_a_guard_looks_every_few_seconds_and_not_at_each_call(root, world, reads):
    held = acquire(root)
    guard = pickle.loads(pickle.dumps(held.guard()))
    reads.clear()
    for _ in range(100):
        guard.check()
    assert len(reads) == 1
    world.sleep(2.9)
    guard.check()
    assert len(reads) == 1
    world.sleep(0.2)
    guard.check()
    assert len(reads) == 2
    assert world.slept < 4


def test_a_guard_waits_for_a_heartbeat_that_is_late(root, world):
    held = acquire(root)
    guard, began = held.guard(), world.now
    world.at(began + 22.5, lambda: beat(held))
    while world.now < began + 14.9:
        guard.check()
        world.sleep(1)
    assert world.now == began + 15
    guard.check()
    assert world.now == began + 23


def test_a_guard_made_late_does_not_take_an_old_heartbeat_for_a_new_one(root, world):
    held = acquire(root)
    world.sleep(16)
    world.at(world.now + 1.5, lambda: beat(held))
    held.guard().check()
    assert world.slept == 16 + 2


def test_a_guard_whose_clock_is_ahead_waits_for_one_heartbeat(root, world):
    held = acquire(root)
    world.skew = 3600
    guard = held.guard()
    world.at(world.now + 4.5, lambda: (setattr(world, "skew", 0), beat(held), setattr(world, "skew", 3600)))
    guard.check()
    assert world.slept == 5
    guard.check()
    assert world.slept == 5


def test_a_guard_waits_for_storage_and_for_a_lease_that_is_missing(root, world, monkeypatch):
    held = acquire(root)
    guard, began = held.guard(), world.now
    guard.check()

    def refuse(url):
        raise storage.StorageError("away")

    world.at(began, lambda: monkeypatch.setattr(lease, "read", refuse))
    world.at(began + 5.5, lambda: monkeypatch.setattr(lease, "read", swap.read))
    world.at(began + 5.5, lambda: storage.delete(f"{root}/lease.json"))
    world.at(began + 20.5, lambda: beat(held))
    world.sleep(4)
    guard.check()
    assert world.now == began + 6
    world.sleep(12)
    guard.check()
    assert world.now == began + 21


def test_a_wait_can_be_given_up(root, world):
    held = acquire(root)
    guard = held.guard()
    world.sleep(100)
    asked = []
    with pytest.raises(storage.StorageError, match=r"lease\.json: it could not be seen whether this job still"):
        guard.check(give_up=lambda: asked.append(1) or len(asked) == 3)
    assert world.slept == 102
    beat(held)
    guard.check(give_up=lambda: True)


@pytest.mark.parametrize("looked_before", [0.0, 0.5, 2.9, 5.0])
def test_after_the_wait_no_guard_of_an_attempt_before_believes_that_it_may_write(root, world, looked_before):
    held = acquire(root)
    before = held.guard()
    before.check()
    world.sleep(looked_before)
    held.next_attempt()
    guard = held.guard()
    with contextlib.suppress(LeaseLost):
        before.check()  # the last moment at which it may find nothing
    beat(held)
    guard.check()
    believed = world.now
    if looked_before < lease._LOOK_SECONDS:
        before.check()  # as it does not look again
    guard.outwait()
    assert world.now - believed >= lease._LOOK_SECONDS
    with pytest.raises(LeaseLost, match="another attempt"):
        before.check()
    with pytest.raises(storage.StorageError, match="others may still write"):
        guard.outwait(give_up=lambda: True)


def test_a_guard_of_an_attempt_that_has_ended_lets_nothing_be_written(root, world):
    held = acquire(root)
    guard = held.guard()
    held.release("failed")
    for _ in range(2):
        with pytest.raises(LeaseLost, match=r"the attempt at 'tiny' has ended \(failed\)"):
            guard.check()
    acquire(root)
    with pytest.raises(LeaseLost, match="has ended"):
        guard.check()


@settings(deadline=None)  # a first write takes longer
@given(
    beats=st.lists(st.floats(0.5, 60), max_size=8),
    checks=st.lists(st.tuples(st.integers(0, 2), st.floats(0, 200)), max_size=60),
    taken_from=st.floats(0, 150),
    behind=st.tuples(*[st.floats(-3600, 14)] * 3),
    comes_back=st.floats(0, 60),
)
def test_nobody_writes_when_another_takes(beats, checks, taken_from, behind, comes_back):
    """A holder whose heartbeats are in time or late and then end, guards that are asked now and then and whose clocks
    are wrong, and a taker: no write is permitted in the seconds before it takes, nor ever after.
    """
    world = World()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "time", world)
        patch.setattr(Lease, "_keep", lambda held: None)
        patch.setattr(swap, "_SETTLE_SECONDS", 0.0)
        root, last = f"memory://{uuid.uuid4().hex}", world.now
        held = acquire(root, holder=ELSEWHERE)
        guards, allowed, refused = [held.guard() for _ in behind], [], []

        def check(i):
            world.skew = -behind[i]
            try:
                if guards[i]._is_alive():
                    allowed.append(world.now)
            except LeaseLost:
                refused.append(world.now)
            world.skew = 0.0

        for i, when in checks:
            world.at(world.now + when, functools.partial(check, i))
        for seconds in beats:
            last += seconds
            world.at(last, lambda: beat(held))
        world.sleep(taken_from)
        taker = None
        while taker is None:
            with contextlib.suppress(LeaseHeld):
                taker = acquire(root)
        taken = world.now
        world.at(taken + comes_back, lambda: beat(held))
        world.sleep(1000)
        assert held.lost is not None
        assert taker.lost is None
        assert all(when <= taken - 15 + max(0.0, *behind) for when in allowed)
        assert all(when >= taken for when in refused)


def test_of_many_that_ask_at_the_same_time_one_gets_it(root, monkeypatch):
    monkeypatch.setattr(lease, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(swap, "_SETTLE_SECONDS", 0.2)
    held, refused = [], []

    def take():
        try:
            held.append(Lease.acquire(root, "tiny", lambda line: None))
        except LeaseHeld as e:
            refused.append(e)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 7)
    held[0].release("finished")


def test_any_number_of_threads_may_share_a_guard(root, world, reads):
    held = acquire(root)
    guard = Guard(f"{root}/lease.json", held.owner)
    reads.clear()
    came = []
    threads = [threading.Thread(target=lambda: came.append(guard.check())) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert came == [None] * 16
    assert len(reads) == 1


def wait_until(true, seconds=60.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_workers_of_an_attempt_before_may_not_write_any_more(root):
    held = acquire(root)
    first = held.guard()
    first.check()
    held.next_attempt()
    second = held.guard()
    second.check()  # once the heartbeat has said so
    again = pickle.loads(pickle.dumps(first))
    with pytest.raises(LeaseLost, match=r"another attempt at .tiny. has begun"):
        again.check()
    held.release("finished")
