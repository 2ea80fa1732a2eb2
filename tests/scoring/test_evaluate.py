import io

import numpy as np
import pytest
import torch
from helpers import write_shards
from PIL import Image
from ranks import run_ranks
from small_run import export_model, small_flow

from eiwtrain import data, evaluate, export, flow
from eiwtrain.scoring import scores, yardsticks


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "data"
    write_shards(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    export_model(small_flow(), folder, step=3)
    return folder


def reader(folder):
    return data.ShardReader(str(folder), data.load_manifest(str(folder)), "test")


def score(folder, **kwargs):
    return scores.score(small_flow(), data.eval_batches(reader(folder), images=100, seed=0, **kwargs))


def test_the_score_is_the_mean_over_images_with_its_standard_error(shards):
    model, images = small_flow(), reader(shards)
    (batch,) = data.eval_batches(images, images=100, seed=0, micro_batch=len(images))
    bits = model.bits_per_dim(flow.dequantize(batch.images, batch.noise(), 8)).detach().double()
    result = score(shards, micro_batch=5)
    assert result.images == len(images)
    assert result.bits_per_dim == pytest.approx(float(bits.mean()), rel=1e-5)
    assert result.standard_error == pytest.approx(float(bits.std() / len(images) ** 0.5), rel=1e-3)


def same_on_every_rank(folder, expected):
    import torch.distributed as dist

    result = score(folder, micro_batch=4, rank=dist.get_rank(), world_size=dist.get_world_size())
    assert result.images == expected.images
    assert result.bits_per_dim == pytest.approx(expected.bits_per_dim, rel=1e-5)


def test_the_score_is_the_same_at_another_world_size(shards):
    run_ranks(same_on_every_rank, 3, shards, score(shards, micro_batch=4))


def test_more_draws_of_noise_give_a_tighter_bound(shards):
    model, numbers = small_flow(), range(2)
    a, b = (next(data.eval_batches(reader(shards), images=9, seed=0, micro_batch=9, draw=n)) for n in numbers)
    (one, alone), (other, _), (first, both) = (scores.image_bits(model, draws) for draws in ([a], [b], [a, b]))
    assert torch.equal(one, alone)
    assert torch.equal(one, first)
    assert not torch.equal(one, other)
    # log((e^a + e^b) / 2) lies between the mean of a and b and the larger
    assert both.mean() < (one.mean() + other.mean()) / 2


def test_a_class_conditional_model_is_scored_with_the_labels_of_the_images(shards):
    model = small_flow(classes=2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    batch = data.first_batch(reader(shards), 6, seed=0)
    assert set(batch.labels.tolist()) == {0, 1}
    expected = model.bits_per_dim(batch.images, batch.noise(), batch.labels).mean().item()
    assert scores.score(model, [batch]).bits_per_dim == pytest.approx(expected, rel=1e-6)
    assert not torch.allclose(
        *(model.log_prob(batch.images, batch.noise(), x) for x in (batch.labels, 1 - batch.labels))
    )
    with pytest.raises(data.DataError, match=r"sample \d+ has no class"):
        scores.score(model, [batch._replace(labels=batch.labels - 1)])


def test_an_evaluation_stops_when_asked(shards):
    batches = data.eval_batches(reader(shards), images=100, seed=0, micro_batch=2)
    answers = iter([False, True])
    assert scores.score(small_flow(), batches, lambda: next(answers)) is None


def test_png_yardstick_counts_whole_files():
    image = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "PNG", optimize=True)
    assert yardsticks.bits_per_dim([image, image])["png"] == pytest.approx(8 * file.tell() / image.size)
    assert yardsticks.bits_per_dim([image])["png"] > 8  # noise cannot be compressed, and a header comes on top
    assert yardsticks.bits_per_dim([np.zeros((3, 32, 32), np.uint8)])["png"] < 1
    assert yardsticks.bits_per_dim([image], n_bits=3)["png"] < 4


def test_the_command_works_on_an_exported_model(shards, model_folder, capsys):
    assert evaluate.main([str(model_folder), "--data", str(shards)]) == 0
    assert f"on {len(reader(shards))} images of data, split test" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (lambda m, s: evaluate.main(["/nowhere", "--data", str(s)]), "/nowhere"),
        (lambda m, s: evaluate.main([str(m), "--data", "/nowhere"]), "/nowhere"),
        (lambda m, s: evaluate.main([str(m), "--data", str(s), "--split", "val"]), "'val'"),
        (lambda m, s: export.main(["best", "--run", "/nowhere", "--output", "/tmp/x"]), "no checkpoint 'best'"),
    ],
)
def test_a_command_that_cannot_work_says_why_in_one_line(command, words, shards, model_folder, capsys):
    assert command(model_folder, shards) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_the_error_of_one_image_or_of_bits_that_are_no_number_is_not_known():
    assert np.isnan(scores.mean(torch.tensor([3.0], dtype=torch.float64)).standard_error)
    assert np.isnan(scores.mean(torch.tensor([float("nan"), 1.0], dtype=torch.float64)).standard_error)


@pytest.mark.parametrize("option", ["scores", "json", "histogram"])
def test_a_file_that_is_there_is_replaced_only_if_asked(tmp_path, capsys, option):
    (tmp_path / "out").write_text("mine")
    args = ["/nowhere", "--data", "x", "--against", "y", "--histogram", str(tmp_path / "h.png")]
    args += [f"--{option}", str(tmp_path / "out")]
    assert evaluate.main(args) == 2
    assert f"--{option}: {tmp_path}/out is there already" in capsys.readouterr().err
    assert evaluate.main([*args, "--overwrite"]) == 2
    assert "is there already" not in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"
