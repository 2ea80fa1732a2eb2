import math

import pytest
import torch
from helpers import tiny_config

from eiwtrain.config import Config, Train
from eiwtrain.train import report


def test_a_meter_gives_means_over_its_steps(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])
    meter = report.Meter()
    meter.add(8, 4.0, waited=0.5, worked=1.0)
    meter.add(8, 2.0, waited=0.5, worked=1.0, faults=3)
    meter.add(8, math.nan, waited=0.5, worked=2.5)  # a step that was skipped
    now[0] += 9.0  # steps, and an evaluation between them
    assert (meter.bits_per_dim, meter.images_per_second, meter.data_wait, meter.seconds) == (3.0, 4.0, 0.25, 9.0)
    p = report.progress(meter, 2, Train(max_steps=12, global_batch=8), goodput=0.5)
    assert (p.images, p.faults, p.goodput) == (16, 3, 0.5)
    assert p.eta == pytest.approx(10 * 8 / 4.0)


@pytest.mark.parametrize(
    ("drift", "model", "remedies"),
    [
        (1e-3, {}, []),
        (0.02, {}, [". model.anchor_every=8 or model.trunk_dtype=float64 or model.backprop=checkpointed fixes it"]),
        (1.5, {}, [". model.trunk_dtype=float64 or model.backprop=checkpointed fixes it"]),
        (math.nan, {}, [". model.trunk_dtype=float64 or"]),
        (0.02, {"backprop": "auto"}, ["model.trunk_dtype=float64"]),
        (0.02, {"backprop": "stored"}, []),
        (0.02, {"anchor_every": 4}, []),
        (1.5, {"anchor_every": 4}, ["drift 1.5e+00", "model.trunk_dtype=float64"]),
        (math.nan, {"anchor_every": 4}, ["precision. model.trunk_dtype=float64 or model.backprop"]),
        (math.nan, {"anchor_every": 4, "trunk_dtype": "float64"}, ["precision. model.backprop"]),
    ],
)
def test_drift_beyond_the_limit_is_reported_with_a_remedy(tmp_path, drift, model, remedies):
    warning = report.drift_warning(drift, Config.model_validate(tiny_config(tmp_path, model=model)))
    assert bool(warning) == bool(remedies)
    assert [r for r in remedies if r not in warning] == []


def test_curves_are_grouped_and_leave_out_what_does_not_exist():
    entropy = torch.tensor([[1.0, 2.0], [3.0, math.nan]])
    orders = [(2.5, 3.0), (math.nan, 0.0)]
    curves = report.curves(
        report.Meter(), 4.5, 0.25, norm=math.inf, lr=0.1, entropy=entropy, orders=orders, faults=2, epoch=1.5
    )
    assert "train/grad_norm" not in curves
    assert (curves["train/bits_per_dim"], curves["flow/shuffle_penalty"]) == (4.5, 0.25)
    assert curves["flow/entropy_stays_level0"] == 2.0
    assert curves["flow/entropy_leaves_level1"] == 3.0
    assert "flow/entropy_stays_level1" not in curves
    assert (curves["flow/order_entropy_level0"], curves["flow/order_changes_level0"]) == (2.5, 3.0)
    assert "flow/order_entropy_level1" not in curves
    assert (curves["train/epoch"], curves["time/storage_faults"]) == (1.5, 2.0)
    assert {name.split("/")[0] for name in curves} == {"train", "flow", "time"}


def test_what_auto_keeps_is_said_with_the_reason_for_less():
    assert "3 of 8" in report.kept_line(3, 8, 1.0)
    assert "short" not in report.kept_line(3, 8, 1.0)
    assert "56%" in report.kept_line(3, 8, 0.75**2)
