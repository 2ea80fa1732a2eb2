"""DeepSpeed, and nothing but DeepSpeed: the only file that knows its config and its quirks.

The loop sees little of it: `step` takes the micro-batches of one optimizer step; `weights`, `moments` and
`load_moments` move the parameters and the optimizer state, keyed by parameter name and whole, so that checkpoints fit
any world size and ZeRO stage.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from eiwtrain import flow
from eiwtrain.config import Train
from eiwtrain.train import agreed, eager
from eiwtrain.train.flat import FlatModule
from eiwtrain.train.optimizers import matrices_for, optimizer_of

MOST_IN_BUCKET = 50_000_000  # number of gradients that are reduced at once: 200 MB
LEAVES: tuple[type[nn.Module], ...] = (flow.Level, flow.VariationalDequantizer)
"""Modules that ZeRO 3 must gather whole, as their forward uses parameters of submodules that it does not call.

They return a tensor or a flat tuple of tensors: in nested outputs DeepSpeed's hooks miss where backward begins.
"""


class Engine:
    """`module` under DeepSpeed with the optimizer of the config, at ZeRO stage 0, 1, 2 or 3.

    Parameters, gradients, their all-reduce and the optimizer are float32. The module itself decides which arithmetic
    runs in bf16 (the flow autocasts only its conditioners), so DeepSpeed's own precision modes, which would cast the
    trunk and its log-determinants, stay off.

    At stage 0 DeepSpeed has a `FlatModule` in its place. At stage 3 `module` is sharded over the ranks in place: one of
    the `LEAVES` is whole only while it runs forward or backward, and outside `step` no parameter has any elements;
    `weights` returns them.
    """

    def __init__(self, module: nn.Module, train: Train, micro_batch: int, accumulation: int, world_size: int) -> None:
        device = next(module.parameters()).device
        deepspeed = _import_deepspeed(device.type)
        _use(device)
        eager.keep_compiler_out()
        leaves: list[nn.Module] = []
        if train.zero_stage == 3:
            leaves = deepspeed.utils.set_z3_leaf_modules(module, list(LEAVES), raise_if_not_found=False)
            for leaf in leaves:
                leaf.register_forward_pre_hook(_with_gradients)
                leaf.register_forward_hook(_check_flat)
        numbers = sum(p.numel() for p in module.parameters())
        self._flat = FlatModule(module, matrices_for(train, module)) if train.zero_stage == 0 else None
        seen = module if self._flat is None else self._flat
        optimizer = optimizer_of(seen.parameters(), train, [] if self._flat is None else self._flat.blocks)
        if self._flat is not None:
            optimizer.get_grads_for_reduction = self._gradients_to_reduce  # DeepSpeed looks for this name
        self._engine, *_ = deepspeed.initialize(
            model=seen,
            optimizer=optimizer,
            config=_deepspeed_config(train, micro_batch, accumulation, world_size, numbers),
            dist_init_required=False,  # Ray Train has made the process group
        )
        self.module = module
        self.device: torch.device = self._engine.device
        self._accumulation = accumulation
        self._stage, self._clip = train.zero_stage, train.clip
        self.before_waiting: Callable[[], None] = lambda: None
        """Called in each step before it first waits for other ranks: at stage 0 where gradients are summed, at 1 and 2
        after the first forward pass, at 3 never, as its first forward pass gathers weights."""
        self.reported: list[float] = []
        """What the last step's `report` returned, summed over ranks."""
        leaf_of = {id(p): number for number, leaf in enumerate(leaves) for p in leaf.parameters()}
        groups: defaultdict[int | None, dict[str, nn.Parameter]] = defaultdict(dict)
        for name, parameter in module.named_parameters():
            groups[leaf_of.get(id(parameter))][name] = parameter
        self._groups = list(groups.values())

    def step(
        self,
        losses: Sequence[Callable[[nn.Module], Tensor]],
        lr: float,
        report: Callable[[], Tensor] | None = None,
    ) -> tuple[float, bool]:
        """Make one optimizer step, or none if the loss or a gradient is not finite. Collective.

        Args:
            losses: for each of the `accumulation` micro-batches, a function of the module that returns this rank's
                contribution to the loss, a scalar. Their sum over micro-batches and ranks is minimised.
            lr: learning rate of this step.
            report: called after the last backward pass; returns (n,) float64 on the device, which are summed over ranks
                into `reported`. They are read together with the norm: the host waits for the device once.

        Returns:
            The gradient norm before clipping, and whether the step was applied; both are the same on every rank. The
            step is not applied if a contribution of any rank or the norm is not finite: then the returned norm is not
            finite, and weights, moments and the optimizer's count of its steps stay as they were, to the bit.
        """
        if len(losses) != self._accumulation:
            raise ValueError(f"{len(losses)} micro-batches for {self._accumulation} accumulation steps")
        self._set_rate(lr)
        # DeepSpeed averages over micro-batches and ranks; the sum is needed. At stage 0 the gradient is multiplied by
        # the ranks once it is summed: a loss times 3 would round otherwise in the whole backward pass than one times 1,
        # and Adam makes whole steps of gradients that are zero but for rounding.
        ranks = dist.get_world_size()
        scale = self._accumulation * (ranks if self._flat is None else 1)
        norm = None
        for number, loss in enumerate(losses, 1):
            contribution = loss(self._engine)
            if number == 1 and self._stage in (1, 2):
                self.before_waiting()
            self._engine.backward(scaled(contribution, scale))
            if self._flat is not None:
                if number < len(losses):
                    self._flat.gather()
                else:
                    norm = ranks * self._read(self._flat.norm(), report)
                    self._flat.clip_(norm, self._clip, ranks)
                    self._optimizer.passes = not math.isfinite(norm)
            self._engine.step()  # at stages 1 to 3 DeepSpeed skips a norm that is not finite, and reports inf
        if norm is None:  # DeepSpeed computes it
            norm = self._read(self._engine.get_global_grad_norm(), report)
        return norm, math.isfinite(norm)

    def _gradients_to_reduce(self) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """Return what DeepSpeed sums over ranks at stage 0, which it does next."""
        assert self._flat is not None
        gradients = self._flat.gradients_to_reduce()
        self.before_waiting()
        return gradients

    def _read(self, norm: Any, report: Callable[[], Tensor] | None) -> float:
        """Return the norm as a number; with it read what `report` returns, summed over ranks. Collective."""
        own = torch.empty(0, dtype=torch.float64, device=self.device) if report is None else report()
        if report is not None:
            dist.all_reduce(own)
        value, *self.reported = agreed.beside(norm, own).tolist()
        return float(value)

    def average_in(self, model: nn.Module) -> Callable[[float], None]:
        """Return a function that moves the parameters of `model`, a copy of the module, a share 0..1 of the way to
        those of the module. Collective, as is the function."""
        own = dict(model.named_parameters())
        if self._flat is not None:
            return self._flat.average_in(own)
        averages: list[list[Tensor]] = [[own[name] for name in group] for group in self._groups]

        def move(share: float) -> None:
            for average, weights in zip(averages, self.weights(), strict=True):
                torch._foreach_lerp_(average, list(weights.values()), share)

        return move

    def weights(self) -> Iterator[dict[str, Tensor]]:
        """Yield the parameters by name, whole and detached, in groups that together are all. Collective.

        At stage 3 this is an all-gather of the model, a leaf at a time: no more than a leaf is whole at once, unless
        the caller holds on to tensors. At other stages it costs nothing.
        """
        for group in self._groups:
            with self.whole(list(group.values())):
                yield {name: parameter.detach() for name, parameter in group.items()}

    def whole(self, parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which these parameters are whole, which they are anyway if nothing is sharded.
        Collective."""
        if self._stage < 3:
            return contextlib.nullcontext()
        from deepspeed import zero

        context: contextlib.AbstractContextManager[Any] = zero.GatheredParameters(parameters)
        return context

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (`parameter.moment`, tensor) for each of the optimizer's moments of every parameter, whole, float32.
        Collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state = self._optimizer.state
        flat = self._flat_moments() if self._flat is not None and state else {}
        for name, parameter in self.module.named_parameters():
            for key in self._optimizer.moments:
                if not state:  # no step has been applied
                    yield f"{name}.{key}", torch.zeros(_whole_shape(parameter), device=self.device)
                elif flat:
                    yield f"{name}.{key}", flat[key][name]
                else:
                    yield f"{name}.{key}", safe_get_full_optimizer_state(parameter, key)

    def load_moments(self, moments: dict[str, Tensor], updates: int, loss: Callable[[nn.Module], Tensor]) -> None:
        """Restore what `moments` returned after `updates` applied steps. Collective.

        `loss` is any loss of the module to which every parameter contributes: a fresh optimizer has no state to fill
        before its first step, so one is made with gradients of zero at a learning rate of zero, which leaves the
        weights as they are. At stage 0 that takes no loss.
        """
        if self._flat is not None:
            self._set_rate(0.0)
            self._flat.weights.grad = torch.zeros_like(self._flat.weights)
            self._optimizer.step()
            self._flat.weights.grad = None
            for key, named in self._flat_moments().items():
                for name, part in named.items():
                    part.copy_(moments[f"{name}.{key}"])
        else:
            hooks = [parameter.register_hook(torch.zeros_like) for parameter in self.module.parameters()]
            self.step([loss] * self._accumulation, lr=0.0)
            for hook in hooks:
                hook.remove()
            for name, parameter in self.module.named_parameters():
                for key in self._optimizer.moments:
                    self._load_moment(parameter, key, moments[f"{name}.{key}"].to(self.device))
        for state in self._optimizer.state.values():
            state["step"].fill_(updates)

    def _flat_moments(self) -> dict[str, dict[str, Tensor]]:
        """Return the optimizer's moments at stage 0, by kind and parameter."""
        assert self._flat is not None
        (state,) = self._optimizer.state.values()
        return {key: self._flat.named(state[key]) for key in self._optimizer.moments}

    def _load_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed import utils

        if self._stage < 3:
            utils.safe_set_full_optimizer_state(parameter, value, key)
        else:
            # the `full` setter fails where the ranks do not divide a parameter: it forgets that shards are padded
            size = utils.safe_get_local_optimizer_state(parameter, key).numel()
            padded = F.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
            utils.safe_set_local_optimizer_state(parameter, padded.narrow(0, size * dist.get_rank(), size), key)

    def _set_rate(self, lr: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr

    @property
    def _optimizer(self) -> Any:
        """The optimizer inside ZeRO's wrapper, whose state holds the count of its steps."""
        return self._engine.optimizer if self._stage == 0 else self._engine.optimizer.optimizer


def scaled(contribution: Tensor, scale: float) -> Tensor:
    """Return a loss times `scale`, NaN if it is not finite: it then shows in the norm of every rank, whatever its
    gradients are."""
    finite = 1.0 + 0.0 * contribution.detach()  # 1, or NaN
    return contribution * scale * finite


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the whole parameter, also where ZeRO 3 shards it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _with_gradients(_leaf: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the inputs, with floating-point tensors made to require gradients.

    DeepSpeed reduces a leaf's gradients when the gradient of its input arrives. If no input requires one, as at the
    first level, it does so before there are any.
    """
    if not torch.is_grad_enabled():
        return inputs
    return tuple(
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad else x
        for x in inputs
    )


def _check_flat(leaf: nn.Module, _inputs: Any, output: Any) -> None:
    """Raise TypeError for an output in which DeepSpeed would not see the tensors: it would train nothing."""
    if not all(isinstance(x, Tensor) for x in (output if isinstance(output, tuple) else (output,))):
        raise TypeError(f"{type(leaf).__name__}: a leaf of ZeRO 3 has to return a tensor or a flat tuple of tensors")


def _deepspeed_config(
    train: Train, micro_batch: int, accumulation: int, world_size: int, numbers: int
) -> dict[str, Any]:
    """Return DeepSpeed's config for a model of `numbers` trained numbers."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world_size,
        # DeepSpeed's default is 1.0, so it is always set; at stage 0 the norm is known by then, and DeepSpeed would
        # compute it once more
        "gradient_clipping": train.clip if train.zero_stage else 0.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": train.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_bucket_size": min(MOST_IN_BUCKET, numbers),  # the default is a buffer of 2 GB, whatever the model
            # stage 3 shards every parameter and frees a leaf after each use: DeepSpeed's defaults keep those below 1e5
            # elements whole, and from forward to backward any model below 1e9
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # or the host waits for the device twice a micro-batch
    }


def _use(device: torch.device) -> None:
    """Have DeepSpeed compute on this very device, and wait for other ranks as long as the process group does."""
    from deepspeed.utils import groups

    if device.index is not None:
        # All of DeepSpeed takes it for the index of the GPU. Ray numbers workers in another order than GPUs where a
        # node has more than 10, whose ids it sorts as text.
        os.environ["LOCAL_RANK"] = str(device.index)
    if groups._WORLD_GROUP is None:  # in which DeepSpeed reduces; it would make one that waits 10 minutes with NCCL
        world: Any = dist.group.WORLD
        groups._WORLD_GROUP = dist.new_group(timeout=world._get_backend(device).options._timeout)


def _import_deepspeed(kind: str = "cpu") -> Any:
    """Return DeepSpeed for a kind of device, made quiet, and kept from compiling anything: on CPU it would compile its
    shared-memory collectives.

    That compilation takes minutes, and a process killed during it leaves a lock on which the next run hangs forever;
    gloo is enough.
    """
    os.environ["DS_ACCELERATOR"] = kind  # whatever somebody has set for another machine: it would fail here
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with _without_mlflow(), eager.without_compiler():
        import deepspeed
        from deepspeed.utils import logger

        with contextlib.suppress(ImportError):  # DeepSpeed looks it up whatever the optimizer is
            import deepspeed.runtime.zero.muon.muon_optimizer

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__ = {}  # else it tries them all: on a GPU by nvcc, with a warning for each
    return deepspeed


@contextlib.contextmanager
def _without_mlflow() -> Iterator[None]:
    """Have MLflow not found, unless it is imported already: DeepSpeed's autotuner would import it, for a second on each
    rank."""
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules["mlflow"]
