"""What a flow is, as plain data: `FlowConfig`, checked where it is made, to JSON and back.

Not for how it is trained.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .checks import check_choice, check_count, check_known
from .conditioners import ConditionerConfig
from .reversible import BACKPROP_MODES
from .shuffle import SHUFFLES

COUPLINGS = ("affine", "spline")
DEQUANTIZATIONS = ("uniform", "variational")


@dataclass(frozen=True)
class FlowConfig:
    """The shape and the precision of an `EIWFlow`. Raises ValueError, naming the field, where it makes no sense."""

    image_shape: tuple[int, int, int]
    """(C, H, W). H and W must be divisible by 2 ** levels."""
    levels: int = 3
    """Each is squeeze, steps, shuffle, split; the last has neither shuffle nor split."""
    steps: int = 8
    """Of actnorm, invertible 1x1 convolution and coupling, in each level."""
    conditioner: ConditionerConfig = field(default_factory=ConditionerConfig)
    """The network in each coupling and in each split prior."""
    coupling: str = "affine"
    """affine, or spline: affine and then a rational-quadratic spline, which has an analytic inverse too."""
    bins: int = 8
    """Of each spline, 2 to 16: more are steeper, and what is inverted in float32 loses precision."""
    shuffle: str = "soft"
    """What comes before a split: none, fixed, hard or soft (see `eiwtrain.flow.shuffle`)."""
    shuffle_block: int = 4
    """Side of blocks, in places of a level's grid, that the soft shuffle turns each by itself; 0 for whole images. 4 is
    denser, also in the same time, and its blocks show as edges in the samples of flows trained briefly."""
    dequantization: str = "uniform"
    """How an image becomes reals: uniform, or variational, by noise that a small flow learns for each image; then
    log-probabilities are lower bounds (see `eiwtrain.flow.dequantization`)."""
    classes: int = 0
    """With labels 0 to classes - 1, the prior of each level has a mean and a scale of its own for each class and
    channel; 0 for no labels."""
    backprop: str = "invertible"
    """What the backward pass goes by: stored, checkpointed, invertible or auto (see `eiwtrain.flow.reversible`). It
    changes memory and time, and gradients by rounding only."""
    memory_budget: int | None = None
    """With auto, bytes of activations to keep, beyond what invertible keeps; None for what is free when training
    starts."""
    conditioner_dtype: str = "float32"
    """float32, or bfloat16 for convolutions, matrix products and attention in conditioners; parameters are float32 in
    both."""
    trunk_dtype: str = "float32"
    """float32 or float64: what flows between couplings, and the log-determinants. float64 makes reconstruction safe
    for very deep flows at twice the trunk's memory."""
    anchor_every: int = 0
    """With invertible backprop, keep the true activation after every n steps (the shuffle counts as one); 0 for
    none. It bounds how far rounding errors of the reconstruction can grow."""
    n_bits: int = 8
    """Bits of a pixel's value, 1 to 8."""

    def __post_init__(self) -> None:
        if not isinstance(self.image_shape, tuple) or len(self.image_shape) != 3:
            raise ValueError(f"image_shape: {self.image_shape!r} is not (C, H, W)")
        for size in self.image_shape:
            check_count("image_shape", size, least=1)
        check_count("levels", self.levels, least=1)
        check_count("steps", self.steps, least=1)
        check_count("anchor_every", self.anchor_every, least=0)
        check_count("n_bits", self.n_bits, least=1, most=8)
        check_choice("shuffle", self.shuffle, SHUFFLES)
        check_choice("backprop", self.backprop, BACKPROP_MODES)
        check_choice("coupling", self.coupling, COUPLINGS)
        check_choice("dequantization", self.dequantization, DEQUANTIZATIONS)
        check_count("bins", self.bins, least=2, most=16)
        check_count("classes", self.classes, least=0)
        check_count("shuffle_block", self.shuffle_block, least=0)
        if self.memory_budget is not None:
            check_count("memory_budget", self.memory_budget, least=0)
        check_choice("conditioner_dtype", self.conditioner_dtype, ("float32", "bfloat16"))
        check_choice("trunk_dtype", self.trunk_dtype, ("float32", "float64"))
        if not isinstance(self.conditioner, ConditionerConfig):
            raise ValueError(f"conditioner: {self.conditioner!r} is not a ConditionerConfig")
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
        """C * H * W."""
        channels, height, width = self.image_shape
        return channels * height * width

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**asdict(self), "image_shape": list(self.image_shape)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FlowConfig:
        """The inverse of `to_dict`. Raises ValueError for a field that is unknown, missing or wrong."""
        check_known("flow config", values, tuple(f.name for f in fields(cls)))
        conditioner = values.get("conditioner", {})
        check_known("flow config's conditioner", conditioner, tuple(f.name for f in fields(ConditionerConfig)))
        shape = values.get("image_shape")
        if not isinstance(shape, (list, tuple)):
            raise ValueError(f"image_shape: {shape!r} is not [C, H, W]")
        return cls(**{**values, "image_shape": tuple(shape), "conditioner": ConditionerConfig(**conditioner)})
