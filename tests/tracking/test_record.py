"""The origin of a run in its MLflow record, and runs that were left RUNNING."""

import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from helpers import tiny_config, write_shards
from mlflow import MlflowClient

from eiwtrain import storage, tracking
from eiwtrain.config import Config
from eiwtrain.data.manifest import load_manifest
from eiwtrain.storage import holders, lease, watch
from eiwtrain.storage.lease import Lease
from eiwtrain.storage.watch import Watch
from eiwtrain.tracking import provenance, record

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "data"
    write_shards(folder)
    return str(folder)


@pytest.fixture
def config(tmp_path, database, shards):
    config = Config.model_validate(tiny_config(tmp_path, data={"path": shards}))
    Path(config.run.storage).mkdir()
    shutil.copy(database, config.run.storage)
    return config


def named(config, name):
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


def found(run):
    return MlflowClient(run.uri).get_run(run.run_id)


def state(run):
    run = found(run)
    return run.info.status, run.data.tags["eiwtrain.status"]


def inputs_of(run):
    return {i.tags[0].value: i.dataset for i in found(run).inputs.dataset_inputs}


def test_a_data_set_is_an_input_once_after_many_starts(config):
    manifest = load_manifest(config.data.path)
    inputs = provenance.inputs(config, manifest)
    run = tracking.begin(config, {}, inputs)
    tracking.begin(config, {}, inputs)
    other = tracking.begin(named(config, "other"), {}, inputs)
    for which in (run, other):
        assert len(found(which).inputs.dataset_inputs) == 2
        of = inputs_of(which)
        assert (of["training"].name, of["evaluation"].name) == (f"{manifest.title} train", f"{manifest.title} test")
        for context, split in (("training", "train"), ("evaluation", "test")):
            assert manifest.fingerprint.startswith(of[context].digest)
            assert len(of[context].digest) == 36
            assert of[context].source_type == "local"
            assert json.loads(of[context].source) == {"uri": config.data.path}
            profile = json.loads(of[context].profile)
            assert profile["images"] == manifest.splits[split].samples
            assert profile["fingerprint"] == manifest.fingerprint
            assert profile["resolution"] == 8


def test_a_data_set_in_a_bucket_names_its_kind_of_storage(config):
    data = config.data.model_copy(update={"path": "s3://bucket/photos"})
    elsewhere = config.model_copy(update={"data": data})
    (train, _) = provenance.inputs(elsewhere, load_manifest(config.data.path))
    assert (train.dataset.source_type, json.loads(train.dataset.source)) == ("s3", {"uri": "s3://bucket/photos"})


def test_a_name_too_long_for_mlflow_is_cut(config):
    manifest = dataclasses.replace(load_manifest(config.data.path), name="x" * 600)
    run = tracking.begin(config, {}, provenance.inputs(config, manifest))
    assert inputs_of(run)["training"].name == "x" * 500


def test_later_attempts_keep_the_description(config):
    manifest = load_manifest(config.data.path)
    about = provenance.description(config, manifest, "python -m eiwtrain.run x.yaml", 12345)
    for text in (
        manifest.title, manifest.fingerprint[:12], "12,345 parameters", "`python -m eiwtrain.run x.yaml`", config.root,
        "2 levels of 2 steps", "ELBO",
        f"{manifest.splits['train'].samples} train and {manifest.splits['test'].samples} test images of 8x8",
    ):  # fmt: skip
        assert text in about
    run = tracking.begin(config, {provenance.NOTE_TAG: about, "a": "1"})
    assert found(run).data.tags["mlflow.note.content"] == about
    MlflowClient(run.uri).set_tag(run.run_id, "mlflow.note.content", "mine")
    tracking.begin(config, {provenance.NOTE_TAG: about, "a": "2"})
    assert (found(run).data.tags["mlflow.note.content"], found(run).data.tags["a"]) == ("mine", "2")


def test_the_tags_name_the_source_the_user_and_the_root(config, monkeypatch):
    monkeypatch.setattr(provenance, "revision", lambda package: {"commit": COMMIT, "dirty": "true"})
    run = tracking.begin(config, provenance.tags(config, "the command"))
    tags = found(run).data.tags
    assert tags["mlflow.source.git.commit"] == COMMIT
    assert tags["mlflow.source.git.dirty"] == "true"
    assert (tags["mlflow.source.name"], tags["mlflow.source.type"]) == ("eiwtrain.run", "LOCAL")
    assert (tags["mlflow.user"], tags["eiwtrain.root"]) == (provenance.user(), config.root)
    assert tags["eiwtrain.command"] == "the command"


