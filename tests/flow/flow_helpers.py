"""What several tests of the flow need. No tests here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from eiwtrain.flow import ConditionerConfig, EIWFlow, FlowConfig

Module = TypeVar("Module", bound=nn.Module)

TINY = FlowConfig((3, 8, 8), levels=2, steps=2, conditioner=ConditionerConfig(hidden=8), backprop="stored")


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
    return at_random_parameters(EIWFlow(replace(config, **changes)).to(dtype), scale=0.1)


def images(batch: int, config: FlowConfig = TINY, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, *config.image_shape, generator=generator, dtype=torch.float64) - 0.5).to(dtype)


def log_abs_det_jacobian(function: Any, x: Tensor) -> Tensor:
    """log |det| of the full Jacobian of a map of one sample, (1, ...), computed a row at a time."""
    jacobian = torch.autograd.functional.jacobian(lambda v: function(v.view(x.shape)).flatten(), x.flatten())
    return torch.linalg.slogdet(jacobian)[1]
