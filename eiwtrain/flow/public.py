"""Every public name of `eiwtrain.flow`. Not to be imported from directly: that package offers them."""

from .bijection import Bijection, Chain, Coupling, Half, Transformed
from .conditioners import (
    Conditioner,
    ConvConditioner,
    DenseConditioner,
    NoiseConditioner,
    ResidualConditioner,
    TransformerConditioner,
    make_conditioner,
)
from .config import ConditionerConfig, DequantizerConfig, FlowConfig
from .dequantization import NoiseFlow, VariationalDequantizer
from .files import CONFIG_FILE, MODEL_FILE, load, metadata, not_finite, restore, save
from .gaussian import log_normal
from .images import bits_per_dim, dequantize, quantize
from .layers import (
    ActNorm,
    AffineCoupling,
    ConditionedCoupling,
    Exchange,
    InvertibleConv1x1,
    NetworkCoupling,
    OnFirst,
    Squeeze,
    squeeze,
    unsqueeze,
)
from .level import Level
from .multiscale import EIWFlow, FlowOutput
from .order import Order
from .presets import PRESETS, preset
from .reversible import run_chain
from .shuffle import FixedShuffle, HardHalf, SoftHalf, make_shuffle
from .spline import SplineCoupling

__all__ = [
    "CONFIG_FILE",
    "MODEL_FILE",
    "PRESETS",
    "ActNorm",
    "AffineCoupling",
    "Bijection",
    "Chain",
    "ConditionedCoupling",
    "Conditioner",
    "ConditionerConfig",
    "ConvConditioner",
    "Coupling",
    "DenseConditioner",
    "DequantizerConfig",
    "EIWFlow",
    "Exchange",
    "FixedShuffle",
    "FlowConfig",
    "FlowOutput",
    "Half",
    "HardHalf",
    "InvertibleConv1x1",
    "Level",
    "NetworkCoupling",
    "NoiseConditioner",
    "NoiseFlow",
    "OnFirst",
    "Order",
    "ResidualConditioner",
    "SoftHalf",
    "SplineCoupling",
    "Squeeze",
    "Transformed",
    "TransformerConditioner",
    "VariationalDequantizer",
    "bits_per_dim",
    "dequantize",
    "load",
    "log_normal",
    "make_conditioner",
    "make_shuffle",
    "metadata",
    "not_finite",
    "preset",
    "quantize",
    "restore",
    "run_chain",
    "save",
    "squeeze",
    "unsqueeze",
]
