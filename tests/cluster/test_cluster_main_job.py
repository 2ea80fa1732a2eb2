"""The main job through real Ray, DeepSpeed and MLflow, in real processes that are stopped by real signals."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import yaml
from helpers import tiny_config, write_shards
from jobs import Job
from mlflow import MlflowClient
from watchers import mark, wait_until, watchers

from eiwtrain import checkpoints, flow, run
from eiwtrain.reporting import facts
from eiwtrain.storage import lease

pytestmark = pytest.mark.cluster

STEPS, CHECKPOINT_EVERY, EVAL_EVERY = 200, 70, 100  # long enough that a signal comes before the end
SUMMARY = {
    "steps", "images", "test_bits_per_dim", "png_bits_per_dim", "images_per_second", "goodput", "drift", "samples",
    "exported_model", "mlflow_run_id", "metrics", "webp_bits_per_dim", "yardstick_images",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    write_shards(folder / "data", n=100)
    config = tiny_config(
        folder, train={"max_steps": STEPS}, checkpoint={"every": CHECKPOINT_EVERY}, eval={"every": EVAL_EVERY}
    )
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder):
    code, output = Job(folder, name="whole").wait()
    assert code == 0, output
    return output


def final_weights(folder, name):
    newest = checkpoints.committed(str(folder / "runs" / name))[0]
    assert (newest.step, newest.samples_seen) == (STEPS, STEPS * 8)
    return checkpoints.load(newest)


def curve(folder, name, key):
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    summary = json.loads((folder / "runs" / name / "summary.json").read_text())
    return {m.step: m.value for m in client.get_metric_history(summary["mlflow_run_id"], key)}, [
        m.step for m in client.get_metric_history(summary["mlflow_run_id"], key)
    ]


def assert_the_journal_has_what_mlflow_has(folder, name):
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    summary = json.loads((folder / "runs" / name / "summary.json").read_text())
    names = client.get_run(summary["mlflow_run_id"]).data.metrics
    recorded = [m for n in names for m in client.get_metric_history(summary["mlflow_run_id"], n)]
    lines = [json.loads(line) for line in Path(summary["metrics"]).read_text().splitlines()]
    written = [
        (curve, row["step"], round(1000 * row["time"]), value)
        for row in lines
        for curve, value in row.items()
        if curve not in ("step", "time")
    ]
    assert sorted(written) == sorted((m.key, m.step, m.timestamp, m.value) for m in recorded)


def test_a_whole_run_says_and_leaves_what_it_should(folder, uninterrupted):
    root = folder / "runs" / "whole"
    last_line = uninterrupted.strip().splitlines()[-1]
    assert last_line == str(root / "summary.json")
    summary = json.loads(Path(last_line).read_text())
    assert summary.keys() >= SUMMARY
    assert (summary["steps"], summary["images"]) == (STEPS, STEPS * 8)
    assert f"step {STEPS:>6,}/{STEPS}" in uninterrupted
    assert "\r" not in uninterrupted
    assert summary["published"]["reason"] in uninterrupted  # no protocol that was published has these images
    assert Path(summary["samples"]).read_bytes()[1:4] == b"PNG"
    model = flow.load(summary["exported_model"])
    saved = checkpoints.section(final_weights(folder, "whole"), "ema")
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())

    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    run = client.get_run(summary["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval/bits_per_dim"] == pytest.approx(summary["test_bits_per_dim"])
    assert run.data.metrics["eval/png_bits_per_dim"] == pytest.approx(summary["png_bits_per_dim"])
    values, steps = curve(folder, "whole", "train/bits_per_dim")
    assert steps == list(range(1, STEPS + 1))
    assert values[STEPS] < values[1]
    assert {n.split("/")[0] for n in run.data.metrics} == {"train", "eval", "time", "memory", "flow", "system"}
    assert curve(folder, "whole", "system/cpu_utilization_percentage")[1][0] == 1
    assert len(curve(folder, "whole", "eval/webp_bits_per_dim")[1]) == 2
    images = [f.path for f in client.list_artifacts(run.info.run_id, "images") if f.path.endswith(".png")]
    assert sorted(path.removeprefix("images/").split("+")[:3:2] for path in images) == [
        [name, str(step)] for name in ("entropy_by_level", "reconstructions", "samples") for step in (EVAL_EVERY, STEPS)
    ]
    assert_the_journal_has_what_mlflow_has(folder, "whole")

    known = facts.gather(str(root))
    assert known.notes == ()
    assert known.parameters == sum(p.numel() for p in model.parameters())
    assert [(p.step, p.value) for p in known.curves["time/workers"]] == [(s, 2.0) for s in range(1, STEPS + 1)]
    assert [p.step for p in known.recorded.pictures] == [EVAL_EVERY, STEPS]


def stop(folder, name, number, code, *overrides):
    """Stop a run by a signal while it trains; returns the step of its checkpoint and its run in MLflow."""
    environment = mark()
    job = Job(folder, *overrides, name=name, environment=environment)
    job.wait_for("training from step ")
    job.wait_for("bits/dim")
    os.killpg(job.process.pid, number)  # as a terminal does it, or `timeout`: the whole process group gets it
    exit_code, output = job.wait()
    assert exit_code == code, output
    step = checkpoints.committed(str(folder / "runs" / name))[0].step
    assert 0 < step < STEPS
    assert f"stopped at step {step} of {STEPS} by {signal.Signals(number).name}" in output
    assert f"-m eiwtrain.run {folder / 'tiny.yaml'} run.name={name}" in output
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    (stopped,) = client.search_runs(["1"], f"attributes.run_name = '{name}'")
    assert stopped.info.status == "KILLED"
    reason = f"stopped by {signal.Signals(number).name}; resumes with the same command"
    assert stopped.data.tags["eiwtrain.status"] == reason
    wait_until(lambda: not watchers(environment))
    return step, stopped


def test_a_run_stopped_twice_ends_as_an_undisturbed_one(folder, uninterrupted):
    name = "stopped"
    # loader processes are in the group that Ctrl-C reaches; they change nothing of what is trained
    first, stopped = stop(folder, name, signal.SIGINT, 130, "data.loader_workers=1")
    second, again = stop(folder, name, signal.SIGTERM, 143)
    assert first < second
    assert again.info.run_id == stopped.info.run_id

    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    exit_code, output = Job(folder, name=name).wait()
    assert exit_code == 0, output
    assert f"resuming from step {second}" in output
    (finished,) = client.search_runs(["1"], f"attributes.run_name = '{name}'")
    assert (finished.info.run_id, finished.info.status) == (stopped.info.run_id, "FINISHED")
    # every step once, and each with the loss of the uninterrupted run: the same samples, noise and weights
    for key in ("train/bits_per_dim", "train/grad_norm", "eval/bits_per_dim"):
        assert curve(folder, name, key) == curve(folder, "whole", key)
    assert curve(folder, name, "train/bits_per_dim")[1] == list(range(1, STEPS + 1))
    assert curve(folder, name, "eval/bits_per_dim")[1] == [EVAL_EVERY, STEPS]
    assert_the_journal_has_what_mlflow_has(folder, name)
    ours, theirs = final_weights(folder, name), final_weights(folder, "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_killed_worker_is_replaced_and_the_result_is_the_same(folder, uninterrupted):
    import psutil

    job = Job(folder, f"checkpoint.near={folder / 'near'}", name="killed")
    job.wait_for(f"checkpoint at step {CHECKPOINT_EVERY}:")
    near = folder / "near" / f"eiwtrain-near-{os.getuid()}"
    wait_until(lambda: len(list(near.rglob("part-*"))) == 2)
    family = psutil.Process(job.process.pid).children(recursive=True)
    workers = [p for p in family if "RayTrainWorker" in " ".join(p.cmdline())]
    assert len(workers) == 2
    # of Ray no more than it takes: each process more would delay the workers, and each attempt again
    unwanted = ("TrainController", "SynchronizationActor", "dashboard.py", "log_monitor.py", "monitor.py")
    assert not [line for p in family if any(word in (line := " ".join(p.cmdline())) for word in unwanted)]
    workers[0].kill()
    exit_code, output = job.wait(240)
    assert exit_code == 0, output
    assert output.count("training from step") == 2
    (of,) = re.findall(r"resuming from step \d+: .* \((.+) MB from copies on", output)
    assert len(set(of.split(" of "))) == 1  # all of it
    assert list(near.iterdir()) == []
    ours, theirs = final_weights(folder, "killed"), final_weights(folder, "whole")
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert curve(folder, "killed", "train/lr")[1] == list(range(1, STEPS + 1))
    assert_the_journal_has_what_mlflow_has(folder, "killed")
    _, last = lease.look(str(folder / "runs" / "killed"))
    assert (last.outcome, last.failures) == ("finished", 1)
    assert last.why.startswith("its workers failed: the process of rank ")


def test_a_stop_while_workers_are_dead_names_the_last_checkpoint(folder):
    import psutil

    job = Job(folder, "train.max_steps=100000", name="away")
    job.wait_for(f"checkpoint at step {CHECKPOINT_EVERY}:")
    for p in psutil.Process(job.process.pid).children(recursive=True):
        if "RayTrainWorker" in " ".join(p.cmdline()):
            p.kill()
    job.process.send_signal(signal.SIGTERM)
    exit_code, output = job.wait(90)
    assert exit_code == 143, output
    newest = checkpoints.committed(str(folder / "runs" / "away"))[0]
    assert f"checkpoint  {newest.url}" in output
    assert f"stopped at step {newest.step:,} of 100,000 by SIGTERM" in output
    assert "Traceback" not in output


def test_a_damaged_checkpoint_is_passed_over(folder, uninterrupted):
    newest, before = checkpoints.committed(str(folder / "runs" / "whole"))[:2]
    part = Path(newest.url, newest.parts[1].name)
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    exit_code, output = Job(folder, name="whole").wait()
    assert exit_code == 0, output
    assert f"damaged checkpoint passed over: {part}" in output or f"passed over: {newest.url}" in output
    assert f"training from step {before.step} to {STEPS}" in output
    # the damaged one is gone: its steps were trained again, and a new checkpoint stands in its place
    now = checkpoints.committed(str(folder / "runs" / "whole"))
    assert now[0].step == STEPS
    assert newest.url not in [c.url for c in now]
    checkpoints.load(now[0])


def in_this_process(capsys, folder, *arguments):
    """Run the command in this process; returns its exit code and what it printed."""
    code = run.main([str(folder / "tiny.yaml"), *arguments])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_another_model_on_the_same_run_is_refused_at_once(folder, uninterrupted, capsys):
    exit_code, output = in_this_process(capsys, folder, "run.name=whole", "model.steps=3")
    assert exit_code == 2
    assert output.strip() == (
        "error: model.steps: 3 here, but the run began with 2; set it back or use another run.name"
    )


def test_a_loss_that_is_not_finite_ends_the_run_with_its_samples(folder):
    wild = ["train.lr=1.0e+30", "train.warmup_steps=0", "train.clip=0", "train.rollbacks=1"]
    exit_code, output = Job(folder, *wild, name="infinite").wait()
    assert exit_code == 1, output
    # the first step is made, and ruins the weights; four more are not
    assert "step 2 skipped: " in output
    assert "step 5 skipped: " in output
    assert "(4 in a row, 4 in all)" in output
    assert "step 5 follows, with the weights of step 0" in output  # once back, behind the bad steps
    assert "training from step 5 to" in output
    (error,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert error.startswith("error: step 10: loss or gradient was not finite in 4 steps in a row; samples of train: [")
    assert "last good checkpoint: " in error
    assert "/checkpoints/step-00000005-" in error  # of the weights that it went back to
    assert "Traceback" not in output


def test_a_dry_run_prints_what_would_be_and_starts_nothing(folder, capsys):
    exit_code, output = in_this_process(capsys, folder, "run.name=dry", "--dry-run")
    assert exit_code == 0, output
    for line in (
        f"max_steps: {STEPS}",
        "parameters",
        " train, ",
        " test images",
        "a new run",
        "can be written",
        "answers",
    ):
        assert line in output, output
    assert not (folder / "runs" / "dry").exists()


def test_failed_starts_give_back_places_and_a_stop_then_ends(folder):
    job = Job(folder, name="early", environment=os.environ | {"GLOO_SOCKET_IFNAME": "eth9"})  # there is no such
    wait_until(lambda: job.process.poll() is not None or job.log.read_text().count("starting 2 workers") == 2, 180)
    job.process.send_signal(signal.SIGTERM)
    exit_code, output = job.wait(60)
    assert exit_code == 143, output
    assert output.count("Unable to find address for: eth9") in (1, 2)  # the second start may fail before it is stopped
    assert "stopped by SIGTERM before training began" in output
    assert "Traceback" not in output
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    (run,) = client.search_runs(["1"], "attributes.run_name = 'early'")
    assert run.info.status == "KILLED"
