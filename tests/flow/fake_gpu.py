"""Walks training steps, of flows and beside them, on a GPU that is not there, and reports what would be slow or fail on
a real one.

The device is torch's device for backends written in Python, with tensors that have no numbers (`FakeTensorMode`).
It has a backward thread of its own, like a GPU; a build of torch without CUDA has no such thing for the name `cuda`.
A device can be registered once for a process, so this is a program: it prints {case: problems} as JSON.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from flow_helpers import DENSE, TINY
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from eiwtrain.config import Config
from eiwtrain.flow import ConditionerConfig, EIWFlow, FlowConfig, FlowOutput, multiscale
from eiwtrain.flow.config import BACKPROP_MODES, SHUFFLES
from eiwtrain.train import agreed
from eiwtrain.train.engine import scaled
from eiwtrain.train.flat import FlatModule
from eiwtrain.train.objective import MicroBatch
from eiwtrain.train.optimizers import optimizer_of


class Backend(backend_registration._DummyBackendModule):
    """What torch asks the module of a device for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend(rename="fakegpu", backend_module=Backend())


def _in_bfloat16(operation: Any) -> Callable[..., Any]:
    """Return an operation as autocast runs it, on bfloat16."""

    def run(*args: Any, **options: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            given = tree_map_only(Tensor, lambda t: t.bfloat16() if t.is_floating_point() else t, (args, options))
            return operation(*given[0], **given[1])

    return run


cast, not_cast = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
for name in ("conv2d", "linear", "matmul", "mm", "bmm", "addmm", "scaled_dot_product_attention"):
    cast.impl(name, _in_bfloat16(getattr(torch.ops.aten, name)), "AutocastPrivateUse1")
not_cast.fallback(torch.library.fallthrough_kernel)
GPU = torch.device("fakegpu", 0)
BATCH = 3


def cases() -> dict[str, FlowConfig]:
    """Return the flows to walk, by name: every mode, every shuffle, every kind of layer, on both backbones."""
    bfloat16: dict[str, Any] = {"conditioner_dtype": "bfloat16", "backprop": "invertible"}
    dense = replace(DENSE, units=(2, 1), steps=1, **bfloat16)
    glow = replace(TINY, steps=1, **bfloat16)
    found = {f"dense {mode}": replace(dense, backprop=mode) for mode in BACKPROP_MODES}
    found |= {f"glow {mode}": replace(glow, backprop=mode, shuffle="soft") for mode in BACKPROP_MODES}
    dropout = replace(glow.conditioner, dropout=0.1)
    found |= {f"dropout {mode}": replace(glow, backprop=mode, conditioner=dropout) for mode in BACKPROP_MODES}
    for shuffle in SHUFFLES:
        found[f"dense, {shuffle}"] = replace(dense, shuffle=shuffle, dequantization="uniform", units=(1, 1))
        found[f"glow, {shuffle}"] = replace(glow, shuffle=shuffle)
    del found["dense, order"], found["glow, soft"]  # as above
    transformer = ConditionerConfig("transformer", hidden=8, heads=2, patch=2)
    found["spline"] = replace(glow, coupling="spline", classes=5, anchor_every=1, trunk_dtype="float64")
    found["transformer"] = replace(glow, conditioner=transformer, levels=1, dequantization="variational")
    found["residual"] = replace(glow, conditioner=ConditionerConfig("residual", hidden=8))
    return found


def faults() -> dict[str, Callable[[Tensor], object]]:
    """Return operations that the walk must find, on a tensor of the GPU."""
    return {
        "a number": lambda x: float(x.sum()),
        "a condition": lambda x: bool((x > 0).all()),
        "a mask": lambda x: x[x > 0],
        "a copy": lambda x: x.cpu(),
        "a constant": lambda x: x + torch.zeros(3),
        "a tensor": lambda _: torch.zeros(()),
        "an inverse": lambda x: torch.linalg.inv(x),
    }


def _waits(func: Any, args: Any) -> bool:
    """Whether the host waits for a number from the GPU."""
    if func is torch.ops.aten.index.Tensor:
        return any(t.dtype in (torch.bool, torch.uint8) for t in args[1] if t is not None)
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return bool(tags & set(func.tags)) or func is torch.ops.aten._linalg_check_errors.default


class Watch(TorchDispatchMode):
    """Notes every operation that mixes devices or has the host wait for the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if GPU not in given and kwargs.get("device") != GPU:
            with _disable_current_modes():  # for real: a seed on the CPU can be read without waiting for the GPU
                out = func(*args, **kwargs)
            if any(isinstance(t, Tensor) and (t.dim() or t.is_floating_point()) for t in tree_leaves(out)):
                self.problems.add(f"{func} makes a tensor on the CPU")
            return out
        if _waits(func, args):
            self.problems.add(f"{func} waits for the GPU")
        out = func(*args, **kwargs)
        given |= {t.device for t in tree_leaves(out) if isinstance(t, Tensor)}
        if len(given) > 1:
            self.problems.add(f"{func} between {' and '.join(sorted(str(device) for device in given))}")
        return out


def on_gpu(flow: nn.Module) -> None:
    """Put tensors without numbers on the GPU in place of all parameters and buffers."""
    for module in flow.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=GPU)))
        for name, b in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(b.shape, dtype=b.dtype, device=GPU))


def watched(step: Callable[[], object]) -> list[str]:
    """Return the problems of the operations of `step`."""
    with Watch() as watch:
        try:
            step()
        except Exception as e:  # torch itself refuses some
            watch.problems.add(f"{type(e).__name__}: {e}"[:500])
    return sorted(watch.problems)


def walk(config: FlowConfig) -> list[str]:
    """Return the problems of a training step's forward and backward pass."""
    flow = EIWFlow(config)
    # the bytes of tensors without numbers cannot be measured
    half = mock.patch.object(multiscale, "how_many_fit", lambda costs, _budget: len(costs) // 2)
    with FakeTensorMode(allow_non_fake_inputs=True), half:
        on_gpu(flow)
        pixels = torch.empty(BATCH, *config.image_shape, dtype=torch.uint8, device=GPU)
        noise = torch.empty(BATCH, *config.noise_shape, device=GPU)
        labels = torch.empty(BATCH, dtype=torch.int64, device=GPU) if config.classes else None

        def step() -> None:
            out = flow(pixels, noise, labels)
            (out.penalty - out.log_prob).sum().backward()

        problems = watched(step)
    lost = [name for name, p in flow.named_parameters() if p.grad is None or p.grad.device != GPU]
    return problems + [f"{name} has no gradient" for name in lost]


def update(optimizer: str) -> list[str]:
    """Return the problems of what a training step at ZeRO stage 0 does beside its flow, but for the read of the norm.

    The host's own numbers, as the count of steps, are on the CPU.
    """
    config = Config.model_validate(
        {"run": {"name": "x"}, "data": {"path": "x", "resolution": 8}, "train": {"optimizer": optimizer}}
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        module, averaged = nn.Linear(4, 4), nn.Linear(4, 4)
        on_gpu(module), on_gpu(averaged)
        flat = FlatModule(module, [module.weight] if optimizer == "muon" else [])
        average = flat.average_in(dict(averaged.named_parameters()))
        chosen = optimizer_of(flat.parameters(), config.train, flat.blocks)
        pixels = torch.empty(BATCH, 3, 8, 8, dtype=torch.uint8, device=GPU)
        weight = torch.empty(BATCH, device=GPU)

        def forward(images: Tensor, *_: Any) -> FlowOutput:
            values = module(images.flatten(1)[:, :4].float()).sum(1)
            return FlowOutput(values, values, torch.empty(2, 2, device=GPU))

        def step() -> None:
            batch = MicroBatch(weight, config, pixels)
            for _ in range(2):
                scaled(batch.loss(forward), 2.0).backward()  # type: ignore[arg-type]
                flat.gather()
            agreed.beside(flat.norm(), batch.sums)
            flat.clip_(2.0, 1.0)
            chosen.step()
            average(0.5)
            flat.weights.grad = None

        found = watched(step) + watched(step)  # the first makes the optimizer's state
        return [problem for problem in found if not problem.endswith("makes a tensor on the CPU")]


def main() -> None:
    """Print the problems of all cases."""
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, 3, device=GPU)
        found = {name: watched(lambda fault=fault: fault(x)) for name, fault in faults().items()}
    flows = {name: walk(config) for name, config in cases().items()}
    updates = {name: update(name) for name in ("adamw", "adamax", "muon")}
    print(json.dumps({"faults": found, "flows": flows, "updates": updates}), flush=True)
    os._exit(0)  # the backward threads of the device do not end by themselves


if __name__ == "__main__":
    main()
