import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas
import pytest
import torch
import yaml
from helpers import DENSE
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.proto_json_utils import parse_tf_serving_input
from PIL import Image
from small_run import commit, export_model, small_flow, tracked

from eiwtrain import export, flow, storage
from eiwtrain.exporting import assemble, models, pyfunc

WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({hidden}))  # None there: it cannot be imported, and is found to be missing
sys.path.insert(0, {root!r})
"""


def run_without(hidden, code, folder):
    """Run the code in a process that cannot import these packages."""
    code = WITHOUT.format(hidden=set(hidden), root=str(Path(flow.__file__).parents[2])) + code
    return subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run of three checkpoints, of which the second is the best."""
    root = tmp_path_factory.mktemp("runs") / "tiny"
    for step, bits in ((3, 5.5), (6, 4.5), (9, 5.0)):
        commit(root, step, bits)
    return root


@pytest.fixture(scope="module")
def folder(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert export.main(["best", "--run", str(root), "--output", str(folder), "--no-register"]) == 0
    return folder


def pixels(n=5, seed=1):
    return torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("which", "step"), [("best", 6), ("last", 9), ("3", 3)])
def test_the_checkpoint_that_was_asked_for_is_exported(root, tmp_path, which, step):
    assert export.main([which, "--run", str(root), "--output", str(tmp_path / "m"), "--no-register"]) == 0
    assert flow.metadata(tmp_path / "m")["step"] == step


def test_a_run_is_named_by_its_name_too_and_its_models_have_a_place(root):
    assert export.main(["last", "--run", "tiny", "--storage", str(root.parent), "--no-register"]) == 0
    assert flow.metadata(root / "exported" / "step-00000009-00000009")["step"] == 9


def test_an_exported_model_has_the_bits_of_the_trained_one(folder):
    noise = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    expected = small_flow(seed=6).bits_per_dim(pixels(), noise)
    assert torch.equal(flow.load(folder).bits_per_dim(pixels(), noise), expected)
    assert torch.equal(models.open_model(str(folder)).flow.bits_per_dim(pixels(), noise), expected)


def test_the_weights_load_where_only_torch_and_safetensors_are(folder, tmp_path):
    dense = small_flow(**DENSE)
    flow.save(dense, tmp_path / "dense")
    code = f"""
import torch
from eiwtrain import flow
g = torch.Generator().manual_seed
pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=g(1))
noise = torch.rand(5, 3, 8, 8, generator=g(2))
torch.set_num_threads({torch.get_num_threads()})
print(flow.load({str(folder)!r}).bits_per_dim(pixels, noise).tolist())
dense = flow.load("dense")
print(dense.bits_per_dim(pixels, torch.rand(5, *dense.config.noise_shape, generator=g(2))).tolist())
"""
    done = run_without(["mlflow", "numpy", "fsspec", "yaml", "pydantic", "PIL", "ray", "deepspeed"], code, tmp_path)
    noise = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    expected = small_flow(seed=6).bits_per_dim(pixels(), noise).tolist()
    noise = torch.rand(5, *dense.config.noise_shape, generator=torch.Generator().manual_seed(2))
    expected = [expected, dense.bits_per_dim(pixels(), noise).tolist()]
    assert list(map(json.loads, done.stdout.splitlines())) == expected, done.stderr[-2000:]  # to the last bit


def test_loading_a_model_runs_only_code_that_is_installed(folder, tmp_path):
    copy, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(folder, copy)
    assert yaml.safe_load((copy / "MLmodel").read_text())["flavors"]["python_function"]["code"] is None
    for planted in ("code/eiwtrain", "code/eiwtrain/exporting", "eiwtrain"):
        (copy / planted).mkdir(parents=True)
        for name in ("__init__.py", "pyfunc.py"):
            (copy / planted / name).write_text(f"open({str(ran)!r}, 'w')\n")
    load = f"import mlflow; mlflow.pyfunc.load_model({str(copy)!r}); print('loaded')"
    done = run_without([], load, tmp_path)
    assert done.stdout == "loaded\n", done.stderr[-2000:]
    without = run_without(["eiwtrain"], load, tmp_path)
    assert without.stderr.splitlines()[-1].startswith("ModuleNotFoundError: ")
    assert not ran.exists()


