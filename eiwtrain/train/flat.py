"""The parameters of a module as views of one flat tensor: what a step does to all of them is then a few operations.

For ZeRO stage 0. At stages 1 to 3 DeepSpeed has flat tensors of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors  # loops in C++; DeepSpeed uses them as well

from eiwtrain.train.optimizers import Block

_BLOCK = 2**16  # numbers whose squares are added up at once


def flatten_(parameters: Sequence[Tensor]) -> Tensor:
    """Return all elements as one tensor of one dimension, and make the parameters views of it.

    Raises:
        TypeError: they are not all float32.
    """
    if other := {p.dtype for p in parameters} - {torch.float32}:
        raise TypeError(f"parameters are float32 in training, not {', '.join(map(str, other))}")
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    for parameter, view in zip(parameters, views(flat, parameters), strict=True):
        parameter.data = view
    return flat


def layout(matrices: Iterable[Tensor]) -> tuple[list[Block], dict[Tensor, int]]:
    """Return how matrices lie in a flat tensor: their blocks, one for each shape, and the place of each matrix.

    Args:
        matrices: (rows, ...), all dimensions but the first count as one.
    """
    alike: defaultdict[tuple[int, int], list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        alike[len(matrix), matrix[0].numel()].append(matrix)
    ordered = [matrix for shape in sorted(alike) for matrix in alike[shape]]
    return [Block(len(alike[shape]), *shape) for shape in sorted(alike)], {m: n for n, m in enumerate(ordered)}


def views(flat: Tensor, like: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Return the parts of a flat tensor in the shapes of the tensors that it was made from."""
    parts: tuple[Tensor, ...] = _unflatten_dense_tensors(flat, like)
    return parts


class FlatModule(nn.Module):
    """A module as DeepSpeed sees it at stage 0: with one parameter, `weights`, of which its own trained ones are views.

    DeepSpeed then broadcasts, reduces, updates and clears one tensor instead of thousands. Autograd knows nothing of
    it and leaves a gradient in each of the module's own parameters; `gather` moves them into the flat one.

    Args:
        module: whose trained parameters are float32.
        matrices: parameters that come first, those of one shape together, for an optimizer of matrices.
    """

    def __init__(self, module: nn.Module, matrices: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._module = (module,)  # in a tuple, which hides its parameters
        self.blocks, place = layout(matrices)
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        named.sort(key=lambda each: place.get(each[1], len(place)))
        self.names, self.trained = [name for name, _ in named], [p for _, p in named]
        self.weights = nn.Parameter(flatten_(self.trained))

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self._module[0](*inputs, **options)

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the parts of a tensor that is laid out as the weights are, by the names of the parameters."""
        return dict(zip(self.names, views(flat, self.trained), strict=True))

    @torch.no_grad()
    def gather(self) -> Tensor:
        """Add the gradients of the module's own parameters to that of the flat one, and return it; clear them.

        Autograd then hands over the next gradients as they are, where it would add to existing ones, each by itself.
        """
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
        for parameter in self.trained:
            parameter.grad = None
        if self.weights.grad is None:
            self.weights.grad = _flatten_dense_tensors(gradients)
        else:
            torch._foreach_add_(views(self.weights.grad, gradients), gradients)
        assert self.weights.grad is not None
        return self.weights.grad

    def average_in(self, averaged: dict[str, nn.Parameter]) -> Callable[[float], None]:
        """Return a function that moves parameters, copies of the module's by name, a share 0..1 of the way to these."""
        flat, weights = flatten_([averaged[name] for name in self.names]), self.weights.detach()

        def move(share: float) -> None:
            flat.lerp_(weights, share)

        return move

    def gradients_to_reduce(self) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """Return what DeepSpeed all-reduces at the end of a step: the flat gradient, and none of experts."""
        return [self.gather()], {}

    def norm(self) -> Tensor:
        """Return the norm of the flat gradient."""
        assert self.weights.grad is not None
        # in blocks: on CPUs the squares are added up in float32, and over 10^8 numbers that is 1 % off
        return nn.utils.get_total_norm(self.weights.grad.split(_BLOCK))

    @torch.no_grad()
    def clip_(self, norm: float, most: float, times: int = 1) -> None:
        """Multiply the flat gradient by `times`, then scale it, whose norm is now this, down to the norm `most`; 0:
        never."""
        # as `torch.nn.utils.clip_grad_norm_` does
        factor = times * (most / (norm + 1e-6) if most and norm > most else 1.0)
        if factor != 1.0:
            assert self.weights.grad is not None
            self.weights.grad.mul_(factor)
