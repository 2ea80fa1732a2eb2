"""What a bijection is: forward, inverse, log-determinant, backward without stored activations, composition.

Not for particular bijections (`layers`, `shuffle`) nor for choosing what backpropagation stores (`reversible`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn


class Transformed(NamedTuple):
    """A batch after a bijection.

    Attributes:
        y: the transformed batch, (B, C', H', W').
        log_det: log |det dy/dx| of each sample, (B,), in nats.
        penalty: a regulariser of each sample, (B,), which is not part of the density; zero for most bijections.
    """

    y: Tensor
    log_det: Tensor
    penalty: Tensor


class Half(NamedTuple):
    """The half of a batch that a coupling transforms, as `Transformed`; no penalty is None."""

    y: Tensor
    log_det: Tensor
    penalty: Tensor | None = None


Kept = tuple[Tensor, ...]
"""Integer tensors of a forward pass, which the backward pass must not compute again from floats."""

Grads = tuple[Tensor, Tensor, Tensor]
"""The gradients at y, at the log-determinant and at the penalty."""

Reversed = tuple[Tensor, Tensor, tuple[Tensor | None, ...]]
"""The output of `Bijection.reverse`: x, the gradient at x, the gradients of `tuple(self.parameters())`."""


_NOTHING = nullcontext()


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast on the device of `x`, whatever the caller's state."""
    if not torch.is_autocast_enabled(x.device.type):
        return _NOTHING  # many times as fast to enter
    return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=False)


@contextmanager
def with_own_randomness(x: Tensor, seed: int | None = None) -> Iterator[None]:
    """Fork the random states of the CPU and of the device of `x`, seeded if `seed` is given. Afterwards both are as
    before; other devices are left alone."""
    on_gpu = x.device.type == "cuda"
    with torch.random.fork_rng([x.device] if on_gpu else []):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if on_gpu:
                torch.cuda.default_generators[x.device.index].manual_seed(seed)
        yield


def zeros_per_sample(x: Tensor) -> Tensor:
    """Return a zero for each sample of `x`, (B,)."""
    return x.new_zeros(x.shape[0])


