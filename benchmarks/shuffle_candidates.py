"""Candidates for the shuffle before a split, none of them in the package, and a flow that carries any of them.

Not for training or comparing them: that is `benchmarks.shuffle`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eiwtrain import flow
from eiwtrain.flow.bijection import Bijection, Chain, Coupling, Transformed, without_autocast
from eiwtrain.flow.config import SHUFFLES
from eiwtrain.flow.layers import mix_channels
from eiwtrain.flow.shuffle import (
    channel_descriptors,
    from_blocks,
    householder_rotation,
    make_shuffle,
    scaling_terms,
    to_blocks,
)

_LEAST_VARIANCE = 1e-6


@dataclass(frozen=True)
class Recipe:
    """What a candidate is made of. The defaults are those of `plain`."""

    turn: str = "reflect"
    """reflect; cayley or exp of a predicted skew-symmetric matrix; none for weights alone."""
    rank: int = 2
    """Pairs of reflections; for cayley and exp the rank of the skew-symmetric matrix is twice that, 0 for full."""
    weights: bool = True
    """Whether channels are scaled."""
    shift: bool = False
    """Whether a predicted constant is added to each channel."""
    descriptors: str = "plain"
    """One of `DESCRIPTORS`."""
    block: int = 0
    """Side, in pixels, of the blocks that are each described, turned and scaled for themselves; 0: the image."""
    both: bool = False
    """Whether, with blocks, the solver also sees the descriptors of the image."""
    earlier: bool = False
    """Whether the solver also sees the latents that left at the levels before."""
    whole: str = ""
    """After the first level: "instead" or "first", a map of all channels given the latents that left before, in
    place of the halves or before them."""
    static: str = ""
    """"identity" or "rotation", as what a learned 1x1 convolution starts that comes first; "" for none."""
    hidden: int | None = None
    """Hidden units of the solver; None for as many as the parameters of `plain` allow."""


BASE = "plain"
"""What the others are compared with."""

CANDIDATES: dict[str, Recipe] = {
    BASE: Recipe(hidden=32),
    "weights": Recipe(turn="none"),
    "rotation": Recipe(weights=False),
    "soft8": Recipe(rank=4),
    "soft16": Recipe(rank=8),
    "cayley": Recipe(turn="cayley", rank=0),
    "cayley-low": Recipe(turn="cayley"),
    "exp": Recipe(turn="exp", rank=0),
    "exp-low": Recipe(turn="exp"),
    "earlier": Recipe(earlier=True),
    "whole": Recipe(whole="instead"),
    "whole-first": Recipe(whole="first"),
    "static": Recipe(static="identity"),
    "static-alone": Recipe(static="identity", turn="none", weights=False, hidden=1),
    "static-rotated": Recipe(static="rotation", turn="none", weights=False, hidden=1),
    "static-exp": Recipe(static="identity", turn="exp", rank=0),
    "static-block4": Recipe(static="identity", block=4),
    "static-shift": Recipe(static="identity", shift=True),
    "static-block4-shift": Recipe(static="identity", block=4, shift=True),
    "static-block4-exp": Recipe(static="identity", turn="exp", rank=0, block=4),
    "static-block2": Recipe(static="identity", block=2),
    "edges": Recipe(descriptors="edges"),
    "grid": Recipe(descriptors="grid"),
    "shift": Recipe(shift=True),
    "block4": Recipe(block=4),
    "block2": Recipe(block=2),
    "block4-both": Recipe(block=4, both=True),
    "block4-shift": Recipe(block=4, shift=True),
    "block4-turn": Recipe(block=4, weights=False),
    "block4-weights": Recipe(block=4, turn="none"),
    "wide": Recipe(hidden=128),
}
VARIANTS = (*SHUFFLES, *CANDIDATES)


def describe_edges(a: Tensor) -> Tensor:
    """Return `channel_descriptors` and the log-variance of the differences of neighbours: (B, C, H, W) to (B, 4C)."""
    down, right = a.diff(dim=2).square().mean((2, 3)), a.diff(dim=3).square().mean((2, 3))
    return torch.cat((channel_descriptors(a), (0.5 * (down + right) + _LEAST_VARIANCE).log()), dim=1)


def describe_grid(a: Tensor) -> Tensor:
    """Return `channel_descriptors` and the means of the four quarters: (B, C, H, W) to (B, 7C)."""
    return torch.cat((channel_descriptors(a), F.adaptive_avg_pool2d(a, 2).flatten(1)), dim=1)


DESCRIPTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": channel_descriptors,
    "edges": describe_edges,
    "grid": describe_grid,
}


class Memory:
    """Descriptors (B, 3C) of the latents that have left, level by level; what the inverse knows from the start."""

    def __init__(self) -> None:
        self.left: list[Tensor] = []

    def before(self, level: int, like: Tensor, size: int) -> Tensor:
        """Return the descriptors of all levels before `level`, (B, size); zeros at initialisation, before any exist."""
        known = self.left[:level]
        return torch.cat(known, dim=1).to(like.dtype) if known else like.new_zeros(len(like), size)


@dataclass(frozen=True)
class Place:
    """The place of a shuffle: its level, the number of descriptors of earlier latents, and their memory."""

    memory: Memory
    level: int = 0
    earlier: int = 0

    def known(self, like: Tensor) -> Tensor:
        """Return those descriptors, (B, earlier)."""
        return self.memory.before(self.level, like, self.earlier)


class Mixer(nn.Module):
    """A perceptron that starts at zero and predicts an invertible affine map of channels from descriptors."""

    def __init__(self, recipe: Recipe, inputs: int, size: int, hidden: int) -> None:
        super().__init__()
        self.recipe, self.size = recipe, size
        skew = size * (size - 1) // 2 if recipe.rank == 0 else recipe.rank * size
        self.sizes = (size * recipe.weights, size * recipe.shift, 0 if recipe.turn == "none" else skew)
        self.first = nn.Linear(inputs, hidden)
        self.last = nn.Linear(hidden, sum(self.sizes))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        if recipe.turn != "none" and recipe.rank:
            self.vectors = nn.Parameter(F.normalize(torch.randn(recipe.rank, size), dim=1))

    def forward(self, described: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, inputs) to log-weights (B, size), shift (B, size), rotation (B, size, size)."""
        out = self.last(F.relu(self.first(described.to(self.first.weight.dtype)))).to(described.dtype)
        raw, shift, turn = out.split(self.sizes, dim=1)
        nothing = described.new_zeros(len(described), self.size)
        return torch.tanh(raw) if raw.numel() else nothing, shift if shift.numel() else nothing, self._rotation(turn)

    def _rotation(self, raw: Tensor) -> Tensor:
        eye = torch.eye(self.size, dtype=raw.dtype, device=raw.device)
        if self.recipe.turn == "none":
            return eye.expand(len(raw), -1, -1)
        if self.recipe.rank:
            raw = raw.view(-1, self.recipe.rank, self.size)
            learned = self.vectors.to(raw.dtype).expand_as(raw)
            if self.recipe.turn == "reflect":
                return householder_rotation(torch.stack((learned + raw, learned), dim=2).flatten(1, 2))
            skew = raw.mT @ learned
        else:
            rows, columns = torch.tril_indices(self.size, self.size, -1, device=raw.device)
            skew = raw.new_zeros(len(raw), self.size, self.size)
            skew[:, rows, columns] = raw
        skew = skew - skew.mT
        if self.recipe.turn == "exp":
            return torch.linalg.matrix_exp(skew)
        return torch.linalg.solve(eye + skew, eye - skew)


