"""Every public name of `eiwtrain.flow`. Not to be imported from directly: that package offers them."""

from .bijection import Bijection, Chain, Coupling, Transformed
from .conditioners import (
    Conditioner,
    ConvConditioner,
    ResidualConditioner,
    TransformerConditioner,
    make_conditioner,
)
from .config import ConditionerConfig, FlowConfig
from .dequantization import VariationalDequantizer
from .files import CONFIG_FILE, MODEL_FILE, load, metadata, not_finite, restore, save
from .images import bits_per_dim, dequantize, quantize
from .layers import ActNorm, AffineCoupling, InvertibleConv1x1, NetworkCoupling, squeeze, unsqueeze
from .level import Level
from .multiscale import EIWFlow, FlowOutput
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
    "Conditioner",
    "ConditionerConfig",
    "ConvConditioner",
    "Coupling",
    "EIWFlow",
    "FixedShuffle",
    "FlowConfig",
    "FlowOutput",
    "HardHalf",
    "InvertibleConv1x1",
    "Level",
    "NetworkCoupling",
    "ResidualConditioner",
    "SoftHalf",
    "SplineCoupling",
    "Transformed",
    "TransformerConditioner",
    "VariationalDequantizer",
    "bits_per_dim",
    "dequantize",
    "load",
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
