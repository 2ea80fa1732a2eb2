import contextlib
import itertools
import json
import shutil
import sqlite3
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy
from helpers import tiny_config
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from PIL import Image

from eiwtrain import storage, tracking
from eiwtrain.config import Config
from eiwtrain.tracking import backlog, store


@pytest.fixture
def new_config(tmp_path):
    """Return the config of a run whose database does not exist yet."""
    return Config.model_validate(tiny_config(tmp_path))


@pytest.fixture
def config(new_config, database):
    folder = Path(new_config.run.storage)
    folder.mkdir(parents=True)
    shutil.copy(database, folder)
    return new_config


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


def test_a_run_whose_folder_was_deleted_is_a_new_run(config):
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


def failing(monkeypatch, method, *errors, after=False):
    """Have the next calls of a client's method fail, if `after` is set only after they have done their work."""
    real, left = getattr(MlflowClient, method), list(errors)

    def flaky(*args, **kwargs):
        if not left or after:
            result = real(*args, **kwargs)
        if left:
            raise left.pop(0)
        return result

    monkeypatch.setattr(MlflowClient, method, flaky)
    return left


def test_a_store_that_is_away_is_retried_and_nothing_is_lost(config, monkeypatch):
    said = []
    monkeypatch.setattr("eiwtrain.tracking.tracker._RETRY_SECONDS", 0.01)
    run = tracking.begin(config, {})
    left = failing(monkeypatch, "log_batch", *[ConnectionError("gone")] * 4)
    tracker = tracking.Tracker(run, warn=said.append)
    tracker.metrics(1, {"train/lr": 0.1})
    tracker.metrics(2, {"train/lr": 0.2})
    tracker.close()
    assert not left
    assert history(run, "train/lr") == [(1, 0.1), (2, 0.2)]
    assert [line.split("; ")[-1] for line in said] == ["will keep trying", "2 points caught up"]
    assert "is away (ConnectionError: gone)" in said[0]


def test_a_single_failed_call_is_not_reported(config, monkeypatch):
    run = tracking.begin(config, {})
    failing(monkeypatch, "log_batch", ConnectionError("gone"))
    said = []
    tracker = tracking.Tracker(run, warn=said.append)
    tracker.metrics(1, {"train/lr": 0.1})
    tracker.close()
    assert history(run, "train/lr") == [(1, 0.1)]
    assert said == []


def test_points_taken_by_a_call_that_failed_are_there_once(config, monkeypatch):
    monkeypatch.setattr("eiwtrain.tracking.tracker._RETRY_SECONDS", 0.01)
    run = tracking.begin(config, {})
    left = failing(monkeypatch, "log_batch", *[ConnectionError("answer lost")] * 3, after=True)
    tracker = tracking.Tracker(run, warn=lambda _: None)
    for step in range(1, 9):
        tracker.metrics(step, {"train/lr": step / 3, "not/a_number": float("nan"), "infinite": float("inf")})
    tracker.close()
    assert not left
    assert history(run, "train/lr") == [(s, s / 3) for s in range(1, 9)]
    assert [s for s, _ in history(run, "not/a_number")] == [s for s, _ in history(run, "infinite")] == list(range(1, 9))


def test_points_are_logged_in_batches(config, monkeypatch):
    run = tracking.begin(config, {})
    sizes, real = [], MlflowClient.log_batch
    monkeypatch.setattr(
        MlflowClient, "log_batch", lambda *a, **k: (sizes.append(len(k.get("metrics", ()))), real(*a, **k))
    )
    tracker = tracking.Tracker(run)
    for step in range(1, 301):
        tracker.metrics(step, {f"curve{i}": float(step) for i in range(10)})
    tracker.close()
    assert sizes == [1000, 1000, 1000]
    assert history(run, "curve9") == [(s, float(s)) for s in range(1, 301)]


