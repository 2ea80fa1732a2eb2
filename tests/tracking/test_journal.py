import itertools
import json
import shutil
import threading
from functools import partial
from pathlib import Path

import fsspec
import pytest
from helpers import tiny_config
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

from eiwtrain import storage, tracking
from eiwtrain.config import Config
from eiwtrain.tracking import backlog, journal
from eiwtrain.tracking.backlog import Point
from eiwtrain.tracking.journal import Journal, Recorded


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(journal, "_RETRY_SECONDS", 0.01)


@pytest.fixture
def run(tmp_path, database):
    config = Config.model_validate(tiny_config(tmp_path))
    Path(config.run.storage).mkdir(parents=True)
    shutil.copy(database, config.run.storage)
    return tracking.begin(config, {})


def points_of(path):
    """Return (curve, step, time, value) of each point of a journal; times in milliseconds."""
    found = []
    for line in Path(path).read_bytes().splitlines():
        values = json.loads(line)
        step, time = values.pop("step"), round(1000 * values.pop("time"))
        found += [Point(curve, step, time, value) for curve, value in values.items()]
    return found


def of_mlflow(run):
    client = MlflowClient(run.uri)
    curves = client.get_run(run.run_id).data.metrics
    histories = [client.get_metric_history(run.run_id, c) for c in curves]
    return sorted(Point(m.key, m.step, m.timestamp, m.value) for history in histories for m in history)


def test_the_journal_equals_mlflow_after_attempts_that_die(run, tmp_path):
    pandas = pytest.importorskip("pandas")
    file = tmp_path / "run" / "metrics.jsonl"
    saved = {}
    for steps in (range(1, 6), range(4, 9), range(9, 12)):
        tracker = tracking.Tracker(run, backlog=saved, journal=str(file))
        for step in steps:
            tracker.metrics(step, {"train/lr": step / 3, "train/bits_per_dim": 8.0 - step})
        tracker.metrics(step, {"eval/bits_per_dim": 5.0})
        tracker.close()
        with file.open("ab") as killed:  # a line that never reached MLflow, and half of another
            killed.write(b'{"step": 99, "time": 1.5, "train/lr": 0.5}\n{"step": 100, "ti')
    tracking.Tracker(run, journal=str(file)).close()
    assert sorted(points_of(file)) == of_mlflow(run)
    table = pandas.read_json(file, lines=True)
    assert table["train/lr"].dropna().tolist() == pytest.approx([s / 3 for s in range(1, 12)])
    assert table.dropna(subset="train/bits_per_dim")["step"].tolist() == list(range(1, 12))
    assert file.read_text().count("train/lr") == file.read_text().count("train/bits_per_dim") == 11
    assert all("train/lr" in line for line in file.read_text().splitlines() if "train/bits_per_dim" in line)


