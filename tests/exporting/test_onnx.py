import importlib.util

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import DENSE
from small_run import commit, small_flow

from eiwtrain import export
from eiwtrain.exporting import onnx


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A flow whose conditioners are bfloat16, its float32 twin, and the graph that was exported with it."""
    folder = tmp_path_factory.mktemp("onnx")
    model = small_flow(levels=1, steps=1)
    commit(folder / "run", 1, 4.0, model)
    assert (
        export.main(["1", "--run", str(folder / "run"), "--output", str(folder / "m"), "--onnx", "--no-register"]) == 0
    )
    return model, onnxruntime.InferenceSession(str(folder / "m" / "encode.onnx"))


def test_the_graph_encodes_as_the_flow_does_at_any_batch_size(encoder):
    model, session = encoder
    assert [i.name for i in session.get_inputs()] == ["x"]
    assert [o.name for o in session.get_outputs()] == ["z0", "log_det"]
    for n in (1, 3, 7):
        x = torch.rand(n, 3, 8, 8) - 0.5
        z, log_det = session.run(None, {"x": x.numpy()})
        (latent,), expected = model.encode(x)
        np.testing.assert_allclose(z, latent.detach(), atol=1e-2)  # a twin in bfloat16
        np.testing.assert_allclose(log_det / model.dims, expected.detach() / model.dims, atol=1e-2)


def test_a_graph_that_computes_something_else_is_not_given_away(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "_TOLERANCE", 0.0)
    with pytest.raises(ValueError, match="the graph differs from the flow"):
        onnx.write(small_flow(levels=1, steps=1, shuffle="none"), tmp_path / "encode.onnx")


def test_where_there_can_be_no_graph_a_line_says_why_before_anything_is_written(tmp_path, capsys, monkeypatch):
    for run, model, why in (
        ("dense", DENSE, "this flow has no ONNX graph: its log-probability is a bound over noise that joins"),
        ("order", {"shuffle": "order"}, "a flow of shuffle 'order' has no ONNX graph"),
        ("hard", {"shuffle": "hard"}, "a flow of shuffle 'hard' has no ONNX graph"),
    ):
        commit(tmp_path / run, 1, 4.0, small_flow(**model))
        command = ["1", "--run", str(tmp_path / run), "--output", str(tmp_path / "m"), "--onnx", "--no-register"]
        assert export.main(command) == 2
        assert capsys.readouterr().err.startswith(f"error: --onnx: {why}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert export.main(command) == 2
    assert "pip install 'eiwtrain[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