def test_an_image_scores_the_same_at_any_place_of_any_batch(folder):
    model = mlflow.pyfunc.load_model(str(folder))
    images = pixels(70).permute(0, 2, 3, 1).contiguous().numpy()
    scores = model.predict(images)
    assert scores.dtype == np.float32
    assert (model.predict(images) == scores).all()
    noise = torch.rand(70, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    other_draw = small_flow(seed=6).bits_per_dim(pixels(70), noise).detach()
    np.testing.assert_allclose(scores, other_draw, atol=0.1)  # near, not the same
    np.testing.assert_allclose(model.predict(images[::-1].copy()), scores[::-1], rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([model.predict(images[i : i + 1]) for i in range(3)]), scores[:3], 1e-5)
    assert (model.predict(images, params={"seed": 1}) != scores).mean() > 0.9
    flow_, cpu = small_flow(seed=6), torch.device("cpu")
    draws = list(pyfunc._noises(images, (3, 8, 8), 4, 3, cpu))
    assert all(0 <= float(d.min()) < 0.01 and 0.99 < float(d.max()) < 1 for d in draws)
    assert not any(torch.equal(draws[0], d) for d in draws[1:])
    expected = flow.bits_per_dim(flow_.iwbo(pixels(70), draws), flow_.dims).detach()
    np.testing.assert_allclose(model.predict(images, params={"draws": 4, "seed": 3}), expected, 1e-5)
    assert model.predict(images[:0]).shape == (0,)


@pytest.mark.parametrize("draws", [1, 3])
def test_a_flow_in_which_noise_joins_is_scored_over_all_of_it(draws):
    dense = small_flow(**DENSE)
    images = pixels(3).permute(0, 2, 3, 1).contiguous().numpy()
    given = {"draws": draws, "seed": 2}
    noises = list(pyfunc._noises(images, dense.config.noise_shape, draws, 2, torch.device("cpu")))
    assert noises[0].shape[1] > dense.dims
    expected = flow.bits_per_dim(dense.iwbo(pixels(3), noises), dense.dims).detach()
    np.testing.assert_allclose(pyfunc.Scorer(dense).predict(images, given), expected, 1e-5)


def test_predict_says_what_it_takes(folder, tmp_path):
    model = mlflow.pyfunc.load_model(str(folder))
    images = pixels(2).permute(0, 2, 3, 1).contiguous().numpy()
    with pytest.raises(Exception, match="uint8"):
        model.predict(images.astype(np.float32))
    with pytest.raises(Exception, match="whole numbers from 0 to 255"):
        model.predict(pandas.DataFrame({"image": [(i / 255).ravel().tolist() for i in images]}))
    with pytest.raises(Exception, match="draws: 0"):
        model.predict(images, params={"draws": 0})
    export_model(small_flow(classes=2), tmp_path / "classes", step=1)
    conditional = mlflow.pyfunc.load_model(str(tmp_path / "classes"))
    with pytest.raises(Exception, match="a class from 0 to 1 for each of 2 images"):
        conditional.predict(images)
    with pytest.raises(Exception, match="a class from 0 to 1"):
        conditional.predict(images, params={"labels": [0, 2]})
    scores = conditional.predict(images, params={"labels": [0, 1]})
    assert scores.shape == (2,)


@pytest.mark.parametrize("key", ["inputs", "instances"])
def test_a_request_of_other_numbers_than_pixels_is_refused(folder, key):
    schema = mlflow.pyfunc.load_model(str(folder)).metadata.get_input_schema()
    images = pixels(2).permute(0, 2, 3, 1).contiguous().numpy()
    for fine in (images.tolist(), images.astype(np.float64).tolist()):
        assert (parse_tf_serving_input({key: fine}, schema) == images).all()
    for wrong in (images / 255.0, images + 0.5, images * 1.0 - 1, images * 2.0, images * np.nan, images > 9):
        with pytest.raises(MlflowException, match="whole numbers from 0 to 255"):
            parse_tf_serving_input({key: wrong.tolist()}, schema)


def test_nothing_in_the_folder_is_pickled_and_the_weights_are_there_once(folder):
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    assert {p.rpartition(".")[2] for p in files} == {"safetensors", "json", "md", "png", "yaml", "txt", "MLmodel"}
    assert [p for p in files if p.endswith(".safetensors")] == ["model.safetensors"]
    described = mlflow.models.Model.load(str(folder))
    assert described.model_size_bytes == pytest.approx(sum(files.values()), rel=0.01)
    assert [str(i.shape) for i in described.signature.inputs] == ["(-1, 8, 8, 3)"]
    assert described.load_input_example(str(folder)).shape == (2, 8, 8, 3)
    assert Image.open(folder / "samples.png").width > 500
    requirements = (folder / "requirements.txt").read_text().split()
    assert sorted(r.split("==")[0] for r in requirements) == ["eiwtrain", "mlflow", "numpy", "safetensors", "torch"]
    assert not any("+" in r for r in requirements)


class Interrupted(Exception):
    pass


def test_an_export_that_is_cut_short_at_any_file_is_no_model(root, tmp_path, monkeypatch):
    with assemble.assembled(small_flow(), {"step": 1}) as folder:
        assemble.publish(folder, str(tmp_path / "whole"))
        count = len(storage.find(str(folder)))
        target = tmp_path / "cut"
        assemble.publish(folder, str(target))
        for files in range(count):
            left = iter(range(files))

            def put(local, url, left=left):
                if next(left, None) is None:
                    raise Interrupted
                Path(url).parent.mkdir(parents=True, exist_ok=True)
                Path(url).write_bytes(Path(local).read_bytes())

            with monkeypatch.context() as patch:
                patch.setattr(storage, "put_file", put)
                with pytest.raises(Interrupted):
                    assemble.publish(folder, str(target))
            assert not (target / "MLmodel").exists()
            if (target / "model.safetensors").exists():  # then all is there that it needs
                assert files == count - 1
                assert (target / "README.md").exists()
                flow.load(target)
        assemble.publish(folder, str(target))
    assert {n for n, _ in storage.find(str(target))} == {n for n, _ in storage.find(str(tmp_path / "whole"))}


def test_a_folder_with_files_of_the_user_is_not_written_into(root, tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    assert export.main(["best", "--run", str(root), "--output", str(tmp_path), "--no-register"]) == 2
    assert capsys.readouterr().err == f"error: --output: {tmp_path} is not empty; name another folder\n"
    assert [f.name for f in tmp_path.iterdir()] == ["README.md"]


def test_another_model_is_not_written_over(root, tmp_path, capsys):
    output = str(tmp_path / "m")
    command = ["--run", str(root), "--output", output, "--no-register"]
    assert export.main(["best", *command]) == 0
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert export.main(["last", *command]) == 2
    assert (
        capsys.readouterr().err
        == f"error: --output: {output} holds another model; name another folder, or delete it first\n"
    )
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert export.main(["best", *command]) == 2
    assert "holds an export of this checkpoint" in capsys.readouterr().err
    assert export.main(["best", *command, "--overwrite"]) == 0
    assert export.main(["last", *command, "--overwrite"]) == 2


def test_what_cannot_be_exported_says_so_in_one_line_and_writes_nothing(root, tmp_path, capsys):
    commit(tmp_path / "bad", 1, 3.0)
    (part,) = (tmp_path / "bad").rglob("*.safetensors")
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    cases = [
        (["best", "--run", str(tmp_path / "none")], "no checkpoint 'best'"),
        (["4", "--run", str(root)], "committed: [9, 6, 3]"),
        (["best", "--run", str(tmp_path / "bad")], "part-0.safetensors"),
        (["best", "--run", str(root), "--register", "a/b"], "--register: 'a/b'"),
    ]
    for arguments, words in cases:
        assert export.main([*arguments, "--output", str(tmp_path / "m")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert words in line
        assert not (tmp_path / "m").exists()


def test_the_command_registers_under_the_name_of_the_run(root, tmp_path, monkeypatch, capsys):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_id = tracked(uri, tmp_path / "artifacts")
    run = tmp_path / "mine"
    commit(run, 2, 4.0, mlflow_run_id=run_id)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert export.main(["last", "--run", str(run)]) == 0  # in the database beside the run
    assert "registered as models:/mine/1; mine@best names it now: the first" in capsys.readouterr().out
    version = MlflowClient(uri).get_model_version_by_alias("mine", "best")
    assert version.run_id == run_id
    assert export.main(["last", "--run", str(run), "--overwrite"]) == 0
    assert "was registered before as models:/mine/1; it is mine@best" in capsys.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    other = ["--register", "other", "--tracking-uri", uri]
    assert export.main(["last", "--run", str(run), "--overwrite", *other]) == 0
    assert "models:/other/1" in capsys.readouterr().out


def test_when_mlflow_is_away_the_model_is_there_and_a_line_says_how_to_register_it(tmp_path, monkeypatch, capsys):
    run = tmp_path / "mine"
    commit(run, 2, 4.0)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for where in (["--tracking-uri", "http://127.0.0.1:9"], []):
        output = str(tmp_path / f"m{len(where)}")
        assert export.main(["last", "--run", str(run), "--output", output, *where]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("not registered: ")
        assert f"python -m eiwtrain.export 2 --run {run} --output {output} --overwrite --register mine" in line
        assert flow.metadata(output)["step"] == 2
    assert not (tmp_path / "mlflow.db").exists()
