"""EIW-Flow and its kin: exact-likelihood image models with activation-free backpropagation.

Imports torch, safetensors and the standard library, and nothing else of eiwtrain.

    >>> import torch
    >>> from eiwtrain.flow import ConditionerConfig, EIWFlow, FlowConfig, dequantize
    >>> config = FlowConfig((3, 8, 8), levels=2, steps=2, conditioner=ConditionerConfig(hidden=16))
    >>> flow = EIWFlow(config)
    >>> pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    >>> x = dequantize(pixels, torch.rand(4, 3, 8, 8))
    >>> flow.initialize(x)  # once, before training
    >>> out = flow(x)
    >>> (-out.log_prob / flow.dims + 0.01 * out.penalty).mean().backward()
    >>> flow.bits_per_dim(x).shape
    torch.Size([4])
    >>> flow.to_images(flow.sample(2, temperature=0.8)).shape
    torch.Size([2, 3, 8, 8])
"""

from .bijection import Bijection, Chain, Coupling, Transformed
from .conditioners import (
    Conditioner,
    ConditionerConfig,
    ConvConditioner,
    ResidualConditioner,
    TransformerConditioner,
    make_conditioner,
)
from .config import FlowConfig
from .dequantization import VariationalDequantizer
from .files import CONFIG_FILE, MODEL_FILE, load, metadata, save
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
    "preset",
    "quantize",
    "run_chain",
    "save",
    "squeeze",
    "unsqueeze",
]
