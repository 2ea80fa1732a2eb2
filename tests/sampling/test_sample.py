import math
import weakref

import numpy as np
import pytest
import torch
from helpers import DENSE, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from small_run import small_flow

from eiwtrain import data, flow, sample, storage
from eiwtrain.sampling import drawing, image_sets, latents, pictures, series

SIZE = 8
CONDITIONER = flow.ConditionerConfig(hidden=8)


class MidQuantum(data.Batch):
    """A batch whose noise is 1/2: what rounds must not lie at a quantum's edge."""

    def noise(self, device=None, shape=None):
        return torch.full((len(self.images), *(shape or self.images.shape[1:])), 0.5)


def tiny_model(spread=0.02, **config):
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = flow.EIWFlow(flow.FlowConfig((3, SIZE, SIZE), levels=2, steps=2, conditioner=CONDITIONER, **config))
    built.initialize(torch.rand(32, 3, SIZE, SIZE, generator=generator) - 0.5)
    with torch.no_grad():
        for p in built.parameters():
            p.add_(spread * torch.randn(p.shape, generator=generator))
    return built.eval()


def dense_model(spread=0.02, **config):
    """An EIW-Flow: it has more latents than the image has numbers."""
    return small_flow(**DENSE, **config)


BOTH = pytest.mark.parametrize("make", [tiny_model, dense_model])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of two classes, and models without classes, with two and with three named ones."""
    folder = tmp_path_factory.mktemp("sample")
    write_shards(folder / "data")
    flow.save(tiny_model(), folder / "model")
    flow.save(tiny_model(0.1, classes=2), folder / "two")
    flow.save(tiny_model(0.1, classes=2), folder / "turned", {"class_names": ["class1", "class0"]})
    flow.save(tiny_model(0.1, classes=3), folder / "three", {"class_names": ["cat", "dog", "emu"]})
    with torch.random.fork_rng():
        grey = flow.FlowConfig((1, SIZE, SIZE), levels=1, steps=1, conditioner=CONDITIONER)
        flow.save(flow.EIWFlow(grey).eval(), folder / "grey")
    return folder


def reader(folder):
    return data.ShardReader(str(folder / "data"), data.load_manifest(str(folder / "data")), "test")


def nearly_equal(a, b):
    """Return whether images are as equal as those decoded in batches of other sizes."""
    difference = (a.int() - b.int()).abs()
    return difference.max() <= 1 and (difference > 0).float().mean() < 0.01


def command(*words):
    return sample.main([str(word) for word in words])


def pixels(path):
    return np.asarray(Image.open(path))


# latents

SEEDS = st.integers(-(2**63), 2**64)
NUMBERS = st.lists(st.integers(0, 2**40), min_size=1, max_size=5)


@given(SEEDS, NUMBERS)
@settings(max_examples=30, deadline=None)
def test_a_latent_depends_on_seed_and_number_alone(seed, numbers):
    together = latents.draw(seed, torch.tensor(numbers), 12)
    alone = torch.cat([latents.draw(seed, torch.tensor([number]), 12) for number in numbers])
    assert torch.equal(together, alone)
    assert torch.isfinite(together).all()
    assert latents.draw(seed, torch.tensor(numbers), 7).shape == (len(numbers), 7)


def test_latents_of_a_seed_are_these_on_every_machine():
    drawn = latents.draw(0, torch.tensor([0, 1]), 4).tolist()
    assert drawn[0] == pytest.approx([-0.4204043, -1.2566206, -0.6581604, -0.4408274], rel=1e-5)
    assert drawn[1] == pytest.approx([-0.8257303, -1.2676984, 0.5608165, -1.0086015], rel=1e-5)


def test_latents_are_independent_standard_normals():
    drawn = latents.draw(3, torch.arange(400), 512).double()
    for moment, expected in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        assert (drawn**moment).mean().item() == pytest.approx(expected, abs=0.05)
    below = torch.tensor([(drawn < z).double().mean() for z in (-2.0, -1.0, 0.5, 1.5)])
    normal = 0.5 * (1 + torch.erf(torch.tensor([-2.0, -1.0, 0.5, 1.5]) / math.sqrt(2)))
    assert (below - normal).abs().max() < 0.005
    others = [drawn[1:], latents.draw(4, torch.arange(399), 512), drawn[:-1].roll(1, 1), drawn[:-1].roll(256, 1)]
    assert all((drawn[:-1] * other).mean().abs() < 0.01 for other in others)


VECTORS = arrays.arrays(np.float32, (1, 6), elements=st.floats(-8, 8, width=32)).filter(
    lambda v: np.linalg.norm(v) > 0.1
)


@given(VECTORS, VECTORS, st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_the_arc_between_latents_ends_at_them_and_is_reversible(a, b, t):
    a, b, t = torch.from_numpy(a), torch.from_numpy(b), torch.tensor([t], dtype=torch.float64)
    assert torch.equal(latents.slerp(a, b, torch.zeros(1)), a)
    assert torch.equal(latents.slerp(a, b, torch.ones(1)), b)
    at = latents.slerp(a, b, t)
    assert torch.isfinite(at).all()
    if torch.nn.functional.cosine_similarity(a, b) > -0.999:
        torch.testing.assert_close(latents.slerp(b, a, 1 - t), at, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(latents.slerp(2 * a, 2 * b, t), 2 * at, rtol=1e-4, atol=1e-3)


def test_the_arc_between_latents_keeps_length_and_pace():
    a, b = (latents.draw(0, torch.tensor([n]), 3072) for n in (0, 1))
    b = b * a.norm() / b.norm()
    way = latents.slerp(a.expand(9, -1), b.expand(9, -1), torch.arange(9) / 8)
    assert way.norm(dim=1).tolist() == pytest.approx([a.norm().item()] * 9, rel=1e-4)
    paces = (way[1:] - way[:-1]).norm(dim=1)
    assert paces.tolist() == pytest.approx([paces[0].item()] * 8, rel=1e-3)


def test_levels_come_apart_and_together():
    model = tiny_model()
    z = latents.draw(0, torch.arange(3), model.dims)
    parts = latents.split(z, model.latent_shapes)
    assert [tuple(part.shape[1:]) for part in parts] == model.latent_shapes
    assert torch.equal(latents.join(parts), z)


# series


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_the_first_samples_are_the_same_however_many_are_drawn(n, batch, seed):
    model = tiny_model()
    many = torch.cat(list(series.render(model, series.samples(model, 12, seed), 0.8, 4)))
    some = torch.cat(list(series.render(model, series.samples(model, n, seed), 0.8, batch)))
    assert some.dtype == torch.uint8
    assert some.shape == (n, 3, SIZE, SIZE)
    assert nearly_equal(some, many[:n])
    if batch == 4 and n % 4 == 0:
        assert torch.equal(some, many[:n])


def test_samples_differ_by_number_and_by_seed():
    model = tiny_model()
    first, again, other = (drawing.sample(model, 3, 0.8, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_temperature_scales_the_same_latents():
    model = tiny_model()
    z = latents.draw(5, torch.arange(4), model.dims)
    for t in (0.5, 1.0):
        expected = model.to_images(model.decode(latents.split(z * t, model.latent_shapes)))
        assert torch.equal(drawing.sample(model, 4, t, 5), expected)


@BOTH
def test_a_model_of_classes_gives_them_in_turn(make):
    model = make(0.1, classes=3)
    z = latents.draw(0, torch.arange(5), latents.dims_of(model.latent_shapes))

    def of(labels):
        return model.to_images(model.decode(latents.split(z, model.latent_shapes), torch.tensor(labels)))

    assert torch.equal(drawing.sample(model, 5, 1.0, 0), of([0, 1, 2, 0, 1]))
    chosen = torch.cat(list(series.render(model, series.samples(model, 5, 0, [2, 0]))))
    assert torch.equal(chosen, of([2, 0, 2, 0, 2]))
    assert not torch.equal(of([0] * 5), of([1] * 5))


@BOTH
def test_rows_between_samples_end_at_samples(make):
    model = make()
    rows = series.between_samples(model, 3, 5, seed=0)
    images = torch.cat(list(series.render(model, rows, 0.7))).reshape(3, 5, 3, SIZE, SIZE)
    ends = drawing.sample(model, 6, 0.7, 0)
    assert nearly_equal(images[:, 0], ends[::2])
    assert nearly_equal(images[:, -1], ends[1::2])
    assert not nearly_equal(images[:, 2], images[:, 0])


def test_both_ends_of_a_row_between_samples_are_of_one_class():
    labels = series.between_samples(tiny_model(classes=3), 4, 2, 0).labels
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 0, 0]


@BOTH
def test_rows_between_images_end_at_the_images(folder, make):
    model = make()
    pairs = MidQuantum(*series.pairs_of(reader(folder), 3, 0, seed=0))
    assert pairs.indices.tolist() == [0, 1, 2, 3, 4, 5]
    rows = series.between_images(model, pairs, 4)
    images = torch.cat(list(series.render(model, rows))).reshape(3, 4, 3, SIZE, SIZE)
    ends = torch.stack((images[:, 0], images[:, -1]), 1).flatten(0, 1)
    assert nearly_equal(ends, pairs.images)
    assert torch.equal(ends, drawing.reconstruct(model, pairs))


def test_pairs_of_images_are_of_one_class_for_a_model_of_classes(folder):
    model, images = tiny_model(0.1, classes=2), reader(folder)
    pairs = series.pairs_of(images, 3, 2, seed=0)
    assert torch.equal(pairs.labels[::2], pairs.labels[1::2])
    assert len(set(pairs.indices.tolist())) == 6
    assert all(torch.equal(image, torch.from_numpy(images[i])) for image, i in zip(*pairs[::2], strict=True))
    first = data.first_batch(images, len(images), 0)
    assert torch.equal(pairs.keys, first.keys[pairs.indices])
    rows = series.between_images(model, MidQuantum(*pairs), 2)
    assert rows.labels.tolist() == pairs.labels.tolist()
    ends = torch.cat(list(series.render(model, rows)))
    assert nearly_equal(ends, pairs.images)


def test_every_image_can_be_in_a_pair_and_none_twice(folder, monkeypatch):
    images = reader(folder)
    monkeypatch.setattr(series, "BATCH", len(images) - 1)  # so that the last batch is mostly padding
    pairs = series.pairs_of(images, len(images) // 2, 0, seed=0)
    assert pairs.indices.tolist() == list(range(len(images) // 2 * 2))
    with pytest.raises(ValueError, match=f"the split has {len(images) // 2}"):
        series.pairs_of(images, len(images) // 2 + 1, 0, seed=0)


def test_images_are_encoded_a_batch_at_a_time(folder, monkeypatch):
    model, seen = tiny_model(), []
    pairs = series.pairs_of(reader(folder), 3, 0, seed=0)
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda x, labels: (seen.append(len(x)), encode(x, labels))[1])
    series.between_images(model, pairs, 2, batch=4)
    assert seen == [4, 2]


# what training asks for


@BOTH
@pytest.mark.parametrize("classes", [0, 2])
def test_reconstructions_are_exact(folder, make, classes):
    batch = MidQuantum(*data.first_batch(reader(folder), 6, seed=0))
    assert set(batch.labels.tolist()) == {0, 1}
    assert torch.equal(drawing.reconstruct(make(0.1, classes=classes), batch), batch.images)


def test_the_overview_shows_two_temperatures_and_reconstructions(folder):
    model = tiny_model()
    batch = MidQuantum(*data.first_batch(reader(folder), 4, seed=0))
    shown = [drawing.sample(model, 4, t, 0) for t in (0.7, 1.0)] + [batch.images, batch.images]
    titles = ["samples, temperature 0.7", "samples, temperature 1", "held-out images", "their reconstructions"]
    expected = pictures.grid(list(zip(titles, shown, strict=True)))
    assert drawing.overview(model, batch, 4, (0.7, 1.0), 0).tobytes() == expected.tobytes()


def test_the_overview_shows_held_out_images_with_the_bits_of_the_model(folder):
    batch = MidQuantum(*data.first_batch(reader(folder), 4, seed=0))
    picture = np.asarray(drawing.overview(tiny_model(n_bits=3), batch, 4, (0.7, 1.0), 0))
    quarter = picture.shape[0] // 4
    assert set(np.unique(picture[2 * quarter + 25 : 3 * quarter - 5, 5:60])) <= {32 * v for v in range(8)} | {255}


# the command


def test_the_command_draws_a_grid(folder, tmp_path, capsys):
    for name in ("a.png", "b.png"):
        assert command(folder / "model", "--n", 9, "--temperature", 0.7, "--output", tmp_path / name) == 0
    out, err = capsys.readouterr()
    assert "9 images (samples, temperature 0.7), seed 0" in out
    assert err == ""
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    drawn = drawing.sample(tiny_model(), 9, 0.7, 0)
    assert (pixels(tmp_path / "a.png") == np.asarray(pictures.grid([("samples, temperature 0.7", drawn)]))).all()


def test_several_temperatures_stand_side_by_side(folder, tmp_path):
    output = tmp_path / "t.png"
    assert command(folder / "model", "--n", 4, "--temperature", 0.5, 1, "--output", output) == 0
    panels = [(f"temperature {t:g}", drawing.sample(tiny_model(), 4, t, 0)) for t in (0.5, 1.0)]
    assert (pixels(output) == np.asarray(pictures.grid(panels, side_by_side=True))).all()


@pytest.mark.parametrize(
    ("words", "numbers", "titles"),
    [(["all"], [0, 1, 2], ["cat", "dog", "emu"]), (["emu", "0"], [2, 0], ["emu", "cat"])],
)
def test_classes_have_a_row_each(folder, tmp_path, words, numbers, titles):
    assert command(folder / "three", "--classes", *words, "--output", tmp_path / "c.png") == 0
    model, n = tiny_model(0.1, classes=3), 8 * len(numbers)
    drawn = torch.cat(list(series.render(model, series.samples(model, n, 0, numbers))))
    rows = pictures.by_class(drawn, len(numbers))
    expected = pictures.grid([("samples, temperature 1", rows)], 8, titles)
    assert (pixels(tmp_path / "c.png") == np.asarray(expected)).all()


def test_the_command_goes_between_samples_of_a_class(folder, tmp_path):
    output = tmp_path / "i.png"
    assert command(folder / "two", "--interpolate", 3, "--n", 2, "--seed", 4, "--output", output) == 0
    model = tiny_model(0.1, classes=2)
    drawn = torch.cat(list(series.render(model, series.between_samples(model, 2, 3, 4))))
    expected = pictures.grid([("between samples, temperature 1", drawn)], 3, ["0", "1"])
    assert (pixels(output) == np.asarray(expected)).all()


def test_the_command_goes_between_held_out_images(folder, tmp_path, capsys):
    words = ["--data", folder / "data", "--interpolate", 5, "--n", 2, "--output", f"{tmp_path}/between/"]
    assert command(folder / "model", *words) == 0
    assert "10 images (between images of data, split test)" in capsys.readouterr().out
    images, ends = reader(folder), (0, 4, 5, 9)
    for number, end in enumerate(ends):
        shown = pixels(tmp_path / "between" / f"{end:06d}.png").transpose(2, 0, 1)
        assert nearly_equal(torch.tensor(shown), torch.from_numpy(images[number]))


def test_an_npz_is_what_fid_tools_take(folder, tmp_path):
    output = tmp_path / "set.npz"
    assert command(folder / "model", "--n", 5, "--batch", 2, "--output", output) == 0
    with np.load(output, allow_pickle=False) as found:
        assert list(found) == ["arr_0"]
        assert found["arr_0"].dtype == np.uint8
        drawn = drawing.sample(tiny_model(), 5, 1.0, 0).permute(0, 2, 3, 1)
        assert nearly_equal(torch.from_numpy(found["arr_0"]), drawn)
    assert command(folder / "three", "--n", 5, "--classes", "dog", "cat", "--output", output, "--overwrite") == 0
    with np.load(output, allow_pickle=False) as found:
        assert found["arr_1"].tolist() == [1, 0, 1, 0, 1]


@pytest.mark.parametrize("store", ["local", "s3"])
def test_a_folder_gets_png_files(folder, tmp_path, store, request):
    output = f"{tmp_path if store == 'local' else request.getfixturevalue('s3')}/set/"
    assert command(folder / "model", "--n", 5, "--batch", 2, "--output", output) == 0
    assert storage.listdir(output) == [f"{i:06d}.png" for i in range(5)]
    for number, image in enumerate(drawing.sample(tiny_model(), 5, 1.0, 0)):
        storage.get_file(storage.join(output, f"{number:06d}.png"), tmp_path / "one.png")
        assert nearly_equal(torch.tensor(pixels(tmp_path / "one.png").transpose(2, 0, 1)), image)


def test_a_missing_bucket_is_reported_before_anything_is_drawn(folder, s3, capsys, monkeypatch):
    monkeypatch.setattr(flow.EIWFlow, "decode", lambda *_: pytest.fail("it draws"))
    assert command(folder / "model", "--output", f"{s3.replace('bucket', 'nobody')}/set/") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --output: s3://nobody")


def test_a_grid_goes_to_any_url(folder, tmp_path):
    for output in (f"memory://{tmp_path.name}/new/g.png", f"memory://{tmp_path.name}.png", f"file://{tmp_path}/g.png"):
        assert command(folder / "model", "--n", 1, "--output", output) == 0
        assert storage.read_bytes(output).startswith(b"\x89PNG")


def test_a_set_is_never_in_memory_as_a_whole(tmp_path):
    alive, most = weakref.WeakSet(), []

    def batches():
        for number in range(6):
            images = torch.full((2, 3, 4, 4), number, dtype=torch.uint8)
            alive.add(images)
            most.append(len(alive))
            yield images

    image_sets.write_npz(str(tmp_path / "x.npz"), batches(), 12)
    image_sets.write_folder(f"{tmp_path}/x/", batches())
    assert max(most) <= 2  # one is made while the one before is still named
    assert np.load(tmp_path / "x.npz")["arr_0"][:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [int(pixels(tmp_path / "x" / f"{i:06d}.png")[0, 0, 0]) for i in (0, 5, 11)] == [0, 2, 5]


def test_a_set_that_fails_midway_leaves_no_npz(tmp_path):
    def batches():
        yield torch.zeros((2, 3, 4, 4), dtype=torch.uint8)
        raise ValueError("out of luck")

    with pytest.raises(ValueError, match="out of luck"):
        image_sets.write_npz(str(tmp_path / "x.npz"), batches(), 12)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("model", ["--n", "0"], "--n: 0"),
        ("model", ["--batch", "0"], "--batch: 0"),
        ("model", ["--temperature", "0.7", "nan"], "--temperature: nan"),
        ("model", ["--temperature", "0"], "--temperature: 0"),
        ("model", ["--temperature", "inf"], "--temperature: inf"),
        ("model", ["--interpolate", "1"], "--interpolate: 1"),
        ("model", ["--classes", "all"], "--classes: MODEL was trained without classes"),
        ("three", ["--classes", "3"], "--classes: no class '3'; the model has 0 to 2 (cat, dog, emu)"),
        ("two", ["--classes", "0", "cat"], "--classes: no class 'cat'; the model has 0 to 1, or all"),
        ("model", ["--output", "OUT/x.jpg"], ".jpg may lose detail"),
        ("model", ["--output", "OUT/x"], "give x.png for a grid"),
        ("model", ["--output", "DATA/"], "not empty"),
        ("model", ["--output", "/proc/nobody/x.png"], "--output: /proc/nobody"),
        ("model", ["--output", "/proc/nobody/x/"], "--output: /proc/nobody"),
        ("model", ["--output", "nosuch://x.png"], "--output: nosuch://"),
        ("model", ["--n", "1025"], "--output: a grid 33 images wide and 32 high"),
        ("model", ["--interpolate", "65"], "--output: a grid 65 images wide"),
        ("model", ["--n", "4", "--temperature", *["1"] * 33], "66 images wide"),
        ("model", ["--temperature", "0.7", "1", "--output", "OUT/x.npz"], "--temperature: several are for a grid"),
        ("model", ["--data", "DATA"], "--data: it goes with --interpolate"),
        ("model", ["--data", "DATA", "--interpolate", "3", "--temperature", "1"], "leave out --temperature"),
        ("model", ["--data", "/nowhere", "--interpolate", "3"], "--data: no data set at /nowhere"),
        ("model", ["--data", "DATA", "--split", "val", "--interpolate", "3"], "--data: data set 'data' has no split"),
        ("model", ["--data", "DATA", "--interpolate", "3", "--n", "50"], "--n: 50 pairs"),
        ("three", ["--data", "DATA", "--interpolate", "3"], "--data: 2 classes, and the model has 3"),
        ("turned", ["--data", "DATA", "--interpolate", "3"], "--data: its classes are not the model's, or in another"),
        ("model", ["--device", "cuda"], "--device: cuda"),
        ("grey", [], "1 channels"),
        ("nowhere", [], "nowhere"),
        ("memory://nowhere/model", [], "memory://nowhere/model"),
    ],
)
def test_a_refused_command_says_why_in_one_line_and_draws_nothing(
    model, words, message, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(flow.EIWFlow, "decode", lambda *_: pytest.fail("it draws"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    words = [word.replace("OUT", str(tmp_path)).replace("DATA", str(folder / "data")) for word in words]
    model = model if "://" in model else str(folder / model)
    assert command(model, *words) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert message.replace("MODEL", model) in line
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_images_of_another_size_are_refused(folder, tmp_path, capsys):
    write_shards(tmp_path / "large", n=20, resolution=16)
    assert command(folder / "model", "--data", tmp_path / "large", "--interpolate", 3) == 2
    assert "--data: images of large are 3x16x16, and the model takes 3x8x8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_batch_that_does_not_fit_in_memory_is_one_line(error, folder, tmp_path, capsys, monkeypatch):
    def decode(*_):
        raise error

    monkeypatch.setattr(flow.EIWFlow, "decode", decode)
    assert command(folder / "model", "--output", tmp_path / "x.png") == 2
    assert capsys.readouterr().err.startswith("error: --batch: 64 images at a time do not fit")


def test_a_folder_where_a_file_is_to_be_is_refused(folder, tmp_path, capsys):
    (tmp_path / "x.png").mkdir()
    assert command(folder / "model", "--output", tmp_path / "x.png") == 2
    assert "x.png: this is a folder; give the name of a file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["grid.png", "set.npz"])
def test_a_file_that_is_there_is_replaced_only_if_asked(folder, tmp_path, capsys, name):
    for where in (str(tmp_path), f"memory://{tmp_path.name}"):
        output = f"{where}/{name}"
        storage.write_bytes(output, b"mine")
        words = [folder / "model", "--n", 1, "--output", output]
        assert command(*words) == 2
        assert "is there already" in capsys.readouterr().err
        assert storage.read_bytes(output) == b"mine"
        assert command(*words, "--overwrite") == 0
        assert storage.read_bytes(output) != b"mine"
