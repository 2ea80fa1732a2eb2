"""The benchmark of elastic runs: what it counts as lost and repeated, its tables, and how its attempts end."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from chaos_harness.verify import lineage

from benchmarks import elastic, elastic_curves, elastic_report
from benchmarks.environments import NotInstalledError, peers_python

WHOLE = {step: Counter(range(4 * step, 4 * step + 4)) for step in range(3)}
"""An epoch of 12 samples in 3 steps."""


def lines(*attempts: tuple[int, dict[int, list[int]]]) -> list[dict[str, Any]]:
    """Return what rank 0 writes: for each attempt the step that it starts from, and the samples of its steps."""
    found: list[dict[str, Any]] = []
    for first, made in attempts:
        found += [{"restored": first}, *({"step": step, "indices": indices} for step, indices in made.items())]
    return found


def counted(*attempts: tuple[int, dict[int, list[int]]]) -> tuple[int, int, int]:
    found = elastic.count(lineage(lines(*attempts)), WHOLE, 12)
    return found["lost"], found["repeated"], found["other_steps"]


def test_steps_after_the_last_save_are_taken_back_and_count_once() -> None:
    first = {0: [0, 1, 2, 3], 1: [4, 5, 6, 7], 2: [8, 9, 10, 11]}
    assert counted((0, first)) == (0, 0, 0)
    assert counted((0, first), (1, {1: [5, 4, 7, 6], 2: [8, 9, 10, 11]})) == (0, 0, 0)


def test_samples_of_undone_steps_that_do_not_come_again_are_lost() -> None:
    first = {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}
    assert counted((0, first), (1, {1: [8, 9, 10, 11]})) == (4, 0, 2)
    assert counted((0, first), (1, {})) == (8, 0, 2)


def test_samples_that_come_again_after_a_save_are_repeated() -> None:
    first = {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}
    assert counted((0, first), (1, {1: [4, 5, 6, 7], 2: [8, 9, 10, 11], 3: [0, 1, 0, 3]})) == (0, 4, 1)
    assert counted((0, first), (1, {1: [0, 1, 2, 3], 2: [8, 9, 10, 11]})) == (4, 4, 1)


def test_a_refusal_is_in_the_table_as_one_and_not_as_zero() -> None:
    good = {"lost": 1, "repeated": 2, "other_steps": 3, "note": ""}
    rows = [
        {"peer": "eiwtrain", "scenario": "killed", "every": 7} | good,
        {"peer": "torchdata", "scenario": "killed", "every": 7, "note": "refused: AssertionError"},
        {"peer": "torchdata", "scenario": "again", "every": 7, "note": "refused: AssertionError"},
    ]
    table = elastic_report.counts(rows, {"eiwtrain": (), "LitData": ("litdata==1",), "torchdata": ("a==1", "b==2")})
    assert table.splitlines()[0] == "| what happens | state saved every | eiwtrain | a 1, b 2 |"
    assert table.splitlines()[2] == "| killed | 7 steps | 1 / 2 / 3 | refused [1] |"
    assert table.splitlines()[3:] == ["| again | 7 steps | - | refused [1] |", "", "[1] refused: AssertionError"]


def test_an_exception_without_a_message_is_given_with_its_code() -> None:
    said = ("Traceback", "  File", "    assert a == b", "           ^^^^^^", "AssertionError", "")
    log = "\n".join(f"[rank0]: {line}" for line in said)
    assert elastic.why(log) == "AssertionError: assert a == b"
    assert elastic.why(log + "\n[rank0]: ValueError: no\nlater") == "ValueError: no"


def test_the_picture_and_the_table_show_all_runs(tmp_path: Path) -> None:
    steady = {"name": "1", "loss": [3.0, 2.0, 1.0], "workers": [1, 1, 1], "lost": 0, "repeated": 0}
    changing = {"name": "changing", "loss": [3.0, 2.5, 1.25], "workers": [4, 3, 4], "lost": 0, "repeated": 1}
    assert elastic_report.gap(changing, steady) == 0.5
    assert elastic_report.name(changing) == "4 → 3 → 4"
    assert (
        elastic_report.curves([steady, changing]).splitlines()[3] == "| 4 → 3 → 4 | 3.0000 | 1.2500 | 5.0e-01 | 0 | 1 |"
    )
    elastic_report.plot([steady, changing], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_peer_without_an_environment_is_left_out_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NotInstalledError, match="not installed; --install"):
        peers_python(tmp_path, "none", ["none==1"], install=False)
    rows = elastic.counts(["LitData"], tmp_path, False, tmp_path, [])
    assert list(rows) == []
    assert "LitData is left out: not installed" in capsys.readouterr().err


def test_the_sizes_make_whole_steps_at_every_number_of_workers() -> None:
    sizes = [(elastic.IMAGES, elastic.BATCH, n * m) for s in elastic.SCENARIOS.values() for n, m in s]
    sizes += [(elastic_curves.SAMPLES, elastic_curves.BATCH, n) for n in elastic_curves.WORKERS]
    assert all(batch % share == 0 and images % (batch * share) == 0 for images, batch, share in sizes)
    assert elastic_curves.STEPS * elastic_curves.BATCH % elastic_curves.SAMPLES == 0
    assert elastic_curves.SAMPLES == elastic.IMAGES


def interpreter(path: Path, script: str) -> str:
    """Write a program in the place of an interpreter that has a loader."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_an_attempt_ends_with_its_kill_or_with_the_first_failure_of_a_rank(tmp_path: Path) -> None:
    assert elastic.attempt(interpreter(tmp_path / "dies", "kill -9 $$"), {"die_after": 3}, 2) == ""
    assert elastic.attempt(interpreter(tmp_path / "ends", "exit 0"), {"die_after": None}, 2) == ""
    fails = interpreter(tmp_path / "fails", "test $RANK = 0 && exec sleep 300; echo 'ValueError: no' >&2; exit 1")
    began = time.monotonic()
    assert elastic.attempt(fails, {"die_after": None}, 2) == "ValueError: no"
    assert time.monotonic() - began < 60  # the other rank was not waited for


def test_only_a_failure_to_resume_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []

    def attempt(python: str, task: Any, ranks: int) -> str:
        tried.append((ranks, task["processes"], task["die_after"]))
        return failures.pop(0)

    monkeypatch.setattr(elastic, "attempt", attempt)
    failures = ["", "", "ValueError: no"]
    assert elastic.trial("", "LitData", "", "2 → 1 → 2 workers", 7, tmp_path / "a") == ({}, "refused: ValueError: no")
    assert tried == [(2, 2, 10), (1, 2, 17), (2, 2, None)]
    failures = ["ValueError: no"]
    assert elastic.trial("", "LitData", "", "2 → 1 workers", 7, tmp_path / "b") == ({}, "ValueError: no")
