import dataclasses
import time

import pytest
import torch
from small_run import commit, small_flow

from eiwtrain import checkpoints, data, evaluate, export, flow, sample, storage
from eiwtrain.exporting import assemble, models, pyfunc


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


def test_the_file_of_a_model_opens_as_its_folder_does(root, tmp_path):
    model = small_flow(seed=3)
    flow.save(model, tmp_path / "m", {"step": 3})
    file = tmp_path / "m" / flow.MODEL_FILE
    storage.put_file(file, "memory://models/renamed.safetensors")
    for name in (str(file), f"file://{file}", "memory://models/renamed.safetensors"):
        opened = models.open_model(name)
        assert is_of_step(opened, 3)
        assert opened.metadata["step"] == 3
    with pytest.raises(ValueError, match="no such file"):
        models.open_model("memory://models/absent.safetensors")
    for wrong in (file.with_name("config.json"), file.with_name("absent.safetensors")):
        assert sample.main([str(wrong), "--output", str(tmp_path / "x.png")]) == 2


def altered(root, step, **changes):
    """Return the URL of a checkpoint whose manifest says something else."""
    saved = checkpoints.newest(str(root))
    state = saved.state | {key: value for key, value in changes.items() if key in saved.state or key == "config"}
    changed = dataclasses.replace(saved, state=state)
    storage.write_bytes(storage.join(saved.url, checkpoints.MANIFEST), checkpoints.render(changed))
    return saved.url


@pytest.mark.parametrize(
    "changes",
    [
        {"flow": {"steps": 10**9}},
        {"flow": {"steps": 60_000}},
        {"flow": {"levels": 10**12}},
        {"flow": None},
        {"flow": {"image_shape": 3}},
        {"config": {}},
        {"config": {"run": None}},
        {"config": [1]},
        {"score": 3},
        {"eval_bits_per_dim": "x"},
        {"clock": 1},
    ],
    ids=str,
)
def test_a_checkpoint_that_describes_something_else_is_one_line_at_once(root, tmp_path, capsys, changes):
    commit(tmp_path / "r", 3, 5.5)
    if isinstance(changes.get("flow"), dict):
        changes = {"flow": small_flow().config.to_dict() | changes["flow"]}
    url, began = altered(tmp_path / "r", 3, **changes), time.monotonic()
    assert sample.main([url, "--output", str(tmp_path / "x.png")]) == 2
    assert export.main(["last", "--run", str(tmp_path / "r"), "--output", str(tmp_path / "m"), "--no-register"]) == 2
    assert time.monotonic() - began < 20
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 2
    assert not (tmp_path / "m").exists()


def test_weights_that_are_not_finite_are_no_model(tmp_path, capsys):
    model = small_flow(seed=3)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = torch.inf
    commit(tmp_path / "r", 3, 5.5, model)
    flow.save(model, tmp_path / "m")
    with pytest.raises(ValueError, match="not finite"):
        pyfunc._load_pyfunc(str(tmp_path / "m"))
    assert export.main(["best", "--run", str(tmp_path / "r"), "--output", str(tmp_path / "e"), "--no-register"]) == 2
    for name in (tmp_path / "r", tmp_path / "m"):
        assert evaluate.main([str(name), "--data", str(tmp_path / "nowhere")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert all("weights are not finite" in line for line in said)
    assert not (tmp_path / "e").exists()


def test_facts_of_other_types_are_left_out(tmp_path):
    facts = {"step": "ten", "data": ["x"], "class_names": [1], "eval_bits_per_dim": True, "own": [1], "run": "r"}
    flow.save(small_flow(), tmp_path / "m", facts)
    assert models.open_model(str(tmp_path / "m")).metadata == {"own": [1], "run": "r"}


@pytest.mark.parametrize("url", ["reference://x", "http://127.0.0.1:1/x", "simplecache::s3://b/x", "memory://data"])
def test_the_data_set_that_a_checkpoint_names_elsewhere_is_not_opened(tmp_path, monkeypatch, url):
    monkeypatch.setattr(data, "load_manifest", lambda url: pytest.fail(f"{url} was opened"))
    commit(tmp_path / "r", 3, 5.5)
    saved = checkpoints.newest(str(tmp_path / "r"))
    saved.state["config"]["data"]["path"] = url
    assert assemble.manifest_of(saved) is None


def test_a_part_of_a_checkpoint_is_a_file_of_its_folder(tmp_path):
    for number, name in enumerate(("../../x", "/etc/passwd", "a::http://x", "..")):
        root = tmp_path / f"r{number}"
        commit(root, 3, 5.5)
        saved = checkpoints.newest(str(root))
        changed = dataclasses.replace(saved, parts=(dataclasses.replace(saved.parts[0], name=name),))
        storage.write_bytes(storage.join(saved.url, checkpoints.MANIFEST), checkpoints.render(changed))
        with pytest.raises(checkpoints.DamagedCheckpoint, match="names no file of this folder"):
            checkpoints.at(saved.url)


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
