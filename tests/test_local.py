"""The parts of cluster.local that need no Ray: processes found again and ended, state, ports, errors in one line."""

import os
import socket
import stat
import subprocess
import sys
import time

import psutil
import pytest

from cluster import local, ray_nodes, state
from cluster.processes import Process, spawn


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def family(tmp_path):
    """A process and its two descendants."""
    code = (
        "import os, subprocess, sys, time\n"
        "child = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); "
        "time.sleep(600)'\n"
        "start = lambda **k: subprocess.Popen([sys.executable, '-c', child], stdout=subprocess.PIPE, **k)\n"
        "children = [start(preexec_fn=os.setpgrp), start()]\n"
        "[c.stdout.readline() for c in children]\n"
        "print('up', flush=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "family.log"
    process = spawn("family", [sys.executable, "-c", code], os.environ, log)
    until(lambda: log.read_text())
    members = process.family()
    assert len(members) == 3
    yield process, members
    for member in members:
        if member.is_running():
            member.kill()


def again(process):
    """As another Python process reads it from the state file."""
    return Process(process.name, process.pid, process.started, process.mark)


def dead(members):
    return not any(m.is_running() and m.status() != psutil.STATUS_ZOMBIE for m in members)


def test_a_killed_process_takes_its_descendants_along_whatever_their_group(family):
    process, members = family
    assert len({os.getpgid(m.pid) for m in members}) == 2
    assert process.alive
    again(process).kill()
    assert dead(members)
    assert not process.alive
    assert not again(process).alive


def test_a_stopped_process_takes_along_descendants_that_ignore_it(family):
    process, members = family
    process.stop(10)
    assert dead(members)


def test_what_a_dead_process_left_behind_is_found_and_killed(family):
    process, members = family
    members[0].kill()
    process._popen.wait()
    assert not process.alive
    assert {m.pid for m in again(process).family()} == {m.pid for m in members[1:]}
    again(process).kill()
    assert dead(members)


def test_a_process_with_a_recycled_pid_is_let_live(family):
    process, members = family
    recycled = Process(process.name, process.pid, process.started - 100, "another mark")
    assert not recycled.alive
    assert recycled.family() == []
    recycled.kill()
    recycled.terminate()
    assert all(m.is_running() for m in members)


def test_down_ends_what_is_written_down_and_only_that(family, tmp_path):
    process, members = family
    temp = tmp_path / f"{state.TEMP_PREFIX}x"
    temp.mkdir()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as other:
        try:
            recycled = Process("recycled", other.pid, process.started - 100)
            state.record(tmp_path, [process, recycled], temp)
            assert [row[:3] for row in local.status(tmp_path)] == [
                ("family", process.pid, True),
                ("recycled", other.pid, False),
            ]
            assert local.down(tmp_path) == ["family"]
            assert other.poll() is None
        finally:
            other.kill()
    assert dead(members)
    assert not temp.exists()
    assert local.status(tmp_path) == []
    assert local.down(tmp_path) == []


def test_the_state_is_for_its_owner_alone(tmp_path):
    state.record(tmp_path, [], None)
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_down_deletes_no_folder_that_is_not_ray_s(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    state.record(tmp_path, [], precious)
    local.down(tmp_path)
    assert precious.exists()


def one_line(capsys, *argv):
    assert local.main(list(argv)) == 2
    said = capsys.readouterr().err
    assert said.startswith("cluster.local: ")
    assert said.count("\n") == 1
    return said


def test_a_second_cluster_in_the_folder_is_refused(family, tmp_path, capsys):
    process, members = family
    state.record(tmp_path, [process], None)
    assert "its cluster runs already" in one_line(capsys, "up", "--folder", str(tmp_path))
    assert not dead(members)


def test_a_state_that_cannot_be_read_is_one_line(tmp_path, capsys):
    (tmp_path / "cluster.json").write_text("[")
    for command in ("up", "down", "status"):
        assert "cluster.json: cannot be read" in one_line(capsys, command, "--folder", str(tmp_path))


def test_a_port_that_is_taken_is_one_line_and_nothing_is_left(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name in ("gcs", "job", "mlflow"):
            said = one_line(capsys, "up", "--folder", str(tmp_path), f"--{name}-port", port)
            assert port in said
    assert local.status(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot keep a cluster's files here" in one_line(capsys, "up", "--folder", str(tmp_path / "file" / "x"))


def test_a_ray_that_does_not_start_is_one_line_and_nothing_is_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ray_nodes, "_RAY", "raise SystemExit('no Ray here')")
    arguments = ("up", "--folder", str(tmp_path), "--no-s3", "--no-mlflow")
    assert "Ray's node head ended: no Ray here" in one_line(capsys, *arguments)
    assert local.status(tmp_path) == []
