"""The gradients of a flow under DistributedDataParallel. Under DeepSpeed they are tested beside the engine."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from flow_helpers import images, make_flow
from ranks import run_ranks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from eiwtrain.flow import EIWFlow, FlowOutput

pytestmark = pytest.mark.cluster

RANKS, ACCUMULATION, ROWS = 2, 2, 2
OPTIONS: list[dict[str, Any]] = [{}, {"find_unused_parameters": True}, {"static_graph": True}]


def loss(out: FlowOutput, weights: Tensor) -> Tensor:
    # Uneven weights, so that gradients of one sample in place of another's would show.
    return ((-out.log_prob + 10 * out.penalty) * weights).sum()


def gradients(flow: EIWFlow) -> Tensor:
    return torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None])


def gradients_are_plain_autograds() -> None:
    x = images(RANKS * ACCUMULATION * ROWS)
    weights = torch.arange(1, len(x) + 1, dtype=x.dtype)
    plain = make_flow()
    loss(plain(x), weights).backward()
    expected = gradients(plain)

    own = list(zip(x.split(ROWS), weights.split(ROWS), strict=True))[dist.get_rank() :: RANKS]
    for mode in ("checkpointed", "invertible"):
        for options in OPTIONS:
            flow = make_flow(backprop=mode)
            wrapped = DistributedDataParallel(flow, **options)
            for accumulating in (False, True):  # in this order: a static graph needs a synchronised step first
                flow.zero_grad()
                for i, (part, weight) in enumerate(own):
                    with wrapped.no_sync() if accumulating and i < ACCUMULATION - 1 else nullcontext():
                        (RANKS * loss(wrapped(part), weight)).backward()  # DDP takes the mean over ranks
                error = (gradients(flow) - expected).norm() / expected.norm()
                assert error <= 1e-9, (mode, options, accumulating, error)


def test_gradients_over_two_ranks_are_plain_autograds_however_ddp_looks_for_them() -> None:
    run_ranks(gradients_are_plain_autograds, RANKS)
