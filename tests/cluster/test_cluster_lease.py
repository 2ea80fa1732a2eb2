"""The lease of a run between real processes, on a local folder and on a real S3 server that is broken on purpose."""

import json
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from faults import FaultyProxy

from cluster.s3 import S3Server
from eiwtrain import storage
from eiwtrain.storage import holders, lease, retry
from eiwtrain.storage.lease import Lease, LeaseHeld
from eiwtrain.storage.swap import read, swap

pytestmark = pytest.mark.cluster

PROCESSES = 3
HOLDER = """
import sys, time
from eiwtrain.storage import holders, lease
lease._BEAT_SECONDS, lease._STALE_SECONDS, lease._LOOK_SECONDS, lease._POLL_SECONDS = 0.2, 4.0, 0.5, 0.1
root, where = sys.argv[1:]
if where == "elsewhere":
    holders.here = lambda: holders.Holder("elsewhere", 1234, "", 0)
held = lease.Lease.acquire(root, "tiny", lambda line: print(line, file=sys.stderr))
guard = held.guard()
guard.check()
print(held.owner, flush=True)
for line in sys.stdin:
    if line == "check\\n":
        try:
            print(guard.check(), flush=True)
        except lease.LeaseLost as e:
            print(e, flush=True)
    elif line == "lost\\n":
        while held.lost is None:
            time.sleep(0.05)
        print(held.lost, flush=True)
    else:
        held.release(line.strip())
        print("released", flush=True)
"""


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return str(tmp_path / "tiny") if request.param == "local" else f"{request.getfixturevalue('s3')}/tiny"


@pytest.fixture
def quick(monkeypatch):
    """Heartbeats in tenths of seconds."""
    for name, seconds in {"_BEAT_SECONDS": 0.2, "_LOOK_SECONDS": 0.5, "_POLL_SECONDS": 0.1}.items():
        monkeypatch.setattr(lease, name, seconds)


@pytest.fixture
def holder():
    """Starts processes that hold a lease and answer questions; they end with the test."""
    started = []

    def start(root, where="here"):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, root, where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate()


def ask(process, question):
    process.stdin.write(question + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def content(root):
    return json.loads(read(f"{root}/lease.json"))


def wait_until(true, seconds=60.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def compete(url, barrier, number, turns, queue):
    """Replace what is there, once a turn, at the same time as the others do."""
    retry._FIRST_WAIT = 0.05
    for turn in range(turns):
        barrier.wait(60)
        there = read(url)
        barrier.wait(60)
        queue.put((turn, swap(url, there, b"%d %d" % (turn, number))))


def test_of_many_processes_one_replaces_what_is_there(root):
    turns, spawn = 5, multiprocessing.get_context("spawn")
    barrier, queue = spawn.Barrier(PROCESSES), spawn.Queue()
    args = [(f"{root}/f", barrier, number, turns, queue) for number in range(PROCESSES)]
    processes = [spawn.Process(target=compete, args=a) for a in args]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=120) for _ in range(turns * PROCESSES)]
    for process in processes:
        process.join()
    for turn in range(turns):
        assert sorted(won for t, won in answers if t == turn) == [False] * (PROCESSES - 1) + [True]


def test_a_second_start_is_refused_while_the_first_lives(root, holder, quick):
    first, owner = holder(root)
    with pytest.raises(LeaseHeld, match=f"process {first.pid} "):
        Lease.acquire(root, "tiny", lambda line: None)
    assert ask(first, "check") == "None"
    assert content(root)["owner"] == owner
    assert ask(first, "stopped") == "released"
    notes = []
    second = Lease.acquire(root, "tiny", notes.append)
    assert [a.outcome for a in second.earlier] == ["stopped"]
    assert notes == []
    second.release("finished")
    assert [name for name in storage.listdir(root) if name != ".lease.json.lock"] == ["lease.json"]


def test_a_holder_that_is_killed_is_replaced_at_once_on_its_machine(root, holder):
    first, _ = holder(root)
    wait_until(lambda: content(root)["beat"] > 2)
    first.kill()
    wait_until(lambda: holders.started(first.pid) == 0)
    notes = []
    second = Lease.acquire(root, "tiny", notes.append)
    assert [a.outcome for a in second.earlier] == ["died"]
    assert second.earlier_seconds > 0
    assert notes == []
    second.release("finished")