def test_a_batch_waits_for_others_and_a_flush_does_not(config, monkeypatch):
    run = tracking.begin(config, {})
    monkeypatch.setattr(backlog, "_GATHER_SECONDS", 3600.0)
    tracker = tracking.Tracker(run)
    tracker.metrics(1, {"train/lr": 0.1})
    tracker.tags({"step": "1"})
    assert tracker.pending()["tags"] == {"step": "1"}
    tracker.flush()
    assert history(run, "train/lr") == [(1, 0.1)]
    assert MlflowClient(run.uri).get_run(run.run_id).data.tags["eiwtrain.step"] == "1"
    assert tracker.pending() == {}
    tracker.close()


def test_a_flush_does_not_wait_for_a_store_that_is_away(config, monkeypatch):
    run = tracking.begin(config, {})
    monkeypatch.setattr("eiwtrain.tracking.tracker._FLUSH_SECONDS", 3600.0)
    monkeypatch.setattr("eiwtrain.tracking.tracker._DRAIN_SECONDS", 0.0)
    failing(monkeypatch, "log_batch", *[ConnectionError("gone")] * 1000)
    said = []
    tracker = tracking.Tracker(run, warn=said.append)
    tracker.metrics(1, {"train/lr": 0.1})
    tracker.flush()
    assert tracker.pending()["points"][0][2] == [["train/lr", 0.1]]
    assert tracker.close() == tracker.close() == "1 points and 0 images"
    assert said[-1].endswith("did not take 1 points and 0 images")


@pytest.mark.parametrize("fault", ["disk full", "locked"])
def test_a_database_that_is_full_or_locked_is_retried(config, monkeypatch, fault):
    monkeypatch.setattr("eiwtrain.tracking.tracker._RETRY_SECONDS", 0.01)
    run = tracking.begin(config, {})
    path = run.uri.removeprefix("sqlite:///")
    engine = store.client(run.uri)._tracking_client.store.engine
    away = threading.Event()
    said = []

    def warn(line):
        said.append(line)
        away.set()

    def limit_pages(connection, *_):
        connection.execute(f"PRAGMA max_page_count = {1 if not away.is_set() else 1 << 30}")

    def no_patience(_, cursor, statement, parameters, *__):
        return statement.replace("busy_timeout = 20000", "busy_timeout = 10"), parameters

    with sqlite3.connect(path, isolation_level=None) as other, contextlib.ExitStack() as undo:
        if fault == "locked":
            sqlalchemy.event.listen(engine, "before_cursor_execute", no_patience, retval=True)
            undo.callback(sqlalchemy.event.remove, engine, "before_cursor_execute", no_patience)
            other.execute("BEGIN IMMEDIATE")
        else:
            sqlalchemy.event.listen(engine, "checkout", limit_pages)
            undo.callback(sqlalchemy.event.remove, engine, "checkout", limit_pages)
        tracker = tracking.Tracker(run, warn=warn)
        for step in range(1, 1001):
            tracker.metrics(step, {"train/lr": 1 / step})
        assert away.wait(60)
        if fault == "locked":
            other.execute("COMMIT")
        tracker.close()
    other.close()
    assert history(run, "train/lr") == [(s, 1 / s) for s in range(1, 1001)]
    assert {"disk full": "database or disk is full", "locked": "database is locked"}[fault] in said[0]
    assert said[1:] == ["MLflow is back; 1,000 points caught up"]


