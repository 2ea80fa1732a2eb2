"""Runs a training step without numbers and counts what it starts, computes, moves and keeps.

The tensors have shapes and no data (torch's FakeTensorMode), which takes seconds and no memory whatever the size. The
steps of a level are alike, so flows of few steps are counted, and what a step adds is multiplied by the number of
steps: the sum is exact, as is what a further image adds. Not for what that costs (`costs`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from eiwtrain import flow
from eiwtrain.config import Config
from eiwtrain.train import agreed
from eiwtrain.train.engine import scaled
from eiwtrain.train.flat import FlatModule, layout
from eiwtrain.train.objective import MicroBatch
from eiwtrain.train.optimizers import matrices_for, optimizer_of

_BY_DEEPSPEED = (2, 2)
"""Operations that DeepSpeed adds at stage 0: to each micro-batch, whose loss it divides, and to the reduction."""
_FOR_EACH_TENSOR = (0, 4, 4, 9)
"""Operations that it adds at a ZeRO stage for each parameter, with a micro-batch a step; at most, as it shares some out
among the workers."""


@dataclass(frozen=True)
class Counted:
    """What one training step keeps for its backward pass, bytes, its FLOPs, the operations that it starts, and the
    bytes that those without FLOPs read and write: element-wise ones, sums and copies."""

    kept: int
    flops: int
    operations: int
    moved: int

    def plus(self, times: int, more: Counted) -> Counted:
        """Return this plus `times` times the difference of `more` from it."""
        mine, theirs = astuple(self), astuple(more)
        return Counted(*(a + times * (b - a) for a, b in zip(mine, theirs, strict=True)))


def of_all_steps(shape: flow.FlowConfig, images: int, backward: bool = True) -> Counted:
    """Return `count` of the whole flow.

    With Glow's backbone, flows of two and of three steps are counted, and their difference is what each further step
    adds. A flow of one step differs: tensors of several steps together are laid out otherwise. With anchors, the
    difference is of a period of steps.
    """
    if shape.backbone != "glow" or not isinstance(shape.steps, int):
        return count(shape, images, backward)
    period = shape.anchor_every if shape.backprop == "invertible" and shape.anchor_every else 1
    few = min(shape.steps, 2 + (shape.steps - 2) % period)
    times = (shape.steps - few) // period
    less = count(replace(shape, steps=few), images, backward)
    if not times:
        return less
    return less.plus(times, count(replace(shape, steps=few + period), images, backward))


def of_a_step(shape: flow.FlowConfig) -> int:
    """Return the bytes that one step of the first level keeps for an image if it keeps its activations: flows of one
    and of two steps, on two and on three images, leave nothing else in the difference."""
    level = replace(shape, levels=1, units=1, steps=1, shuffle="none", dequantization="uniform", classes=0)
    level = replace(level, backprop="stored")
    of_two, of_three = ([count(replace(level, steps=s), n, False).kept for s in (1, 2)] for n in (2, 3))
    return (of_three[1] - of_three[0]) - (of_two[1] - of_two[0])


@cache
def count(shape: flow.FlowConfig, images: int, backward: bool = True, fake: bool = True) -> Counted:
    """Run one training step of a flow and count it.

    Args:
        backward: also run the backward pass, or else count the FLOPs and operations of the forward pass alone.
        fake: run on tensors without data; or on real ones, which gives the same.
    """
    started = Started()
    with FakeTensorMode() if fake else nullcontext():
        model = flow.EIWFlow(shape)
        pixels = torch.zeros(images, *shape.image_shape, dtype=torch.uint8)
        noise = torch.full((images, *shape.noise_shape), 0.5)
        labels = torch.zeros(images, dtype=torch.int64) if shape.classes else None
        with started:
            kept, loss = _kept(
                lambda: model(pixels, noise, labels).log_prob.sum(), [*model.parameters(), *model.buffers()]
            )
            if backward:
                loss.backward()
    return Counted(kept, started.flops, started.operations, started.moved)


def count_around(config: Config, model: flow.EIWFlow) -> tuple[int, int]:
    """Return the operations that a training step starts outside its flow: for each micro-batch, and once.

    The code of a training step is run on parameters of few numbers each, as many as the model has: at ZeRO stage 0 they
    are one tensor whatever their number, and Muon's matrices one for each shape. At other stages DeepSpeed's own loops
    over them come on top.

    Args:
        model: the flow, with or without numbers.
    """
    blocks, matrices = layout(matrices_for(config.train, model))
    small = [torch.ones(1, n + 1) for n, block in enumerate(blocks) for _ in range(block.matrices)]  # as many shapes
    others = [torch.ones(1) for p in model.parameters() if p not in matrices]
    own = nn.ParameterList(nn.Parameter(t) for t in [*small, *others])
    flat = FlatModule(own, list(own)[: len(small)])
    average = flat.average_in(dict(copy.deepcopy(own).named_parameters()))
    optimizer = optimizer_of(flat.parameters(), config.train, flat.blocks)
    images = torch.zeros(2, *model.config.image_shape, dtype=torch.uint8)
    log_prob, penalty = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    out = flow.FlowOutput(log_prob, penalty, torch.zeros(model.config.levels, 2))
    batch = MicroBatch(torch.ones(2), config, images)

    def step() -> tuple[int, int]:
        loss, update = Started(), Started()
        with loss:
            scaled(batch.loss(lambda *_: out), 1.0).backward()  # type: ignore[arg-type]
        for parameter in own:
            parameter.grad = torch.ones_like(parameter)
        with loss:
            flat.gather()
        with update:
            norm, *_ = agreed.beside(flat.norm(), agreed.pack([batch], [0.0] * 6, 0)).tolist()
            flat.clip_(norm, norm / 2)
            optimizer.step()
            average(0.5)
            for order in model.orders():
                order.latest.copy_(order.latest)
        return loss.operations, update.operations

    step()  # the optimizer makes its moments
    each, once = (a + b for a, b in zip(step(), _BY_DEEPSPEED, strict=True))
    return each, once + _FOR_EACH_TENSOR[config.train.zero_stage] * len(own)


def update_flops(config: Config, model: flow.EIWFlow) -> int:
    """Return the FLOPs of an update of the weights: Muon's products of matrices."""
    return sum(block.flops for block in layout(matrices_for(config.train, model))[0])


