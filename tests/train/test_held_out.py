from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import DENSE, tiny_config, write_shards
from small_run import small_flow

from eiwtrain import data
from eiwtrain.config import Config
from eiwtrain.scoring import scores
from eiwtrain.train import held_out
from eiwtrain.train.held_out import HeldOut

SCORE = scores.Score(5.0, 0.25, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held-out")
    write_shards(folder / "data")
    return folder


@pytest.fixture(params=[{}, DENSE], ids=["glow", "dense"])
def split(folder, request):
    config = Config.model_validate(tiny_config(folder))
    reader = data.ShardReader(config.data.path, data.load_manifest(config.data.path), "test")
    state = SimpleNamespace(averaged=small_flow(**request.param), step=6)
    return HeldOut(config, state, reader, torch.device("cpu"), 4)


class Log:
    """Stands in for a tracker and keeps all that it receives."""

    def __init__(self):
        self.points, self.images = [], {}

    def metrics(self, step, values):
        self.points.append((step, values))

    def image(self, step, name, image):
        self.images[step, name] = image


def test_an_evaluation_is_one_point_with_images_of_its_step(split):
    log = Log()
    split.show(SCORE, log, pytest.fail, lambda _: True)
    ((step, values),) = log.points
    assert values.keys() == {
        "eval/bits_per_dim", "eval/standard_error", "eval/png_bits_per_dim", "eval/webp_bits_per_dim", "flow/drift",
    }  # fmt: skip
    assert (step, values["eval/bits_per_dim"], values["eval/standard_error"]) == (6, 5.0, 0.25)
    assert 0 < values["flow/drift"] < 1e-3
    assert list(log.images) == [(6, name) for name in ("samples", "reconstructions", "entropy_by_level")]


def test_drift_beyond_the_limit_is_reported(split, folder):
    split.config = Config.model_validate(tiny_config(folder, eval={"drift_warning": 1e-12}))
    said = []
    split.show(SCORE, Log(), said.append, lambda _: False)
    assert "above eval.drift_warning" in said[0]


def test_a_stop_between_pictures_leaves_out_the_others(split):
    log, left, said = Log(), iter([True, False]), []
    split.show(SCORE, log, said.append, lambda _: next(left))
    assert said == ["step 6: not all of its pictures are drawn, as the job ends"]
    assert [name for _, name in log.images] == ["samples"]
    assert len(log.points) == 1


def test_reconstructions_are_below_their_images(split):
    shown = np.asarray(dict(split.pictures())["reconstructions"])
    upper, lower = np.split(shown, 2)
    assert shown.std() > 10
    differs = (upper != lower).any(axis=2).mean(axis=1)
    assert (differs[-60:] == 0).all()  # below the titles: these reconstructions are exact
    assert differs.max() > 0


def test_yardsticks_are_computed_once_on_a_limited_sample(split, monkeypatch):
    counts, real = [], held_out.yardsticks.bits_per_dim

    def counting(images, n_bits):
        images = list(images)
        counts.append(len(images))
        return real(images, n_bits)

    monkeypatch.setattr(held_out.yardsticks, "bits_per_dim", counting)
    monkeypatch.setattr(held_out, "_YARDSTICK_PIXELS", 3 * 8 * 8)
    first = dict(split.yardsticks)
    split.show(SCORE, Log(), lambda _: None, lambda _: False)
    assert counts == [3]
    assert first == {coder: pytest.approx(bits) for coder, bits in split.yardsticks.items()}


def test_entropies_are_of_held_out_images_and_averaged_weights(split):
    entropy = split.entropy()
    assert entropy.shape == (2, 2)
    assert torch.isfinite(entropy[0]).all()
    assert torch.isnan(entropy[1, 1])
    assert (split.entropy()[0] == entropy[0]).all()
    split.state.averaged = small_flow(seed=1, **(DENSE if split.state.averaged.orders() else {}))
    assert (split.entropy()[0] != entropy[0]).any()
