"""Published figures stand only beside scores of the same data set, version and estimator."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from typing import Any

import pytest

from data_prep.sources import imagenet
from eiwtrain.data.manifest import Manifest
from eiwtrain.data.shards import Split
from eiwtrain.flow import FlowConfig
from eiwtrain.scoring import published
from eiwtrain.scoring.estimator import estimator_of
from eiwtrain.scoring.published import Scored, comparable

TABLE = json.loads(resources.files("eiwtrain.scoring").joinpath("published.json").read_text())
CIFAR = {"name": "cifar10"}


def imagenet_of(variant: str, side: int) -> dict[str, Any]:
    return {"name": "imagenet", "variant": variant, "side": side, "protocol": "x"}


def manifest(source: Any, side: int = 32, train: int = 50_000, **params: Any) -> Manifest:
    preprocessing = {"name": "p", "version": 3, "params": {"source": source, "crop": "center", **params}}
    splits = {name: Split(name, n, ()) for name, n in (("train", train), ("test", 10_000), ("val", 50_000))}
    return Manifest("mine", side, 3, preprocessing, splits, "abc")


def scored(of: Manifest | None = None, **changes: Any) -> Scored:
    usual = Scored(of or manifest(CIFAR), "test", 10_000, ("abc", "train"), n_bits=8, classes=0)
    return replace(usual, **changes)


def of_imagenet(variant: str, side: int, images: int, resolution: int | None = None) -> Scored:
    return scored(manifest(imagenet_of(variant, side), resolution or side, 1_281_160), split="val", images=images)


def models(of: Scored, *estimators: str) -> list[tuple[str, float]]:
    return [(figure.model, figure.bits_per_dim) for figure in comparable(of, estimators).figures]


def test_figures_are_of_the_score_s_own_estimator() -> None:
    assert models(scored(), "ELBO") == [("RealNVP", 3.49), ("Glow", 3.35)]
    assert models(scored(), "ELBO", "IWBO(1000)") == [("RealNVP", 3.49), ("Glow", 3.35), ("DenseFlow-74-10", 2.98)]
    assert models(scored(), "IWBO(16)") == []
    assert "IWBO(200)" in comparable(of_imagenet("downsampled-2017", 32, 50_000), ["ELBO"]).reason


def test_the_versions_of_imagenet_do_not_share_a_figure() -> None:
    estimators = {figure["estimator"] for figure in TABLE["figures"]}
    for side in (32, 64):
        old = comparable(of_imagenet("pixelrnn-2016", side, 49_999), estimators).figures
        new = comparable(of_imagenet("downsampled-2017", side, 50_000), estimators).figures
        assert old
        assert new
        assert not {figure.bits_per_dim for figure in old} & {figure.bits_per_dim for figure in new}
        assert not comparable(of_imagenet("original", side, 50_000), estimators).figures


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (scored(manifest({"name": "folder"})), "mine"),
        (scored(manifest("what")), "mine"),
        (scored(manifest(CIFAR, side=16)), "32 pixels"),
        (scored(manifest(CIFAR, short_side=40)), "cut"),
        (scored(manifest(CIFAR, crop="random")), "cut"),
        (scored(manifest(CIFAR, box=[0, 0, 32, 32])), "cut"),
        (scored(manifest(CIFAR, train=5_000)), "5,000"),
        (scored(images=2_000), "2,000"),
        (scored(split="val"), "val"),
        (scored(trained_on=("other", "train")), "trained"),
        (scored(trained_on=("abc", "test")), "trained"),
        (scored(trained_on=(None, None)), "trained"),
        (scored(n_bits=5), "5-bit"),
        (scored(classes=10), "class"),
        (of_imagenet("pixelrnn-2016", 64, 49_999, resolution=32), "64 pixels"),
    ],
)
def test_another_protocol_has_no_figure_and_says_why(other: Scored, named: str) -> None:
    found = comparable(other, ["ELBO"])
    assert not found.figures
    (line,) = found.lines()
    assert named in line


def test_lines_name_every_figure_with_its_source() -> None:
    found = comparable(scored(), ["ELBO", "IWBO(1000)"])
    lines = found.lines()
    assert len(lines) == 1 + len(found.figures)
    for line, figure in zip(lines[1:], found.figures, strict=True):
        assert all(word in line for word in (figure.model, figure.estimator, figure.source))
        assert f"{figure.bits_per_dim:.2f}" in line


def test_every_figure_has_a_protocol_an_estimator_of_ours_and_a_source() -> None:
    config = FlowConfig(image_shape=(3, 8, 8))
    ours = {estimator_of(config, draws).name for draws in (1, 200, 1000)}
    for figure in TABLE["figures"]:
        assert published.Figure(**figure).protocol in TABLE["protocols"]
        assert figure["estimator"] in ours
        assert figure["source"]
        assert 1 < figure["bits_per_dim"] < 8


def test_protocols_are_data_sets_that_data_prep_can_write() -> None:
    for facts in TABLE["protocols"].values():
        assert facts["split"] in ("test", "val")
        if facts["source"]["name"] == "imagenet":
            about = imagenet.VARIANTS[facts["source"]["variant"]]
            assert (facts["images"], facts["training_images"]) == (about.val, about.train)
            assert facts["source"]["side"] == facts["resolution"]