def test_points_not_logged_are_logged_by_the_next_attempt(config, monkeypatch):
    run = tracking.begin(config, {})
    monkeypatch.setattr("eiwtrain.tracking.tracker._DRAIN_SECONDS", 0.0)
    said = []
    with monkeypatch.context() as broken:
        failing(broken, "log_batch", *[ConnectionError("gone")] * 1000)
        first = tracking.Tracker(run, warn=said.append)
        for step in range(1, 6):
            first.metrics(step, {"train/lr": float(step), "strange": float("nan")})
        first.tags({"checkpoint": "here"})
        saved = json.loads(json.dumps(first.pending(), allow_nan=False))
        first.metrics(6, {"train/lr": 6.0})  # after the checkpoint
        first.close()
    monkeypatch.setattr("eiwtrain.tracking.tracker._DRAIN_SECONDS", 60.0)
    # meanwhile two of them were logged with other times
    MlflowClient(run.uri).log_metric(run.run_id, "train/lr", 2.0, step=2, timestamp=7)
    MlflowClient(run.uri).log_metric(run.run_id, "train/lr", 4.0, step=4, timestamp=7)
    second = tracking.Tracker(run, backlog=saved)
    for step in range(6, 9):
        second.metrics(step, {"train/lr": float(step)})
    second.close()
    assert sorted(history(run, "train/lr")) == [(s, float(s)) for s in range(1, 9)]
    assert sorted(s for s, _ in history(run, "strange")) == [1, 2, 3, 4, 5]
    assert MlflowClient(run.uri).get_run(run.run_id).data.tags["eiwtrain.checkpoint"] == "here"


def test_histories_are_read_only_for_curves_of_a_backlog(config, monkeypatch):
    run = tracking.begin(config, {})
    MlflowClient(run.uri).log_metric(run.run_id, "a", 1.0, step=1, timestamp=1)
    asked, real = [], MlflowClient.get_metric_history
    monkeypatch.setattr(MlflowClient, "get_metric_history", lambda *a: (asked.append(a[-1]), real(*a))[1])
    for saved in ({}, {"points": [[2, 5, [["a", 2.0]]]]}, {"points": [[1, 5, [["a", 1.0]]]]}):
        asked.clear()
        tracking.Tracker(run, backlog=saved).close()
        assert asked == (["a"] if saved and saved["points"][0][0] == 1 else [])
    assert history(run, "a") == [(1, 1.0), (2, 2.0)]


def test_a_guard_that_raises_stops_all_writing(config, monkeypatch):
    monkeypatch.setattr("eiwtrain.tracking.tracker._DRAIN_SECONDS", 3600.0)
    monkeypatch.setattr("eiwtrain.tracking.tracker._FLUSH_SECONDS", 3600.0)
    run = tracking.begin(config, {})
    lost = threading.Event()

    def guard():
        if lost.is_set():
            raise PermissionError("the lease is somebody else's")

    said = []
    tracker = tracking.Tracker(run, warn=said.append, guard=guard)
    tracker.metrics(1, {"train/lr": 0.1})
    tracker.flush()
    assert said == []
    lost.set()
    tracker.metrics(2, {"train/lr": 0.2})
    tracker.image(2, "samples", Image.new("RGB", (8, 8)))
    tracker.flush()
    assert len(said) == 1
    tracker.metrics(3, {"train/lr": 0.3})
    tracker.close()
    assert history(run, "train/lr") == [(1, 0.1)]
    assert MlflowClient(run.uri).list_artifacts(run.run_id, "images") == []
    assert len(said) == 1
    assert "the lease is somebody else's" in said[0]


def test_a_refused_curve_does_not_block_the_others(config):
    said = []
    run = tracking.begin(config, {})
    tracker = tracking.Tracker(run, warn=said.append)
    for step in range(1, 8):
        tracker.metrics(step, {"train/lr": 0.2, "no name : like ? this": 0.1, "train/loss": 3.0})
    tracker.image(1, "no name : like this", Image.new("RGB", (8, 8)))
    tracker.flush()
    tracker.metrics(8, {"train/lr": 0.2, "no name : like ? this": 0.1, "train/loss": 3.0})
    tracker.close()
    assert history(run, "train/lr") == [(s, 0.2) for s in range(1, 9)]
    assert history(run, "train/loss") == [(s, 3.0) for s in range(1, 9)]
    assert sorted(line.partition(" refused ")[2].split(":")[0] for line in said) == [
        "'no name ",
        "image 'no name ",
    ]


def test_a_deleted_run_is_reported_once(config, monkeypatch):
    monkeypatch.setattr("eiwtrain.tracking.tracker._DRAIN_SECONDS", 3600.0)
    run = tracking.begin(config, {})
    said = []
    tracker = tracking.Tracker(run, warn=said.append)
    tracker.flush()
    MlflowClient(run.uri).delete_run(run.run_id)
    for step in range(1, 4):
        tracker.metrics(step, {"train/lr": 0.1, "train/loss": 0.1})
    tracker.close()
    assert said == [f"MLflow run {run.run_id} was deleted: nothing more is logged"]


