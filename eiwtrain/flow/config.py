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
}
"""Each kind of conditioner and its class in `eiwtrain.flow.conditioners`. To add one, write the class and a line here:
the checks, the command line, `--fields` and the tests follow."""

if TYPE_CHECKING:  # a type checker takes no Literal that is computed
    ConditionerKind = str
else:
    ConditionerKind = Literal[tuple(CONDITIONERS)]

ShuffleKind = Literal["none", "fixed", "hard", "soft"]
SHUFFLES: tuple[ShuffleKind, ...] = get_args(ShuffleKind)

BackpropMode = Literal["stored", "checkpointed", "invertible", "auto"]
BACKPROP_MODES: tuple[BackpropMode, ...] = get_args(BackpropMode)


@dataclass(frozen=True)
class ConditionerConfig:
    """The network inside a coupling, and its size. Raises ValueError, naming the field, where it makes no sense."""

    kind: ConditionerKind = "conv"
    """The network inside each coupling: conv (Glow's), residual (gated blocks), transformer (on patches, as Jet's)."""
    hidden: Annotated[int, Range(1)] = 128
    """Channels between the first layer and the last. Glow has 512, Flow++ 96, Jet 512."""
    depth: Annotated[int, Range(0)] = 1
    """conv: 1x1 convolutions between its first and its last 3x3 convolution (Glow has 1); otherwise: blocks."""
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


@dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """The fields of a flow that do not depend on the images."""

    levels: Annotated[int, Range(1)] = 3
    """Scales: each halves the side of the image and, except for the last, factors out half of the channels."""
    steps: Annotated[int, Range(1)] = 8
    """Flow steps (actnorm, invertible 1x1 convolution, coupling) on each level."""
    conditioner: ConditionerConfig = field(default_factory=ConditionerConfig)
    """The network inside each coupling and each split's prior."""
    coupling: Literal["affine", "spline"] = "affine"
    """What a coupling does: an affine map, or one followed by a rational-quadratic spline, whose inverse is
    analytic too."""
    bins: Annotated[int, Range(2, 16)] = 8
    """Bins of each spline; with more it can be steeper, and inverting it in float32 loses precision."""
    shuffle: ShuffleKind = "soft"
    """Entropy-informed weighting shuffle before each split: none, fixed, hard (per-sample sort), soft (rotation)."""
    shuffle_block: Annotated[int, Range(0)] = 4
    """Side of the blocks, in places of a level's grid, that the soft shuffle rotates each by itself; 0: whole images.
    Blocks of 4 give a denser model, also at equal time; their edges show in samples of flows trained briefly."""
    dequantization: Literal["uniform", "variational"] = "uniform"
    """Noise added to the pixels: uniform, or from a small flow that is trained along; then log-probabilities are lower
    bounds."""
    classes: Annotated[int, Range(0)] = 0
    """Classes of a class-conditional model, as many as the data set has: each has a mean and a scale of its own in the
    prior of each level; 0: labels play no part."""
    backprop: BackpropMode = "invertible"
    """How backward gets activations: keep them, recompute each step, invert the flow (memory constant in depth), or
    keep as many as fit and invert the rest. Gradients differ by rounding only."""
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
        if height % 2**self.levels or width % 2**self.levels:
            raise ValueError(
                f"levels: {self.levels} levels halve {height}x{width} images {self.levels} times, "
                f"and both sides must be divisible by {2**self.levels}"
            )
        least, patch = (height // 2**self.levels, width // 2**self.levels), self.conditioner.patch
        if self.conditioner.kind == "transformer" and any(side % patch for side in least):
            raise ValueError(f"patch: {patch} does not divide the grid of the last level, {least[0]}x{least[1]}")

    @property
    def dims(self) -> int:
        """Dimensions of an image, D = C * H * W."""
        channels, height, width = self.image_shape
        return channels * height * width

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the uniform noise that the flow takes beside an image: (C, H, W) for dequantization alone."""
        return self.image_shape

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return {"image_shape": list(self.image_shape)} | {k: v for k, v in asdict(self).items() if k != "image_shape"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FlowConfig:
        """Make a config of what `to_dict` returned. Raises ValueError for a field that is unknown, missing or wrong."""
        check_known("flow config", values, tuple(f.name for f in fields(cls)))
        conditioner = values.get("conditioner", {})
        check_known("flow config's conditioner", conditioner, tuple(f.name for f in fields(ConditionerConfig)))
        shape = values.get("image_shape")
        if not isinstance(shape, (list, tuple)):
            raise ValueError(f"image_shape: {shape!r} is not [C, H, W]")
        return cls(**{**values, "image_shape": tuple(shape), "conditioner": ConditionerConfig(**conditioner)})