def backpropagate(
    outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the gradients at `inputs` from those at `outputs`, where there are any; None where no output depends on an
    input."""
    both = ((o, grad) for o, grad in zip(outputs, grads, strict=True) if o is not None and grad is not None)
    pairs = [(o, grad) for o, grad in both if o.requires_grad]
    if not pairs or not inputs:
        return [None] * len(inputs)
    outs, gs = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outs, list(inputs), gs, allow_unused=True))


def parameters_of(module: nn.Module) -> tuple[nn.Parameter, ...]:
    """Return `tuple(module.parameters())`, several times as fast."""
    found: dict[nn.Parameter, None] = {}  # in order, each once
    modules = [module]
    while modules:
        now = modules.pop()
        found.update((p, None) for p in now._parameters.values() if p is not None)
        modules += [m for m in reversed(now._modules.values()) if m is not None]
    return tuple(found)


def trainable(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the parameters that are not frozen."""
    return [p for p in parameters if p.requires_grad]


def align_gradients(parameters: Sequence[Tensor], grads: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Spread the gradients of `trainable(parameters)` over `parameters`, with None for those that are frozen."""
    left = iter(grads)
    return tuple(next(left) if p.requires_grad else None for p in parameters)


def compose(first: Transformed, second: Transformed) -> Transformed:
    """Return `second`, computed from `first.y`, with the log-determinant and penalty of `first` added."""
    return Transformed(second.y, first.log_det + second.log_det, first.penalty + second.penalty)


def halves_of(channels: int) -> tuple[int, int]:
    """Return the sizes of the two halves of channels; the first is the larger one if their number is odd."""
    return channels - channels // 2, channels // 2


def flatten_chains(bijections: Iterable[Bijection]) -> Iterator[Bijection]:
    """Yield the bijections, and in place of each chain its parts."""
    for bijection in bijections:
        if isinstance(bijection, Chain):
            yield from flatten_chains(bijection)
        else:
            yield bijection


def _or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


class Bijection(nn.Module):
    """A map of (B, C, H, W) with an inverse and a log-determinant.

    A subclass writes `forward` and `inverse`. It computes in the dtype of its input and casts its parameters to
    that, so that the trunk may be float64 while parameters stay float32. It is deterministic, as `reverse` runs it
    again.
    """

    kept_count: int = 0
    """Number of integer tensors that `forward_keeping` keeps."""

    def forward(self, x: Tensor) -> Transformed:
        """Map x to (y, log_det, penalty); `log_det` in nats, (B,)."""
        raise NotImplementedError

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x that `forward` maps to y."""
        raise NotImplementedError

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        """Set parameters from a first batch, where they depend on data; returns y."""
        out: Transformed = self(x)
        return out.y

    def forward_keeping(self, x: Tensor) -> tuple[Transformed, Kept]:
        """Run `forward`; also return the `kept_count` integer tensors that `reverse` must not recompute from floats."""
        return self(x), ()

    def reverse(self, y: Tensor, kept: Kept, grad_y: Tensor, grad_log_det: Tensor, grad_penalty: Tensor) -> Reversed:
        """Return the input and the gradients at it and at the parameters, from the output and the gradients at it.

        This default inverts, runs forward again with grad, and differentiates: good enough where forward is cheap.

        Returns:
            x, grad_x, and the gradients aligned with `tuple(self.parameters())`, None for those that are frozen.
        """
        with torch.no_grad():
            x = self.inverse(y)
        parameters = parameters_of(self)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            grads = backpropagate(self(x), (x, *trainable(parameters)), (grad_y, grad_log_det, grad_penalty))
        return x.detach(), _or_zeros(grads[0], x), align_gradients(parameters, grads[1:])


class Coupling(Bijection):
    """One half of the channels passes unchanged and conditions an invertible map of the other
    (NICE, arXiv 1410.8516, section 3.2).

    The first half of the channels conditions, the larger one if their number is odd, and the rest is transformed;
    `mirrored`: the other way round. A subclass writes `condition` (the only expensive call), `transform` and
    `untransform`.
    """

    def __init__(self, mirrored: bool = False) -> None:
        super().__init__()
        self.mirrored = mirrored

    def condition(self, a: Tensor, kept: Kept = ()) -> tuple[Tensor, ...]:
        """Return the parameters of `transform` from the half a. Integers are taken from `kept`, if given."""
        raise NotImplementedError

    def transform(self, b: Tensor, params: tuple[Tensor, ...]) -> Half:
        """Transform the half b."""
        raise NotImplementedError

    def untransform(self, b: Tensor, params: tuple[Tensor, ...]) -> Tensor:
        """Invert `transform`."""
        raise NotImplementedError

    def kept_of(self, params: tuple[Tensor, ...]) -> Kept:
        """Return the integers among `params`."""
        return ()

    def pull_back(
        self, b: Tensor, params: tuple[Tensor, ...], grads: Grads
    ) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
        """Return the half before `transform`, from the half b after it; and the gradients at that half and at the
        params, from those at what `transform` returns."""
        with torch.no_grad():
            params = tuple(p.detach().requires_grad_() if p.is_floating_point() else p for p in params)
            b = self.untransform(b, params).requires_grad_()
        with torch.enable_grad():
            out = self.transform(b, params)
        floats = [p for p in params if p.is_floating_point()]
        grad_b, *of_floats = backpropagate(out, (b, *floats), grads)
        left = iter(of_floats)
        return b.detach(), _or_zeros(grad_b, b), [next(left) if p.is_floating_point() else None for p in params]

    def go_back(
        self, a: Tensor, b: Tensor, kept: Kept, grads: Grads
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Do as `reverse` with the halves: return b before the coupling, what the gradient at a gains by the params,
        the gradient at b, and those at the parameters. `condition` runs once."""
        parameters = parameters_of(self)
        with torch.enable_grad():
            a = a.detach().requires_grad_()
            params = self.condition(a, kept)
        b, grad_b, at_params = self.pull_back(b, params, grads)
        grad_a, *of_parameters = backpropagate(params, (a, *trainable(parameters)), at_params)
        return b, _or_zeros(grad_a, a), grad_b, align_gradients(parameters, of_parameters)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split x into the half that conditions and the half that is transformed."""
        channels = x.shape[1]
        if channels < 2:
            raise ValueError(f"a coupling needs at least 2 channels, not {channels}")
        first, second = x.split(halves_of(channels), dim=1)
        return (second, first) if self.mirrored else (first, second)

    def whole(self, a: Tensor, b: Tensor) -> Tensor:
        """Join the halves: the inverse of `halves`."""
        return torch.cat((b, a) if self.mirrored else (a, b), dim=1)

    def forward(self, x: Tensor) -> Transformed:
        return self.forward_keeping(x)[0]

    def forward_keeping(self, x: Tensor) -> tuple[Transformed, Kept]:
        a, b = self.halves(x)
        params = self.condition(a)
        out = self.transform(b, params)
        penalty = zeros_per_sample(b) if out.penalty is None else out.penalty
        return Transformed(self.whole(a, out.y), out.log_det, penalty), self.kept_of(params)

    def inverse(self, y: Tensor) -> Tensor:
        a, b = self.halves(y)
        return self.whole(a, self.untransform(b, self.condition(a)))

    def reverse(self, y: Tensor, kept: Kept, grad_y: Tensor, grad_log_det: Tensor, grad_penalty: Tensor) -> Reversed:
        """Do as `Bijection.reverse`, with one run of the conditioner for both the inversion and the gradients."""
        (a, b), (grad_a, grad_b) = self.halves(y), self.halves(grad_y)
        b, more_a, grad_b, grads = self.go_back(a, b, kept, (grad_b, grad_log_det, grad_penalty))
        return self.whole(a, b), self.whole(grad_a + more_a, grad_b), grads


class Chain(Bijection):
    """Bijections one after the other; log-determinants and penalties add up."""

    def __init__(self, parts: Iterable[Bijection]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.kept_count = sum(part.kept_count for part in self)

    def __iter__(self) -> Iterator[Bijection]:
        return cast(Iterator[Bijection], iter(self.parts))

    def forward(self, x: Tensor) -> Transformed:
        out = Transformed(x, zeros_per_sample(x), zeros_per_sample(x))
        for part in self:
            out = compose(out, part(out.y))
        return out

    def inverse(self, y: Tensor) -> Tensor:
        for part in reversed(list(self)):
            y = part.inverse(y)
        return y

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        for part in self:
            x = part.initialize(x)
        return x

    def forward_keeping(self, x: Tensor) -> tuple[Transformed, Kept]:
        out = Transformed(x, zeros_per_sample(x), zeros_per_sample(x))
        kept: Kept = ()
        for part in self:
            step, ints = part.forward_keeping(out.y)
            out, kept = compose(out, step), (*kept, *ints)
        return out, kept

    def reverse(self, y: Tensor, kept: Kept, grad_y: Tensor, grad_log_det: Tensor, grad_penalty: Tensor) -> Reversed:
        """Reverse part by part from the last, so that only one part's graph is alive at a time."""
        total: dict[int, Tensor | None] = {}  # by identity: parts may share a parameter
        for part in reversed(list(self)):
            first = len(kept) - part.kept_count
            kept, own = kept[:first], kept[first:]
            y, grad_y, grads = part.reverse(y, own, grad_y, grad_log_det, grad_penalty)
            for p, grad in zip(part.parameters(), grads, strict=True):
                before = total.get(id(p))
                total[id(p)] = grad if before is None else before if grad is None else before + grad
        return y, grad_y, tuple(total.get(id(p)) for p in self.parameters())