def git(folder, *arguments):
    identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
    result = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return result.stdout.strip()


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "clone" / "package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    return folder


def test_the_revision_comes_from_the_repository_of_the_package(package):
    git(package.parent, "init", "-q", "-b", "trunk")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-qm", "first")
    commit = git(package.parent, "rev-parse", "HEAD")
    assert provenance.revision(package) == {"commit": commit, "dirty": "false", "branch": "trunk"}
    git(package.parent, "remote", "add", "origin", "https://user:token@host.example/a/b.git?key=secret")
    (package / "__init__.py").write_text("changed = True")
    assert provenance.revision(package) == {
        "commit": commit, "dirty": "true", "branch": "trunk", "repoURL": "https://host.example/a/b.git",
    }  # fmt: skip


def test_a_repository_around_an_installed_package_is_ignored(package, monkeypatch):
    monkeypatch.setattr(provenance, "_installed_from", dict)
    monkeypatch.delenv("EIWTRAIN_COMMIT", raising=False)
    git(package.parent, "init", "-q")
    git(package.parent, "commit", "-qm", "first", "--allow-empty")
    assert provenance.revision(package) == {}
    monkeypatch.setenv("EIWTRAIN_COMMIT", COMMIT)
    assert provenance.revision(package) == {"commit": COMMIT}


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        (
            {"url": "https://u:p@host/r.git", "vcs_info": {"vcs": "git", "commit_id": COMMIT}},
            {"commit": COMMIT, "repoURL": "https://host/r.git"},
        ),
        ({"url": "file:///x", "dir_info": {"editable": True}}, {}),
        (None, {}),
    ],
)
def test_without_git_the_revision_is_what_pip_installed(package, monkeypatch, installed, expected):
    text = None if installed is None else json.dumps(installed)
    monkeypatch.setattr(
        provenance.metadata, "distribution", lambda name: types.SimpleNamespace(read_text=lambda file: text)
    )
    monkeypatch.delenv("EIWTRAIN_COMMIT", raising=False)
    monkeypatch.setenv("PATH", str(package))  # no git
    assert provenance.revision(package) == expected


def test_the_environment_artifact_has_versions_and_no_secret(config, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-seen")
    nvidia = tmp_path / "nvidia-smi"
    nvidia.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 570.1'\n")
    nvidia.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    tracking.begin(config, {}, environment={"python": "an older one"})
    run = tracking.begin(config, {}, environment=provenance.environment())
    text = Path(MlflowClient(run.uri).download_artifacts(run.run_id, "environment.json")).read_text()
    about = json.loads(text)
    assert about["distributions"]["torch"] == importlib.metadata.version("torch")
    assert sys.version.split()[0] in about["python"]
    assert about["gpus"] == ["NVIDIA H200, 143771 MiB, 570.1"]
    assert "not-to-be-seen" not in text


# The holder of a run's lease, and runs that nobody trains.


def gone():
    """Return the holder of a lease whose process, on this machine, has exited."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    holder = dataclasses.replace(holders.here(), pid=process.pid, started=holders.started(process.pid))
    process.wait()
    return holder


def leave(root, how):
    """Write the lease of the run at `root` as a holder leaves it; return the time of the last sign of life."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lease, "_keep", lambda held: None)
        holder = {"gone": gone, "silent": lambda: holders.Holder("elsewhere", 1, "", 0)}.get(how, holders.here)()
        patch.setattr(holders, "here", lambda: holder)
        held = Lease.acquire(root, "tiny", lambda line: None)
        if how in ("finished", "stopped", "failed"):
            held.release(how)
    return json.loads(storage.read_bytes(storage.join(root, "lease.json")))["attempt"]["ended"]


@pytest.mark.parametrize(
    ("how", "outcome"),
    [("alive", "running"), ("gone", "died"), ("silent", "running"), ("finished", "finished"), ("stopped", "stopped")],
)
def test_a_lease_shows_its_owner_and_whether_it_may_live(tmp_path, how, outcome):
    root = str(tmp_path)
    assert lease.look(root) is None
    ended = leave(root, how)
    before = storage.read_bytes(storage.join(root, "lease.json"))
    owner, attempt = lease.look(root)
    assert owner == json.loads(before)["owner"]
    assert (attempt.outcome, attempt.ended) == (outcome, ended)
    assert storage.read_bytes(storage.join(root, "lease.json")) == before


def test_a_file_that_is_no_lease_is_ignored(tmp_path):
    storage.write_bytes(storage.join(str(tmp_path), "lease.json"), b"{}")
    assert lease.look(str(tmp_path)) is None


DIED = "its driver died, last sign of life {}; resumes with the same command"


@pytest.mark.parametrize(
    ("how", "status", "text"),
    [
        ("gone", "KILLED", DIED),
        ("finished", "FINISHED", "finished"),
        ("failed", "FAILED", "failed"),
        ("stopped", "KILLED", "stopped; resumes with the same command"),
        ("alive", "RUNNING", "running"),
    ],
)
def test_a_run_left_running_is_ended_at_the_next_start_of_any(config, how, status, text):
    left = named(config, "left")
    run = tracking.begin(left, {})
    ended = leave(left.root, how)
    ours = tracking.begin(config, {})
    lines = tracking.end_abandoned(ours)
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(ended))
    assert state(run) == (status, text.format(when))
    assert state(ours) == ("RUNNING", "running")
    if status == "RUNNING":
        assert lines == []
    else:
        assert lines == [f"MLflow had 'left' as RUNNING, and nobody trains it: now {status}"]
        assert found(run).info.end_time == round(1000 * ended)
    assert tracking.begin(left, {}) == run
    assert state(run) == ("RUNNING", "running")


