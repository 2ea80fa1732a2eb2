import json
from pathlib import Path

import pytest
from helpers import tiny_config
from mlflow import MlflowClient
from PIL import Image

from eiwtrain import storage, tracking
from eiwtrain.config import Config


@pytest.fixture
def config(tmp_path):
    return Config.model_validate(tiny_config(tmp_path))


def history(run, key):
    return [(m.step, m.value) for m in MlflowClient(run.uri).get_metric_history(run.run_id, key)]


def status(run):
    return MlflowClient(run.uri).get_run(run.run_id).info.status


def test_a_run_is_found_again_with_its_params_once(config):
    first = tracking.begin(config, {"mlflow.source.git.commit": "abc"})
    tracking.end(first, "KILLED")
    assert status(first) == "KILLED"
    changed = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 99})})
    second = tracking.begin(changed, {"mlflow.source.git.commit": "def"})
    assert second == first
    assert status(first) == "RUNNING"
    run = MlflowClient(first.uri).get_run(first.run_id)
    assert run.info.run_name == "tiny"
    assert run.data.params["train.max_steps"] == "12"
    assert run.data.tags["mlflow.source.git.commit"] == "def"
    assert len(MlflowClient(first.uri).search_runs([first.experiment_id])) == 1


def test_a_run_whose_folder_was_deleted_begins_anew(config):
    first = tracking.begin(config, {})
    storage.delete(config.root)
    assert tracking.begin(config, {}).run_id != first.run_id


def test_steps_logged_before_a_crash_are_not_logged_again(config):
    run = tracking.begin(config, {})
    for steps in (range(1, 6), range(3, 9)):  # the second attempt went back to step 2
        tracker = tracking.Tracker(run)
        for step in steps:
            tracker.metrics(step, {"train/bits_per_dim": 8.0 - step})
        tracker.metrics(6, {"eval/bits_per_dim": 5.0}) if 6 in steps else None
        tracker.image(4, "samples", Image.new("RGB", (8, 8)))
        tracker.close()
    assert history(run, "train/bits_per_dim") == [(s, 8.0 - s) for s in range(1, 9)]
    assert history(run, "eval/bits_per_dim") == [(6, 5.0)]
    images = MlflowClient(run.uri).list_artifacts(run.run_id, "images")
    assert len([f for f in images if f.path.endswith(".png")]) == 1


def test_a_store_that_is_away_is_tried_again_and_nothing_is_lost(config, monkeypatch):
    said = []
    monkeypatch.setattr(tracking, "_RETRY_SECONDS", 0.01)
    run = tracking.begin(config, {})
    tracker = tracking.Tracker(run, warn=said.append)
    real, failures = tracker._log, []

    def flaky(*what):
        if len(failures) < 3:
            failures.append(what)
            raise ConnectionError("away")
        real(*what)

    monkeypatch.setattr(tracker, "_log", flaky)
    tracker.metrics(1, {"train/lr": 0.1})
    tracker.metrics(2, {"train/lr": 0.2})
    tracker.close()
    assert history(run, "train/lr") == [(1, 0.1), (2, 0.2)]
    assert ["is away" in line for line in said] == [True]


def test_a_record_that_is_refused_does_not_hold_up_the_others(config):
    said = []
    run = tracking.begin(config, {})
    tracker = tracking.Tracker(run, warn=said.append)
    tracker.metrics(1, {"no name : like ? this": 0.1})
    tracker.metrics(2, {"train/lr": 0.2})
    tracker.flush()
    assert history(run, "train/lr") == [(2, 0.2)]
    assert ["refused" in line for line in said] == [True]
    tracker.close()


def test_params_that_an_interrupted_start_left_out_are_logged_by_the_next(config, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "log_batch", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("away")))
        with pytest.raises(tracking.TrackingError, match="away"):
            tracking.begin(config, {})
    (failed,) = MlflowClient(tracking.tracking_uri(config)).search_runs(["1"])
    assert failed.info.status == "FAILED"
    run = tracking.begin(config, {})
    assert MlflowClient(run.uri).get_run(run.run_id).data.params["train.max_steps"] == "12"
    assert len(MlflowClient(run.uri).search_runs([run.experiment_id])) == 1


def test_an_identity_that_cannot_be_read_is_one_line(config):
    storage.write_bytes(storage.join(config.root, "run.json"), b"[]")
    with pytest.raises(tracking.TrackingError, match=r"run.json is not the run's identity"):
        tracking.begin(config, {})


def test_checking_a_local_store_makes_nothing(config, tmp_path):
    tracking.check(config)
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_used_is_one_line(config):
    Path(config.run.storage).mkdir(parents=True)
    Path(config.run.storage, "mlflow.db").write_bytes(b"this is no database" * 100)
    for call in (lambda: tracking.begin(config, {}), lambda: tracking.check(config)):
        with pytest.raises(tracking.TrackingError, match=r"tracking.uri: sqlite:///") as e:
            call()
        assert len(str(e.value).splitlines()) == 1


def test_the_identity_of_a_run_is_in_its_folder(config):
    tracking.begin(config, {})
    assert len(json.loads(storage.read_bytes(storage.join(config.root, "run.json")))["uid"]) == 32


def test_how_to_view_a_local_store_and_a_server():
    local = tracking.TrackedRun("sqlite:////x/mlflow.db", "1", "abc")
    assert local.view_command.endswith("mlflow ui --backend-store-uri sqlite:////x/mlflow.db --port 5000")
    assert local.url == "http://127.0.0.1:5000/#/experiments/1/runs/abc?workflowType=machine_learning"
    server = tracking.TrackedRun("https://host/", "1", "abc")
    assert server.view_command == ""
    assert server.url == "https://host/#/experiments/1/runs/abc?workflowType=machine_learning"