def apply(b: Tensor, params: tuple[Tensor, ...]) -> Transformed:
    """Turn, scale, shift the channels of b, (B, C, H, W)."""
    log_weights, shift, turn = params
    y = mix_channels(log_weights.exp().unsqueeze(2) * turn, b) + shift[:, :, None, None]
    return Transformed(y, *scaling_terms(b, log_weights))


def unapply(y: Tensor, params: tuple[Tensor, ...]) -> Tensor:
    """The inverse of `apply`."""
    log_weights, shift, turn = params
    return mix_channels(turn.mT * (-log_weights).exp().unsqueeze(1), y - shift[:, :, None, None])


class CandidateHalf(Coupling):
    """Turns and scales one half of the channels by what the other half, and maybe earlier latents, say."""

    def __init__(self, recipe: Recipe, channels: int, place: Place, hidden: int, mirrored: bool = False) -> None:
        super().__init__(mirrored)
        self.recipe, self.place = recipe, place
        sizes = (channels // 2, channels - channels // 2)
        given, size = reversed(sizes) if mirrored else sizes
        self.describe = DESCRIPTORS[recipe.descriptors]
        inputs = (1 + recipe.both) * self.describe(torch.zeros(1, given, 2, 2)).shape[1]
        self.mixer = Mixer(recipe, inputs + place.earlier * recipe.earlier, size, hidden)

    def condition(self, a: Tensor, kept: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        blocks = to_blocks(a, self.recipe.block) if self.recipe.block else a
        seen = [self.describe(a)] if self.recipe.both else []
        if self.recipe.earlier:
            seen.append(self.place.known(a))
        seen = [self.describe(blocks), *(s.repeat_interleave(len(blocks) // len(a), dim=0) for s in seen)]
        with without_autocast(a):
            return cast(tuple[Tensor, ...], self.mixer(torch.cat(seen, dim=1)))

    def transform(self, b: Tensor, params: tuple[Tensor, ...]) -> Transformed:
        if not self.recipe.block:
            return apply(b, params)
        out = apply(to_blocks(b, self.recipe.block), params)
        of_blocks = out.log_det.view(len(b), -1), out.penalty.view(len(b), -1)
        return Transformed(from_blocks(out.y, b.shape), of_blocks[0].sum(1), of_blocks[1].mean(1))

    def untransform(self, b: Tensor, params: tuple[Tensor, ...]) -> Tensor:
        if not self.recipe.block:
            return unapply(b, params)
        return from_blocks(unapply(to_blocks(b, self.recipe.block), params), b.shape)


class CandidateWhole(Bijection):
    """Turns and scales all channels by what earlier latents say."""

    def __init__(self, recipe: Recipe, channels: int, place: Place, hidden: int) -> None:
        super().__init__()
        self.place = place
        self.mixer = Mixer(recipe, place.earlier, channels, hidden)

    def forward(self, x: Tensor) -> Transformed:
        return apply(x, self.mixer(self.place.known(x)))

    def inverse(self, y: Tensor) -> Tensor:
        return unapply(y, self.mixer(self.place.known(y)))


def candidate(recipe: Recipe, channels: int, place: Place, hidden: int) -> Chain:
    """The shuffle of a recipe."""
    parts: list[Bijection] = []
    if recipe.static:
        parts.append(flow.InvertibleConv1x1(channels, identity=recipe.static == "identity"))
    if recipe.whole and place.level:
        parts.append(CandidateWhole(recipe, channels, place, hidden))
    predicts = recipe.turn != "none" or recipe.weights or recipe.shift
    if predicts and (recipe.whole != "instead" or not place.level):
        parts += [CandidateHalf(recipe, channels, place, hidden, mirrored) for mirrored in (False, True)]
    return Chain(parts)


def matched(recipe: Recipe, channels: int, place: Place) -> Chain:
    """The shuffle of a recipe, its solver as wide as the parameters of `plain` allow, or as the recipe says."""

    def build(hidden: int) -> Chain:
        with torch.random.fork_rng():
            return candidate(recipe, channels, place, hidden)

    if recipe.hidden is not None:
        return build(recipe.hidden)
    budget = parameters(matched(CANDIDATES[BASE], channels, place))
    narrow, more = parameters(build(1)), parameters(build(2)) - parameters(build(1))
    return build(max(1, 1 + (budget - narrow) // more))


def parameters(module: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in module.parameters())


class BenchmarkFlow(flow.EIWFlow):
    """An `EIWFlow` whose shuffles are of any of the `VARIANTS`. The rest starts the same whatever the variant."""

    def __init__(self, config: flow.FlowConfig, variant: str) -> None:
        super().__init__(replace(config, shuffle="none", backprop="stored"))
        self.memory = Memory()
        self.levels[0].register_forward_pre_hook(self._forget)
        channels, earlier = config.image_shape[0], 0
        for index, (leaving, _, _) in enumerate(self.latent_shapes[:-1]):
            level = cast(flow.Level, self.levels[index])
            channels *= 4
            place = Place(self.memory, index, earlier)
            with torch.random.fork_rng():
                if variant in CANDIDATES:
                    cast(nn.ModuleList, level.units[-1]).append(matched(CANDIDATES[variant], channels, place))
                elif (shuffle := make_shuffle(variant, channels)) is not None:
                    cast(nn.ModuleList, level.units[-1]).append(shuffle)
            level.register_forward_hook(self._remember)
            channels -= leaving
            earlier += 3 * leaving

    def decode(self, latents: list[Tensor], *rest: Any) -> Tensor:
        self.memory.left = [channel_descriptors(z.to(self._trunk_dtype())) for z in latents[:-1]]
        return super().decode(latents, *rest)

    def initialize(self, x: Tensor, noise: Tensor | None = None) -> None:
        self._forget()
        super().initialize(x, noise)

    def _forget(self, *_: Any) -> None:
        self.memory.left = []

    def _remember(self, level: nn.Module, given: Any, out: tuple[Tensor, ...]) -> None:
        leaving = self.latent_shapes[len(self.memory.left)][0]
        self.memory.left.append(channel_descriptors(out[0][:, -leaving:]))


def recipe_of(variant: str) -> dict[str, Any] | None:
    """What is not as in `plain`, as JSON holds it; None for the kinds of the package."""
    if variant not in CANDIDATES:
        return None
    return {k: v for k, v in asdict(CANDIDATES[variant]).items() if v != getattr(Recipe(), k)}
