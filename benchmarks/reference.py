"""Compare our EIW-Flow with what its authors' program computes, from files that hold its weights, noise and results.

    python -m benchmarks.reference tests/flow/data/*.safetensors

A file has the weights of a flow of any size, by the names of the authors' program (github.com/studying910/EIW-Flow,
commit 0c4ddeb), an input, the noise, and in float64 what the program computed: y and the log-determinant after each
part, log_prob, the regulariser, bits/dim and every gradient. The sizes come from the file's metadata and the shapes of
its weights. Two kinds of file: in `structure` each coupling's network is one 3x3 convolution, so that the flow alone is
compared; in `dense` it is the published one, whose attention and normalisation (`PublishedAttention`,
`ConstantNorm`) stand here in place of ours.

Prints the largest absolute difference of each result, with stored and with reconstructed activations, and of the
image that the inverse gives back. Exit code 0 if all are below 1e-9, 1 if not, 2 for a file of another kind.
Not for speed or density.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from eiwtrain import flow
from eiwtrain.flow.layers import NetworkCoupling

LIMIT = 1e-9
SIGMA = 1e-3  # weight of the regulariser in the loss whose gradients are recorded
MODES = ("stored", "invertible")

Weights = dict[str, Tensor]


class NotAReference(ValueError):
    """The file does not hold what this program compares."""


class PublishedAttention(nn.Module):
    """The attention of DenseFlow's and EIW-Flow's programs: a Nystroem approximation with 4 landmarks whose tokens are
    runs of one channel's numbers, as (N, 3d, H, W) is read as (N, H W, 3d) without a transpose."""

    landmarks = 4

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.queries_keys_values = nn.Conv2d(channels, 3 * width, 1)
        self.attended = nn.Conv2d(width, channels, 1)

    def forward(self, h: Tensor) -> Tensor:
        n, _, height, width = h.shape
        places = height * width
        q, k, v = self.queries_keys_values(h).reshape(n, places, -1).chunk(3, dim=-1)
        near_q, near_k = (
            t.reshape(n, self.landmarks, places // self.landmarks, -1).mean(dim=2) / math.sqrt(places) for t in (q, k)
        )
        to_landmarks = (q @ near_k.mT).softmax(dim=-2)
        between = (near_q @ near_k.mT).softmax(dim=-2)
        from_landmarks = (near_q @ k.mT).softmax(dim=-2)
        out = to_landmarks @ self._pseudo_inverse(between) @ (from_landmarks @ v) + v
        return self.attended(out.reshape(n, -1, height, width))

    @staticmethod
    def _pseudo_inverse(matrix: Tensor, iterations: int = 6) -> Tensor:
        """Approximate the inverse by iteration (Nystroemformer, arXiv 2102.03902, equation 11)."""
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        largest = matrix.abs().sum(-2, keepdim=True).amax(-1, True) * matrix.abs().sum(-1, keepdim=True).amax(-2, True)
        z = matrix.mT / largest
        for _ in range(iterations):
            product = matrix @ z
            z = 0.25 * z @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
        return z


class ConstantNorm(nn.Module):
    """Batch normalisation whose statistics are constants."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, h: Tensor) -> Tensor:
        return nn.functional.batch_norm(h, self.mean, self.variance, self.weight, self.bias, eps=1e-5)


class OneConvolution(flow.Conditioner):
    """A 3x3 convolution: the network of the couplings in `structure` files."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def network(self, x: Tensor) -> Tensor:
        return self.conv(x)


@dataclass(frozen=True)
class Reference:
    """A file: its tensors by name, and the flow that it describes."""

    tensors: Weights
    metadata: dict[str, str]
    config: flow.FlowConfig
    mode: str

    @property
    def weights(self) -> Weights:
        return {name.removeprefix("weight."): t for name, t in self.tensors.items() if name.startswith("weight.")}

    @property
    def parts(self) -> list[str]:
        """Names of the recorded parts of the chain, `after.K.Class`, in order."""
        names = {name.rpartition(".")[0] for name in self.tensors if name.startswith("after.")}
        return sorted(names, key=lambda name: int(name.split(".")[1]))


def read(path: Path) -> Reference:
    """Read a reference file. Raises NotAReference for another kind of file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        described = json.loads(metadata["construction"])
        return Reference(tensors, metadata, _config(described, tensors), described["mode"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, IndexError) as error:
        raise NotAReference(f"{path}: no reference file of EIW-Flow ({type(error).__name__}: {error})") from error


def _config(described: dict[str, Any], tensors: Weights) -> flow.FlowConfig:
    encoder = "weight.transforms.0.encoder."
    couplings = {m[1] for name in tensors if (m := re.match(re.escape(encoder) + r"transforms\.(\d+)\.coupling", name))}
    first = encoder + "transforms.1.coupling_net.0.transform."
    deep = _depth(tensors, first + "1.dense.")
    conditioner = flow.ConditionerConfig("dense", hidden=described["mid"], activation="relu")
    network = "weight.transforms.3.blocks.0.transforms.0.transforms.2.coupling_net.0.dn.transform.1.dense."
    if depth := _depth(tensors, network):
        growth = len(tensors[network + "0.nn.2.bias"])
        conditioner = replace(conditioner, depth=depth, growth=growth)
    return flow.FlowConfig(
        image_shape=tuple(described["image"]),
        backbone="dense",
        levels=len(described["blocks"]),
        units=tuple(described["blocks"]),
        steps=tuple(described["layers"]),
        noise_channels=described["growth"],
        conditioner=conditioner,
        shuffle="order",
        dequantization="variational",
        dequantizer=flow.DequantizerConfig(
            couplings=len(couplings),
            hidden=len(tensors[encoder + "context_init.2.bias"]),
            depth=deep,
            growth=len(tensors[first + "1.dense.0.nn.2.bias"]) if deep else 1,
        ),
        n_bits=described["bits"],
        trunk_dtype="float64",
    )


def _depth(tensors: Weights, prefix: str) -> int:
    return len({m[1] for name in tensors if (m := re.match(re.escape(prefix) + r"(\d+)\.nn\.", name))})


def build(reference: Reference, backprop: str) -> flow.EIWFlow:
    """Build the flow, with the networks that the file's couplings have; its weights are not set."""
    model = flow.EIWFlow(replace(reference.config, backprop=backprop)).double()
    for level in model.levels:
        for module in list(level.modules()):
            if isinstance(module, NetworkCoupling) and isinstance(module.conditioner, flow.DenseConditioner):
                ours = module.conditioner
                if reference.mode == "structure":
                    module.conditioner = OneConvolution(ours.first.in_channels, ours.last.out_channels)
                else:
                    hidden = reference.config.conditioner.hidden
                    cast(Any, ours).attention = PublishedAttention(hidden, hidden // 2)
                    cast(Any, ours).norm = ConstantNorm(2 * hidden)
    return model.double()


def translate(reference: Reference, theirs: Weights) -> Weights:
    """Return the state of our flow, parameters and buffers by name, as differentiable functions of their weights."""
    config, ours = reference.config, Weights()

    def dense_layers(to: str, name: str, depth: int) -> None:
        for i in range(depth):
            for part, place in (("narrow", 0), ("wide", 2)):
                copy(f"{to}.{part}.{i}", f"{name}.{i}.nn.{place}")
        copy(f"{to}.gate", f"{name}.{depth}.conv")

    def copy(to: str, name: str, change: Callable[[Tensor], Tensor] = lambda t: t) -> None:
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in theirs:
                ours[f"{to}.{kind}"] = change(theirs[f"{name}.{kind}"])

    def gaussian(to: str, name: str, inverted: bool = False) -> None:
        loc, log_scale = theirs[f"{name}.loc"][0], theirs[f"{name}.log_scale"][0]
        ours[f"{to}.bias"] = -loc if inverted else loc * (-log_scale).exp()
        ours[f"{to}.log_scale"] = -log_scale if inverted else log_scale

    def convolution(to: str, name: str) -> None:
        p, lower, upper = torch.linalg.lu(theirs[f"{name}.weight"])
        diagonal = upper.diagonal()
        ours[f"{to}.factors"] = lower.tril(-1) + upper.triu(1) + torch.diag(diagonal.abs().log())
        ours[f"{to}.sign"] = diagonal.detach().sign()
        ours[f"{to}.rows"] = p.detach().argmax(dim=1)

    encoder = "transforms.0.encoder"
    gaussian("dequantizer.flow.parts.parts.0.bijection", f"{encoder}.base_dist")
    dense_layers("dequantizer.flow.context.fine", f"{encoder}.context_init.1", 4)
    copy("dequantizer.flow.context.down", f"{encoder}.context_init.2")
    dense_layers("dequantizer.flow.context.coarse", f"{encoder}.context_init.3", 4)
    for i in range(config.dequantizer.couplings):
        convolution(f"dequantizer.flow.parts.parts.{1 + 2 * i}.bijection", f"{encoder}.transforms.{2 * i}")
        to = f"dequantizer.flow.parts.parts.{2 + 2 * i}.conditioner"
        name = f"{encoder}.transforms.{2 * i + 1}.coupling_net.0.transform"
        copy(f"{to}.first", f"{name}.0")
        dense_layers(f"{to}.layers", f"{name}.1.dense", config.dequantizer.depth)
        copy(f"{to}.last", f"{name}.2", _pairs_apart)
    last = 2 * config.dequantizer.couplings
    convolution(f"dequantizer.flow.parts.parts.{1 + last}.bijection", f"{encoder}.transforms.{last}")

    for level, (units, steps) in enumerate(zip(config.units_of_levels, config.steps_of_levels, strict=True)):
        block = f"transforms.{3 + 2 * level}"
        for unit in range(units):
            if unit:
                to, name = f"levels.{level}.joins.{unit - 1}.conditioner", f"{block}.noise_params.{unit - 1}"
                copy(f"{to}.first", f"{name}.transformation.0")
                copy(f"{to}.last", f"{name}.transformation.2", _means_last)
            for step in range(steps):
                to, name = f"levels.{level}.units.{unit}.{step}.parts", f"{block}.blocks.{unit}.transforms.{step}"
                ours[f"{to}.0.bias"] = -theirs[f"{name}.transforms.0.shift"][0]
                ours[f"{to}.0.log_scale"] = -theirs[f"{name}.transforms.0.log_scale"][0]
                convolution(f"{to}.1", f"{name}.transforms.1")
                to, name = f"{to}.2.conditioner", f"{name}.transforms.2.coupling_net.0"
                if reference.mode == "structure":
                    copy(f"{to}.conv", f"{name}.conv", _pairs_apart)
                    continue
                name = f"{name}.dn.transform"
                copy(f"{to}.first", f"{name}.0")
                dense_layers(f"{to}.layers", f"{name}.1.dense", config.conditioner.depth)
                copy(f"{to}.attention.queries_keys_values", f"{name}.1.mha.qkv")
                copy(f"{to}.attention.attended", f"{name}.1.mha.out_transform")
                copy(f"{to}.norm", f"{name}.1.mix_conv.0")
                ours[f"{to}.norm.mean"] = reference.tensors[f"buffer.{name}.1.mix_conv.0.running_mean"]
                ours[f"{to}.norm.variance"] = reference.tensors[f"buffer.{name}.1.mix_conv.0.running_var"]
                copy(f"{to}.mix", f"{name}.1.mix_conv.2")
                copy(f"{to}.last", f"{name}.2", _pairs_apart)
        if level < config.levels - 1:
            to, name = f"levels.{level}.units.{units - 1}.{steps}.parts.1", f"transforms.{4 + 2 * level}"
            copy(f"{to}.weigh_first", f"{name}.weightGenerator.fc.0")
            copy(f"{to}.weigh_last", f"{name}.weightGenerator.fc.2")
            copy(f"{to}.excite_first", f"{name}.SELayer.fc.0")
            copy(f"{to}.excite_last", f"{name}.SELayer.fc.2")
    gaussian(f"levels.{config.levels - 1}.prior", "base_dist", inverted=True)
    return ours


def _pairs_apart(t: Tensor) -> Tensor:
    """Turn outputs 2j, 2j + 1 (scale and shift of channel j) into all scales, then all shifts."""
    return torch.cat((t[0::2], t[1::2]))


def _means_last(t: Tensor) -> Tensor:
    """Turn outputs that are all means, then all scales, into all scales, then all means."""
    return torch.cat(t.chunk(2)[::-1])


def results(model: flow.EIWFlow, pixels: Tensor, noise: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return what the flow computes, by the names that a file has, and the inverse of its latents, as reals."""
    levels = [cast(flow.Level, level) for level in model.levels]
    x, log_q, joining = model._reals(pixels, noise)
    n = model.config.n_bits
    unit = model.dims * torch.tensor(2.0**n).log().item()  # rounded to float32 by the authors' program
    found = {"0.y": x + 0.5, "0.log_det": -log_q - unit}
    found |= {"1.y": x, "1.log_det": torch.zeros_like(log_q)}
    found |= {"2.y": flow.squeeze(x), "2.log_det": torch.zeros_like(log_q)}
    latents: list[Tensor] = []
    stays = x
    for number, (level, joins) in enumerate(zip(levels, joining, strict=True)):
        y, log_det, _, _ = level(stays, joins)
        stays, leaves = level.split(y)
        latents.append(leaves)
        gained = flow.log_normal(leaves)
        # A part's own log-determinant: the order and the squeeze have none, the last Gaussian is no part.
        if number < len(levels) - 1:
            block = list(level.bijections())[-1].inverse(y)
            found |= {f"{4 + 2 * number}.y": stays, f"{4 + 2 * number}.log_det": gained}
        else:
            block = cast(flow.Bijection, level.prior).inverse(y)
            log_det = log_det - cast(flow.Bijection, level.prior)(block).log_det
        found |= {f"{3 + 2 * number}.y": block, f"{3 + 2 * number}.log_det": log_det}
    out = model(pixels, noise)
    log_prob = out.log_prob - unit
    bits = -log_prob.mean() / (model.dims * math.log(2))
    found |= {"log_prob": log_prob, "regulariser": out.penalty.mean()}
    found |= {"bits_per_dim": bits, "loss": bits + SIGMA * out.penalty.mean()}
    return found, model.decode(latents)


def uniform_noise(reference: Reference) -> Tensor:
    """Return the recorded noise, standard normal, as the uniform numbers that our flow takes, (B, n)."""
    tensors, config = reference.tensors, reference.config
    pieces = [flow.unsqueeze(tensors["noise.0"]).flatten(1)]
    number = 1
    for units in config.units_of_levels:
        of_level = [tensors[f"noise.{number + unit}"] for unit in range(units - 1)]
        number += units - 1
        if of_level:
            pieces.append(torch.cat(of_level, dim=1).flatten(1))
    return torch.special.ndtr(torch.cat(pieces, dim=1))


def compare(reference: Reference, backprop: str) -> dict[str, float]:
    """Return the largest absolute difference of each result."""
    theirs = {name: t.clone().requires_grad_() for name, t in reference.weights.items()}
    model = build(reference, backprop).eval()
    ours = translate(reference, theirs)
    if unset := {name for name, _ in model.named_parameters()} - set(ours):
        raise NotAReference(f"no weights for {len(unset)} parameters, such as {min(unset)}")
    model.load_state_dict({name: t.detach() for name, t in ours.items()}, strict=False)
    for order in model.orders():
        order.sort()
    pixels, noise = reference.tensors["pixels"].to(torch.uint8), uniform_noise(reference)
    found, back = results(model, pixels, noise)
    found["loss"].backward()
    grads = [cast(Tensor, p.grad) for _, p in model.named_parameters()]
    pulled = torch.autograd.grad(
        [ours[name] for name, _ in model.named_parameters()], list(theirs.values()), grads, allow_unused=True
    )

    differences = {}
    for part in reference.parts:
        number = part.split(".")[1]
        for what in ("y", "log_det"):
            differences[f"{part} {what}"] = _difference(found[f"{number}.{what}"], reference.tensors[f"{part}.{what}"])
    for name in ("log_prob", "regulariser", "bits_per_dim"):
        differences[name] = _difference(found[name], reference.tensors[name])
    zero = torch.zeros(())
    differences["gradients"] = max(
        _difference(zero if grad is None else grad, reference.tensors.get(f"grad.{name}", zero))
        for name, grad in zip(theirs, pulled, strict=True)
    )
    differences["inverse"] = _difference(back, found["1.y"])
    return differences


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return (ours.detach() - theirs).abs().max().item()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="reference files (safetensors)")
    worst = 0.0
    for path in parser.parse_args(arguments).files:
        try:
            reference = read(path)
            rows = {mode: compare(reference, mode) for mode in MODES}
        except NotAReference as error:
            print(error, file=sys.stderr)
            return 2
        print(f"{path}: {reference.mode}, {len(reference.weights)} tensors of weights\n")
        print(f"| largest difference of | {' | '.join(MODES)} |\n|---|" + "---:|" * len(MODES))
        for name in rows[MODES[0]]:
            print(f"| {name} | " + " | ".join(f"{rows[mode][name]:.1e}" for mode in MODES) + " |")
        print()
        worst = max(worst, *(value if value == value else math.inf for row in rows.values() for value in row.values()))
    print(f"largest difference of all: {worst:.1e}; the limit is {LIMIT:.0e}")
    return 0 if worst < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
