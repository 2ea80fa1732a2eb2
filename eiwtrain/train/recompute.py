"""Checks on a GPU, before training, that conditioners compute the same in the backward pass as in the forward pass.

The backward pass runs in a thread of its own and with gradients, the forward pass of inverted bijections without. A
library that chooses kernels by either would give gradients of another function, and nothing else would show it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from eiwtrain import flow

_WEIGHTS_NOT_ZERO = 0.05  # in place of layers that start at zero, whose output is zero whatever computes it


def warning(model: flow.EIWFlow, batch: Callable[[], tuple[Any, ...]]) -> str | None:
    """Return one line if a conditioner of the model gives other numbers in the backward pass; None if all is well.

    It looks at no model on the CPU, whose backward pass runs in the same thread, and at none that stores everything and
    so computes nothing again.

    Args:
        model: in evaluation mode, with whole weights.
        batch: returns the arguments for a call of the model.
    """
    device = next(model.parameters()).device
    if device.type == "cpu" or model.config.backprop == "stored":
        return None
    found = dict(differences(model, batch()))
    if not found:
        return None
    names = ", ".join(f"{name} by {difference:.1e}" for name, difference in found.items())
    return (
        f"warning: on {device} conditioners give other numbers in the backward pass than in the forward pass, {names}: "
        f"gradients of model.backprop={model.config.backprop} are inexact by as much; model.backprop=stored computes "
        "nothing again (docs/gpus.md)"
    )


@torch.no_grad()
def differences(model: flow.EIWFlow, arguments: tuple[Any, ...]) -> Iterator[tuple[str, float]]:
    """Yield the name of each conditioner whose outputs are not equal to the bit, and the largest difference. One
    conditioner of each kind and size is looked at, with what it is given in a run of the model on `arguments`."""
    kinds: dict[Any, tuple[str, flow.Conditioner, Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, flow.Conditioner):

            def keep(module: Any, inputs: tuple[Tensor, ...], name: str = name) -> None:
                kinds.setdefault((type(module), inputs[0].shape), (name, module, inputs[0].clone()))

            hooks.append(module.register_forward_pre_hook(keep))
    model(*arguments)
    for hook in hooks:
        hook.remove()
    for name, module, x in kinds.values():
        first, *others = _four_times(_with_weights(module), x)
        if not all(torch.equal(first, other) for other in others):
            yield name, max(float((first.double() - other.double()).abs().max()) for other in others)


def _with_weights(module: flow.Conditioner) -> flow.Conditioner:
    """Return a copy of a conditioner without hooks, to be trained, whose weights are not zero."""
    twin = copy.deepcopy(module).requires_grad_()
    generator = torch.Generator(next(twin.parameters()).device).manual_seed(0)
    for p in twin.parameters():
        if not p.any():
            p.normal_(0.0, _WEIGHTS_NOT_ZERO, generator=generator)
    return twin


def _four_times(module: flow.Conditioner, x: Tensor) -> list[Tensor]:
    """Return what a conditioner makes of x without gradients and with them, in this thread and in autograd's."""
    outputs: list[Tensor] = []

    def both() -> None:
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                outputs.append(module(x.detach().requires_grad_(gradients)).detach())

    both()
    with torch.enable_grad():
        _Backward.apply(x.detach().requires_grad_(), both).sum().backward()
    return outputs


class _Backward(torch.autograd.Function):
    """The identity; its backward pass calls a function, in the thread of autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.call()
        return grad, None
