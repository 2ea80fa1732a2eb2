import io
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from score_sets import flat, noise, reader, smooth, trained_flow, write_set
from small_run import export_model

from eiwtrain import evaluate, storage
from eiwtrain.scoring import outliers
from eiwtrain.scoring.score_table import score_images

SCORES = st.lists(st.sampled_from([-2.0, 0.0, 0.5, 1.0, 1.5, 40.0]), min_size=2, max_size=30).map(np.array)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outliers")
    model = trained_flow()
    export_model(model, folder / "model")
    sets = {
        name: write_set(folder / name, images)
        for name, images in (("soft", smooth(40)), ("noise", noise(30)), ("flat", flat(30)))
    }
    return SimpleNamespace(model=model, exported=str(folder / "model"), **sets)


@given(SCORES, SCORES)
def test_auroc_is_the_share_of_pairs_in_which_the_outside_scores_higher(inside, outside):
    pairs = [(o > i) + 0.5 * (o == i) for o in outside for i in inside]
    area = outliers.auroc(inside, outside)
    assert area.value == pytest.approx(np.mean(pairs))
    assert outliers.auroc(outside, inside).value == pytest.approx(1 - area.value)
    same = outliers.auroc(np.exp(inside), np.exp(outside))  # only the order counts
    assert (same.value, same.standard_error) == pytest.approx((area.value, area.standard_error))


def test_the_standard_error_is_that_of_sets_drawn_again_and_again():
    generator = np.random.default_rng(0)

    def draw():
        return generator.normal(0, 1, 80), generator.exponential(1.5, 120)

    drawn = [outliers.auroc(*draw()) for _ in range(400)]
    spread = np.std([area.value for area in drawn])
    assert np.mean([area.standard_error for area in drawn]) == pytest.approx(spread, rel=0.1)


def test_a_single_image_has_no_standard_error_and_a_score_that_is_not_finite_no_auroc():
    assert np.isnan(outliers.auroc(np.array([1.0]), np.array([2.0, 3.0])).standard_error)
    with pytest.raises(ValueError, match="AUROC: 1 of 4 images have scores that are not finite"):
        outliers.auroc(np.array([1.0, np.inf]), np.array([2.0, 3.0]))


def test_noise_needs_more_bits_than_any_image_of_the_kind_trained_on(here, capsys, tmp_path):
    args = [here.exported, "--data", here.soft, "--against", here.noise, "--histogram", str(tmp_path / "h.png")]
    assert evaluate.main(args) == 0
    out = capsys.readouterr().out
    assert "AUROC 1.0000 ± 0.0000 by bits/dim (ELBO)\n" in out
    assert "on 40 images of soft, split test" in out
    assert "on 30 images of noise, split test" in out


def test_simpler_images_look_likelier_until_their_complexity_is_taken_off(here, capsys):
    url = "memory://outliers/"
    args = [here.exported, "--data", here.soft, "--against", here.flat, "--complexity", "png"]
    assert evaluate.main([*args, "--histogram", url + "h.png", "--scores", url + "s.parquet"]) == 0
    rows = pq.read_table(io.BytesIO(storage.read_bytes(url + "s.parquet")))
    kind, bits, png = (np.array(rows[name]) for name in ("set", "bits_per_dim", "png_bits_per_dim"))
    assert (kind == "in").sum() == 40
    assert (kind == "out").sum() == 30
    inside, outside = kind == "in", kind == "out"
    plain = outliers.auroc(bits[inside], bits[outside])
    less = outliers.auroc((bits - png)[inside], (bits - png)[outside])
    out = capsys.readouterr().out
    assert plain.value < 0.5 < less.value
    assert f"AUROC {plain.value:.4f} ± {plain.standard_error:.4f} by bits/dim (ELBO); below 1/2" in out
    assert f"AUROC {less.value:.4f} ± {less.standard_error:.4f} by bits/dim (ELBO) minus PNG's" in out
    assert rows.schema.metadata[b"against_data"] == b"flat"
    two = Image.open(io.BytesIO(storage.read_bytes(url + "h.png"))).size
    assert evaluate.main([*args[:5], "--histogram", url + "one.png"]) == 0
    one = Image.open(io.BytesIO(storage.read_bytes(url + "one.png"))).size
    assert two == (one[0], 2 * one[1])


def test_the_corrected_score_is_what_the_model_needs_beyond_the_coder(here):
    table = score_images(here.model, reader(here.soft), images=5, batch=5)
    for coder in ("png", "webp"):
        np.testing.assert_array_equal(outliers.corrected(table, coder), table.bound - table.coders[coder])


def test_the_scores_are_of_the_tightest_bound_there_is(here, capsys):
    args = [here.exported, "--data", here.soft, "--against", here.flat, "--histogram", "memory://outliers/k.png"]
    assert evaluate.main([*args, "--iwbo", "3"]) == 0
    tables = [score_images(here.model, reader(url), images=99, batch=64, draws=3) for url in (here.soft, here.flat)]
    area = outliers.auroc(*(table.bound for table in tables))
    assert f"AUROC {area.value:.4f} ± {area.standard_error:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("inside", "outside"),
    [([1.0, 2.0, 3.0], [2.0, 1e6]), ([3.0, 3.0], [3.0, 3.0]), ([1.0], [2.0])],
    ids=["one wild image", "all alike", "one image each"],
)
def test_a_histogram_can_be_drawn_of_any_scores(inside, outside):
    sets = [np.array(inside), np.array(outside)]
    png = outliers.histogram({"bits/dim": sets}, {"bits/dim": outliers.auroc(*sets)}, "these", "those")
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    assert (pixels.max(-1) - pixels.min(-1) > 30).sum() > 2000  # coloured: bars, as the legend has some 560
