import numpy as np
import pytest
from score_sets import flat, noise, smooth

from eiwtrain.scoring import yardsticks


def channels_first(images):
    return images.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("n_bits", [8, 5])
def test_every_image_has_its_own_figure_and_their_mean_is_that_of_all(n_bits):
    images = channels_first(np.concatenate([noise(3), flat(3), smooth(3)]))
    by_image = yardsticks.image_bits_per_dim(images, n_bits)
    means = yardsticks.bits_per_dim(iter(images), n_bits)
    for coder in yardsticks.CODERS:
        one_by_one = [yardsticks.bits(image, coder, n_bits) / image.size for image in images]
        assert by_image[coder].tolist() == one_by_one
        assert means[coder] == pytest.approx(np.mean(one_by_one))
        assert by_image[coder][:3].min() > by_image[coder][3:6].max()  # noise takes more than one colour


def test_more_images_than_are_held_at_a_time_count_alike(monkeypatch):
    images = channels_first(smooth(11))
    whole = yardsticks.bits_per_dim(images)
    monkeypatch.setattr(yardsticks, "_AT_A_TIME", 4)
    assert yardsticks.bits_per_dim(images) == pytest.approx(whole)


def test_every_coder_has_a_title():
    assert list(yardsticks.TITLES) == list(yardsticks.CODERS)