def images(run):
    return sorted(f.path for f in MlflowClient(run.uri).list_artifacts(run.run_id, "images"))


@pytest.mark.parametrize("method", ["log_image", "set_tag", "_log_artifact_helper"])
def test_an_image_is_there_once_wherever_logging_it_failed(config, monkeypatch, method):
    run = tracking.begin(config, {})
    monkeypatch.setattr("eiwtrain.tracking.tracker._RETRY_SECONDS", 0.01)
    real, calls = getattr(MlflowClient, method), []

    def flaky(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:  # the preview
            raise ConnectionError("gone")
        result = real(*args, **kwargs)
        if len(calls) == 1 and method != "_log_artifact_helper":
            raise ConnectionError("answer lost")
        return result

    monkeypatch.setattr(MlflowClient, method, flaky)
    said = []
    for step in (1, 2):
        tracker = tracking.Tracker(run, warn=said.append)
        tracker.image(step, "eval/samples", Image.new("RGB", (8, 8)))
        tracker.image(1, "eval/samples", Image.new("RGB", (8, 8)))
        tracker.close()
    stems = [path.removesuffix(".png") for path in images(run) if path.endswith(".png")]
    assert [stem.split("+timestamp")[0] for stem in stems] == [f"images/eval~samples+step+{s}" for s in (1, 2)]
    assert images(run) == sorted([f"{s}.png" for s in stems] + [f"{s}+compressed.webp" for s in stems])
    assert MlflowClient(run.uri).get_run(run.run_id).data.tags["mlflow.loggedImages"] == "True"
    assert said[1::2] == ["MLflow takes images again"] * (len(said) // 2)


def test_failing_images_do_not_block_curves_and_the_newest_stay(config, monkeypatch):
    run = tracking.begin(config, {})
    monkeypatch.setattr("eiwtrain.tracking.tracker._DRAIN_SECONDS", 0.0)
    monkeypatch.setattr("eiwtrain.tracking.tracker._RETRY_SECONDS", 3600.0)
    said = []
    with monkeypatch.context() as broken:
        failing(broken, "log_image", *[OSError("no such bucket")] * 1000)
        tracker = tracking.Tracker(run, warn=said.append)
        for step in range(1, backlog.MOST_IMAGES + 5):
            tracker.image(step, "samples", Image.new("RGB", (8, 8)))
        tracker.flush()
        tracker.metrics(1, {"train/lr": 0.1})
        tracker._backlog.wait(60.0, lambda: not tracker.pending().get("points"))
        assert history(run, "train/lr") == [(1, 0.1)]
        saved = tracker.pending()
        assert saved == {"images": [["samples", s] for s in range(5, 5 + backlog.MOST_IMAGES)]}
        tracker.close()
    assert "does not take images (OSError: no such bucket)" in said[0]
    assert said[1].endswith("did not take 0 points and 6 images")
    said.clear()
    MlflowClient(run.uri).log_image(run.run_id, Image.new("RGB", (8, 8)), key="samples", step=6)
    tracker = tracking.Tracker(run, warn=said.append, backlog=saved)
    assert tracker.lost_images(5)
    assert not tracker.lost_images(4)
    tracker._thread.join(0.0)
    monkeypatch.setattr("eiwtrain.tracking.tracker._DRAIN_SECONDS", 60.0)
    tracker.close()
    lost = ", ".join(f"samples of step {s}" for s in (5, 7, 8, 9, 10))
    assert said == [f"images that the last attempt could not log: {lost}"]


def test_too_many_points_are_reported_and_the_oldest_dropped(config, monkeypatch):
    monkeypatch.setattr(backlog, "MOST_POINTS", 10)
    run = tracking.begin(config, {})
    free = threading.Event()
    said = []
    tracker = tracking.Tracker(run, warn=said.append, guard=lambda: free.wait(60))
    for step in range(1, 31):
        tracker.metrics(step, {"train/lr": float(step)})
    assert len(tracker.pending()["points"]) == 10
    free.set()
    tracker.close()
    assert history(run, "train/lr") == [(s, float(s)) for s in range(21, 31)]
    assert ["the oldest are dropped" in line for line in said] == [True]


EVENTS = ["step", "look", "taken by the store", "not taken", "confirmed", "checkpoint", "crash"]


@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(1, 5)), max_size=80))
@example([("step", 2), ("look", 1), ("not taken", 1), ("checkpoint", 1), ("crash", 1)])
@example([("step", 2), ("look", 1), ("taken by the store", 1), ("checkpoint", 1), ("crash", 1)])
@example([("step", 3), ("checkpoint", 1), ("crash", 1), ("step", 2), ("look", 1)])
@example([("step", 5), ("step", 1), ("look", 1), *[("taken by the store", 1), ("confirmed", 1)] * 3, ("crash", 1)])
@settings(deadline=None)
def test_whenever_attempts_die_each_step_is_logged_once(events):
    """Model a store that keeps one of equal points, and attempts that resume from the newest checkpoint."""
    store: dict[backlog.Point, None] = {}
    clock = itertools.count()
    step, queue, looked, batch, checkpoint = 0, backlog.Backlog(), False, None, (0, {})
    furthest = 0
    end = [("all steps", 5), ("look", 1), ("confirmed", 1), *[("taken by the store", 1), ("confirmed", 1)] * 1000]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backlog, "CHUNK", 3)
        patch.setattr(backlog, "_GATHER_SECONDS", -1.0)
        for event, times in [*events, *end]:
            if event in ("step", "all steps"):  # all: the last attempt trains at least as far as those before it
                for _ in range(times if event == "step" else furthest - step + times):
                    step, t = step + 1, next(clock)
                    furthest = max(furthest, step)
                    curves = ["a"] if step % 2 else ["a", "b"]
                    queue.put(points=[backlog.Point(c, step, t, float(step)) for c in curves])
            elif event == "look" and not looked:
                steps: dict[str, list[int]] = {}
                for p in store:
                    steps.setdefault(p.curve, []).append(p.step)
                last = {curve: max(of_curve) for curve, of_curve in steps.items()}
                doubtful = {p.curve for p in queue.earlier if p.step <= last.get(p.curve, -1)}
                queue.skip_logged(last, {c: steps[c] for c in doubtful})
                looked = True
            elif event in ("taken by the store", "not taken") and looked and batch is None and queue.waiting[0]:
                batch = queue.take()
                store.update(dict.fromkeys(batch.points if event != "not taken" else ()))
            elif event == "confirmed" and batch is not None:
                store.update(dict.fromkeys(batch.points))
                queue.done()
                batch = None
            elif event == "checkpoint":
                checkpoint = (step, json.loads(json.dumps(queue.to_json())))
            elif event == "crash":
                step, queue, looked, batch = checkpoint[0], backlog.Backlog(checkpoint[1]), False, None
        for curve, stride in (("a", 1), ("b", 2)):
            assert [p.step for p in store if p.curve == curve] == list(range(stride, step + 1, stride))


