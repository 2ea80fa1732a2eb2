"""Runs bijections one after the other in few operations, because to start one costs more than a small one takes.

- An actnorm and the 1x1 convolution after it are one map y = W x + shift. The matrices W of all steps with as many
  channels, their inverses and log-determinants are computed together.
- The bfloat16 copies of the weights of all networks are made together, and so are their gradients in float32.
- An exchange of the halves after a coupling is the order in which the coupling joins them.
- Log-determinants are added up at the end, and no zeros are made where there are none.

Not for what is kept for the backward pass (`reversible`), nor for a bijection alone: its `forward` gives the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .bijection import (
    Bijection,
    Coupling,
    Grads,
    Kept,
    Reversed,
    Transformed,
    align_gradients,
    backpropagate,
    flatten_chains,
    halves_of,
    parameters_of,
    trainable,
)
from .layers import (
    ActNorm,
    ConditionedCoupling,
    Exchange,
    InvertibleConv1x1,
    NetworkCoupling,
    inverse_of,
    product_of,
)
from .low_precision import Slot, cast_all, cast_gradients, slots_in_bfloat16, using
from .network_layers import recall, remember

_NOTHING = nullcontext()


class Run(NamedTuple):
    """A batch after bijections: y, (B, C, H, W), and what they add up: terms of the log-determinant and of the penalty,
    each (B,), or () where it is the same for all samples."""

    y: Tensor
    log_dets: tuple[Tensor, ...] = ()
    penalties: tuple[Tensor, ...] = ()

    def then(self, after: Run) -> Run:
        """Return `after`, which began at `y`, with the terms of this one, too."""
        return Run(after.y, self.log_dets + after.log_dets, self.penalties + after.penalties)

    def transformed(self) -> Transformed:
        """Return it with the terms added up."""
        return Transformed(self.y, total(self.log_dets, self.y), total(self.penalties, self.y))


def total(terms: Sequence[Tensor], batch: Tensor) -> Tensor:
    """Return the sum of terms, (B,), where B is the size of the batch; zeros if there are no terms."""
    if not terms:
        return batch.new_zeros(batch.shape[0])
    each = [term.expand(batch.shape[0]) for term in terms]
    return each[0] if len(each) == 1 else torch.stack(each).sum(0)


class Mixing(NamedTuple):
    """The map x -> weight x + shift at every place, (C, C) and (C, 1), and its inverse y -> inverse y - bias."""

    weight: Tensor
    shift: Tensor
    inverse: Tensor
    bias: Tensor


class _Alike(NamedTuple):
    """The mixings of as many channels, computed together, and the numbers of their parts."""

    parts: list[int]
    weights: Tensor  # (N, C, C)
    shifts: Tensor  # (N, C, 1)
    log_det: Tensor  # (), of all of them
    mixings: list[Mixing]


class Prepared(NamedTuple):
    """What is computed for all parts together; `ready` is by the number of a part."""

    alike: list[_Alike]
    ready: dict[int, Mixing | list[Tensor]]
    """Its mixing, or the copies in bfloat16 of what its `slots` hold."""

    @property
    def log_dets(self) -> tuple[Tensor, ...]:
        """Return the terms of all mixings, each ()."""
        return tuple(one.log_det for one in self.alike)


class Fused:
    """Bijections to be run one after the other."""

    def __init__(self, bijections: Iterable[Bijection]) -> None:
        self._parts: list[_Part] = []
        self._ends = [0]
        for bijection in bijections:
            self._parts += _parts_of(list(flatten_chains([bijection])))
            self._ends.append(len(self._parts))

    @cached_property
    def parameters(self) -> tuple[Tensor, ...]:
        """Return the parameters of all bijections; one that several share is there several times."""
        return tuple(p for part in self._parts for p in part.parameters)

    def prepare(self, x: Tensor, inverses: bool = False) -> Prepared:
        """Compute what the parts need for batches like x, their input or their output; differentiable, except for the
        inverses, which are computed only if asked for."""
        mixes: defaultdict[int, list[int]] = defaultdict(list)
        slots = []
        for i, part in enumerate(self._parts):
            if isinstance(part, _Mix):
                mixes[part.channels].append(i)
            slots += [(i, slot) for slot in part.slots]
        alike = [_mix_together(parts, [self._parts[i] for i in parts], x, inverses) for parts in mixes.values()]
        ready: dict[int, Any] = {i: mixing for one in alike for i, mixing in zip(one.parts, one.mixings, strict=True)}
        copies = cast_all([parameters[name] for _, (parameters, name) in slots], torch.bfloat16)
        for (i, _), copy in zip(slots, copies, strict=True):
            ready.setdefault(i, []).append(copy)
        return Prepared(alike, ready)

    def forward(
        self, x: Tensor, prepared: Prepared, number: int | None = None, selective: bool = False
    ) -> tuple[Run, list[Kept]]:
        """Run all bijections, or the one of this number; return what they add up, without `prepared.log_dets`, and what
        `reverse` needs of each part: integers, and if `selective`, what its network remembers."""
        parts = range(len(self._parts)) if number is None else range(*self._ends[number : number + 2])
        run = Run(x)
        kept = []
        for i in parts:
            step, of_part = self._parts[i].forward(run.y, prepared.ready.get(i), selective)
            run = run.then(step)
            kept.append(of_part)
        return run, kept

    def inverse(self, y: Tensor) -> Tensor:
        """Return x."""
        prepared = self.prepare(y, inverses=True)
        for i in reversed(range(len(self._parts))):
            y = self._parts[i].inverse(y, prepared.ready.get(i))
        return y

    def reverse(self, y: Tensor, kept: Sequence[Kept], grads: Grads) -> Reversed:
        """Return x, the gradient at x and those at `parameters`, from y and the gradients at the outputs.

        It goes back part by part, so that the activations of only one are alive at a time.
        """
        with torch.enable_grad():
            prepared = self.prepare(y, inverses=True)
        found: dict[int, tuple[Tensor | None, ...]] = {}
        for i in reversed(range(len(self._parts))):
            y, grad_x, found[i] = self._parts[i].reverse(y, kept[i], grads, prepared.ready.get(i))
            grads = (grad_x, *grads[1:])
        for one in prepared.alike:
            found.update(self._through(one, [found[i] for i in one.parts], grads[1].sum()))
        of_parameters = [grad for i in range(len(self._parts)) for grad in found[i]]
        return y, grads[0], tuple(cast_gradients(of_parameters, self.parameters))

    def _through(
        self, one: _Alike, found: list[tuple[Tensor | None, ...]], grad_log_det: Tensor
    ) -> dict[int, tuple[Tensor | None, ...]]:
        """Turn gradients at mixings into those at the parameters of their parts, by their numbers."""
        parameters = [p for i in one.parts for p in self._parts[i].parameters]
        at_mixings = [torch.stack(cast(Any, grads)) for grads in zip(*found, strict=True)]
        grads = backpropagate(
            (one.weights, one.shifts, one.log_det), trainable(parameters), (*at_mixings, grad_log_det)
        )
        each = iter(align_gradients(parameters, grads))
        return {i: tuple(next(each) for _ in self._parts[i].parameters) for i in one.parts}


class _Part:
    """A bijection, or several that run as one; `ready` is what `Fused.prepare` made for it."""

    slots: Sequence[Slot] = ()
    """Where the weights are that are used in bfloat16."""

    @cached_property
    def parameters(self) -> tuple[Tensor, ...]:
        """Return the parameters in the order of the gradients that `reverse` returns."""
        raise NotImplementedError

    def forward(self, x: Tensor, ready: Any, selective: bool = False) -> tuple[Run, Kept]:
        """Return the output and what to keep."""
        raise NotImplementedError

    def inverse(self, y: Tensor, ready: Any) -> Tensor:
        """Return the input."""
        raise NotImplementedError

    def reverse(self, y: Tensor, kept: Kept, grads: Grads, ready: Any) -> Reversed:
        """Return the input, its gradient, and those at the parameters, or at what is ready in place of them."""
        raise NotImplementedError


class _Plain(_Part):
    """A bijection that runs as it is."""

    def __init__(self, bijection: Bijection) -> None:
        self.bijection = bijection

    @cached_property
    def parameters(self) -> tuple[Tensor, ...]:
        return parameters_of(self.bijection)

    def forward(self, x: Tensor, ready: Any, selective: bool = False) -> tuple[Run, Kept]:
        out, kept = self.bijection.forward_keeping(x)
        return Run(out.y, (out.log_det,), (out.penalty,)), kept

    def inverse(self, y: Tensor, ready: Any) -> Tensor:
        return self.bijection.inverse(y)

    def reverse(self, y: Tensor, kept: Kept, grads: Grads, ready: Any) -> Reversed:
        return self.bijection.reverse(y, kept, *grads)


class _Mix(_Part):
    """An actnorm and the 1x1 convolution after it."""

    def __init__(self, norm: ActNorm, mix: InvertibleConv1x1) -> None:
        self.norm, self.mix = norm, mix
        self.channels = mix.sign.shape[0]

    @cached_property
    def parameters(self) -> tuple[Tensor, ...]:
        return self.mix.factors, self.norm.log_scale, self.norm.bias

    def forward(self, x: Tensor, ready: Mixing, selective: bool = False) -> tuple[Run, Kept]:
        weight = ready.weight.expand(x.shape[0], -1, -1)
        return Run(torch.baddbmm(ready.shift, weight, x.flatten(2)).view(x.shape)), ()

    def inverse(self, y: Tensor, ready: Mixing) -> Tensor:
        inverse = ready.inverse.expand(y.shape[0], -1, -1)
        return torch.baddbmm(ready.bias, inverse, y.flatten(2), beta=-1).view(y.shape)

    def reverse(self, y: Tensor, kept: Kept, grads: Grads, ready: Mixing) -> Reversed:
        grad_y = grads[0].flatten(2)
        x = self.inverse(y, ready)
        grad_x = torch.bmm(ready.weight.mT.expand(y.shape[0], -1, -1), grad_y).view(y.shape)
        grad_weight = torch.bmm(grad_y, x.flatten(2).mT).sum(0)
        return x, grad_x, (grad_weight, grad_y.sum((0, 2)).unsqueeze(1))


class _Coupled(_Part):
    """A coupling, and the exchange of the halves after it, if there is one."""

    def __init__(self, coupling: Coupling, exchanged: bool) -> None:
        self.coupling, self.exchanged = coupling, exchanged
        if isinstance(coupling, NetworkCoupling):
            self.slots = slots_in_bfloat16(coupling.conditioner)

    @cached_property
    def parameters(self) -> tuple[Tensor, ...]:
        return parameters_of(self.coupling)

    def forward(self, x: Tensor, ready: Any, selective: bool = False) -> tuple[Run, Kept]:
        a, b = self.coupling.halves(x)
        outputs: list[Tensor] = []
        with self._weights(ready), remember(outputs) if selective else _NOTHING:
            params = self.coupling.condition(a)
        out = self.coupling.transform(b, params)
        penalties = () if out.penalty is None else (out.penalty,)
        return Run(self._whole(a, out.y), (out.log_det,), penalties), (*self.coupling.kept_of(params), *outputs)

    def inverse(self, y: Tensor, ready: Any) -> Tensor:
        a, b = self._halves(y)
        with self._weights(ready):
            params = self.coupling.condition(a)
        return self.coupling.whole(a, self.coupling.untransform(b, params))

    def reverse(self, y: Tensor, kept: Kept, grads: Grads, ready: Any) -> Reversed:
        (a, b), (grad_a, grad_b) = self._halves(y), self._halves(grads[0])
        kept, outputs = kept[: self.coupling.kept_count], kept[self.coupling.kept_count :]
        with self._weights(ready), recall(outputs) if outputs else _NOTHING:
            b, more_a, grad_b, of_parameters = self.coupling.go_back(a, b, kept, (grad_b, *grads[1:]))
        return self.coupling.whole(a, b), self.coupling.whole(grad_a + more_a, grad_b), of_parameters

    def _weights(self, copies: Sequence[Tensor] | None) -> AbstractContextManager[None]:
        return using(self.slots, copies) if copies else _NOTHING

    def _halves(self, y: Tensor) -> tuple[Tensor, Tensor]:
        if not self.exchanged:
            return self.coupling.halves(y)
        second, first = y.split(halves_of(y.shape[1])[::-1], dim=1)
        return (second, first) if self.coupling.mirrored else (first, second)

    def _whole(self, a: Tensor, b: Tensor) -> Tensor:
        if not self.exchanged:
            return self.coupling.whole(a, b)
        return torch.cat((a, b) if self.coupling.mirrored else (b, a), dim=1)


def _parts_of(bijections: Sequence[Bijection]) -> Iterator[_Part]:
    i = 0
    while i < len(bijections):
        now, after = bijections[i], bijections[i + 1] if i + 1 < len(bijections) else None
        i += 1
        if isinstance(now, ActNorm) and isinstance(after, InvertibleConv1x1):
            yield _Mix(now, after)
            i += 1
        elif isinstance(now, Coupling) and not isinstance(now, ConditionedCoupling):
            exchanged = isinstance(after, Exchange)
            yield _Coupled(now, exchanged)
            i += exchanged
        else:
            yield _Plain(now)


def _mix_together(numbers: list[int], parts: Sequence[Any], x: Tensor, inverses: bool) -> _Alike:
    """Compute the mixings of parts with as many channels, in float64, so that each is rounded only once."""

    def stack(tensors: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(tensors)).double()

    channels = parts[0].channels
    factors, sign = stack(p.mix.factors for p in parts), stack(p.mix.sign for p in parts)
    log_scale, bias = (stack(getattr(p.norm, name) for p in parts).flatten(2) for name in ("log_scale", "bias"))
    rows = torch.stack([p.mix.rows for p in parts])
    weights = product_of(factors, sign, rows) * log_scale.exp().mT  # (N, C, C) times (N, 1, C)
    shifts = weights @ bias
    places = x.numel() // max(1, x.shape[0] * channels)  # bijections keep the number of dimensions
    log_det = places * (factors.diagonal(dim1=1, dim2=2).sum() + log_scale.sum())
    weights, shifts, log_det = weights.to(x.dtype), shifts.to(x.dtype), log_det.to(x.dtype)
    with torch.no_grad():
        if inverses:
            inverse = (inverse_of(factors, sign, rows) * (-log_scale).exp()).to(x.dtype)
            biases = bias.to(x.dtype)
        else:  # not to be used
            inverse, biases = weights, shifts
    mixings = [Mixing(*each) for each in zip(*(t.unbind() for t in (weights, shifts, inverse, biases)), strict=True)]
    return _Alike(numbers, weights, shifts, log_det, mixings)
