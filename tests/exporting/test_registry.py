import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from small_run import small_flow, tracked

from eiwtrain.exporting import assemble, models, registry
from eiwtrain.tracking import TrackedRun, TrackingError

FACTS = {
    "data": "photos",
    "data_fingerprint": "f" * 64,
    "eval_bits_per_dim": 4.0,
    "eval_standard_error": 0.01,
    "eval_split": "test",
    "eval_images": 8,
}


class Store:
    """A registry in a database of this machine, and a run in it."""

    def __init__(self, folder):
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.run_id = tracked(self.uri, folder / "artifacts")
        self.client = MlflowClient(self.uri)
        self.folder = folder

    def register(self, step, name="flow", run_id="", url=None, **facts):
        metadata = FACTS | {"step": step, "checkpoint": f"step-{step:08d}-0000abcd"} | facts
        model = small_flow(seed=step)
        with assemble.assembled(model, metadata) as folder:
            run_id = self.run_id if run_id == "" else run_id
            return registry.register(name, folder, url or str(folder), self.uri, run_id, model, metadata)

    def best(self, name="flow"):
        return str(self.client.get_model_version_by_alias(name, "best").version)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("registry"))


def test_a_version_says_what_it_is_and_loads_by_its_alias(store, monkeypatch):
    assert str(store.register(1, "one")) == "registered as models:/one/1; one@best names it now: the first"
    version = store.client.get_model_version_by_alias("one", "best")
    assert version.run_id == store.run_id
    assert version.description.startswith("A model of 8x8 images")
    weights = version.tags.pop("weights_sha256")
    assert len(weights) == 64
    assert version.tags == {
        "step": "1",
        "checkpoint": "step-00000001-0000abcd",
        "bits_per_dim": "4.0",
        "standard_error": "0.01",
        "eval_split": "test",
        "eval_images": "8",
        "data": "photos",
        "data_fingerprint": "f" * 64,
        "image_shape": "3x8x8",
        "n_bits": "8",
    }
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    model = mlflow.pyfunc.load_model("models:/one@best")
    assert model.metadata.signature is not None
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    assert model.predict(images).shape == (3,)


def test_a_registered_model_opens_as_any_other(store, monkeypatch):
    store.register(5, "opened")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    for name in ("models:/opened@best", "models:/opened/1"):
        opened = models.open_model(name)
        assert opened.metadata["step"] == 5
        expected = dict(small_flow(seed=5).state_dict())
        assert all(torch.equal(t, expected[n]) for n, t in opened.flow.state_dict().items())
    for name in ("models:/opened@none", "models:/opened/2", "models:/nothing/1"):
        with pytest.raises(ValueError, match=name):
            models.open_model(name)


def test_the_alias_moves_to_a_better_model_only(store):
    store.register(1, bits=None, eval_bits_per_dim=4.0)
    assert store.best() == "1"
    worse = store.register(2, eval_bits_per_dim=4.1)
    assert (worse.is_best, store.best()) == (False, "1")
    assert worse.why == "flow@best stays on version 1: it has 4.0000 bits/dim, this one 4.1000"
    assert not store.register(3, eval_bits_per_dim=4.0).is_best
    better = store.register(4, eval_bits_per_dim=3.9)
    assert (better.is_best, store.best()) == (True, "4")
    assert better.why == "flow@best names it now: 3.9000 bits/dim, 4.0000 before"


@pytest.mark.parametrize(
    "other",
    [{"data_fingerprint": "0" * 64}, {"eval_split": "val"}, {"eval_images": 9}, {"eval_bits_per_dim": None}],
)
def test_figures_that_do_not_compare_leave_the_alias_where_it_is(store, other):
    name = "compare-" + next(iter(other))
    store.register(1, name)
    stays = store.register(2, name, **({"eval_bits_per_dim": 1.0} | other))
    assert (stays.is_best, store.best(name)) == (False, "1")
    assert "does not compare" in stays.why or "do not compare" in stays.why or "not evaluated" in stays.why
    if "eval_bits_per_dim" in other:
        before_nothing = store.register(3, name + "-later", eval_bits_per_dim=None)
        assert before_nothing.is_best
        assert store.register(4, name + "-later").is_best


def test_other_bits_of_a_pixel_or_another_resolution_do_not_compare():
    tags = {"bits_per_dim": "4.0", "n_bits": "8", "image_shape": "3x8x8"}
    assert registry._better(tags | {"bits_per_dim": "3.0"}, tags)[0]
    for change in ({"n_bits": "5"}, {"image_shape": "3x16x16"}):
        better, why = registry._better(tags | {"bits_per_dim": "3.0"} | change, tags)
        assert not better
        assert next(iter(change)) in why
    assert not registry._better(tags | {"bits_per_dim": "nan"}, tags)[0]


