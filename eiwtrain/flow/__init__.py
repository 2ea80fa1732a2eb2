"""EIW-Flow and similar flows: exact-likelihood image models with activation-free backpropagation.

Imports torch, safetensors and the standard library, and nothing else of eiwtrain. The names, listed in `public`, are
imported when the first of them is used, so that a program can read `config` and `presets` without waiting for torch.

    >>> import torch
    >>> from eiwtrain.flow import ConditionerConfig, EIWFlow, FlowConfig, dequantize
    >>> config = FlowConfig((3, 8, 8), levels=2, steps=2, conditioner=ConditionerConfig(hidden=16))
    >>> flow = EIWFlow(config)
    >>> pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    >>> x = dequantize(pixels, torch.rand(4, 3, 8, 8))
    >>> flow.initialize(x)  # once, before training
    >>> out = flow(x)
    >>> (-out.log_prob / flow.dims + 0.01 * out.penalty).mean().backward()
    >>> flow.bits_per_dim(x).shape
    torch.Size([4])
    >>> flow.to_images(flow.sample(2, temperature=0.8)).shape
    torch.Size([2, 3, 8, 8])
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Import every public name when the first is asked for (PEP 562)."""
    if find_spec(f"{__name__}.{name}") is not None:  # `from . import images`, maybe while `public` is being imported
        return import_module(f".{name}", __name__)
    public = import_module(".public", __name__)
    globals().update({each: getattr(public, each) for each in public.__all__})
    if name in globals():
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
