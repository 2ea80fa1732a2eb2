"""The device of a worker or a command, and how it computes: without TensorFloat-32, always by the same kernels.

Not for the library: `eiwtrain.flow` leaves PyTorch's settings to the program that loads it.
"""

from __future__ import annotations

import os

import torch

from eiwtrain.config import Config
from eiwtrain.on_ray import session


def of_worker(config: Config) -> torch.device:
    """Return the device of this worker of Ray Train: its GPU, or the CPU with no more threads than its cores."""
    exact_float32()
    same_kernels()
    if config.train.deterministic:
        deterministic_kernels()
    if not config.workers.gpus:
        torch.set_num_threads(config.workers.cpus)  # no more than its own cores, so that sums are the same each time
        return torch.device("cpu")
    device: torch.device = session.worker_gpu()
    torch.cuda.set_device(device)
    return device


def of_command(name: str) -> torch.device:
    """Return the device that `--device` names: `cpu`, `cuda`, or `auto` for a GPU if there is one.

    Raises:
        ValueError: there is no GPU.
    """
    exact_float32()
    same_kernels()
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: cuda was asked for, and PyTorch finds no GPU; give cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def exact_float32() -> None:
    """Keep GPUs from rounding float32 to TensorFloat-32, which has 10 bits of mantissa, in this process.

    By default PyTorch lets convolutions do so.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def same_kernels() -> None:
    """Keep cuDNN from choosing a convolution by a race, in this process: its winners differ between threads, and the
    backward pass, in a thread of its own, computes again what the forward pass computed."""
    torch.backends.cudnn.benchmark = False


def deterministic_kernels() -> None:
    """Have this process use only kernels whose result depends on nothing but their input. Call it before cuBLAS is
    first used, which then reads its setting."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
