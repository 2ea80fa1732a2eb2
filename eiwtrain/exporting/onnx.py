"""The encoder of a flow as an ONNX graph: reals to latents and log-determinant, in float32, at any batch size.

Not for decoding, nor for pixels: the caller draws and adds the noise (`flow.dequantize`, or `EIWFlow.dequantize` for
variational dequantization). With standard-normal latents, log p(x) is their log-density plus `log_det`.
Needs onnx, onnxscript and onnxruntime; each graph is compared with torch before it is published.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from eiwtrain.flow import EIWFlow

ONNX_FILE = "encode.onnx"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_TOLERANCE = 1e-3  # of latents, and of the log-determinant in nats per dimension; float32 gives some 1e-6


class _Encoder(nn.Module):
    def __init__(self, flow: EIWFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        latents, log_det = self.flow.encode(x, labels)
        return *latents, log_det


def check(flow: EIWFlow) -> None:
    """Raise ValueError if this flow has no ONNX graph, or a package to write it is not installed."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--onnx: {', '.join(missing)} not installed; pip install 'eiwtrain[onnx]'")
    if flow.config.noise_shape != flow.config.image_shape:
        raise ValueError(
            "--onnx: this flow has no ONNX graph: its log-probability is a bound over noise that joins on the way, and "
            "ONNX has no inverse of the normal distribution to make it from uniform numbers"
        )
    if flow.config.shuffle in ("hard", "order"):
        raise ValueError(
            f"--onnx: a flow of shuffle '{flow.config.shuffle}' has no ONNX graph: torch exports no stable sort"
        )


def write(flow: EIWFlow, file: Path) -> None:
    """Write the graph: input `x`, float32 (n, C, H, W), in [-1/2, 1/2), and `labels`, int64 (n,), if there are
    classes; outputs `z0`, `z1` and so on, the latents of each level, and `log_det` (n,) in nats.

    Conditioners compute in float32, even if the flow was trained in bfloat16.

    Raises:
        ValueError: the graph does not compute what the flow does.
    """
    import onnxruntime

    plain = EIWFlow(replace(flow.config, conditioner_dtype="float32", trunk_dtype="float32", backprop="stored"))
    plain.load_state_dict(flow.state_dict())
    encoder = _Encoder(plain.float().eval().requires_grad_(False))
    batch = torch.export.Dim.DYNAMIC
    example = _example(flow, 3)
    shapes = tuple({0: batch} for _ in example)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own exporter uses deprecated functions
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.export.export(encoder, example, dynamic_shapes=shapes, strict=True)
        names = [f"z{level}" for level in range(flow.config.levels)] + ["log_det"]
        torch.onnx.export(program, (), str(file), output_names=names, external_data=False, verbose=False)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        for n in (1, 4):
            inputs = _example(flow, n)
            given = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
            *latents, log_det = [
                float((torch.from_numpy(got) - wanted).abs().max())
                for got, wanted in zip(session.run(None, given), encoder(*inputs), strict=True)
            ]
            if not max(*latents, log_det / flow.dims) < _TOLERANCE:
                raise ValueError(f"--onnx: the graph differs from the flow: latents {max(latents)}, log_det {log_det}")


def _example(flow: EIWFlow, n: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    x = torch.rand(n, *flow.config.image_shape, generator=generator) - 0.5
    classes = flow.config.classes
    return (x, torch.arange(n) % classes) if classes else (x,)
