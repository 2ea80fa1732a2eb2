"""Counts what a config costs before anything runs: parameters, FLOPs, bytes. Not for measuring a run: that is
`eiwtrain.train.report`, nor for printing the costs: that is `eiwtrain.driver.dry_run`.

FLOPs, operations and activations are counted on tensors without data (`eiwtrain.driver.counting`). Time is not counted:
it is FLOPs over a GPU's published peak and an assumed share of it, `MFU`, or what the host needs to start the
operations at an assumed rate, `LAUNCH`, whichever is longer.

Not counted: what dropout keeps, the workspace of cuDNN, what an allocator loses to rounding, CUDA's own memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from eiwtrain.config import Config, Train, batching
from eiwtrain.driver import counting
from eiwtrain.flow.config import BackpropMode
from eiwtrain.flow.memory import SLACK, STATE_BYTES
from eiwtrain.train.engine import MOST_IN_BUCKET
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
    update_flops: int = 0
    """FLOPs of an optimizer step itself, which each worker makes whole: Muon's products of matrices."""
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
        updated = self.update_flops / (gpu.flops_per_second * MFU)
        step = accumulation * max(computed, self.operations[mode] * LAUNCH)
        return step + max(updated, self.update_operations * LAUNCH)


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
    each_loss, update = counting.count_around(config, model)
    for mode in COUNTED_MODES:
        step = counting.of_all_steps(replace(shape, backprop=mode), images)
        more = counting.of_all_steps(replace(shape, backprop=mode), images + 1, backward=False)
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
        counting.of_a_step(shape),
        checkpoint_bytes=2 * state + 2 * _FLOAT * parameters,
        train=config.train,
        backprop=config.model.backprop,
        memory_budget=config.model.memory_budget,
        update_flops=counting.update_flops(config, model),
        update_operations=update,
    )
