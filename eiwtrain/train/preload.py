"""Imports what a training worker needs, in a process that Ray keeps ready for one: the worker then starts at once.

Ray imports this module by its name, which `eiwtrain.on_ray.session` gives it. Not for GPUs: what looks at them waits
until Ray has given the worker its own.
"""

from __future__ import annotations

import contextlib
import os

from eiwtrain.on_ray.session import PRELOAD, PRELOAD_GPUS


def import_all(cpus: str, gpus: str) -> None:
    """Import it for a worker of so many CPUs and GPUs; libraries read the number of threads when they are imported."""
    os.environ.setdefault("OMP_NUM_THREADS", cpus)
    import eiwtrain.on_ray.trainer
    import eiwtrain.train.loop  # noqa: F401
    from eiwtrain.train import engine

    if gpus == "0":
        engine._import_deepspeed("cpu")


if wanted := os.environ.get(PRELOAD):
    with contextlib.suppress(Exception):  # the worker will say what is wrong
        import_all(wanted, os.environ.get(PRELOAD_GPUS, ""))
