"""The benchmark of starts: what it makes of the records of a run. The runs themselves are too long for a test."""

import contextlib
import json
import os
import socket

from benchmarks import start
from benchmarks.relay import relayed


def write(folder, name, lines):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut sh')


def test_a_part_ends_when_its_last_process_has_finished_it(tmp_path):
    driver = [{"time": 11.0, "part": "imports"}, {"time": 14.0, "part": "Ray"}]
    ranks = [[{"time": t, "part": "worker"}, {"time": 21.0, "part": "weights"}] for t in (16.0, 17.5)]
    for name, lines in (("1", driver), ("2", ranks[0]), ("3", ranks[1]), ("4", [{"time": 40.0, "part": "worker"}])):
        write(tmp_path / "timeline", name, lines)
    assert start._parts(tmp_path, 10.0, 20.0) == {"imports": 1.0, "Ray": 3.0, "worker": 3.5, "steps": 2.5}
    assert start._parts(tmp_path, 50.0, 60.0) == {}


def test_steps_are_those_of_all_ranks_after_a_moment(tmp_path):
    write(tmp_path / "audit", "a", [{"time": 1.0, "restored": 0}, {"time": 2.0, "step": 0}, {"time": 3.0, "step": 1}])
    write(tmp_path / "audit", "b", [{"time": 2.5, "step": 0}])
    assert start._steps(tmp_path, 2.0) == {2.5: 0, 3.0: 1}


def test_the_table_has_medians_and_ratios_to_this_checkout(tmp_path):
    def row(tree, seconds, parts):
        span = {"seconds": seconds, "cpu_seconds": 2 * seconds, "parts": parts}
        return {"tree": tree, "start": span, "recovery": span}

    rows = [row("here", s, {"imports": s / 2, "steps": s / 2}) for s in (8.0, 10.0, 30.0)] + [row("old", 20.0, {})]
    lines = start.table(rows).splitlines()
    assert lines[0] == "| | here | old |"
    assert lines[2:5] == [
        "| **command to first step, s** | **10.0** | 20.0 (2.00 times) |",
        "| **command to first step, CPU s** | **20.0** | 40.0 (2.00 times) |",
        "| imports, s | 5.0 |  |",
    ]


def test_what_a_bucket_sends_is_counted_and_in_the_table(capfd):
    with socket.create_server(("127.0.0.1", 0)) as server, relayed(server.getsockname()[1], 0.0, 1e9) as relay:
        client = socket.create_connection(("127.0.0.1", relay.port), timeout=30)
        upstream, _ = server.accept()
        client.sendall(b"ask")
        assert upstream.recv(3) == b"ask"
        upstream.sendall(b"x" * 100)
        assert client.recv(100, socket.MSG_WAITALL) == b"x" * 100
        assert relay.sent == 100
        upstream.close()
        assert client.recv(1) == b""
        client.close()
        other = socket.create_connection(("127.0.0.1", relay.port), timeout=30)
        upstream, _ = server.accept()  # still open when the relay ends
    assert other.recv(1) == b""
    other.close()
    upstream.close()
    assert capfd.readouterr().err == ""
    span = {"seconds": 1.0, "cpu_seconds": 1.0, "parts": {}}
    rows = [{"tree": tree, "start": span, "recovery": span, "recovery_bytes": n} for tree, n in (("a", 2e6), ("b", 0))]
    assert start.table(rows).splitlines()[-1] == "| read from the bucket, MB | 2.0 | 0.0 |"
    assert "bucket" not in start.table([{**row, "recovery_bytes": None} for row in rows])


def test_a_relay_that_ends_while_it_connects_closes_the_connection():
    with socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(20):
            with relayed(server.getsockname()[1], 0.0, 1e9) as relay:
                client = socket.create_connection(("127.0.0.1", relay.port), timeout=30)
            with contextlib.suppress(ConnectionResetError), client:  # before the relay took it
                assert client.recv(1) == b""


def test_the_cpu_of_processes_that_carry_the_mark_is_counted(monkeypatch):
    monkeypatch.setattr(start.psutil, "pids", lambda: [os.getpid(), os.getppid()])
    monkeypatch.setattr(start.psutil.Process, "environ", lambda self: {start._MARK: str(self.pid)})
    processes = start.Processes(str(os.getpid()))
    assert 0 < processes.look() <= processes.look()
    assert processes.ranks() == []
