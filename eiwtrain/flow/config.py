"""What a flow is, as plain data: every field once, with its type, allowed values, default and meaning.

`eiwtrain.config` takes the fields from here, so this module imports no torch. Not for how a flow is trained.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from .fields import Range, check_fields, check_known, check_number

CONDITIONERS = {
    "conv": "ConvConditioner",
    "residual": "ResidualConditioner",
    "transformer": "TransformerConditioner",
    "dense": "DenseConditioner",
}
"""Each kind of conditioner and its class in `eiwtrain.flow.conditioners`. To add one, write the class and a line here:
the checks, the command line, `--fields` and the tests follow."""

if TYPE_CHECKING:  # a type checker takes no Literal that is computed
    ConditionerKind = str
else:
    ConditionerKind = Literal[tuple(CONDITIONERS)]

BackboneKind = Literal["glow", "dense"]

ShuffleKind = Literal["none", "fixed", "hard", "soft", "order"]
SHUFFLES: tuple[ShuffleKind, ...] = get_args(ShuffleKind)

BackpropMode = Literal["stored", "checkpointed", "invertible", "selective", "auto"]
BACKPROP_MODES: tuple[BackpropMode, ...] = get_args(BackpropMode)


@dataclass(frozen=True)
class ConditionerConfig:
    """The network inside a coupling, and its size. Raises ValueError, naming the field, where it makes no sense."""

    kind: ConditionerKind = "conv"
    """The network inside each coupling: conv (Glow's), residual (gated blocks), transformer (on patches, as Jet's),
    dense (DenseFlow's: densely connected layers beside attention)."""
    hidden: Annotated[int, Range(1)] = 128
    """Channels between the first layer and the last. Glow has 512, Flow++ 96, Jet 512, DenseFlow 48."""
    depth: Annotated[int, Range(0)] = 1
    """conv: 1x1 convolutions between its first and its last 3x3 convolution (Glow has 1); dense: layers (DenseFlow has
    7); otherwise: blocks."""
    growth: Annotated[int, Range(1)] = 64
    """Channels that each layer of a dense network adds."""
    attention: Literal["places", "none"] = "places"
    """dense: attention between the places of the grid, beside the layers, or none."""
    activation: Literal["relu", "gelu", "silu"] = "silu"
    """Nonlinearity between convolutions; the smooth ones keep gradients truer in low precision. A transformer always
    has gelu."""
    dropout: Annotated[float, Range(0, below=1)] = 0.0
    """Share of activations set to zero while training: after each activation in a conv, in each residual branch of the
    others. Flow++ has 0.2 on CIFAR-10."""
    heads: Annotated[int, Range(1)] = 4
    """Heads of a transformer's attention; must divide `hidden`."""
    patch: Annotated[int, Range(1)] = 2
    """Side of a transformer's patches, in places of a level's grid (each level halves the image's side), whose sides it
    must divide."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kind == "transformer" and self.hidden % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide hidden = {self.hidden}")


@dataclass(frozen=True)
class DequantizerConfig:
    """The size of the flow that makes the noise of variational dequantization. Raises ValueError, naming the field,
    where it makes no sense."""

    couplings: Annotated[int, Range(1)] = 4
    """Couplings, each after a 1x1 convolution; one more such convolution ends the flow."""
    hidden: Annotated[int, Range(1)] = 64
    """Channels of the features of the image that every coupling sees, and of the couplings' networks."""
    depth: Annotated[int, Range(0)] = 4
    """Layers of each coupling's dense network."""
    growth: Annotated[int, Range(1)] = 64
    """Channels that each of these layers adds."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """The fields of a flow that do not depend on the images."""

    backbone: BackboneKind = "glow"
    """How levels are made: glow (steps, then a split with a learned prior), or dense (DenseFlow's: units of steps, each
    of which sees new noise whose distribution depends on the units before it; half leaves right after a squeeze)."""
    levels: Annotated[int, Range(1)] = 3
    """Scales: each halves the side of the image and, except for the last, factors out half of the channels."""
    units: Annotated[int, Range(1)] | tuple[Annotated[int, Range(1)], ...] = 1
    """dense: units on each level; a list has one number for each level."""
    steps: Annotated[int, Range(1)] | tuple[Annotated[int, Range(1)], ...] = 8
    """Flow steps (actnorm, invertible 1x1 convolution, coupling) on each level, or dense: in each of its units; a list
    has one number for each level."""
    noise_channels: Annotated[int, Range(1)] = 10
    """dense: channels of noise that join before each unit but a level's first."""
    conditioner: ConditionerConfig = field(default_factory=ConditionerConfig)
    """The network inside each coupling and each split's prior."""
    coupling: Literal["affine", "spline"] = "affine"
    """What a coupling does: an affine map, or one followed by a rational-quadratic spline, whose inverse is
    analytic too."""
    bins: Annotated[int, Range(2, 16)] = 8
    """Bins of each spline; with more it can be steeper, and inverting it in float32 loses precision."""
    shuffle: ShuffleKind = "soft"
    """What happens to the channels before each split: none, fixed (a random permutation), order (EIW-Flow's learned
    order, the same for every image), or our own, for each image: hard (sort), soft (rotation)."""
    order_input: Literal["channels", "one"] = "channels"
    """The constant that the order's network sees: the number of channels, as the authors' program has it, or 1."""
    kl: Literal["as-published", "true"] = "as-published"
    """The order's regulariser: what the authors' program computes, or the Kullback-Leibler divergence it stands for."""
    shuffle_block: Annotated[int, Range(0)] = 4
    """Side of the blocks, in places of a level's grid, that the soft shuffle rotates each by itself; 0: whole images.
    Blocks of 4 give a denser model, also at equal time; their edges show in samples of flows trained briefly."""
    dequantization: Literal["uniform", "variational"] = "uniform"
    """Noise added to the pixels: uniform, or from a small flow that is trained along; then log-probabilities are lower
    bounds."""
    dequantizer: DequantizerConfig = field(default_factory=DequantizerConfig)
    """The size of that small flow."""
    classes: Annotated[int, Range(0)] = 0
    """Classes of a class-conditional model, as many as the data set has: each has a mean and a scale of its own in the
    prior of each level; 0: labels play no part."""
    backprop: BackpropMode = "invertible"
    """How backward gets activations: keep them (stored), recompute each step (checkpointed), invert the flow
    (invertible: memory constant in depth, a third more arithmetic), invert it but keep what is dear in each network
    (selective: a few percent more arithmetic), or the cheapest of these that fits for each step (auto). Gradients
    differ by rounding only."""
    memory_budget: Annotated[int, Range(0)] | None = None
    """Bytes of activations that a worker may keep with `backprop: auto`, beyond what invertible keeps; null: what is
    free when it starts."""
    trunk_dtype: Literal["float32", "float64"] = "float32"
    """Precision of what flows between couplings and of log-determinants. float64 makes reconstruction safe for very
    deep flows at twice the trunk's memory."""
    anchor_every: Annotated[int, Range(0)] = 0
    """Steps (the shuffle counts as one) after which backward keeps a true activation where it inverts, which bounds
    drift; 0: only one a level."""
    n_bits: Annotated[int, Range(1, 8)] = 8
    """Bits per channel that are modelled; 5 is usual for LSUN and CelebA-HQ."""


@dataclass(frozen=True)
class FlowConfig(FlowSettings):
    """The shape and the precision of an `EIWFlow`. Raises ValueError, naming the field, where it makes no sense."""

    image_shape: tuple[int, int, int]
    """(C, H, W). H and W must be divisible by 2 ** levels."""
    conditioner_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: run convolutions, matrix products and attention of conditioners in it. Parameters are float32 in
    both."""

    def __post_init__(self) -> None:
        if not isinstance(self.image_shape, tuple) or len(self.image_shape) != 3:
            raise ValueError(f"image_shape: {self.image_shape!r} is not (C, H, W)")
        for size in self.image_shape:
            check_number("image_shape", size, int, Range(1))
        check_fields(self)
        _, height, width = self.image_shape
        # Sides are compared first: two to the power of a hostile number of levels is itself too large.
        if self.levels >= min(height, width).bit_length() or height % 2**self.levels or width % 2**self.levels:
            factor = f"2^{self.levels}" if self.levels > 16 else 2**self.levels
            raise ValueError(
                f"levels: {self.levels} levels halve {height}x{width} images {self.levels} times, "
                f"and both sides must be divisible by {factor}"
            )
        for name in ("units", "steps"):
            numbers = getattr(self, name)
            if isinstance(numbers, tuple) and len(numbers) != self.levels:
                raise ValueError(f"{name}: {len(numbers)} numbers for {self.levels} levels; give one for each level")
        if self.backbone == "glow" and set(self.units_of_levels) != {1}:
            raise ValueError("units: backbone glow has one unit a level; take backbone dense, or more steps")
        least, patch = (height // 2**self.levels, width // 2**self.levels), self.conditioner.patch
        if self.conditioner.kind == "transformer" and any(side % patch for side in least):
            raise ValueError(f"patch: {patch} does not divide the grid of the last level, {least[0]}x{least[1]}")

    @property
    def dims(self) -> int:
        """Dimensions of an image, D = C * H * W."""
        channels, height, width = self.image_shape
        return channels * height * width

    @property
    def units_of_levels(self) -> tuple[int, ...]:
        """The number of units on each level."""
        return self.units if isinstance(self.units, tuple) else (self.units,) * self.levels

    @property
    def steps_of_levels(self) -> tuple[int, ...]:
        """The number of steps in each unit of each level."""
        return self.steps if isinstance(self.steps, tuple) else (self.steps,) * self.levels

    @property
    def noise_of_levels(self) -> tuple[tuple[int, int, int], ...]:
        """The shape (C, H, W) of the noise that joins on each level, for all of its units together; C may be 0."""
        _, height, width = self.image_shape
        counts = (self.noise_channels * (units - 1) for units in self.units_of_levels)
        return tuple((n, height >> level, width >> level) for level, n in enumerate(counts, 1))

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """The shape of the noise of an image: the image's own where only dequantization needs noise, (n,) where noise
        joins on the way too. In the second case the first D numbers are dequantization's."""
        joining = sum(c * h * w for c, h, w in self.noise_of_levels)
        return (self.dims + joining,) if joining else self.image_shape

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        values = {"image_shape": self.image_shape} | asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FlowConfig:
        """Make a config of what `to_dict` returned. Raises ValueError for a field that is unknown, missing or wrong."""
        check_known("flow config", values, tuple(f.name for f in fields(cls)))
        made: dict[str, Any] = {}
        for name, part in _PARTS.items():
            given = values.get(name, {})
            check_known(f"flow config's {name}", given, tuple(f.name for f in fields(part)))
            made[name] = part(**given)
        shape = values.get("image_shape")
        if not isinstance(shape, (list, tuple)):
            raise ValueError(f"image_shape: {shape!r} is not [C, H, W]")
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists, **made})


_PARTS: dict[str, type[Any]] = {"conditioner": ConditionerConfig, "dequantizer": DequantizerConfig}
"""The fields that are configs of their own."""
