"""Counts what a config costs before anything runs: parameters, FLOPs, bytes. Not for measuring a run: that is
`eiwtrain.train.report`, nor for printing the costs: that is `eiwtrain.driver.dry_run`.

Counted means that a training step (forward and backward) is run on tensors that have shapes and no data (torch's
FakeTensorMode), which takes seconds and no memory whatever the size. The steps of a level are alike, so flows of few
steps are counted, and what a step adds is multiplied by the number of steps: the sum is exact, as is what a further
image adds. Time is not counted: it is FLOPs over a GPU's published peak and an assumed share of it, `MFU`, or
what the host needs to start the operations at an assumed rate, `LAUNCH`, whichever is longer.

Not counted: what dropout keeps, the workspace of cuDNN, what an allocator loses to rounding, CUDA's own memory.
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
from eiwtrain.config import Config, Train, batching
from eiwtrain.flow.config import BackpropMode
from eiwtrain.flow.memory import SLACK, STATE_BYTES
from eiwtrain.train import agreed
from eiwtrain.train.engine import MOST_IN_BUCKET, optimizer_of, scaled
from eiwtrain.train.flat import FlatModule
from eiwtrain.train.objective import MicroBatch
from eiwtrain.train.state import flow_config, outline

COUNTED_MODES: tuple[BackpropMode, ...] = ("stored", "checkpointed", "selective", "invertible")

MFU = 0.25
"""The share of a GPU's peak at which training is assumed to compute: assumed, not measured. It is model FLOPs
utilisation where activations are stored; where some are recomputed, that is less by as much (PaLM, arXiv 2204.02311,
appendix B, calls this one hardware FLOPs utilisation)."""

LAUNCH = 7e-6
"""Seconds in which PyTorch starts an operation, from Python or its autograd: assumed, not measured. The host starts one
after the other, so a micro-batch takes at least that for each of its operations, however small it is."""

FREE = 0.2
"""The share of a GPU's memory that is left to what is not counted here."""

_BY_DEEPSPEED = (2, 2)
"""Operations that DeepSpeed adds at stage 0: to each micro-batch, whose loss it divides, and to the reduction."""
_FOR_EACH_TENSOR = (0, 4, 4, 9)
"""Operations that it adds at a ZeRO stage for each parameter, with a micro-batch a step; at most, as it shares some out
among the workers."""

