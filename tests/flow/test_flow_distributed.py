"""The gradients of a flow under DistributedDataParallel. Under DeepSpeed they are tested beside the engine."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from flow_helpers import DENSE, TINY, images, make_flow
from ranks import run_ranks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from eiwtrain.flow import EIWFlow, FlowConfig, FlowOutput

pytestmark = pytest.mark.cluster

RANKS, ACCUMULATION, ROWS = 2, 2, 2
OPTIONS: list[dict[str, Any]] = [{}, {"find_unused_parameters": True}, {"static_graph": True}]


def loss(out: FlowOutput, weights: Tensor) -> Tensor:
    # Uneven weights, so that gradients of one sample in place of another's would show.
    return ((-out.log_prob + 10 * out.penalty) * weights).sum()


def gradients(flow: EIWFlow) -> Tensor:
    return torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None])


def batch_for(config: FlowConfig) -> tuple[Tensor, ...]:
    """Return reals, or pixels and noise where noise joins on the way."""
    x = images(RANKS * ACCUMULATION * ROWS, config)
    if config.backbone == "glow":
        return (x,)
    noise = torch.rand(len(x), *config.noise_shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    return (256 * (x + 0.5)).to(torch.uint8), noise


def gradients_are_plain_autograds(config: FlowConfig) -> None:
    batch = batch_for(config)
    weights = torch.arange(1, len(batch[0]) + 1, dtype=torch.float64)
    plain = make_flow(config)
    loss(plain(*batch), weights).backward()
    expected = gradients(plain)

    own = list(zip(*(t.split(ROWS) for t in (weights, *batch)), strict=True))[dist.get_rank() :: RANKS]
    for mode in ("checkpointed", "invertible"):
        for options in OPTIONS:
            flow = make_flow(config, backprop=mode)
            wrapped = DistributedDataParallel(flow, **options)
            for accumulating in (False, True):  # in this order: a static graph needs a synchronised step first
                flow.zero_grad()
                for i, (weight, *part) in enumerate(own):
                    with wrapped.no_sync() if accumulating and i < ACCUMULATION - 1 else nullcontext():
                        (RANKS * loss(wrapped(*part), weight)).backward()  # DDP takes the mean over ranks
                error = (gradients(flow) - expected).norm() / expected.norm()
                assert error <= 1e-9, (config.backbone, mode, options, accumulating, error)


def with_every_backbone() -> None:
    for config in (TINY, DENSE):
        gradients_are_plain_autograds(config)


def test_gradients_over_two_ranks_are_plain_autograds_however_ddp_looks_for_them() -> None:
    run_ranks(with_every_backbone, RANKS)
