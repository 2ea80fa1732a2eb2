"""DeepSpeed, and nothing but DeepSpeed: the only file that knows its config and its quirks.

What the loop sees is small: `step` takes the micro-batches of one optimizer step, `moments` and `load_moments`
move the optimizer state, keyed by parameter name and whole, so that checkpoints fit any world size and ZeRO stage.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eiwtrain.config import Train

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state per parameter, besides its step count
BETAS = (0.9, 0.999)


class Engine:
    """`module` under DeepSpeed with AdamW, at ZeRO stage 0, 1 or 2.

    Parameters, gradients, their all-reduce and the optimizer are float32; which arithmetic runs in bf16 is the
    module's own business (the flow autocasts its conditioners and nothing else), so DeepSpeed's own precision modes,
    which would cast the trunk and its log-determinants, stay off.
    """

    def __init__(self, module: nn.Module, train: Train, micro_batch: int, accumulation: int, world_size: int) -> None:
        deepspeed = _import_deepspeed()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, betas=BETAS, weight_decay=train.weight_decay)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=_deepspeed_config(train, micro_batch, accumulation, world_size),
            dist_init_required=False,  # Ray Train has made the process group
        )
        self.module = module
        self.device: torch.device = self._engine.device
        self._accumulation = accumulation
        self._stage = train.zero_stage

    def step(self, losses: Sequence[Callable[[nn.Module], Tensor]], lr: float) -> float:
        """One optimizer step.

        Args:
            losses: for each of the `accumulation` micro-batches, a function of the module that gives this rank's
                contribution to the loss, a scalar. What is minimised is their sum over micro-batches and ranks.
            lr: learning rate of this step.

        Returns:
            The gradient norm before clipping.
        """
        if len(losses) != self._accumulation:
            raise ValueError(f"{len(losses)} micro-batches for {self._accumulation} accumulation steps")
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        # DeepSpeed averages over micro-batches and ranks; what is asked for is the sum
        scale = self._accumulation * torch.distributed.get_world_size()
        norm = None
        for loss in losses:
            self._engine.backward(loss(self._engine) * scale)
            if self._stage == 0 and self._engine.is_gradient_accumulation_boundary():
                norm = nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
            self._engine.step()
        return float(self._engine.get_global_grad_norm() if norm is None else norm)  # DeepSpeed has none at stage 0

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """(`parameter.exp_avg`, tensor) and its twin for every parameter, whole, float32. Collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        for name, parameter in self.module.named_parameters():
            for key in MOMENTS:
                if self._stage == 0:
                    yield f"{name}.{key}", self._engine.optimizer.state[parameter][key]
                else:
                    yield f"{name}.{key}", safe_get_full_optimizer_state(parameter, key)

    def load_moments(self, moments: dict[str, Tensor], step: int, loss: Callable[[nn.Module], Tensor]) -> None:
        """Put back what `moments` gave, after `step` optimizer steps.

        `loss` is any finite loss of the module: a fresh optimizer has no state to fill until it has made a step, so
        one is made with gradients times zero at a learning rate of zero, which leaves the weights as they are.
        """
        from deepspeed.utils import safe_set_full_optimizer_state

        self.step([lambda module: loss(module) * 0.0] * self._accumulation, lr=0.0)
        for name, parameter in self.module.named_parameters():
            for key in MOMENTS:
                value = moments[f"{name}.{key}"].to(self.device)
                if self._stage == 0:
                    self._engine.optimizer.state[parameter][key].copy_(value)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)
        for state in self._adamw.state.values():
            state["step"].fill_(step)

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        """The AdamW below ZeRO's wrapper, whose state holds the step count."""
        return self._engine.optimizer if self._stage == 0 else self._engine.optimizer.optimizer


def _deepspeed_config(train: Train, micro_batch: int, accumulation: int, world_size: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world_size,
        "gradient_clipping": train.clip,  # DeepSpeed's default is 1.0: always say it
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": train.zero_stage, "overlap_comm": False, "contiguous_gradients": True},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }


def _import_deepspeed() -> Any:
    """DeepSpeed, quiet, and kept from compiling its shared-memory collectives on CPU.

    That compilation takes minutes, and a process killed in it leaves a lock on which the next run hangs for ever;
    gloo serves.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
