"""What several tests of the flow need. No tests here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from eiwtrain.flow import Conditioner, ConditionerConfig, DequantizerConfig, EIWFlow, FlowConfig, FlowOutput

Module = TypeVar("Module", bound=nn.Module)

TINY = FlowConfig((3, 8, 8), levels=2, steps=2, conditioner=ConditionerConfig(hidden=8), backprop="stored")
DENSE = FlowConfig(
    (3, 8, 8),
    backbone="dense",
    levels=2,
    units=(3, 2),
    steps=(1, 2),
    noise_channels=2,
    conditioner=ConditionerConfig("dense", hidden=6, depth=1, growth=4, activation="silu"),
    shuffle="order",
    dequantization="variational",
    dequantizer=DequantizerConfig(couplings=2, hidden=4, depth=1, growth=3),
    backprop="stored",
)
"""A small EIW-Flow: three units, so that a cross-unit coupling sees more than one input."""


def at_random_parameters(module: Module, scale: float = 0.2, seed: int = 1) -> Module:
    """The module, with noise on every parameter: at the start most of a flow is the identity, which proves nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
    return module


def make_flow(config: FlowConfig = TINY, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> EIWFlow:
    """A flow at random parameters, the same ones for the same shapes."""
    torch.manual_seed(seed)
    flow = at_random_parameters(EIWFlow(replace(config, **changes)).to(dtype), scale=0.1)
    for order in flow.orders():
        order.sort()
    return flow


def images(batch: int, config: FlowConfig = TINY, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, *config.image_shape, generator=generator, dtype=torch.float64) - 0.5).to(dtype)


def log_abs_det_jacobian(function: Any, x: Tensor) -> Tensor:
    """log |det| of the full Jacobian of a map of one sample, (1, ...), computed a row at a time."""
    jacobian = torch.autograd.functional.jacobian(lambda v: function(v.view(x.shape)).flatten(), x.flatten())
    return torch.linalg.slogdet(jacobian)[1]


def whole_loss(out: FlowOutput) -> Tensor:
    """Return a loss of every output."""
    # uneven weights, so that gradients of one sample in place of another's would show.
    weights = torch.arange(1, len(out.log_prob) + 1, dtype=out.log_prob.dtype)
    return ((-out.log_prob + 10 * out.penalty) * weights).mean()


def gradients(flow: EIWFlow, x: Tensor, loss: Callable[[FlowOutput], Tensor] = whole_loss) -> Tensor:
    """Return the gradients of the input and all parameters as one float64 vector; zero where a gradient is missing."""
    flow.zero_grad()
    x = x.clone().requires_grad_()
    loss(flow(x)).backward()
    grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in (x, *flow.parameters())]
    return torch.cat([g.flatten().double() for g in grads])


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b|."""
    return ((a - b).norm() / b.norm()).item()


@contextmanager
def conditioner_calls(flow: nn.Module) -> Iterator[Counter[str]]:
    """Count, in the block, how often each conditioner runs, by its name."""
    calls: Counter[str] = Counter()
    hooks = [
        module.register_forward_hook(lambda _m, _i, _o, name=name: calls.update([name]))
        for name, module in flow.named_modules()
        if isinstance(module, Conditioner)
    ]
    yield calls
    for hook in hooks:
        hook.remove()
