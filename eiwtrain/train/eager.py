"""Keeps torch's compiler out of a process that compiles nothing: its import takes more than a second of each rank's
start.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.checkpoint

_COMPILER = "torch._dynamo"


def keep_compiler_out() -> None:
    """Have those functions of torch that are never compiled run as they are: by itself torch would import its compiler
    when an optimizer is made or activations are recomputed, to except them from what nobody compiles."""
    wrapper = torch._disable_dynamo(_as_it_is).__code__
    for function in (*vars(torch.optim.Optimizer).values(), *vars(torch.utils.checkpoint).values()):
        if getattr(function, "__code__", None) is wrapper:
            function.__wrapped__.__dynamo_disable = function.__wrapped__
    if _COMPILER not in sys.modules:
        torch._dynamo = _Compiler()  # type: ignore[assignment]  # an import of the real one puts that here


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Have `torch.compile` do nothing, as for the decorators of DeepSpeed's Muon optimizer it would import the
    compiler."""
    before = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = before


class _Config:
    """The compiler's settings: one is known without it, and all others need it."""

    error_on_nested_fx_trace = True  # which torch reads whenever activations are to be recomputed

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(_COMPILER).config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(importlib.import_module(_COMPILER).config, name, value)


def _as_it_is(function: Any = None, *_: Any, **__: Any) -> Any:
    """Return the function, or a decorator that does."""
    return _as_it_is if function is None else function


class _Compiler:
    """Stands in the compiler's place in torch until somebody needs more than that setting, and exceptions from what
    nobody compiles."""

    def __getattr__(self, name: str) -> Any:
        if _COMPILER not in sys.modules and name in _INSTEAD:
            return _INSTEAD[name]
        return getattr(importlib.import_module(_COMPILER), name)


_INSTEAD = {"config": _Config(), "disable": _as_it_is}
