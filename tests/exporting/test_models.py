import pytest
import torch
from small_run import commit, small_flow

from eiwtrain import checkpoints, export, flow
from eiwtrain.exporting import models


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "tiny"
    for step, bits in ((3, 5.5), (6, 4.5), (9, None)):
        commit(root, step, bits)
    return root


def is_of_step(model, step):
    expected = small_flow(seed=step).state_dict()
    return all(torch.equal(t, expected[name]) for name, t in model.flow.state_dict().items())


def test_a_model_opens_from_whatever_one_has_of_it(root, tmp_path):
    export.main(["3", "--run", str(root), "--output", str(tmp_path / "m"), "--no-register"])
    export.main(["3", "--run", str(root), "--output", "memory://models/three", "--no-register"])
    newest = checkpoints.newest(str(root))
    for name, step in (
        (str(root), 6),  # the best
        (newest.url, 9),
        (newest.url + "/", 9),
        (str(tmp_path / "m"), 3),
        ("memory://models/three", 3),
    ):
        model = models.open_model(name)
        assert is_of_step(model, step)
        assert model.metadata["step"] == step
        assert not model.flow.training


def test_of_a_run_that_was_never_evaluated_the_newest_opens(tmp_path):
    for step in (3, 6):
        commit(tmp_path / "r", step, None)
    assert is_of_step(models.open_model(str(tmp_path / "r")), 6)
    with pytest.raises(ValueError, match="no checkpoint 'best'"):
        models.choose("best", str(tmp_path / "r"))


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither an exported model nor a checkpoint nor a run"):
        models.open_model(str(tmp_path))
    (tmp_path / flow.MODEL_FILE).write_bytes(b"PK\x03\x04 not this")
    with pytest.raises(ValueError, match="not a safetensors file"):
        models.open_model(str(tmp_path))


def test_the_metadata_says_where_a_model_comes_from(root):
    known = models.metadata_of(models.choose("best", str(root)))
    assert known["checkpoint"] == "step-00000006-00000006"
    assert (known["run"], known["step"], known["samples_seen"]) == ("tiny", 6, 48)
    assert (known["eval_bits_per_dim"], known["eval_standard_error"], known["eval_images"]) == (4.5, 0.01, 8)
    assert (known["workers"], known["wall_seconds"], known["eval_split"]) == (2, 7200.0, "test")
    assert known["training"]["global_batch"] == 8


def test_a_registered_model_without_an_mlflow_says_what_to_set_and_makes_no_database(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(ValueError, match="set MLFLOW_TRACKING_URI"):
        models.open_model("models:/nobody@best")
    assert not list(tmp_path.iterdir())
