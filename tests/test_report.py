import math

import pytest
import torch

from eiwtrain import report


def test_a_meter_gives_means_over_its_steps(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])
    meter = report.Meter()
    meter.add(8, 4.0, 0.5, waited=0.5)
    meter.add(8, 2.0, 1.5, waited=0.5)
    now[0] += 4.0
    assert (meter.bits_per_dim, meter.penalty, meter.images_per_second, meter.data_wait) == (3.0, 1.0, 4.0, 0.25)
    p = report.progress(meter, step=2, max_steps=12, global_batch=8)
    assert p["images"] == 16
    assert p["eta"] == pytest.approx(10 * 8 / 4.0)


def test_curves_are_grouped_and_leave_out_what_does_not_exist():
    entropy = torch.tensor([[1.0, 2.0], [3.0, math.nan]])
    curves = report.curves(report.Meter(), norm=1.0, lr=0.1, goodput=0.5, entropy=entropy)
    assert curves["flow/entropy_stays_level0"] == 2.0
    assert curves["flow/entropy_leaves_level1"] == 3.0
    assert "flow/entropy_stays_level1" not in curves
    assert {name.split("/")[0] for name in curves} == {"train", "flow", "time"}
