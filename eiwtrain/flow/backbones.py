"""What a level consists of, by backbone: Glow's and DenseFlow's.

Not for running it (`level`), nor for how levels make a model (`multiscale`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .bijection import Bijection, Chain, halves_of
from .conditioners import Conditioner, NoiseConditioner, make_conditioner
from .config import FlowConfig
from .layers import (
    ActNorm,
    AffineCoupling,
    ConditionedCoupling,
    Exchange,
    InvertibleConv1x1,
    NetworkCoupling,
    Squeeze,
)
from .level import PRIOR_BOUND, Level
from .shuffle import make_shuffle
from .spline import SplineCoupling

Grid = tuple[int, int]


def make_level(config: FlowConfig, number: int, channels: int, grid: Grid) -> Level:
    """Make level `number`, the first being 0, for an input of these channels and sides (H, W)."""
    return _LEVELS[config.backbone](config, number, channels, grid)


def _glow(config: FlowConfig, number: int, channels: int, grid: Grid) -> Level:
    """Squeeze, steps, shuffle, and a Gaussian prior of what leaves: at a split with mean and log-scale from the half
    that stays (as in Glow's code), at the last level with learned ones per channel."""
    channels, grid, last = 4 * channels, (grid[0] // 2, grid[1] // 2), number == config.levels - 1
    steps: list[Bijection] = [
        Chain([ActNorm(channels), InvertibleConv1x1(channels), _coupling(config, channels, grid)])
        for _ in range(config.steps_of_levels[number])
    ]
    shuffle = None if last else _shuffle(config, channels)
    unit = steps if shuffle is None else [*steps, shuffle]
    prior: Bijection = ActNorm(channels) if last else _affine(config, channels, grid, bound=PRIOR_BOUND)
    leaving = channels if last else halves_of(channels)[1]
    return Level(config, [unit], [], prior, squeezes=True, shape=(channels, *grid), leaving=leaving)


def _dense(config: FlowConfig, number: int, channels: int, grid: Grid) -> Level:
    """Units of steps that end in an exchange of the halves, joined by noise; then squeeze and shuffle, after which half
    leaves and is standard normal (DenseFlow, arXiv 2106.04627; the order before the split is EIW-Flow's). The last
    level ends in a Gaussian with a learned mean and log-scale per channel. The first begins with a squeeze."""
    last, first = number == config.levels - 1, number == 0
    if first:
        channels, grid = 4 * channels, (grid[0] // 2, grid[1] // 2)
    bfloat16 = config.conditioner_dtype == "bfloat16"
    units: list[list[Bijection]] = []
    joins: list[ConditionedCoupling] = []
    seen: list[int] = [channels]  # channels of the inputs that the next cross-unit coupling sees
    for unit in range(config.units_of_levels[number]):
        if unit:
            joining = config.noise_channels
            network = NoiseConditioner(sum(seen), joining * AffineCoupling.outputs_per_channel, bfloat16)
            joins.append(ConditionedCoupling(network, 0, joining))
            seen.append(channels)
            channels += joining
        units.append(
            [
                Chain([ActNorm(channels), InvertibleConv1x1(channels), _coupling(config, channels, grid), Exchange()])
                for _ in range(config.steps_of_levels[number])
            ]
        )
    prior: Bijection | None = ActNorm(channels) if last else None
    if not last:
        channels, grid = 4 * channels, (grid[0] // 2, grid[1] // 2)
        shuffle = _shuffle(config, channels)
        units[-1].append(Chain([Squeeze()] if shuffle is None else [Squeeze(), shuffle]))
    leaving = channels if last else halves_of(channels)[1]
    return Level(config, units, joins, prior, squeezes=first, shape=(channels, *grid), leaving=leaving)


_LEVELS: dict[str, Callable[[FlowConfig, int, int, Grid], Level]] = {"glow": _glow, "dense": _dense}


def _shuffle(config: FlowConfig, channels: int) -> Bijection | None:
    return make_shuffle(config.shuffle, channels, config.shuffle_block, config.order_input, config.kl)


def _coupling(config: FlowConfig, channels: int, grid: Grid) -> NetworkCoupling:
    if config.coupling == "spline":
        made = partial(_conditioner, config, channels, grid)
        return SplineCoupling(made(SplineCoupling.outputs_for(config.bins)), config.bins)
    return _affine(config, channels, grid)


def _affine(config: FlowConfig, channels: int, grid: Grid, bound: float = 2.0) -> AffineCoupling:
    return AffineCoupling(_conditioner(config, channels, grid, AffineCoupling.outputs_per_channel), bound=bound)


def _conditioner(config: FlowConfig, channels: int, grid: Grid, outputs_per_channel: int) -> Conditioner:
    first, second = halves_of(channels)
    bfloat16 = config.conditioner_dtype == "bfloat16"
    return make_conditioner(first, outputs_per_channel * second, grid, config.conditioner, bfloat16)