def _kept(function: Callable[[], Tensor], own: list[Tensor]) -> tuple[int, Tensor]:
    """Return the bytes that autograd saves for the backward pass of `function()`, each storage once, and its result.

    `flow.memory.bytes_saved` does the same for tensors that have an address.
    """
    mine = {id(t.untyped_storage()) for t in own}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no identity is used twice

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if id(storage) not in mine:
            kept[id(storage)] = storage
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    return sum(storage.nbytes() for storage in kept.values()), result


_VIEWS = {  # operations that start nothing on a device
    *("view", "_unsafe_view", "alias", "detach", "as_strided", "lift_fresh", "t", "transpose", "permute"),
    *("slice", "select", "split", "split_with_sizes", "unbind", "expand", "unsqueeze", "squeeze"),
}


_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
if _ATTENTION not in flop_registry:  # torch has formulas for the kernels of GPUs alone
    register_flop_formula(_ATTENTION)(lambda q, k, v, *_args, **_kwargs: sdpa_flop_count(q, k, v))
    register_flop_formula(_ATTENTION_BACKWARD)(
        lambda grad, q, k, v, *_args, **_kwargs: sdpa_backward_flop_count(grad, q, k, v)
    )


class Started(TorchDispatchMode):
    """Counts operations, and sums up FLOPs by the formulas of torch's `FlopCounterMode`, which itself takes every
    operation apart, half as fast, and cannot follow modules that are run in a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.operations = self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        elif namespace == "aten" and name not in _VIEWS:
            self.moved += _bytes_of(args) + _bytes_of(out)
        self.operations += namespace == "aten" and name not in _VIEWS
        return out


def _bytes_of(values: Any) -> int:
    """Return the bytes of all tensors in nested lists and tuples; of an expanded one those that are in memory."""
    if isinstance(values, Tensor):
        sizes = [size for size, stride in zip(values.shape, values.stride(), strict=True) if stride]
        return math.prod(sizes) * values.element_size()
    return sum(map(_bytes_of, values)) if isinstance(values, (list, tuple)) else 0
