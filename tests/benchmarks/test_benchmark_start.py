"""The benchmark of starts: what it makes of the records of a run. The runs themselves are too long for a test."""

import json
import os

from benchmarks import start


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


def test_the_cpu_of_processes_that_carry_the_mark_is_counted(monkeypatch):
    monkeypatch.setattr(start.psutil, "pids", lambda: [os.getpid(), os.getppid()])
    monkeypatch.setattr(start.psutil.Process, "environ", lambda self: {start._MARK: str(self.pid)})
    processes = start.Processes(str(os.getpid()))
    assert 0 < processes.look() <= processes.look()
    assert processes.ranks() == []
