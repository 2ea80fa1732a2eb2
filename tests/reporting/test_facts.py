"""What is gathered of runs in every state."""

import json
import shutil
from pathlib import Path

import pytest
import reported_run
from helpers import write_shards
from mlflow import MlflowClient
from PIL import Image
from reported_run import STEPS
from small_run import export_model, small_flow

from eiwtrain import storage
from eiwtrain.data.manifest import load_manifest
from eiwtrain.reporting import recorded
from eiwtrain.reporting.facts import gather
from eiwtrain.storage.lease import Lease
from eiwtrain.tracking import curves


@pytest.fixture(scope="module")
def finished(tmp_path_factory, database):
    folder = tmp_path_factory.mktemp("finished")
    write_shards(folder / "data")
    config = reported_run.begin(folder, database, workers={"price_per_hour": 0.9})
    return reported_run.train(config, load_manifest(config.data.path).fingerprint)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, without its MLflow."""
    shutil.copytree(finished, tmp_path / "tiny")
    return str(tmp_path / "tiny")


def change(root, edit):
    """Change the newest checkpoint's manifest."""
    folder = max(Path(root, "checkpoints").iterdir())
    content = json.loads((folder / "manifest.json").read_text())
    edit(content["state"])
    del content["sha256"]
    content["sha256"] = storage.sha256_bytes(json.dumps(content).encode())
    (folder / "manifest.json").write_text(json.dumps(content))


def test_a_finished_run_is_known_in_all_its_parts(finished):
    export_model(small_flow(), Path(finished, "model"), checkpoint="step-12")
    run = gather(finished)
    assert (run.name, run.step, run.images, run.global_batch, run.parameters) == ("tiny", STEPS, 8 * STEPS, 8, 12345)
    assert (run.best.bits_per_dim, run.best.standard_error, run.best.step, run.best.images) == (4.0, 0.01, STEPS, 8)
    assert (run.estimator.name, run.data) == ("ELBO", "photos (patches)")
    assert run.manifest.fingerprint == run.fingerprint
    assert "is not prepared from one of: CIFAR-10" in run.published.reason
    assert [(h.outcome, h.why, h.cost) for h in run.holdings] == [
        ("stopped", "SIGTERM", 0.0),
        ("finished", "its workers failed: rank 1 died", 1.5),
    ]
    assert run.time.seconds == reported_run.KINDS | {"other": 5.0}
    assert (run.time.wall, run.time.goodput, run.time.step) == (100.0, 0.6, STEPS)
    assert (run.cost, run.wasted) == (1.5, 1.0)
    assert [(p.step, p.value) for p in run.curves[curves.BITS_PER_DIM]] == [(s, 8 - s / 4) for s in range(1, STEPS + 1)]
    assert [p.step for p in run.recorded.pictures] == [6, 12]
    assert run.recorded.tags["eiwtrain.command"] == "the command"
    assert [(e.url, e.checkpoint) for e in run.exports] == [(f"{finished}/model", "step-12")]
    assert run.notes == ()


