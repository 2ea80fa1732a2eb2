import io
import json
from dataclasses import astuple
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import DENSE
from score_sets import noise, reader, smooth, trained_flow, write_set
from small_run import export_model, small_flow

from eiwtrain import data, evaluate, flow, storage
from eiwtrain.scoring import evaluation, scores, yardsticks
from eiwtrain.scoring.estimator import Estimator, estimator_of
from eiwtrain.scoring.score_table import score_images


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A flow, a copy of it as a folder, and data sets: its own, one of noise, one of larger images."""
    folder = tmp_path_factory.mktemp("scores")
    held_out = write_set(folder / "soft", smooth(20))
    model = trained_flow()
    about = {"data": "soft", "data_fingerprint": data.load_manifest(held_out).fingerprint, "train_split": "train"}
    export_model(model, folder / "model", step=60, **about)
    return SimpleNamespace(
        folder=folder,
        model=model,
        exported=str(folder / "model"),
        soft=held_out,
        noise=write_set(folder / "noise", noise(20)),
        large=write_set(folder / "large", smooth(3, size=16)),
    )


def run(capsys, *args):
    """What the command prints."""
    assert evaluate.main(list(map(str, args))) == 0
    return capsys.readouterr().out


def table(url):
    return pq.read_table(io.BytesIO(storage.read_bytes(url)))


def test_printed_json_and_parquet_figures_are_one(here, tmp_path, capsys):
    out = run(
        capsys, here.exported, "--data", here.soft, "--json", tmp_path / "r.json", "--scores", "memory://c/s.parquet"
    )
    result = json.loads((tmp_path / "r.json").read_text())
    (of_set,) = result["sets"]
    rows = table("memory://c/s.parquet")
    bits = np.array(rows["bits_per_dim"])
    assert len(bits) == 20
    assert of_set["bits_per_dim"] == pytest.approx(bits.mean(), rel=1e-12)
    assert of_set["standard_error"] == pytest.approx(bits.std(ddof=1) / 20**0.5, rel=1e-6)
    assert (
        f"bits/dim {bits.mean():.4f} ± {of_set['standard_error']:.4f} (ELBO, one draw of uniform dequantization noise)"
        " on 20 images" in out
    )
    for coder, title in yardsticks.TITLES.items():
        sizes = np.array(rows[f"{coder}_bits_per_dim"])
        images = [reader(here.soft)[i] for i in range(20)]
        assert sizes.tolist() == [yardsticks.bits(image, coder) / image.size for image in images]
        assert of_set[f"{coder}_bits_per_dim"] == pytest.approx(sizes.mean())
        assert f"{title} {sizes.mean():.4f}" in out


def test_a_parquet_file_says_what_was_scored_by_what(here, capsys):
    run(
        capsys,
        here.exported,
        "--data",
        here.soft,
        "--scores",
        "memory://c/about.parquet",
        "--seed",
        "5",
        "--images",
        "9",
    )
    rows = table("memory://c/about.parquet")
    assert rows.column_names == ["index", "label", "bits_per_dim", "png_bits_per_dim", "webp_bits_per_dim"]
    assert rows["index"].to_pylist() == list(range(9))
    assert rows["label"].to_pylist() == [None] * 9
    about = {key.decode(): value.decode() for key, value in rows.schema.metadata.items()}
    fingerprint = data.load_manifest(here.soft).fingerprint
    assert about == {
        "model": here.exported, "step": "60", "seed": "5", "draws": "1", "n_bits": "8",
        "estimator": "ELBO, one draw of uniform dequantization noise",
        "data": "soft", "fingerprint": fingerprint, "split": "test",
    }  # fmt: skip


def test_the_command_and_the_training_loop_score_alike(here):
    scored = score_images(here.model, reader(here.soft), images=100, batch=6)
    in_training = scores.score(here.model, data.eval_batches(reader(here.soft), images=100, seed=0, micro_batch=6))
    assert astuple(scores.mean(torch.from_numpy(scored.bound))) == pytest.approx(astuple(in_training))


@pytest.mark.parametrize("batch", [1, 6, 20, 64])
def test_the_batch_size_changes_neither_noise_nor_scores(here, batch):
    def noise_of(micro_batch):
        batches = data.eval_batches(reader(here.soft), images=100, seed=3, micro_batch=micro_batch)
        return torch.cat([b.noise()[b.indices >= 0] for b in batches])

    assert torch.equal(noise_of(batch), noise_of(7))
    one, other = (score_images(here.model, reader(here.soft), images=100, batch=b, seed=3) for b in (batch, 7))
    assert one.index.tolist() == other.index.tolist() == list(range(20))
    np.testing.assert_allclose(one.bound, other.bound, rtol=1e-5)
    again = score_images(here.model, reader(here.soft), images=100, batch=7, seed=4)
    assert abs(again.bound - other.bound).min() > 1e-4


def test_iwbo_comes_beside_the_same_one_sample_bound(here, capsys):
    alone = run(capsys, here.exported, "--data", here.soft)
    out = run(capsys, here.exported, "--data", here.soft, "--iwbo", 3, "--scores", "memory://c/iwbo.parquet")
    assert out.splitlines()[1] == alone.splitlines()[1]
    rows = table("memory://c/iwbo.parquet")
    bounds = np.array(rows["iwbo_bits_per_dim"])
    assert f"bits/dim {bounds.mean():.4f} ± {bounds.std(ddof=1) / 20**0.5:.4f} (IWBO(3), 3 draws of uniform" in out
    draws = [next(data.eval_batches(reader(here.soft), images=20, seed=0, micro_batch=20, draw=n)) for n in range(3)]
    with torch.no_grad():
        bound = here.model.iwbo(draws[0].images.contiguous(), [draw.noise() for draw in draws])
    np.testing.assert_allclose(bounds, flow.bits_per_dim(bound, here.model.dims), rtol=1e-5)


@pytest.mark.parametrize("classes", [0, 2])
def test_draws_in_one_forward_pass_change_rounding_alone(here, classes):
    set_, model = here.soft, small_flow(**DENSE, classes=classes)
    if classes:
        set_ = write_set(here.folder / "in-classes", smooth(7), ("cat", "dog"))
    alone, *together = (
        score_images(model, reader(set_), images=7, batch=3, draws=5, at_once=at_once) for at_once in (1, 2, 5, 9)
    )
    assert (alone.bound != alone.first_draw).all()
    for other in together:
        np.testing.assert_allclose(other.bound, alone.bound, rtol=1e-5)
        np.testing.assert_allclose(other.first_draw, alone.first_draw, rtol=1e-5)


def test_an_image_is_read_once_whatever_the_number_of_draws(here, monkeypatch):
    images, read = reader(here.soft), []
    read_into = images.read_into
    monkeypatch.setattr(images, "read_into", lambda to, which: (read.extend(which), read_into(to, which))[1])
    score_images(here.model, images, images=9, batch=4, draws=3)
    assert sorted(set(read)) == list(range(9))
    assert len(read) == 9


def test_estimators_have_their_name_and_draws_in_every_output(here, tmp_path, capsys):
    export_model(small_flow(**DENSE), here.folder / "dense", step=1)
    args = [here.folder / "dense", "--data", here.soft, "--images", 3, "--iwbo", 4, "--batch-draws", 2]
    out = run(capsys, *args, "--json", tmp_path / "r.json", "--scores", tmp_path / "s.parquet")
    result, about = json.loads((tmp_path / "r.json").read_text()), table(str(tmp_path / "s.parquet")).schema.metadata
    for key, name, draws in (("estimator", "ELBO", 1), ("iwbo_estimator", "IWBO(4)", 4)):
        assert (result[key]["name"], result[key]["draws"]) == (name, draws)
        assert str(Estimator(**result[key])) in out
        assert about[key.encode()].decode() == str(Estimator(**result[key]))
    assert "variational" in result["estimator"]["noise"]
    assert "joins" in result["estimator"]["noise"]
    assert "joins" not in estimator_of(here.model.config).noise
    assert result["sets"][0]["iwbo_bits_per_dim"] < result["sets"][0]["bits_per_dim"]


def test_a_variational_model_of_five_bits_is_scored_as_such(here, capsys):
    model = trained_flow(steps=1, dequantization="variational", n_bits=5)
    export_model(model, here.folder / "five")
    out = run(capsys, here.folder / "five", "--data", here.soft)
    assert "(ELBO, one draw of variational dequantization noise, of 5-bit images)" in out
    coders = yardsticks.bits_per_dim((reader(here.soft)[i] for i in range(20)), n_bits=5)
    assert f"PNG {coders['png']:.4f}, WebP {coders['webp']:.4f}" in out


def test_labels_of_a_class_conditional_model_are_in_the_table(here, capsys):
    export_model(trained_flow(steps=1, classes=2), here.folder / "two")
    classes = write_set(here.folder / "classes", smooth(6), ("cat", "dog"))
    run(capsys, here.folder / "two", "--data", classes, "--scores", "memory://c/two.parquet")
    assert sorted(table("memory://c/two.parquet")["label"].to_pylist()) == [0, 0, 0, 1, 1, 1]


def test_it_says_when_the_model_was_trained_on_other_data_or_on_these_images(here, capsys):
    assert "note" not in run(capsys, here.exported, "--data", here.soft)
    own, other = (data.load_manifest(url).fingerprint[:12] for url in (here.soft, here.noise))
    out = run(capsys, here.exported, "--data", here.noise)
    assert f"trained on another data set: soft (fingerprint {own}), these images are of noise ({other})" in out
    out = run(capsys, here.exported, "--data", here.soft, "--split", "train")
    assert "note: the model was trained on these images: split train of soft" in out


def test_a_model_and_data_may_be_anywhere(here, capsys):
    for name in ("model.safetensors", "config.json"):
        storage.put_file(here.folder / "model" / name, f"memory://c/model/{name}")
    for name in storage.listdir(here.soft):
        storage.put_file(f"{here.soft}/{name}", f"memory://c/soft/{name}")
    there = run(capsys, "memory://c/model", "--data", "memory://c/soft")
    assert there.replace("memory://c/model", here.exported) == run(capsys, here.exported, "--data", here.soft)


def test_it_says_which_checkpoint_was_scored(here, capsys):
    out = run(capsys, here.exported, "--data", here.soft)
    assert out.splitlines()[0] == f"model: {here.exported}, step 60, trained on soft"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["--data", "LARGE"],
            "--data: images of large are 3x16x16, and the model takes 3x8x8; python -m data_prep",
        ),
        (["--data", "LARGE"], "--resolution 8 writes such"),
        (["--against", "LARGE"], "--against: images of large are 3x16x16, and the model takes 3x8x8"),
        (["--split", "val"], "--data: data set 'soft' has no split 'val'; it has train, test"),
        (["--against", "SOFT", "--against-split", "val"], "--against: data set 'soft' has no split 'val'"),
        (["--iwbo", "0"], "--iwbo: 0 is too few"),
        (["--batch", "0"], "--batch: 0 is too few"),
        (["--images", "0"], "--images: 0 is too few"),
        (["--complexity", "png"], "--complexity: it goes with --against"),
        (["--histogram", "h.png"], "--histogram: it goes with --against"),
        (["--fid-samples", "8"], "--fid-samples: it goes with --fid-weights"),
        (["--temperature", "0.7"], "--temperature: it goes with --fid-weights"),
        (["--fid-weights", "w.pth", "--temperature", "nan"], "--temperature: nan is not a number above 0"),
        (["--scores", "nowhere://bucket/s.parquet"], "--scores: nowhere://bucket"),
        (["--json", "MODEL/config.json/r.json"], "config.json"),
        (["--json", "MODEL"], "--json: MODEL: this is a folder; give the name of a file"),
    ],
)
def test_what_cannot_work_is_said_in_one_line_before_anything_is_scored(args, words, here, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "score_images", None)
    places = {"LARGE": here.large, "SOFT": here.soft, "MODEL": here.exported}
    for name, place in places.items():
        args, words = [arg.replace(name, place) for arg in args], words.replace(name, place)
    args = [*args, *([] if "--data" in args else ["--data", here.soft])]
    assert evaluate.main([here.exported, *args]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not captured.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(here, capsys):
    assert evaluate.main([here.exported, "--data", here.soft, "--device", "cuda"]) == 2
    assert "--device: cuda was asked for, and PyTorch finds no GPU" in capsys.readouterr().err


def test_a_class_conditional_model_cannot_tell_a_set_of_other_classes(here, capsys):
    export_model(trained_flow(steps=1, classes=2), here.folder / "pets")
    pets = write_set(here.folder / "pets-data", smooth(6), ("cat", "dog"))
    cars = write_set(here.folder / "cars-data", smooth(6), ("car", "bus"))
    assert evaluate.main([str(here.folder / "pets"), "--data", pets, "--against", cars]) == 2
    assert "--against: the model scores an image under its class" in capsys.readouterr().err
