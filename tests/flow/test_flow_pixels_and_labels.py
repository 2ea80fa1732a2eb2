"""Pixels, their noise and their labels through the whole flow; every kind of coupling, conditioner and preset in it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flow_helpers import TINY, gradients, images, log_abs_det_jacobian, make_flow, relative_error, whole_loss
from torch import Tensor

import eiwtrain.flow as eiw
from eiwtrain.flow import PRESETS, ConditionerConfig, EIWFlow, FlowConfig, preset
from eiwtrain.flow.config import BACKPROP_MODES, CONDITIONERS

CHOICES: dict[str, dict[str, Any]] = {
    "spline": {"coupling": "spline", "bins": 4},
    "classes": {"classes": 3},
    "whole images": {"shuffle_block": 0},
    "everything": {"coupling": "spline", "bins": 3, "classes": 3, "dequantization": "variational"},
    **{kind: {"conditioner": ConditionerConfig(kind, 8, patch=1)} for kind in CONDITIONERS},
}


def pixels(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (n, *TINY.image_shape)
    noise = torch.rand(shape, generator=generator, dtype=torch.float64)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8), noise


def labels_of(flow: EIWFlow, n: int) -> Tensor | None:
    return torch.arange(n) % 3 if flow.config.classes else None


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_is_an_exact_density_with_an_exact_inverse(choice: str) -> None:
    flow = make_flow(image_shape=(1, 4, 4), **CHOICES[choice])
    x = images(3, flow.config)
    labels = labels_of(flow, 3)
    latents, log_det = flow.encode(x, labels)
    torch.testing.assert_close(flow.decode(latents, labels), x, rtol=1e-10, atol=1e-10)
    for i in range(3):
        own = None if labels is None else labels[i : i + 1]
        expected = log_abs_det_jacobian(
            lambda v, own=own: torch.cat([z.flatten() for z in flow.encode(v, own)[0]]), x[i : i + 1]
        )
        torch.testing.assert_close(log_det[i], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("mode", BACKPROP_MODES[1:])
def test_every_choice_has_the_gradients_of_autograd_in_every_mode(choice: str, mode: str) -> None:
    images_, noise = pixels(3)
    grads = []
    for backprop in ("stored", mode):
        flow = make_flow(**CHOICES[choice], backprop=backprop, memory_budget=60_000)
        whole_loss(flow(images_, noise, labels_of(flow, 3))).backward()
        assert all(p.grad is not None for p in flow.parameters())
        grads.append(torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None]))
    steep = 1e-8 if CHOICES[choice].get("coupling") == "spline" else 1e-9  # what a spline of few bins is
    assert relative_error(grads[1], grads[0]) <= steep


def test_pixels_with_uniform_noise_are_dequantized_images() -> None:
    flow = make_flow()
    images_, noise = pixels(3)
    x, log_q = flow.dequantize(images_, noise)
    assert torch.equal(log_q, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(x, eiw.dequantize(images_, noise))
    assert torch.equal(flow.log_prob(images_, noise), flow.log_prob(x))
    assert torch.equal(flow.bits_per_dim(images_, noise), flow.bits_per_dim(x))


def test_a_variational_dequantizer_pays_for_the_density_of_its_noise() -> None:
    flow = make_flow(dequantization="variational")
    images_, noise = pixels(3)
    x, log_q = flow.dequantize(images_, noise)
    assert log_q.abs().min() > 1e-3
    torch.testing.assert_close(flow.log_prob(images_, noise), flow.log_prob(x) - log_q)
    assert torch.equal(flow.to_images(x), images_)


@pytest.mark.parametrize("dequantization", ["uniform", "variational"])
def test_the_importance_weighted_bound_is_the_logarithm_of_a_mean(dequantization: str) -> None:
    flow = make_flow(dequantization=dequantization)
    draws = [pixels(2, seed)[1] for seed in range(4)]
    images_ = pixels(2)[0]
    single = torch.stack([flow.log_prob(images_, noise) for noise in draws])
    torch.testing.assert_close(flow.iwbo(images_, draws[:1]), single[0])
    torch.testing.assert_close(flow.iwbo(images_, draws), single.logsumexp(0) - math.log(4))


def test_the_class_conditional_prior_starts_as_none() -> None:
    torch.manual_seed(0)
    flow = EIWFlow(FlowConfig((3, 8, 8), levels=2, steps=1, classes=3, conditioner=ConditionerConfig(hidden=8)))
    x = images(2, dtype=torch.float32)
    first, second = (flow.log_prob(x, labels=torch.full((2,), label)) for label in (0, 2))
    assert torch.equal(first, second)


def test_samples_of_a_class_are_those_of_its_prior() -> None:
    flow = make_flow(classes=2)
    with torch.no_grad():
        for level in flow.levels:
            level.class_prior.mean[1] += 3.0
    seeds = [torch.Generator().manual_seed(1) for _ in range(3)]
    zero, one = (flow.sample(4, generator=seeds[n], labels=torch.full((4,), n)) for n in (0, 1))
    mixed = flow.sample(4, generator=seeds[2])
    torch.testing.assert_close(mixed[0::2], zero[0::2])
    torch.testing.assert_close(mixed[1::2], one[1::2])
    assert not torch.allclose(zero, one)
    likelier = flow.log_prob(one, labels=torch.ones(4).long()) - flow.log_prob(one, labels=torch.zeros(4).long())
    assert (likelier > 0).all()


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (0, torch.zeros(2).long(), "no labels"),
        (3, None, "3 classes takes labels"),
        (3, torch.zeros(3).long(), r"shape \(2,\)"),
        (3, torch.zeros(2), "int64"),
    ],
)
def test_labels_that_do_not_fit_are_refused(classes: int, labels: Tensor | None, message: str) -> None:
    flow = make_flow(classes=classes)
    with pytest.raises(ValueError, match=message):
        flow.log_prob(images(2), labels=labels)
    with pytest.raises(ValueError, match=message):
        flow.decode([torch.zeros(2, *shape).double() for shape in flow.latent_shapes], labels)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_is_no_other_class(label: int) -> None:
    with pytest.raises(IndexError):
        make_flow(classes=3).log_prob(images(2), labels=torch.full((2,), label))


def test_pixels_without_noise_are_refused() -> None:
    with pytest.raises(ValueError, match="noise"):
        make_flow().log_prob(pixels(1)[0])


# Millions of parameters on 3x32x32 images, or 3x64x64 for Jet: Glow's table 3 says 44M for CIFAR-10.
SIZES = {
    "glow": (40, 50),
    "eiw": (130.922462, 130.922462),  # the authors' program, counted by building it
    "eiw-small": (2, 4),
    "eiw-tiny": (0.5, 0.6),
    "jet": (190, 230),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_size(name: str) -> None:
    config = FlowConfig.from_dict(preset(name, {"image_shape": [3, 64, 64] if name == "jet" else [3, 32, 32]}))
    with torch.device("meta"):
        shapes = [p.numel() for p in EIWFlow(config).parameters()]
    least, most = SIZES[name]
    assert least <= sum(shapes) / 1e6 <= most


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_can_be_changed_in_part_and_runs(name: str) -> None:
    changes = {"image_shape": [3, 16, 16], "steps": 1, "units": 1, "conditioner": {"hidden": 16, "depth": 1}}
    flow = EIWFlow.from_config({"preset": name, **changes})
    assert flow.config == EIWFlow.from_config(flow.config.to_dict()).config
    assert flow.config.levels == PRESETS[name]["levels"]
    assert flow.config.conditioner == ConditionerConfig(**{**PRESETS[name]["conditioner"], "hidden": 16, "depth": 1})
    assert gradients(flow, torch.rand(2, 3, 16, 16) - 0.5).isfinite().all()


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="glow, eiw, eiw-small, eiw-tiny, jet"):
        EIWFlow.from_config({"preset": "realnvp", "image_shape": [3, 16, 16]})


@pytest.mark.parametrize("wrong", [{"name": "x"}, {"conditioner": None}])
def test_a_preset_with_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="|".join(wrong)):
        EIWFlow.from_config({"preset": "glow", "image_shape": [3, 16, 16], **wrong})