@pytest.mark.parametrize("skew", [-3600, 3600])
def test_a_run_is_left_to_a_driver_whose_lease_changes_whatever_the_clock_says(config, monkeypatch, skew):
    runs = {name: tracking.begin(named(config, name), {}) for name in ("silent", "living")}
    for name in runs:
        leave(named(config, name).root, "silent")
    ours, looks, now = tracking.begin(config, {}), Watch(), time.monotonic()
    monkeypatch.setattr(time, "time", lambda real=time.time: real() + skew)
    assert tracking.end_abandoned(ours, looks) == []
    assert looks.is_unsure
    url = storage.join(named(config, "living").root, "lease.json")
    content = json.loads(storage.read_bytes(url))
    content["attempt"]["ended"] += 5
    storage.write_bytes(url, json.dumps(content).encode())
    monkeypatch.setattr(watch.time, "monotonic", lambda: now + watch.SECONDS - 1)
    monkeypatch.setattr(record, "_ABANDONED_SECONDS", 3600.0)
    assert tracking.end_abandoned(ours, looks) == []
    monkeypatch.setattr(watch.time, "monotonic", lambda: now + watch.SECONDS + 60)
    assert len(tracking.end_abandoned(ours, looks)) == 1
    assert {name: state(run)[0] for name, run in runs.items()} == {"silent": "KILLED", "living": "RUNNING"}


def test_runs_that_cannot_be_read_are_left_alone(config, monkeypatch):
    runs = {}
    for name in ("another machine's", "no lease", "no folder", "broken", "died"):
        c = named(config, name.replace(" ", "-").replace("'", ""))
        runs[name] = tracking.begin(c, {})
        if name != "no lease":
            leave(c.root, "gone")
        if name == "another machine's":  # whose folder has the same path
            storage.write_bytes(storage.join(c.root, "run.json"), b'{"uid": "another"}')
        if name == "broken":
            storage.write_bytes(storage.join(c.root, "run.json"), b"[]")
        if name == "no folder":
            storage.delete(c.root)
    foreign = MlflowClient(runs["died"].uri).create_run(runs["died"].experiment_id)
    tracking.end_abandoned(tracking.begin(config, {}))
    assert {name: state(run)[0] for name, run in runs.items()} == dict.fromkeys(runs, "RUNNING") | {"died": "KILLED"}
    assert MlflowClient(runs["died"].uri).get_run(foreign.info.run_id).info.status == "RUNNING"
    monkeypatch.setattr(MlflowClient, "search_runs", lambda *args, **kwargs: 1 / 0)
    assert tracking.end_abandoned(runs["died"]) == []


def test_a_run_does_not_end_itself(config):
    run = tracking.begin(config, {})
    leave(config.root, "gone")
    assert tracking.end_abandoned(run) == []
    assert state(run)[0] == "RUNNING"


def test_time_is_bounded_when_many_runs_were_left(config, monkeypatch):
    run = tracking.begin(named(config, "left"), {})
    leave(named(config, "left").root, "gone")
    monkeypatch.setattr(record, "_ABANDONED_SECONDS", -1.0)
    assert tracking.end_abandoned(tracking.begin(config, {})) == []
    assert state(run)[0] == "RUNNING"