def test_an_ended_run_shows_how_it_ended(config):
    run = tracking.begin(config, {})
    tags = lambda: MlflowClient(run.uri).get_run(run.run_id).data.tags["eiwtrain.status"]  # noqa: E731
    assert tags() == "running"
    tracking.end(run, "KILLED", "stopped by SIGTERM; resumes with the same command")
    assert (status(run), tags()) == ("KILLED", "stopped by SIGTERM; resumes with the same command")
    tracking.end(run, "FINISHED")
    assert (status(run), tags()) == ("FINISHED", "finished")


def test_an_end_is_retried_for_a_while(config, monkeypatch, capsys):
    monkeypatch.setattr("eiwtrain.tracking.record._AGAIN_SECONDS", 0.01)
    run = tracking.begin(config, {})
    left = failing(monkeypatch, "set_terminated", *[ConnectionError("gone")] * 3)
    tracking.end(run, "FAILED")
    assert not left
    assert status(run) == "FAILED"
    monkeypatch.setattr("eiwtrain.tracking.record._END_SECONDS", 0.05)
    failing(monkeypatch, "set_terminated", *[ConnectionError("gone")] * 1000)
    tracking.end(run, "FINISHED")
    assert capsys.readouterr().err == f"could not mark MLflow run {run.run_id} as FINISHED: ConnectionError: gone\n"