def test_a_journal_that_was_lost_is_read_from_mlflow(run, tmp_path):
    file = tmp_path / "metrics.jsonl"
    for name in ("lost", "metrics"):
        tracker = tracking.Tracker(run, journal=str(tmp_path / f"{name}.jsonl"))
        for step in range(1, 4) if name == "lost" else range(4, 6):
            tracker.metrics(step, {"a": float(step), "b": -step / 7})
        tracker.close()
    assert sorted(points_of(file)) == of_mlflow(run)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_a_journal_that_is_right_is_kept_without_reading_curves(run, tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    for steps in (range(1, 4), range(4, 6)):
        tracker = tracking.Tracker(run, journal=str(file))
        for step in steps:
            tracker.metrics(step, {"a": float(step)})
        tracker.close()
        monkeypatch.setattr(MlflowClient, "get_metric_history", lambda *_: pytest.fail("a curve was read"))
    assert [(p.step, p.value) for p in points_of(file)] == [(s, float(s)) for s in range(1, 6)]


def test_points_are_written_while_mlflow_is_away(run, tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    tracker = tracking.Tracker(run, warn=lambda _: None, journal=str(file))
    tracker.metrics(1, {"a": 1.0})
    tracker.flush()

    def away(*args, **kwargs):
        raise ConnectionError("gone")

    monkeypatch.setattr(MlflowClient, "log_batch", away)
    tracker.metrics(2, {"a": 2.0})
    assert [p.step for p in points_of(file)] == [1, 2]
    tracker.close(0.0)


def test_numbers_that_are_not_finite_are_null(run, tmp_path):
    file = tmp_path / "metrics.jsonl"
    tracker = tracking.Tracker(run, journal=str(file))
    tracker.metrics(1, {"a": float("nan"), "b": float("inf"), "c": 0.1})
    tracker.close()
    line = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert (line["a"], line["b"], line["c"]) == (None, None, 0.1)


def test_a_replaced_attempt_writes_to_a_file_that_nobody_sees(tmp_path):
    file = tmp_path / "metrics.jsonl"
    nothing = Recorded({}, {}, lambda _: [])
    old, new = Journal(str(file)), Journal(str(file))
    for j in (old, new):
        j.begin(nothing)
        j.flush(60)
    old.append([Point("a", 1, 1000, 1.0)])
    new.append([Point("a", 1, 2000, 2.0)])
    old.close(60)
    new.close(60)
    assert points_of(file) == [Point("a", 1, 2000, 2.0)]


def test_a_guard_that_raises_stops_all_writing(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"")

    def guard():
        raise PermissionError("the lease is somebody else's")

    j = Journal(str(file), guard=guard, warn=lambda _: None)
    j.begin(Recorded({}, {}, lambda _: []))
    j.append([Point("a", 1, 1000, 1.0)])
    j.flush(60)
    j.close(60)
    assert file.read_bytes() == b""


def test_failing_remote_storage_is_reported_once_and_retried(monkeypatch):
    fsspec.filesystem("memory").store.clear()
    url, said, real, failures = "memory://run/metrics.jsonl", [], storage.write_pieces, iter(range(3))
    tried = threading.Event()

    def flaky(*args):
        if next(failures, None) is not None:
            raise storage.StorageError(f"{url}: 503 SlowDown")
        tried.set()
        return real(*args)

    monkeypatch.setattr(storage, "write_pieces", flaky)
    j = Journal(url, warn=said.append)
    j.begin(Recorded({}, {}, lambda _: []))
    j.append([Point("a", 1, 1000, 1.0)])
    assert tried.wait(60)
    j.close(60)
    assert json.loads(storage.read_bytes(url)) == {"step": 1, "time": 1.0, "a": 1.0}
    assert said == [f"{url} cannot be written (StorageError: {url}: 503 SlowDown); will keep trying"]


def test_remote_storage_is_written_once_a_minute_and_at_a_flush(monkeypatch):
    fsspec.filesystem("memory").store.clear()
    url, real, writes = "memory://run/metrics.jsonl", storage.write_pieces, []
    monkeypatch.setattr(storage, "write_pieces", lambda *a: (writes.append(1), real(*a))[1])
    j = Journal(url)
    j.begin(Recorded({}, {}, lambda _: []))
    j.flush(60)
    assert len(writes) == 1
    for step in range(100):
        j.append([Point("a", step, 1000 + step, 1.0)])
    assert len(writes) == 1
    j.flush(60)
    assert len(writes) == 2
    assert len(storage.read_bytes(url).splitlines()) == 100
    j.close(60)
    assert len(writes) == 2


def test_a_full_disk_is_reported_once_and_no_point_is_lost(tmp_path, monkeypatch):
    said = []
    j = Journal(str(tmp_path / "metrics.jsonl"), warn=said.append)
    j.begin(Recorded({}, {}, lambda _: []))
    j.flush(60)
    real = j._file

    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(j, "_file", Full())
        j.append([Point("a", 1, 1000, 1.0)])
        j.append([Point("a", 2, 2000, 2.0)])
    assert j._file is real
    j.append([Point("a", 3, 3000, 3.0)])
    j.close(60)
    assert [p.step for p in points_of(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert len(said) == 1
    assert "No space left on device" in said[0]


EVENTS = ["step", "step", "look", "open", "sent", "sent", "confirmed", "publish", "checkpoint", "storage away"]
ATTEMPTS = st.lists(
    st.tuples(
        st.sampled_from([[], ["look"], ["look", "open"], ["look", "open", "publish"]]),
        st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(1, 5)), max_size=20),
        st.sampled_from(["crash", "crash", "torn"]),
    ),
    max_size=5,
)


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
@given(ATTEMPTS)
@example([(["look", "open"], [("step", 4), ("sent", 1)], "crash")])
@example([(["look", "open"], [("step", 3), ("publish", 1)], "crash"), (["look"], [("step", 3), ("sent", 1)], "crash")])
@settings(deadline=None, max_examples=200)
def test_whenever_attempts_die_the_journal_equals_the_store(remote, tmp_path_factory, attempts):
    """Follow the model of `test_tracking`; the journal does its background work at any later time, or never."""
    events = [e for start, then, end in attempts for e in [*((s, 1) for s in start), *then, (end, 1)]]
    store: dict[Point, None] = {}
    clock = itertools.count(1)
    url = f"memory://{next(NAMES)}/metrics.jsonl" if remote else str(tmp_path_factory.mktemp("run") / "metrics.jsonl")
    step, queue, looked, batch, checkpoint = 0, backlog.Backlog(), None, None, (0, {})
    writer = Journal(url, warn=lambda _: None)
    away = False

    def history(curve):
        return [p for p in store if p.curve == curve]

    def write_pieces(*args, real=storage.write_pieces):
        if away:
            raise storage.StorageError("away")
        real(*args)

    end = [("storage away", 2), ("step", 5), ("look", 1), ("open", 1), *[("sent", 1), ("confirmed", 1)] * 1000]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backlog, "CHUNK", 3)
        patch.setattr(backlog, "_GATHER_SECONDS", -1.0)
        patch.setattr(storage, "write_pieces", write_pieces)
        for event, n in [*events, *end, ("open", 1), ("publish", 1)]:
            if event == "step":
                for _ in range(n):
                    step, t = step + 1, next(clock)
                    queue.put(points=[Point(c, step, t, t / 7) for c in (["a"] if step % 2 else ["a", "b"])])
            elif event == "look" and looked is None:
                newest = {}
                for p in store:
                    newest[p.curve] = max(newest.get(p.curve, (0, 0)), (p.step, p.time))
                doubtful = {p.curve for p in queue.earlier if p.step <= newest.get(p.curve, (-1, 0))[0]}
                looked = Recorded(newest, {c: history(c) for c in doubtful}, history)
                steps = {c: {p.step for p in of} for c, of in looked.read.items()}
                queue.skip_logged({c: s for c, (s, _) in newest.items()}, steps, writer.append)
            elif event == "open" and looked is not None and writer._file is None:
                writer._done(partial(writer._open, looked))
            elif event == "publish" and remote and writer._file is not None:
                writer._done(writer._publish)
            elif event == "storage away":
                away = n % 2 == 1
            elif event == "sent" and looked is not None and batch is None and queue.waiting[0]:
                batch = queue.take()
                store.update(dict.fromkeys(batch.points))
            elif event == "confirmed" and batch is not None:
                queue.done()
                batch = None
            elif event == "checkpoint":
                checkpoint = (step, json.loads(json.dumps(queue.to_json())))
            elif event == "crash" or (event == "torn" and not remote):
                step, queue, looked, batch = checkpoint[0], backlog.Backlog(checkpoint[1]), None, None
                if writer._file is not None:
                    writer._file.close()
                writer = Journal(url, warn=lambda _: None)
                if event == "torn" and Path(url).exists():
                    Path(url).write_bytes(Path(url).read_bytes()[: -7 * n])
        if writer._file is not None:
            writer._file.close()
    lines = storage.read_bytes(url).splitlines()
    found = [Point(c, r["step"], round(1000 * r["time"]), v) for r in map(json.loads, lines) for c, v in r.items()]
    assert sorted(p for p in found if p.curve in ("a", "b")) == sorted(store)
    assert len({(p.curve, p.step) for p in store}) == len(store) >= step + step // 2


NAMES = map("run{}".format, itertools.count())


@pytest.mark.parametrize(
    "line",
    ['{"step": 2, "time": Infinity, "a": 1}', '{"step": "2", "time": 1, "a": 1}', '{"step": 2, "time": 1, "a": "b"}'],
)
def test_reading_stops_at_a_line_of_another_format(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "time": 1.5, "a": 2.5}\n' + line + "\n")
    assert list(journal.read(file)) == [journal.Row(1500, 1, {"a": 2.5})]
