"""bfloat16 copies of weights, made for many layers at once.

Under autocast a layer casts its weights each time it runs, one by one. Here all are cast in one operation, and their
gradients back in one. Not for which networks compute in bfloat16: those of `conditioners`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Slot = tuple[dict[str, Any], str]
"""Where a module holds a parameter."""


def layers_of(network: nn.Module) -> Iterator[nn.Conv2d | nn.Linear]:
    """Yield the convolutions and linear layers of a network."""
    return (module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear))


def slots_in_bfloat16(network: nn.Module) -> list[Slot]:
    """Return the slots of the parameters that a network uses in bfloat16: those of convolutions and linear layers, if
    it is a conditioner that computes so, and they are float32 (float64 stays what it is)."""
    if not getattr(network, "in_bfloat16", False):
        return []
    return [
        (layer._parameters, name)
        for layer in layers_of(network)
        for name, parameter in layer._parameters.items()
        if parameter is not None and parameter.dtype == torch.float32
    ]


@contextmanager
def using(slots: Sequence[Slot], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Have the modules use these tensors in place of their parameters."""
    before = [parameters[name] for parameters, name in slots]
    for (parameters, name), tensor in zip(slots, tensors, strict=True):
        parameters[name] = tensor
    try:
        yield
    finally:
        for (parameters, name), parameter in zip(slots, before, strict=True):
            parameters[name] = parameter


def cast_all(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return copies in another dtype, as views of one tensor, with gradients if the tensors have them."""
    return list(_Cast.apply(dtype, *tensors)) if tensors else []


def cast_gradients(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
    """Return gradients, those in another dtype than these tensors cast to theirs."""
    out = list(grads)
    others = {i: g for i, g in enumerate(grads) if g is not None and g.dtype != like[i].dtype}
    if others:
        dtype = like[next(iter(others))].dtype
        for i, grad in zip(others, _copied(list(others.values()), dtype), strict=True):
            out[i] = grad
    return out


def _copied(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    flat = tensors[0].new_empty(sum(t.numel() for t in tensors), dtype=dtype)
    copies = [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]
    torch._foreach_copy_(copies, list(tensors))
    return copies


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.like = tensors
        return tuple(_copied(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *cast_gradients(grads, ctx.like)