@pytest.fixture
def driver(config):
    """Begin a run whose driver, this process, holds the lease."""
    run = tracking.begin(config, {})
    leave(config.root, "gone")
    return run, lease.look(config.root)[0]


def test_a_run_is_settled_as_its_driver_intended_or_as_killed(config, driver):
    run, owner = driver
    assert tracking.settle(run, owner, config.root, 1.5e9, "FINISHED", "by the skin of its teeth")
    assert state(run) == ("FINISHED", "by the skin of its teeth")
    assert not tracking.settle(run, owner, config.root, 1.6e9)  # it has ended
    assert found(run).info.end_time == 1.5e12
    tracking.begin(config, {})
    assert tracking.settle(run, owner, config.root, 1.5e9)
    assert state(run) == ("KILLED", DIED.format("2017-07-14 02:40:00 UTC"))


def test_a_run_whose_lease_changed_or_is_gone_is_not_touched(config, driver, monkeypatch):
    run, owner = driver
    monkeypatch.setattr(MlflowClient, "set_terminated", lambda *args: pytest.fail("it was"))
    assert not tracking.settle(run, "another", config.root, 1.5e9)
    storage.delete(storage.join(config.root, "lease.json"))
    assert not tracking.settle(run, owner, config.root, 1.5e9)
    assert state(run) == ("RUNNING", "running")


@pytest.mark.parametrize("call", ["get_run", "set_terminated", "set_tag"])
@pytest.mark.parametrize("after", [False, True])
def test_a_driver_that_begins_during_settling_stays_running(config, driver, monkeypatch, call, after):
    run, owner = driver
    real = getattr(MlflowClient, call)

    def takes_over(*args, **kwargs):
        monkeypatch.setattr(MlflowClient, call, real)
        result = real(*args, **kwargs) if after else None
        leave(config.root, "alive")
        tracking.begin(config, {})
        return result if after else real(*args, **kwargs)

    monkeypatch.setattr(MlflowClient, call, takes_over)
    assert not tracking.settle(run, owner, config.root, 1.5e9)
    assert getattr(MlflowClient, call) is real
    assert state(run) == ("RUNNING", "running")


def test_a_settling_that_fails_halfway_is_done_by_the_next(config, driver, monkeypatch):
    run, owner = driver
    for call in ("set_terminated", "set_tag"):
        with monkeypatch.context() as broken:
            broken.setattr(MlflowClient, call, lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                tracking.settle(run, owner, config.root, 1.5e9)
    assert tracking.settle(run, owner, config.root, 1.5e9)
    assert state(run) == ("KILLED", DIED.format("2017-07-14 02:40:00 UTC"))


@pytest.mark.parametrize(
    "root", ["reference://x::http://127.0.0.1:1/x", "http://127.0.0.1:1/x", "filecache::s3://b/x", "memory://x"]
)
def test_a_tag_of_another_run_never_makes_a_driver_open_its_url(config, monkeypatch, root):
    run = tracking.begin(config, {})
    client = MlflowClient(run.uri)
    client.create_run(run.experiment_id, tags={"eiwtrain.root": root, "eiwtrain.uid": "x"})
    opened = []
    monkeypatch.setattr(storage, "read_bytes", lambda url, *_: opened.append(url))
    assert tracking.end_abandoned(run) == []
    assert opened == []


def test_an_experiment_that_was_deleted_is_named_with_its_remedy_before_anything_starts(config):
    run = tracking.begin(config, {})
    tracking.check(config)
    MlflowClient(run.uri).delete_experiment(run.experiment_id)
    began = time.monotonic()
    for look in (lambda: tracking.check(config), lambda: tracking.begin(config, {})):
        with pytest.raises(tracking.TrackingError, match=f"restore --experiment-id {run.experiment_id}") as e:
            look()
        assert not e.value.passing
    assert time.monotonic() - began < 4


def test_an_artifact_store_that_is_down_is_not_said_to_be_mlflow(config, monkeypatch):
    monkeypatch.setattr(record, "_BEGIN_SECONDS", 0.0)

    def down(*_args, **_kwargs):
        raise ConnectionError("refused")

    monkeypatch.setattr(MlflowClient, "log_dict", down)
    with pytest.raises(tracking.TrackingError, match=r"answers, and its artifact store .*mlartifacts.* does not") as e:
        tracking.begin(config, {})
    assert e.value.passing
    assert "tracking.uri" not in str(e.value)