@pytest.mark.parametrize("method", ["create_experiment", "create_run", "log_batch", "set_tag"])
def test_a_start_that_fails_halfway_continues_the_same_run(config, monkeypatch, method):
    monkeypatch.setattr("eiwtrain.tracking.record._AGAIN_SECONDS", 0.01)
    failing(monkeypatch, method, ConnectionError("answer lost"), after=True)
    run = tracking.begin(config, {"a": "b"})
    (found,) = MlflowClient(run.uri).search_runs([run.experiment_id])
    assert (found.info.run_id, found.info.status) == (run.run_id, "RUNNING")
    assert found.data.params["train.max_steps"] == "12"


def test_params_that_a_start_left_out_are_logged_by_the_next(config, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr("eiwtrain.tracking.record._BEGIN_SECONDS", 0.0)
        failing(broken, "log_batch", ConnectionError("away"))
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


def test_a_local_store_is_created_by_a_run_and_not_by_a_check(new_config, tmp_path):
    tracking.check(new_config)
    assert list(tmp_path.iterdir()) == []
    assert status(tracking.begin(new_config, {})) == "RUNNING"


def test_a_store_that_cannot_be_used_is_one_line(config):
    Path(config.run.storage, "mlflow.db").write_bytes(b"this is no database" * 100)
    for call in (lambda: tracking.begin(config, {}), lambda: tracking.check(config)):
        with pytest.raises(tracking.TrackingError, match=r"tracking.uri: sqlite:///") as e:
            call()
        assert len(str(e.value).splitlines()) == 1


def test_a_database_is_in_its_folder_however_that_is_named(tmp_path, database):
    config = Config.model_validate(tiny_config(tmp_path / "a?b %41 #c::d%"))
    path = Path(config.run.storage, "mlflow.db")
    path.parent.mkdir(parents=True)
    shutil.copy(database, path)
    run = tracking.begin(config, {})
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as there:
        assert there.execute("SELECT run_uuid FROM runs").fetchall() == [(run.run_id,)]
    assert {p.name for p in tmp_path.iterdir()} == {"a?b %41 #c::d%"}
    assert "mlartifacts" in {p.name for p in path.parent.iterdir()}


@pytest.mark.parametrize("problem", ["a folder", "in a file", "too long"])
def test_a_database_that_cannot_be_made_is_one_line_at_once(new_config, tmp_path, problem):
    (tmp_path / "file").write_bytes(b"")
    where = {"a folder": tmp_path, "in a file": tmp_path / "file" / "x.db", "too long": tmp_path / ("x" * 300)}[problem]
    store = new_config.tracking.model_copy(update={"uri": f"sqlite:///{where}"})
    config, began = new_config.model_copy(update={"tracking": store}), time.monotonic()
    for call in (lambda: tracking.check(config), lambda: tracking.begin(config, {})):
        with pytest.raises(tracking.TrackingError, match=f"tracking.uri: sqlite:///{where} cannot be used: ") as e:
            call()
        assert len(str(e.value).splitlines()) == 1
    assert time.monotonic() - began < 30


def test_mlflow_does_not_try_for_minutes_to_open_a_database(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "check_sqlite", lambda path: None)  # as where only MLflow finds what is wrong
    began = time.monotonic()
    with pytest.raises(tracking.TrackingError, match="unable to open database file"):
        store.client(f"sqlite:///{tmp_path}")
    assert time.monotonic() - began < 30


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
