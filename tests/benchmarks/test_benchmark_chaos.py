"""What the chaos benchmark takes for lost, repeated, changed or left behind: it must report each of them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chaos_harness import trial, verify
from chaos_harness.faults import FAULTS
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import chaos
from cluster.local import LocalCluster, ray_nodes
from eiwtrain import checkpoints, storage
from eiwtrain.config.file import load_config

SAMPLES, BATCH, EPOCHS = 8, 4, 3
STEPS = SAMPLES * EPOCHS // BATCH


def indices(step: int) -> list[int]:
    first = step * BATCH % SAMPLES
    return list(range(first, first + BATCH))


def steps(first: int, last: int, ranks: int = 2) -> list[dict[str, Any]]:
    """What `ranks` workers write that make the steps first..last-1."""
    lines: list[dict[str, Any]] = [{"rank": rank, "restored": first} for rank in range(ranks)]
    for step in range(first, last):
        share = BATCH // ranks
        lines += [
            {"rank": r, "step": step, "indices": indices(step)[r * share : (r + 1) * share]} for r in range(ranks)
        ]
    return lines


def count(lines: list[dict[str, Any]]) -> tuple[int, int]:
    return verify.count_samples(verify.lineage(lines), STEPS, BATCH, SAMPLES)


@given(
    st.lists(st.tuples(st.integers(0, STEPS), st.integers(0, STEPS), st.sampled_from([1, 2, 4])), max_size=5),
    st.integers(0, 7),
)
def test_an_honest_history_counts_each_sample_once_however_often_it_was_interrupted(
    attempts: list[tuple[int, int, int]], cut: int
) -> None:
    lines, reached = [], 0
    for saved, last, ranks in attempts:
        first = min(saved, reached)
        made = steps(first, max(first, last), ranks)
        lines += made[: max(ranks, len(made) - cut)] if cut else made
        reached = max(first, last - -(-cut // ranks)) if last > first else first
    assert count([*lines, *steps(reached, STEPS)]) == (0, 0)


def test_a_lost_step_a_lost_rank_and_a_repeated_step_are_told() -> None:
    whole = steps(0, STEPS)
    assert count([line for line in whole if line.get("step") != 3]) == (BATCH, 0)
    assert count([line for line in whole if (line.get("step"), line["rank"]) != (3, 1)]) == (BATCH // 2, 0)
    assert count([*whole, next(line for line in whole if line.get("step") == 2)]) == (0, BATCH // 2)
    # the weights of the checkpoint at 3 without its samples; the samples of 2 again, on weights that have seen them
    assert count([*steps(0, 2), *steps(3, STEPS)]) == (BATCH, 0)
    later = [line for line in steps(2, STEPS) if "step" in line]
    assert count([*steps(0, 3), *later]) == (0, BATCH)
    assert count([*whole, {"step": STEPS, "rank": 0, "indices": [0]}]) == (0, 1)
    assert count([*whole, {"step": 0, "rank": 0, "indices": [SAMPLES]}]) == (0, 1)
    wrong = [line | {"indices": [0]} if line.get("step") == 5 and line["rank"] == 0 else line for line in whole]
    assert count(wrong) == (2, 1)


def test_epochs_that_end_inside_a_step_are_not_counted_wrongly_but_refused() -> None:
    with pytest.raises(ValueError, match="no whole epochs"):
        verify.count_samples({}, 5, 3, 8)


def test_the_audit_is_read_in_order_of_time_without_a_line_that_a_kill_cut_short(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"time": 3.0, "rank": 0, "restored": 1}) + "\n" + '{"time": 4.0, "rank": 0, "st'
    )
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"time": float(t), "rank": 0, "step": t, "indices": [t]}) + "\n" for t in (1, 2))
    )
    lines = verify.read_audit(tmp_path)
    assert [line["time"] for line in lines] == [1.0, 2.0, 3.0]
    assert verify.lineage(lines) == {}


def tensors() -> dict[str, torch.Tensor]:
    return {"weights/a": torch.tensor([3.0, 4.0]), "ema/a": torch.zeros(2), "moments/a": torch.ones(2)}


def test_one_bit_of_one_weight_is_told() -> None:
    ours = tensors()
    assert verify.differing(ours, tensors()) == []
    assert verify.distance(ours, tensors()) == 0
    ours["weights/a"] = torch.nextafter(ours["weights/a"], torch.tensor(9.0))
    assert verify.differing(ours, tensors()) == ["weights/a"]
    assert 0 < verify.distance(ours, tensors()) < 1e-6
    ours = tensors()
    ours["ema/a"] = -ours["ema/a"]  # zero with a sign
    assert verify.differing(ours, tensors()) == ["ema/a"]
    assert verify.differing({}, tensors()) == sorted(tensors())
    for other in (tensors()["moments/a"].double(), torch.ones(3)):
        assert verify.differing(tensors() | {"moments/a": other}, tensors()) == ["moments/a"]


def test_the_distance_is_relative_per_section_and_infinite_where_it_cannot_be_told() -> None:
    ours = tensors()
    ours["weights/a"] = torch.tensor([3.0, 4.5])
    assert verify.distance(ours, tensors()) == pytest.approx(0.1)
    ours["moments/a"] = torch.tensor([1.0, 2.0])
    assert verify.distance(ours, tensors()) == pytest.approx(0.5**0.5)
    for name, value in (("moments/a", torch.tensor([1.0, float("nan")])), ("moments/b", torch.ones(1))):
        assert verify.distance(tensors() | {name: value}, tensors()) == float("inf")


def curves() -> verify.Curves:
    every = [(step, 1 / step) for step in range(1, 7)]
    return {"train/bits_per_dim": every, "train/seconds": every, "eval/bits_per_dim": [(3, 0.5), (6, 0.25)]}


def test_good_curves_may_differ_in_what_time_decides() -> None:
    ours = curves() | {"train/seconds": [(step, 7.0) for step in range(1, 7)], "checkpoint/stall": [(2, 1.0)]}
    assert verify.check_curves(ours, curves()) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"train/bits_per_dim": [*curves()["train/bits_per_dim"], (4, 0.25)]}, "more than once: steps 4"),
        ({"train/seconds": [*curves()["train/seconds"], (4, 9.0)]}, "more than once: steps 4"),
        ({"checkpoint/stall": [(2, 1.0), (2, 1.5)]}, "more than once: steps 2"),
        ({"train/bits_per_dim": curves()["train/bits_per_dim"][1:]}, "not logged: steps 1"),
        ({"train/seconds": curves()["train/seconds"][:-1]}, "not logged: steps 6"),
        ({"eval/bits_per_dim": [(6, 0.25)]}, "not logged: steps 3"),
        ({"eval/bits_per_dim": [(3, 0.5), (5, 0.3), (6, 0.25)]}, "did not: steps 5"),
        ({"eval/bits_per_dim": [(3, 0.5), (6, 0.25000001)]}, "other values than the uninterrupted run's: steps 6"),
        ({"eval/bits_per_dim": [(3, 0.5), (6, float("nan"))]}, "other values than the uninterrupted run's: steps 6"),
    ],
)
def test_a_step_logged_twice_or_not_or_with_another_value_is_told(change: verify.Curves, problem: str) -> None:
    (line,) = verify.check_curves(curves() | change, curves())
    assert problem in line


def test_values_may_differ_within_a_tolerance_that_is_asked_for() -> None:
    ours = curves() | {"eval/bits_per_dim": [(3, 0.5001), (6, 0.25)]}
    assert verify.check_curves(ours, curves(), 1e-3) == []
    assert len(verify.check_curves(ours, curves(), 1e-4)) == 1


def committed(root: str, name: str) -> checkpoints.Checkpoint:
    url = storage.join(checkpoints.folder(root), name)
    part = checkpoints.Part("part-00000-of-00001.safetensors", 1, "")
    for file in (part.name, checkpoints.MANIFEST):
        storage.write_bytes(storage.join(url, file), b"x")
    return checkpoints.Checkpoint(url, 4, 16, (part,), {})


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints/step-00000004-0123abcd/part-00001-of-00002.safetensors",
        "checkpoints/step-00000002-0123abcd/part-00000-of-00001.safetensors",
        "checkpoints/step-00000002-0123abcd/manifest.damaged.json",
        "checkpoints/step-00000004-0123abcd/.manifest.json.0f.tmp",
        "checkpoints/note.txt",
        ".run.json.0f.tmp",
        ".probe-0f",
    ],
)
def test_a_file_that_belongs_to_nothing_is_an_orphan(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path / "run")
    good_one = committed(root, "step-00000004-0123abcd")
    monkeypatch.setattr(checkpoints, "committed", lambda root: [good_one])
    for good in ("run.json", "summary.json", "model/model.safetensors"):
        storage.write_bytes(storage.join(root, good), b"{}")
    assert verify.stray_files(root) == []
    storage.write_bytes(storage.join(root, name), b"x")
    assert verify.stray_files(root) == [name]


def test_a_process_of_the_trial_is_found_until_it_ends(tmp_path: Path) -> None:
    trial = f"test-{os.getpid()}"
    command = [sys.executable, "-c", "print(flush=True); input()"]
    environment = os.environ | {verify.MARK: trial}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        (found,) = verify.processes(trial)
        assert found.pid == child.pid
        assert verify.processes(trial + "0") == []
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
        assert verify.processes(trial) == []


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"finished": False}, "did not finish"),
        ({"samples_lost": 1}, "1 samples lost, 0 repeated"),
        ({"samples_repeated": 2}, "0 samples lost, 2 repeated"),
        ({"weights_equal": False, "distance": 0.5}, "distance 0.5"),
        ({"curve_problems": ["curve a: x"]}, "curve a: x"),
        ({"orphans": ["a.tmp"]}, "orphan: a.tmp"),
        ({"problems": ["MLflow says RUNNING"]}, "MLflow says RUNNING"),
    ],
)
def test_a_trial_survives_when_nothing_at_all_is_wrong(wrong: dict[str, Any], line: str) -> None:
    good: dict[str, Any] = {"finished": True, "weights_equal": True}
    assert verify.Verdict(**good).survived
    assert verify.Verdict(**good).lines() == []
    verdict = verify.Verdict(**good | wrong)
    assert not verdict.survived
    assert line in verdict.lines()[0]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"attempt": {"outcome": "finished"}}', []),
        (b'{"attempt": {"outcome": "running"}}', ["the lease was not given back: running"]),
        (None, ["there is no lease.json"]),
    ],
)
def test_a_lease_that_was_not_given_back_is_told(content: bytes | None, problem: list[str], tmp_path: Path) -> None:
    if content is not None:
        storage.write_bytes(str(tmp_path / "lease.json"), content)
    assert verify.lease_problems(str(tmp_path)) == problem


def write_audit(folder: Path, *lines: dict[str, Any]) -> None:
    (folder / "a.jsonl").write_text("".join(json.dumps({"rank": 0} | line) + "\n" for line in lines))


def test_recovery_ends_with_the_first_step_beyond_what_was_made_before_training_began_again(tmp_path: Path) -> None:
    begun, made = {"time": 0.0, "restored": 0}, [{"time": 1.0 + s, "step": s, "indices": []} for s in range(4)]
    write_audit(tmp_path, begun, *made)  # 0 at 1.0, 1 at 2.0, 2 at 3.0, 3 at 4.0
    assert trial.recovery_seconds(tmp_path, 2.5) == 0.5
    assert trial.recovery_seconds(tmp_path, 4.5) is None
    assert trial.recovery_seconds(tmp_path, 0.5) == 0.5
    # what was killed made step 3 before it died; the next made 2 and 3 again, then 4
    again = [{"time": 20.0 + s, "step": s, "indices": []} for s in range(2, 5)]
    write_audit(tmp_path, begun, *made, {"time": 20.0, "restored": 2}, *again)
    assert trial.recovery_seconds(tmp_path, 3.5) == 20.5


def test_each_fault_has_its_turn_and_a_seed_gives_the_same_trials_again() -> None:
    faults = [FAULTS[name] for name in ("kill-rank", "kill-driver", "flip-bit")]
    planned = chaos.schedule(faults, 7, 3)
    assert planned == chaos.schedule(faults, 7, 3)
    assert len({seed for _, seed in planned}) == 7
    assert {f.name for f, _ in planned[:3]} == {f.name for f, _ in planned[3:6]} == {f.name for f in faults}
    assert {seed for _, seed in planned}.isdisjoint(seed for _, seed in chaos.schedule(faults, 7, 4))


@given(st.integers(0, 10_000), st.sampled_from(list(FAULTS.values())))
def test_moments_are_within_the_run_and_not_before_there_is_something_to_break(seed: int, fault: Any) -> None:
    moment = trial.draw_moment(random.Random(seed), fault.earliest)
    assert fault.earliest <= moment.step < trial.STEPS
    assert moment.delay >= 0


@pytest.mark.parametrize(
    ("kinds", "said"),
    [("kill-all", "no such fault: kill-all"), ("kill-rank,kill-node", "not available at this place: kill-node")],
)
def test_an_unknown_fault_and_one_that_a_place_does_not_have_are_refused(kinds: str, said: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as refused:
        chaos.main(["--place", "local", "--kinds", kinds])
    assert refused.value.code == 2
    assert f"--kinds: {said}" in capsys.readouterr().err


def test_a_place_has_the_faults_whose_needs_it_offers() -> None:
    assert {f.name for f in chaos.choose(None, set())} == {n for n, f in FAULTS.items() if not f.needs}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=lambda fault: fault.name)
def test_on_gpus_each_worker_has_one_and_kernels_compute_the_same_each_time(
    fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "Driver", lambda *args: None)
    for gpus in (0, 1):
        place = trial.Place("data", str(tmp_path / "runs"), None, {}, gpus=gpus)
        made = trial.Trial(place, "run", tmp_path / str(gpus), random.Random(0), fault.config)
        made.start()
        config = load_config(str(made.folder / "config.yaml"))
        assert (config.workers.gpus, config.train.deterministic) == (gpus, bool(gpus))


def test_nodes_have_a_gpu_each_and_a_new_one_that_of_a_dead_one(tmp_path: Path) -> None:
    cluster: Any = LocalCluster(tmp_path, gpus=["3", "5"])
    cluster._ray = SimpleNamespace(spawn_node=lambda name, cpus, gpu: SimpleNamespace(gpu=gpu, alive=True))
    cluster._join = lambda spawn: spawn()
    first, second = cluster.add_node(), cluster.add_node()
    first.alive = False
    assert [node.gpu for node in (first, second, cluster.add_node(), cluster.add_node())] == ["3", "5", "3", None]


@pytest.mark.parametrize(("gpu", "count"), [(None, 0), ("3", 1)])
def test_ray_offers_the_gpu_of_a_node(
    gpu: str | None, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(ray_nodes, "spawn", lambda name, command, env, log: (command, env))
    command, env = ray_nodes.RayNodes(tmp_path, tmp_path, {"gcs": 1}, {}).spawn_node("node-1", 1, gpu)
    assert f"--num-gpus={count}" in command
    assert env.get("CUDA_VISIBLE_DEVICES") == gpu


@pytest.mark.parametrize(
    ("named", "count", "found"), [(None, 4, ["0", "1"]), ("5,2,7", 3, ["5", "2"]), (None, 1, None), ("5", 1, None)]
)
def test_two_gpus_of_this_machine_are_taken_or_the_command_refuses(
    named: str | None, count: int, found: list[str] | None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    if found is not None:
        assert chaos.own_gpus() == found
        return
    with pytest.raises(SystemExit) as refused:
        chaos.main(["--gpus"])
    assert refused.value.code == 2
    assert "--gpus: a trial has 2 workers with a GPU each, and PyTorch finds 1 here" in capsys.readouterr().err


def row(kind: str, **verdict: Any) -> chaos.Row:
    good: dict[str, Any] = {"finished": True, "weights_equal": True}
    return chaos.Row(kind, 1, "", "", verify.Verdict(**good | verdict), 2, 60.0, 10.0, "")


def test_the_table_counts_what_each_kind_lost() -> None:
    rows = [row("a"), row("a", samples_lost=3, weights_equal=False), row("b", orphans=["x", "y"], samples_repeated=1)]
    lines = chaos.table(rows).splitlines()
    assert lines[2] == "| a | 2 | 1 | 3 | 0 | 1 | 0 | 10.0 |"
    assert lines[3] == "| b | 1 | 0 | 0 | 1 | 1 | 2 | 10.0 |"
    assert lines[4] == "| all | 3 | 1 | 3 | 1 | 2 | 2 | 10.0 |"
    assert json.dumps([r.to_json() for r in rows])


@pytest.mark.parametrize(
    ("rows", "code"), [([row("a")], 0), ([row("a"), row("a", orphans=["x"])], 1), ([], 1)], ids=["good", "bad", "none"]
)
def test_the_exit_code_and_the_json_tell_whether_all_survived(
    rows: list[chaos.Row], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chaos, "run", lambda *args: rows)
    assert chaos.main(["--folder", str(tmp_path / "new"), "--json", str(tmp_path / "out.json")]) == code
    written = json.loads((tmp_path / "out.json").read_text())
    assert {"trials", "survived", "samples_lost", "samples_repeated", "weights_equal", "orphans"} <= written.keys()
    assert (written["trials"], written["survived"]) == (len(rows), sum(r.verdict.survived for r in rows))
