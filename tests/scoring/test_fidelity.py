import importlib.util
import io
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from score_sets import reader, smooth, trained_flow, write_set
from small_run import export_model

from eiwtrain import evaluate
from eiwtrain.sampling import series
from eiwtrain.scoring import fidelity

CPU = torch.device("cpu")
needs_network = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None,
    reason="torch-fidelity is not installed: pip install -e '.[fid]'",
)


def normal(seed, n, d, scale=1.0):
    generator = np.random.default_rng(seed)
    return scale * generator.normal(size=(n, d)) @ generator.normal(size=(d, d)) + generator.normal(size=d)


def closed_formula(a, b):
    """FID as it is defined, by a matrix square root."""
    root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(
        np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * root
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(8, 40), st.integers(8, 40), st.integers(2, 6), st.floats(0.1, 10))
def test_fid_is_the_closed_formula(seed, m, n, d, scale):
    a, b = normal(seed, m, d), normal(seed + 1, n, d, scale)
    assert fidelity.frechet_distance(a, b) == pytest.approx(closed_formula(a, b), rel=1e-6)
    assert fidelity.frechet_distance(b, a) == pytest.approx(fidelity.frechet_distance(a, b), rel=1e-9)


@pytest.mark.parametrize("n", [5, 50])
def test_fid_of_a_set_and_itself_moved_is_the_square_of_the_way(n):
    a = normal(0, n, 20)  # of fewer images than features, and of more
    assert fidelity.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert fidelity.frechet_distance(a, a + 0.5) == pytest.approx(20 * 0.25)


def test_kid_is_the_unbiased_mean_over_pairs_of_a_cubic_kernel():
    a, b = normal(0, 7, 4), normal(1, 7, 4)

    def kernel(x, y):
        return (x @ y / 4 + 1) ** 3

    def within(x):
        return np.mean([kernel(x[i], x[j]) for i in range(7) for j in range(7) if i != j])

    expected = within(a) + within(b) - 2 * np.mean([kernel(x, y) for x in a for y in b])
    kid = fidelity.kernel_distance(a, b)
    assert kid.mean == pytest.approx(expected)
    assert (kid.deviation, kid.subsets, kid.size) == (0, 1, 7)


def test_kid_of_two_sets_of_one_kind_is_about_zero_and_of_two_kinds_is_not():
    a, b = (np.random.default_rng(seed).normal(size=(400, 8)) for seed in (0, 1))
    same, other = fidelity.kernel_distance(a, b), fidelity.kernel_distance(a, b + 1)
    assert abs(same.mean) < 0.02
    assert other.mean > 1
    assert abs(fidelity.kernel_distance(a, a).mean) < 0.1


def test_kid_of_larger_sets_is_a_mean_over_subsets_that_repeats(monkeypatch):
    monkeypatch.setattr(fidelity, "_SUBSET", 50)
    a, b = normal(0, 70, 4), normal(0, 90, 4, 1.2)
    kid = fidelity.kernel_distance(a, b, seed=3)
    assert (kid.subsets, kid.size) == (100, 50)
    assert kid.deviation > 0
    assert kid == fidelity.kernel_distance(a, b, seed=3) != fidelity.kernel_distance(a, b, seed=4)


def test_without_the_extra_one_line_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^--fid-weights: .* pip install -e '\.\[fid\]'$"):
        fidelity.load_network(str(tmp_path / "w.pth"), CPU)


class Opens:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Weights of the right shapes, a flow and a data set."""
    folder = tmp_path_factory.mktemp("fid")

    class Unloaded(fidelity._inception()):
        def load_state_dict(self, state):
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    torch.manual_seed(0)
    weights = Unloaded("random", ["2048"], feature_extractor_weights_path=nothing).state_dict()
    for name, tensor in weights.items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(tensor)
    save_file(weights, folder / "random.safetensors")
    torch.save(weights, folder / "random.pth")
    model = trained_flow(steps=5)
    export_model(model, folder / "model")
    soft = write_set(folder / "soft", smooth(6))
    return SimpleNamespace(folder=folder, weights=weights, model=model, exported=str(folder / "model"), soft=soft)


@needs_network
def test_the_command_prints_fid_and_kid_of_samples_to_the_images(here, capsys):
    weights = str(here.folder / "random.safetensors")
    args = [here.exported, "--data", here.soft, "--fid-weights", weights, "--fid-samples", "5", "--temperature", "0.8"]
    assert evaluate.main(args) == 0
    network = fidelity.load_network(weights, CPU)
    images = torch.from_numpy(reader(here.soft).read(range(6)))
    samples = torch.cat(list(series.render(here.model, series.samples(here.model, 5, 0), 0.8)))
    real, drawn = fidelity.features(network, [images]), fidelity.features(network, [samples])
    assert real.shape == (6, 2048)
    fid, kid = fidelity.frechet_distance(real, drawn), fidelity.kernel_distance(real, drawn)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"FID {fid:.3f}, KID {kid.mean:.5f} ± {kid.deviation:.5f} over 100 subsets of 5: ")
    assert "5 samples at temperature 0.8, 6 images" in line
    assert f"not the published weights: SHA-256 {network.sha256[:8]}" in line
    assert fid > 0.1


@needs_network
def test_both_kinds_of_file_give_the_same_network_and_torchvision_is_not_asked_for(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # an import of it raises
    monkeypatch.delitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3")
    images = torch.from_numpy(smooth(2)).permute(0, 3, 1, 2)
    networks = [fidelity.load_network(str(here.folder / name), CPU) for name in ("random.pth", "random.safetensors")]
    one, other = (fidelity.features(network, [images]) for network in networks)
    np.testing.assert_array_equal(one, other)
    assert one.std() > 0.01


@needs_network
def test_a_file_that_is_not_the_network_s_is_refused_in_one_line_and_runs_nothing(here, tmp_path, capsys):
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    torch.save({"a": Opens(tmp_path / "opened")}, tmp_path / "code.pth")
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello world")
    torch.save(here.weights, tmp_path / fidelity.PUBLISHED)
    for name, words in {
        "other.pth": "does not hold the weights of FID's Inception",
        "list.pth": "it holds a list",
        "code.pth": "PyTorch's restricted loader refuses it",
        "other.safetensors": "does not hold the weights",
        "text.pth": "does not hold the weights",
        "text.safetensors": "does not hold the weights",
        fidelity.PUBLISHED: "its name says 6726825d",
        "weights.ckpt": "neither .pth nor .safetensors",
        "absent.pth": "is not there; give weights-inception-2015-12-05-6726825d.pth",
    }.items():
        args = [here.exported, "--data", here.soft, "--fid-weights", str(tmp_path / name)]
        assert evaluate.main(args) == 2
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert line.startswith("error: --fid-weights: ")
        assert words in line
        assert not captured.out
    assert not (tmp_path / "opened").exists()