_FLOAT = 4  # bytes of a parameter, its gradient, its average and each of its moments


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU."""

    name: str
    flops_per_second: float
    """Peak in dense bfloat16 matrix products, as published."""
    bytes: float
    """Memory."""


GPUS = (
    # NVIDIA L4 Tensor Core GPU data sheet: 242 TFLOPS with sparsity, which doubles the dense figure
    Gpu("L4", 121e12, 24e9),
    # NVIDIA L40S data sheet: 733 TFLOPS with sparsity
    Gpu("L40S", 362e12, 48e9),
    # NVIDIA A100 Tensor Core GPU data sheet
    Gpu("A100 80 GB", 312e12, 80e9),
    # NVIDIA H100 Tensor Core GPU data sheet, SXM: 1,979 TFLOPS with sparsity
    Gpu("H100 SXM", 989e12, 80e9),
    # NVIDIA H200 Tensor Core GPU data sheet, SXM: 1,979 TFLOPS with sparsity
    Gpu("H200", 989e12, 141e9),
)
REFERENCE = GPUS[2]
"""The GPU that the configs are planned for."""


@dataclass(frozen=True)
class Costs:
    """The costs of a config; dicts are by backpropagation mode, one of `COUNTED_MODES`."""

    parameters: int
    flops_per_image: dict[str, float]
    """FLOPs of a training step, forward and backward with what it recomputes, at the config's micro-batch. A
    multiplication and an addition are two; convolutions and matrix products count, as in torch's `FlopCounterMode`."""
    operations: dict[str, int]
    """Operations that a training step starts for each micro-batch, forward and backward, the loss and the gathering of
    gradients included; views do not count."""
    moved_bytes: dict[str, int]
    """Bytes that those of them read and write that are neither convolutions nor products, in a micro-batch."""
    activation_bytes: dict[str, int]
    """Kept from the forward pass for the backward pass, by each image of a micro-batch."""
    fixed_bytes: dict[str, int]
    """Also kept, whatever the number of images: bfloat16 copies of weights, matrices of 1x1 convolutions."""
    workspace_bytes: int
    """Held for each image during the backward pass: what one step of the first level keeps, the most that checkpointed
    and invertible hold of recomputed activations at a time. Gradients of activations come on top."""
    checkpoint_bytes: int
    """Bytes of all tensors of a checkpoint: weights, their average and the optimizer's two moments."""
    train: Train
    backprop: str
    memory_budget: int | None
    """The config's own."""
    update_operations: int = 0
    """Operations that a training step starts once: to reduce and clip the gradient, to read its norm and what the
    workers agree on, to update weights, moments and average."""

    @property
    def gradient_bytes(self) -> int:
        """Bytes of gradients that each worker sends to the all-reduce of an optimizer step: float32."""
        return _FLOAT * self.parameters

    @property
    def mode(self) -> str:
        """The config's backpropagation mode on `REFERENCE`, see `mode_in`."""
        return self.mode_in(REFERENCE.bytes)

    def mode_in(self, memory: float) -> str:
        """Return the config's backpropagation mode on a GPU with `memory` bytes.

        For auto: stored or selective, if that fits its budget, or else invertible, which bounds time from above and
        memory from below. Without a budget of its own it has what would be free on that GPU.
        """
        if self.backprop != "auto":
            return self.backprop
        budget = self.memory_budget
        if budget is None:
            free = memory - 2 * _FLOAT * self.parameters  # weights and their average are there already
            two = 2 * max(2, self.train.micro_batch) * self.workspace_bytes
            budget = int(SLACK * free) - STATE_BYTES * self.parameters - two
        images = self.train.micro_batch
        fitting = (mode for mode in ("stored", "selective") if self.kept_bytes(mode, images) <= budget)
        return next(fitting, "invertible")

    def kept_bytes(self, mode: str, images: int) -> int:
        """Return the bytes that are kept for the backward pass of a micro-batch of `images` images."""
        return self.fixed_bytes[mode] + images * self.activation_bytes[mode]

    def state_bytes(self, workers: int) -> int:
        """Return the bytes that one of `workers` workers holds between steps and through them, without activations."""
        return sum(self.state(workers).values())

    def state(self, workers: int) -> dict[str, int]:
        """Return `state_bytes` by kind. All is float32; the average is whole on every worker at any ZeRO stage."""
        whole = _FLOAT * self.parameters
        share = -(-whole // workers)
        zero = self.train.zero_stage
        return {
            "weights": share if zero == 3 else whole,
            "average": whole,
            # at stage 3 DeepSpeed keeps a buffer to accumulate in, and flattens a second one for the update
            "gradients": (whole, whole, share, 2 * share)[zero],
            "moments": 2 * (share if zero else whole),
            # DeepSpeed copies the weights that it updates in float32, also where they already are float32
            "master weights": share if zero else 0,
            "reduction buffer": _FLOAT * min(MOST_IN_BUCKET, self.parameters) if zero else 0,
        }

    def worker_bytes(self, mode: str, workers: int) -> int:
        """Return the bytes of one of `workers` workers in a training step: its state, and what a full micro-batch keeps
        and recomputes."""
        images = self.train.micro_batch
        recomputed = 0 if mode == "stored" else images * self.workspace_bytes
        return self.state_bytes(workers) + self.kept_bytes(mode, images) + recomputed

    def fits(self, gpu: Gpu, workers: int) -> bool:
        """Whether a training step of one of `workers` workers fits into a GPU with `FREE` to spare; auto makes room by
        inverting."""
        least = "invertible" if self.backprop == "auto" else self.backprop
        return self.worker_bytes(least, workers) <= (1 - FREE) * gpu.bytes

    def step_seconds(self, gpu: Gpu, workers: int) -> float:
        """Return the time of an optimizer step on `workers` such GPUs, in the mode that the config has there.

        It is that of one worker's micro-batches one after the other; communication between workers is not in it.
        """
        rows, accumulation = batching(self.train, workers)
        mode = self.mode_in(gpu.bytes)
        computed = rows * self.flops_per_image[mode] / (gpu.flops_per_second * MFU)
        # the host reads the norm before it starts the update, so nothing hides these operations
        return accumulation * max(computed, self.operations[mode] * LAUNCH) + self.update_operations * LAUNCH


def of(config: Config, channels: int = 3) -> Costs:
    """Return the costs of a config for images of `channels` channels."""
    shape = flow_config(config, channels)
    shape = replace(shape, conditioner=replace(shape.conditioner, dropout=0.0))  # dropout needs real numbers
    model = outline(config, channels)
    parameters = sum(p.numel() for p in model.parameters())
    state = sum(t.nbytes for t in model.state_dict().values())
    images = max(2, config.train.micro_batch)  # tensors of one image are contiguous where those of several are not
    flops: dict[str, float] = {}
    operations: dict[str, int] = {}
    moved: dict[str, int] = {}
    each: dict[str, int] = {}
    fixed: dict[str, int] = {}
    each_loss, update = count_around(config, model)
    for mode in COUNTED_MODES:
        step = _of_all_steps(replace(shape, backprop=mode), images)
        more = _of_all_steps(replace(shape, backprop=mode), images + 1, backward=False)
        flops[mode], operations[mode], moved[mode] = step.flops / images, step.operations + each_loss, step.moved
        each[mode] = more.kept - step.kept
        fixed[mode] = step.kept - images * each[mode]
    return Costs(
        parameters,
        flops,
        operations,
        moved,
        each,
        fixed,
        _of_a_step(shape),
        checkpoint_bytes=2 * state + 2 * _FLOAT * parameters,
        train=config.train,
        backprop=config.model.backprop,
        memory_budget=config.model.memory_budget,
        update_operations=update,
    )


@dataclass(frozen=True)
class Counted:
    """What one training step keeps for its backward pass, bytes, its FLOPs, the operations that it starts, and the
    bytes that those without FLOPs read and write: element-wise ones, sums and copies."""

    kept: int
    flops: int
    operations: int
    moved: int

    def plus(self, times: int, more: Counted) -> Counted:
        """Return this, plus `times` times what `more` has above it."""
        mine, theirs = astuple(self), astuple(more)
        return Counted(*(a + times * (b - a) for a, b in zip(mine, theirs, strict=True)))


def _of_all_steps(shape: flow.FlowConfig, images: int, backward: bool = True) -> Counted:
    """Return `count` of the whole flow; of Glow's backbone from flows of two steps and of three: each step adds the
    same, except for the first, as what is computed for several together is laid out otherwise for one. With anchors,
    each period of steps does."""
    if shape.backbone != "glow" or not isinstance(shape.steps, int):
        return count(shape, images, backward)
    period = shape.anchor_every if shape.backprop == "invertible" and shape.anchor_every else 1
    few = min(shape.steps, 2 + (shape.steps - 2) % period)
    times = (shape.steps - few) // period
    less = count(replace(shape, steps=few), images, backward)
    if not times:
        return less
    return less.plus(times, count(replace(shape, steps=few + period), images, backward))


def _of_a_step(shape: flow.FlowConfig) -> int:
    """Return the bytes that one step of the first level keeps for an image if it keeps its activations."""
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

    The code of a training step is run on parameters of one number each, as many as the model has: at ZeRO stage 0 they
    are one tensor whatever their number. At other stages DeepSpeed's own loops over them come on top.

    Args:
        model: the flow, with or without numbers.
    """
    own = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in model.parameters())
    flat = FlatModule(own)
    average = flat.average_in(dict(copy.deepcopy(own).named_parameters()))
    optimizer = optimizer_of(flat.parameters(), config.train)
    images = torch.zeros(2, *model.config.image_shape, dtype=torch.uint8)
    log_prob, penalty = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    out = flow.FlowOutput(log_prob, penalty, torch.zeros(model.config.levels, 2))
    batch = MicroBatch(torch.ones(2), config, images)

    def step() -> tuple[int, int]:
        loss, update = Started(), Started()
        with loss:
            scaled(batch.loss(lambda *_: out), 1.0).backward()  # type: ignore[arg-type]
        for parameter in own:
            parameter.grad = torch.ones(1)
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