def test_a_model_is_registered_once(store):
    first = store.register(7, "once")
    again = store.register(7, "once")
    assert (first.version, first.new) == ("1", True)
    assert (again.version, again.new, again.is_best) == ("1", False, True)
    assert str(again) == "was registered before as models:/once/1; it is once@best"
    store.client.delete_registered_model_alias("once", "best")  # as if it had been cut short between the two
    assert store.register(7, "once").is_best
    assert store.best("once") == "1"


def test_what_is_in_a_bucket_stays_there(store):
    store.register(1, "bucket", url="s3://bucket/models/one")
    assert store.client.get_model_version("bucket", "1").source == "s3://bucket/models/one"
    store.register(2, "bucket", url="s3://bucket/models/two", run_id="0" * 32)  # of a run that is not in this store
    version = store.client.get_model_version("bucket", "2")
    assert version.source == "s3://bucket/models/two"
    assert not version.run_id


def test_files_of_this_machine_go_into_the_run_and_stay_when_the_folder_goes(store):
    store.register(1, "local")
    source = store.client.get_model_version("local", "1").source
    assert source.endswith("/models/step-00000001-0000abcd")
    logged = store.client.list_artifacts(store.run_id, "models/step-00000001-0000abcd")
    assert {"model.safetensors", "MLmodel", "README.md"} <= {f.path.rpartition("/")[2] for f in logged}
    with pytest.raises(TrackingError, match="export to a bucket"):
        store.register(2, "local", run_id=None)


def test_at_the_end_of_a_run_its_model_is_registered_from_a_place_that_stays(store, tmp_path):
    from small_run import commit

    from eiwtrain import checkpoints

    remote = "memory://runs/tiny"
    for root in (str(tmp_path / "tiny"), remote):
        commit(root, 3, 4.0)
        saved = checkpoints.newest(root)
        run = TrackedRun(store.uri, "0", store.run_id)
        model = small_flow(seed=3)
        with assemble.assembled(model, models.metadata_of(saved)) as folder:
            done = assemble.register(folder, "end-" + root[:3].strip("/"), root, saved, run, model)
        version = store.client.get_model_version(done.name, done.version)
        if root == remote:
            assert version.source == f"{remote}/exported/step-00000003-00000003"
            assert models.open_model(version.source).metadata["step"] == 3
        else:
            assert version.source.startswith(f"file://{store.folder}")


def test_a_store_that_is_away_is_told_in_one_line(tmp_path):
    model = small_flow()
    with assemble.assembled(model, FACTS) as folder, pytest.raises(TrackingError) as caught:
        registry.register("a", folder, "s3://b/m", "http://127.0.0.1:9", None, model, FACTS)
    assert "Connection refused" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", " a", "a/b", "a:b", "a@b", "a'b", "a%b"])
def test_a_name_that_a_registered_model_cannot_have_is_refused(name):
    with pytest.raises(ValueError, match="--register"):
        registry.check_name(name)


@pytest.mark.parametrize(
    "uri",
    [
        "mysql+pymysql://host/db",
        "postgresql://host/db",
        "databricks://profile",
        "uc:http://host",
        "plugin-scheme://host",
        "sqlite:///{folder}/absent.db",
        "http://user@host",
        "http://host\x1b/x",
        "file:///etc",
    ],
)
def test_an_mlflow_that_only_a_checkpoint_names_is_used_where_it_is_a_server_or_is_here(tmp_path, monkeypatch, uri):
    def store(uri):
        return registry.store_of(str(tmp_path), {"tracking": {"uri": uri}})

    for name in ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TrackingError, match="give --tracking-uri") as e:
        store(uri.format(folder=tmp_path))
    assert str(e.value).isprintable()
    (tmp_path / "there.db").touch()
    for fine in (f"sqlite:///{tmp_path}/there.db", "http://host:5000", "https://host/mlflow"):
        assert store(fine) == fine
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "x")
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_TOKEN is set"):
        store("http://host:5000")


@pytest.mark.parametrize("source", ["http://127.0.0.1:1/x", "ftp://127.0.0.1:1/x", "hdfs://host/x", "s3://b::http://x"])
def test_a_version_whose_files_are_anywhere_is_not_fetched(store, monkeypatch, source):
    name = f"elsewhere-{source.partition(':')[0]}"
    store.client.create_registered_model(name)
    store.client.create_model_version(name, source, await_creation_for=0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", lambda **_: pytest.fail("it was fetched"))
    with pytest.raises(ValueError, match="is not opened"):
        models.open_model(f"models:/{name}/1")