def test_curves_come_from_mlflow_where_the_file_of_them_is_gone(finished, tmp_path):
    whole = gather(finished)
    shutil.copytree(Path(finished).parent, tmp_path / "runs")
    (tmp_path / "runs" / "tiny" / "metrics.jsonl").unlink()
    run = gather(str(tmp_path / "runs" / "tiny"), f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert {name: [p[::2] for p in points] for name, points in run.curves.items()} == {
        name: [p[::2] for p in points] for name, points in whole.curves.items()
    }


@pytest.mark.parametrize("uri", [None, "http://127.0.0.1:9"])
def test_without_mlflow_the_rest_is_there_and_a_note_says_so(copy, uri):
    change(copy, lambda state: state["config"]["tracking"].update(uri=uri))
    run = gather(copy)
    (note,) = run.notes
    assert note.startswith("MLflow could not be read")
    assert (run.step, run.best.step, len(run.curves[curves.LR])) == (STEPS, STEPS, STEPS)
    assert (run.recorded.pictures, run.recorded.tags) == ((), {})
    Path(copy, "metrics.jsonl").unlink()
    assert "its curves are neither in metrics.jsonl" in gather(copy).notes[1]


def test_an_mlflow_that_does_not_have_the_run_is_noted(copy, database):
    assert gather(copy, f"sqlite:///{database}").notes[0].endswith("mlflow.db does not have the run")


def test_a_run_that_never_took_a_step_has_its_config_from_mlflow(tmp_path, database):
    config = reported_run.begin(tmp_path, database, train={"lr": 0.25})
    run = gather(config.root)
    assert (run.name, run.step, run.best, run.time, run.curves, run.config) == ("tiny", 0, None, None, {}, None)
    assert (run.fields["train.lr"], run.global_batch) == ("0.25", 8)
    assert [h.why for h in run.holdings] == ["SIGTERM"]


def test_a_run_that_trains_is_running(tmp_path, database):
    config = reported_run.begin(tmp_path, database)
    lease = Lease.acquire(config.root, "tiny", print)
    try:
        assert [h.outcome for h in gather(config.root).holdings] == ["stopped", "running"]
    finally:
        lease.release("stopped")


def test_a_summary_of_an_earlier_end_is_not_that_of_the_newest_checkpoint(copy):
    shares = dict.fromkeys([*reported_run.KINDS, "other"], 0.0) | {"productive": 1.0}
    summary = {"checkpoint": "elsewhere/step-00000006-00000006", "goodput_shares": shares, "wall_seconds": 7.0}
    for checkpoint, wall in (("step-00000006-00000006", 100.0), ("step-00000012-0000000c", 7.0)):
        summary["checkpoint"] = f"elsewhere/{checkpoint}"
        Path(copy, "summary.json").write_text(json.dumps(summary))
        assert gather(copy).time.wall == wall


def test_fields_that_were_not_there_then_have_their_defaults(copy):
    change(copy, lambda state: state["config"]["train"].pop("betas"))
    assert gather(copy).fields["train.betas"] == "[0.9, 0.999]"


@pytest.mark.parametrize(
    "edit",
    [
        lambda state: state.update(config=[1]),
        lambda state: state.update(eval_bits_per_dim="x"),
        lambda state: state.update(class_names=3),
    ],
)
def test_files_that_describe_no_run_are_refused(copy, edit):
    change(copy, edit)
    with pytest.raises(ValueError, match="describe"):
        gather(copy)


def test_what_is_wrong_in_single_files_is_left_out(copy):
    def edit(state):
        state.update(clock={"wall": "x", "seconds": [1]}, score={"bits_per_dim": 4.0, "images": "x"}, parameters="x")
        state["flow"].update(levels="x")

    change(copy, edit)
    lease = json.loads(Path(copy, "lease.json").read_text())
    lease["earlier"][0][0] = "x"
    Path(copy, "lease.json").write_text(json.dumps(lease))
    Path(copy, "summary.json").write_text("[]")
    Path(copy, "samples.png").write_text("<svg/>")
    with open(Path(copy, "metrics.jsonl"), "a") as file:
        file.write('{"step": 1e999}\n')
    run = gather(copy)
    assert (run.best, run.parameters, run.flow, run.holdings, run.overview) == (None, None, None, (), None)
    assert any("its model is not known" in note for note in run.notes)
    assert any("lease.json does not list the jobs" in note for note in run.notes)
    assert len(run.curves[curves.LR]) == STEPS


@pytest.mark.parametrize("content", ["{}", "[1]", '{"format": "eiwtrain-lease/1"}'])
def test_a_lease_that_is_none_is_noted(copy, content):
    Path(copy, "lease.json").write_text(content)
    run = gather(copy)
    assert any("lease.json does not list the jobs" in note for note in run.notes)
    assert run.holdings == ()


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no run"):
        gather(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="this is a file"):
        gather(str(tmp_path / "file"))


def test_a_run_in_a_bucket_is_known_as_well(finished, s3):
    for name, _ in storage.find(finished):
        storage.put_file(Path(finished, name), storage.join(s3, "tiny", name))
    here, there = gather(finished), gather(f"{s3}/tiny", f"sqlite:///{Path(finished).parent}/mlflow.db")
    assert there.root == f"{s3}/tiny"
    alike = ("step", "best", "holdings", "time", "curves", "recorded", "published", "notes")
    assert [getattr(here, name) for name in alike] == [getattr(there, name) for name in alike]


def test_pictures_are_pictures_and_evenly_spread(tmp_path, monkeypatch):
    Image.new("RGB", (2, 1)).save(tmp_path / "a.png")
    Image.new("RGB", (2, 1)).save(tmp_path / "a.gif")
    assert recorded.picture((tmp_path / "a.png").read_bytes())[8:12] == b"WEBP"
    assert recorded.picture((tmp_path / "a.gif").read_bytes()) is None
    assert recorded.picture((tmp_path / "a.png").read_bytes()[:40]) is None
    monkeypatch.setattr(recorded, "_MOST_PIXELS", 1)
    assert recorded.picture((tmp_path / "a.png").read_bytes()) is None
    assert recorded._spread(list(range(100)), 8) == [0, 14, 28, 42, 57, 71, 85, 99]


def test_mlflow_that_names_a_place_of_the_web_is_not_followed(tmp_path, database):
    config = reported_run.begin(tmp_path, database)
    client = MlflowClient(f"sqlite:///{config.run.storage}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    run.info._artifact_uri = "ftp://127.0.0.1/x"
    with pytest.raises(storage.StorageError, match="is not opened"):
        recorded._pictures(client, run)