def test_a_suspended_holder_is_replaced_and_knows_it_later(root, holder, quick, monkeypatch):
    monkeypatch.setattr(lease, "_STALE_SECONDS", 4.0)
    first, _ = holder(root, "elsewhere")
    assert ask(first, "check") == "None"
    first.send_signal(signal.SIGSTOP)
    began, notes = time.monotonic(), []
    second = Lease.acquire(root, "tiny", notes.append)
    assert time.monotonic() - began >= 4
    assert len(notes) == 1
    first.send_signal(signal.SIGCONT)
    lost = "run.name: 'tiny' was taken over by "
    assert ask(first, "check").startswith(lost)
    assert ask(first, "lost").startswith(lost)
    assert ask(first, "failed") == "released"
    assert second.lost is None
    second.guard().check()
    assert content(root)["attempt"]["outcome"] == "running"
    second.release("finished")
    assert content(root)["attempt"]["outcome"] == "finished"


def test_a_server_that_goes_away_and_returns_costs_nobody_the_lease(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(lease, "_STALE_SECONDS", 4.0)
    monkeypatch.setattr(retry, "_IMPATIENT", 0.3)
    with S3Server(tmp_path / "s3", bucket="bucket") as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        root = f"s3://bucket/{tmp_path.name}/tiny"
        held = Lease.acquire(root, "tiny", lambda line: None)
        guard = held.guard()
        guard.check()
        server.stop()
        asked = []
        wait_until(lambda: not guard._is_alive())  # what it has seen last is good for a moment
        with pytest.raises(storage.StorageError, match="could not be seen"):
            guard.check(give_up=lambda: True)
        waiter = threading.Thread(target=lambda: guard.check(give_up=lambda: bool(asked.append(1))))
        waiter.start()
        wait_until(lambda: len(asked) > 3)
        assert held.lost is None
        server.start()
        waiter.join(60)
        assert not waiter.is_alive()
        assert held.lost is None
        assert content(root)["owner"] == held.owner
        server.stop()
        notes = []
        held._note = notes.append
        held.release("finished")
        assert len(notes) == 1
        assert "could not be given back" in notes[0]


@pytest.fixture
def proxy(s3, s3_server, monkeypatch):
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.1)
    with FaultyProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy
        assert proxy.pending == 0


class Deaf:
    """A client to which no answer comes."""

    def sendall(self, data):
        pass


def lose_answer(proxy, times):
    """Have the server carry out the next puts and the client never know."""

    def apply(exchange):
        client, exchange.client = exchange.client, Deaf()
        exchange.forward()
        exchange.client = client
        exchange.reset()

    proxy._add(apply, times, "PUT")


@pytest.mark.parametrize("times", [1, 2])  # the client itself sends a second time what was reset once
def test_a_put_whose_answer_is_lost_counts(proxy, s3, times):
    url = f"{s3}/f"
    for there, data in ((None, b"1"), (b"1", b"2")):
        lose_answer(proxy, times)
        assert swap(url, there, data)
        assert not swap(url, there, b"3")
        assert read(url) == data


def test_a_swap_rides_out_what_passes(proxy, s3):
    url = f"{s3}/f"
    assert swap(url, None, b"1")
    for status, code, method in ((503, "SlowDown", "PUT"), (409, "ConditionalRequestConflict", "PUT"), (500, "", "")):
        proxy.answer(status, code, matching=method)
        assert swap(url, read(url), code.encode())
        assert read(url) == code.encode()


def test_a_server_that_knows_no_conditions_is_written_and_looked_at(proxy, s3, s3_server):
    url = f"{s3}/f"
    proxy.answer(501, "NotImplemented", matching="PUT")
    assert swap(url, None, b"1")
    proxy.answer(501, "NotImplemented", matching="PUT")
    assert swap(url, b"1", b"2")
    assert not swap(url, b"1", b"3")
    assert read(url) == b"2"


def test_a_missing_bucket_is_one_line(s3):
    with pytest.raises(storage.StorageError, match="the bucket does not exist") as e:
        swap("s3://no-such-bucket/f", None, b"1")
    assert "\n" not in str(e.value)
    with pytest.raises(storage.StorageError, match="the bucket does not exist"):
        Lease.acquire("s3://no-such-bucket/tiny", "tiny", lambda line: None)
