"""The parts of cluster.local that need no Ray: processes found again and killed, state, ports, errors in one line."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time

import psutil
import pytest

from cluster import local, s3
from cluster.local import ray_nodes, state
from cluster.local.__main__ import main
from cluster.local.processes import Process, spawn


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def family(tmp_path):
    """Start a process, its two children, and one that is no longer below it nor in its session."""
    code = (
        "import os, subprocess, sys, time\n"
        "child = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); "
        "time.sleep(600)'\n"
        "stray = 'import os, time; os.setsid(); os.fork() and os._exit(0); time.sleep(600)'\n"
        "start = lambda **k: subprocess.Popen([sys.executable, '-c', child], stdout=subprocess.PIPE, **k)\n"
        "subprocess.run([sys.executable, '-c', stray], check=True)\n"
        "children = [start(preexec_fn=os.setpgrp), start()]\n"
        "[c.stdout.readline() for c in children]\n"
        "print('up', flush=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "family.log"
    process = spawn("family", [sys.executable, "-c", code], os.environ, log)
    until(lambda: log.read_text())
    members = process.family()
    try:
        assert len(members) == 4
        yield process, members
    finally:
        for member in members:
            if member.is_running():
                member.kill()


def again(process):
    """Return the process as another Python process reads it from the state file."""
    return Process(process.name, process.pid, process.started, process.mark)


def dead(members):
    return not any(m.is_running() and m.status() != psutil.STATUS_ZOMBIE for m in members)


def test_a_killed_process_takes_its_descendants_along(family):
    process, members = family
    assert len({os.getpgid(m.pid) for m in members}) == 3
    assert len({os.getsid(m.pid) for m in members}) == 2
    assert process.alive
    again(process).kill()
    assert dead(members)
    assert not process.alive
    assert not again(process).alive


def test_a_stopped_process_takes_deaf_descendants_along(family):
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
    assert main(list(argv)) == 2
    said = capsys.readouterr().err
    assert said.startswith("cluster.local: ")
    assert said.count("\n") == 1
    return said


def test_a_second_cluster_in_the_folder_is_refused(family, tmp_path, capsys):
    process, members = family
    state.record(tmp_path, [process], None)
    assert "its cluster runs already" in one_line(capsys, "up", "--folder", str(tmp_path))
    assert not dead(members)


UP = ("up", "--job-port", "70000", "--folder")  # which starts nothing, whatever the folder


def test_a_second_up_meanwhile_is_refused_and_changes_nothing(tmp_path, capsys):
    folder = tmp_path / "home"
    with state.claim(folder):
        state.write(folder / state.TOKEN, "of the first")
        state.record(folder, [], None)
        before = {path.name: path.read_text() for path in folder.iterdir()}
        assert "another `up` is starting its cluster" in one_line(capsys, *UP, str(folder))
        assert {path.name: path.read_text() for path in folder.iterdir()} == before
    with state.claim(folder):
        pass  # it is free again


def test_a_folder_of_other_files_is_refused_and_unchanged(tmp_path, capsys):
    tmp_path.chmod(0o755)
    (tmp_path / "a.txt").touch()
    assert "holds other files" in one_line(capsys, *UP, str(tmp_path))
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_an_s3_server_is_written_down_before_it_is_waited_for(tmp_path, capsys, monkeypatch):
    def wait(server, ports):
        assert [(name, lives) for name, _, lives, _ in local.status(tmp_path)] == [("s3", True)]
        raise s3.S3Error("seen")

    program = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(s3, "_find_weed", lambda: "")
    monkeypatch.setattr(s3.S3Server, "_spawn", lambda *args: subprocess.Popen(program))
    monkeypatch.setattr(s3.S3Server, "_wait", wait)
    assert one_line(capsys, "up", "--folder", str(tmp_path)) == "cluster.local: seen\n"
    assert local.status(tmp_path) == []


ENDED = """
import os, signal, time
from eiwtrain.terminal.signals import exit_on_signals
exit_on_signals()
try:
    print("up", flush=True)
    while os.getppid() == int(os.environ["PARENT"]): time.sleep(0.02)
finally:
    for number in (signal.SIGHUP, signal.SIGTERM): os.kill(os.getpid(), number)
    print("in order", flush=True)
"""


@pytest.mark.parametrize(("number", "nohup"), [(signal.SIGTERM, False), (signal.SIGHUP, False), (signal.SIGTERM, True)])
def test_a_signal_stops_the_command_in_order_also_if_repeated(number, nohup):
    ignoring = (lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if nohup else None
    env = os.environ | {"PARENT": str(os.getpid())}
    command = [sys.executable, "-c", ENDED]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, preexec_fn=ignoring) as process:
        assert process.stdout.readline() == "up\n"
        if nohup:
            process.send_signal(signal.SIGHUP)
        process.send_signal(number)
        assert process.communicate(timeout=60)[0] == "in order\n"
    assert process.returncode == 128 + number


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


def test_a_ray_that_does_not_start_leaves_one_line_and_no_more(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ray_nodes, "_RAY", "raise SystemExit('no Ray here')")
    arguments = ("up", "--folder", str(tmp_path), "--no-s3", "--no-mlflow")
    assert "Ray's node head ended: no Ray here" in one_line(capsys, *arguments)
    assert local.status(tmp_path) == []
