"""Output whose reader goes, stalls, or has no room: a real process, real pipes and a real terminal."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LINES = 20_000  # 2 MB: more than a pipe or a terminal holds
PRINTS = f"""
import sys, threading, pathlib
from eiwtrain.terminal.output import protect
protect()
for i in range({LINES}):
    print("line", i, "x" * 80, flush=True)
print("an error", file=sys.stderr)
pathlib.Path(sys.argv[1]).write_text("done")
"""


def start(tmp_path, program=PRINTS, **streams):
    return subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "done")],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams,
        cwd=Path(__file__).parents[2],
    )


def is_done(tmp_path):
    return (tmp_path / "done").exists() and (tmp_path / "done").read_text() == "done"


def test_a_reader_that_takes_all_gets_all_in_order(tmp_path):
    program = PRINTS.replace(str(LINES), "300") + "raise ValueError('at the end ±')"
    process = start(tmp_path, program, stderr=subprocess.STDOUT)
    lines = process.communicate(timeout=60)[0].decode().splitlines()
    assert [line.split()[1] for line in lines[:300]] == [str(i) for i in range(300)]
    assert (lines[300], lines[-1]) == ("an error", "ValueError: at the end ±")
    assert process.returncode == 1


def test_a_reader_that_goes_away_does_not_end_the_program(tmp_path):
    process = start(tmp_path)
    process.stdout.readline()
    process.stdout.close()
    assert b"Error" not in process.stderr.read()
    assert process.wait(60) == 0
    assert is_done(tmp_path)


def test_a_reader_that_stalls_delays_neither_the_program_nor_its_end(tmp_path):
    process = start(tmp_path)
    assert process.wait(60) == 0
    assert is_done(tmp_path)
    assert process.stdout.read().startswith(b"line 0 x")


def test_a_reader_that_continues_hears_how_much_it_missed(tmp_path):
    process = start(tmp_path, PRINTS + "sys.stdin.readline()", stdin=subprocess.PIPE)
    while not is_done(tmp_path):
        assert process.poll() is None
        time.sleep(0.01)
    process.stdin.write(b"end\n")
    process.stdin.flush()
    said = process.communicate(timeout=60)[0].decode().splitlines()
    assert any(line.endswith("lines of output could not be written]") for line in said)
    assert said[-1].startswith(f"line {LINES - 1} ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_does_not_end_the_program(tmp_path):
    with open("/dev/full", "wb") as full:
        process = start(tmp_path, stdout=full, stderr=full)
    assert process.wait(60) == 0
    assert is_done(tmp_path)


def test_a_terminal_that_closes_does_not_end_the_program(tmp_path):
    ours, theirs = pty.openpty()
    process = start(tmp_path, stdout=theirs, stderr=theirs)  # not its controlling terminal: no SIGHUP comes
    os.close(theirs)
    os.read(ours, 10)
    os.close(ours)
    assert process.wait(60) == 0
    assert is_done(tmp_path)


def test_streams_that_are_closed_are_no_error(tmp_path):
    program = PRINTS.replace(str(LINES), "3") + "f = open(sys.argv[1] + '2', 'w'); assert f.fileno() > 2"
    command = f'"$0" -c "$1" "{tmp_path}/done" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", command, sys.executable, program], cwd=Path(__file__).parents[2]).returncode == 0
    assert is_done(tmp_path)


def test_a_signal_is_answered_while_the_reader_stalls(tmp_path):
    program = """
import pathlib, signal, sys, time
from eiwtrain.terminal.console import Console
from eiwtrain.terminal.output import protect
from eiwtrain.terminal.signals import Stop
protect()
with Stop(Console()) as stop:
    stop.training = True
    print("x" * 1_000_000, flush=True)
    pathlib.Path(sys.argv[1]).write_text("done")
    while stop.number is None:
        time.sleep(0.01)
sys.exit(128 + stop.number)
"""
    process = start(tmp_path, program, stderr=subprocess.STDOUT)
    while not is_done(tmp_path):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    process.stdout.close()


def test_a_forked_process_prints_by_itself(tmp_path):
    program = (
        PRINTS.replace(str(LINES), "0") + "import os\nif not os.fork():\n    print('child')\n    os._exit(0)\nos.wait()"
    )
    assert start(tmp_path, program).communicate(timeout=60)[0] == b"child\n"


@pytest.mark.parametrize(
    "command",
    [
        "eiwtrain.run --fields",
        "eiwtrain.evaluate --help",
        "eiwtrain.export --help",
        "eiwtrain.sample --help",
        "data_prep --help",
    ],
)
def test_no_command_reports_that_nobody_reads_it(command):
    process = subprocess.Popen(
        [sys.executable, "-m", *command.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) in (0, -signal.SIGPIPE)
