import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import free_port, tiny_config, write_shards

from eiwtrain.config import Config, ConfigError
from eiwtrain.driver import preflight


def config(folder, **sections):
    return Config.model_validate(tiny_config(folder, **sections))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preflight")
    write_shards(folder / "data")
    return folder


def test_a_good_data_set_is_found(folder):
    manifest = preflight.find_data(config(folder))
    assert manifest is not None
    assert manifest.resolution == 8


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"path": "/nowhere"}, ["data.path", "/nowhere", "data_prep"]),
        ({"resolution": 16}, ["data.resolution", "8 pixels", "data.resolution=8"]),
        ({"eval_split": "val"}, ["data.eval_split", "'val'", "test", "train"]),
        ({"train_split": "tain"}, ["data.train_split", "'tain'"]),
    ],
)
def test_data_that_does_not_fit_is_one_line(folder, data, words):
    with pytest.raises(ConfigError) as e:
        preflight.find_data(config(folder, data=data))
    assert len(str(e.value).splitlines()) == 1
    assert [w for w in words if w not in str(e.value)] == []


@pytest.mark.parametrize(("classes", "right"), [(2, None), (0, None), (3, "model.classes=2")])
def test_a_model_has_as_many_classes_as_its_data_or_none(folder, classes, right):
    conditional = config(folder, model={"classes": classes})
    if right is None:
        assert preflight.find_data(conditional) is not None
        return
    with pytest.raises(ConfigError, match=right):
        preflight.find_data(conditional)


def test_absent_data_that_can_be_prepared_is_no_error(folder):
    assert preflight.find_data(config(folder, data={"path": "/nowhere", "prepare": "photos"})) is None


def test_missing_gpus_are_refused_here_but_not_on_a_cluster(folder, monkeypatch):
    monkeypatch.setattr(preflight, "gpus_here", lambda: 1)
    monkeypatch.setattr(preflight, "torch_build", lambda: {"cuda": "12.6"})
    with pytest.raises(ConfigError, match=r"workers.gpus: 1 for each of 2 workers, but this machine has 1; use"):
        preflight.check_gpus(config(folder, workers={"gpus": 1}), joins_cluster=False)
    preflight.check_gpus(config(folder, workers={"gpus": 1}), joins_cluster=True)
    preflight.check_gpus(config(folder, workers={"gpus": 1, "min": 1}), joins_cluster=False)
    preflight.check_gpus(config(folder), joins_cluster=False)


def test_torch_without_cuda_is_refused_but_not_on_a_cluster(folder, monkeypatch):
    monkeypatch.setattr(preflight, "gpus_here", lambda: 2)
    monkeypatch.setattr(preflight, "torch_build", lambda: {"cuda": None, "__version__": "2.13.0+cpu"})
    with pytest.raises(ConfigError, match=r"workers.gpus: 1, .* torch .* 2\.13\.0\+cpu, .* without CUDA; .*pip") as e:
        preflight.check_gpus(config(folder, workers={"gpus": 1}), joins_cluster=False)
    assert len(str(e.value).splitlines()) == 1
    preflight.check_gpus(config(folder, workers={"gpus": 1}), joins_cluster=True)
    preflight.check_gpus(config(folder), joins_cluster=False)


def test_how_torch_was_built_is_known_without_importing_it():
    code = "import sys; from eiwtrain.driver.preflight import torch_build; found = torch_build();"
    code += "assert 'torch' not in sys.modules; print(found['cuda'], found['__version__'])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert printed == [str(torch.version.cuda), str(torch.__version__)]


def test_gpus_hidden_from_this_process_do_not_count(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert preflight.gpus_here() == 0


def test_a_split_without_images_is_named(folder, monkeypatch):
    manifest = preflight.load_manifest(str(folder / "data"))
    empty = dataclasses.replace(manifest.splits["test"], samples=0)
    monkeypatch.setattr(
        preflight, "load_manifest", lambda url: dataclasses.replace(manifest, splits=manifest.splits | {"test": empty})
    )
    with pytest.raises(ConfigError, match=r"data.eval_split: 'test' of .* has no images"):
        preflight.find_data(config(folder))


def test_a_cluster_that_does_not_answer_is_one_line(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS: nothing answers at 127.0.0.1:\d+"):
        preflight.check_cluster()
    monkeypatch.setenv("RAY_ADDRESS", "")
    preflight.check_cluster()


def test_storage_that_cannot_be_written_is_one_line(folder, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"run.storage: .*file") as e:
        preflight.check_storage(config(folder, run={"storage": str(tmp_path / "file")}))
    assert len(str(e.value).splitlines()) == 1


def test_a_folder_for_copies_that_is_not_safe_here_is_one_line(folder, tmp_path, monkeypatch):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    given = config(folder, checkpoint={"near": f"{tmp_path}/shared"})
    with pytest.raises(ConfigError, match=r"^checkpoint.near: others may replace folders in .*/shared; ") as e:
        preflight.check_folders(given)
    assert len(str(e.value).splitlines()) == 1
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    preflight.check_folders(given)  # the folder of its nodes may be another


def test_a_run_without_checkpoints_is_new(folder, tmp_path):
    assert preflight.find_checkpoints(config(folder, run={"storage": str(tmp_path)}), None) == []
    assert list(Path(tmp_path).iterdir()) == []


def test_a_bucket_that_does_not_answer_may_pass_and_one_that_refuses_does_not(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("EIWTRAIN_RETRY_SECONDS", "0")
    for name, value in {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_ACCESS_KEY_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    remote = Config.model_validate(tiny_config(tmp_path, run={"name": "x", "storage": "s3://bucket/runs"}))
    with pytest.raises(ConfigError, match=r"run\.storage") as e:
        preflight.check_storage(remote)
    assert e.value.passing
    (tmp_path / "file").touch()
    local = Config.model_validate(tiny_config(tmp_path, run={"name": "x", "storage": str(tmp_path / "file")}))
    with pytest.raises(ConfigError, match=r"run\.storage") as e:
        preflight.check_storage(local)
    assert not e.value.passing
