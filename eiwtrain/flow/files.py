"""A flow as files: model.safetensors, which is enough to load it, and config.json, for people to read.

Not for checkpoints of a training run (`eiwtrain.checkpoints`). Nothing is ever unpickled, and what a file says about
itself is compared with its tensors before it costs time or memory.
"""

from __future__ import annotations

import json
import math
import re
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from .config import FlowConfig
from .multiscale import EIWFlow

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_FORMAT = "eiwtrain.flow/1"
_URL = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]+):/")  # pathlib makes one slash of two
_PRECISIONS = (torch.float32, torch.float64)  # in which a flow computes
_MOST_DIMS = 1 << 28  # of an image
_MOST_WORDS = 300  # characters of an error that repeats what a file holds
_SPARE_NUMBERS = 1 << 22  # that building a flow may create beside its weights
_CREATORS = {  # functions of torch that create a tensor of the size that they are given
    **dict.fromkeys((torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full), "sizes"),
    torch.eye: "square",
    **dict.fromkeys((torch.arange, torch.randperm, torch.linspace), "row"),
}
_NO_SIZES = ("memory_budget",)  # numbers of a config that say nothing about its tensors
_OTHER_FILES = {  # how files that are taken for a model begin
    b"version https://git-lfs": "a pointer of git-lfs, not the weights: run `git lfs pull` in its repository",
    b"/annex/objects": "a pointer of git-annex, not the weights: run `git annex get` in its repository",
    b"PK\x03\x04": "a zip file, as torch.save writes: a pickle, which is never opened here",
    b"\x80\x02": "a pickle, which is never opened here",
    b"\x80\x04": "a pickle, which is never opened here",
    b"\x80\x05": "a pickle, which is never opened here",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"<": "a page of the web, or an answer of its server: download the file itself",
    b"{": "JSON: give the folder, or its model.safetensors",
}


def save(flow: EIWFlow, folder: str | Path, metadata: dict[str, Any] | None = None) -> None:
    """Write a flow to a local folder, which is made if it is missing, as `model.safetensors` and `config.json`.

    The header of `model.safetensors` holds all of `config.json`, so that the file can travel alone.

    Args:
        metadata: anything JSON can hold; it is kept beside the config.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    described = {"format": _FORMAT, "config": flow.config.to_dict(), "metadata": metadata or {}}
    tensors = {name: t.detach().cpu().contiguous() for name, t in flow.state_dict().items()}
    save_file(tensors, folder / MODEL_FILE, {"format": "pt", "eiwtrain": json.dumps(described)})
    (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def load(path: str | Path) -> EIWFlow:
    """Load a flow that `save` wrote, from its folder or its `model.safetensors`: on the CPU, in eval mode.

    It warns of weights that are not finite.

    Args:
        path: of this machine. Download what is at a URL first.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a flow, or tensors are missing, unknown, or of other shapes or types.
    """
    path, header = _header(path)
    config = _described(path, header).get("config")
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned, as the file's own packing is not aligned and matrix products may round by alignment: a loaded flow
            # is to give the same bits as the one that was saved.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path}: its tensors cannot be read ({_line(error)})") from error
    flow = restore(config, tensors, str(path))
    if bad := not_finite(flow):
        warnings.warn(f"{path}: {bad}", RuntimeWarning, stacklevel=2)
    return flow


def metadata(path: str | Path) -> dict[str, Any]:
    """Read the metadata that `save` was given; weights are not read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a flow.
    """
    path, header = _header(path)
    described = _described(path, header)
    _config(described.get("config"), path.stat().st_size, str(path))
    kept = described.get("metadata")
    return kept if isinstance(kept, dict) else {}


def restore(config: Any, tensors: Mapping[str, Tensor], where: str) -> EIWFlow:
    """Return the flow of a config with these tensors, which it takes over: in eval mode.

    Neither is trusted: a flow that is larger than the tensors is not built, so that it costs no more time and memory
    than they do.

    Args:
        config: as `FlowConfig.to_dict` returns it.
        tensors: of its `state_dict`, by name.
        where: both were found, for errors.

    Raises:
        ValueError: there is no flow of the config, or tensors are missing, unknown, or of other shapes or types.
    """
    flow = _build(_config(config, sum(t.nbytes for t in tensors.values()), where), tensors, where)
    _compare(flow.state_dict(), tensors, where)
    for name, wanted in flow.state_dict().items():
        if _orders(wanted) and not _orders(tensors[name]):
            raise ValueError(f"{where}: {name} is no order of its {wanted.shape[-1]} entries")
    flow.load_state_dict(dict(tensors), assign=True)  # assign: a flow saved in float64 comes back in float64
    return flow.eval()


def not_finite(flow: EIWFlow) -> str:
    """Return a line about the weights of a flow that are NaN or infinite; empty where all are finite."""
    bad = {name: int((~t.isfinite()).sum()) for name, t in flow.state_dict().items() if not bool(t.isfinite().all())}
    numbers = sum(t.numel() for t in flow.state_dict().values())
    first = next(iter(bad), "")
    return f"{sum(bad.values()):,} of {numbers:,} weights are not finite, the first in {first}" if bad else ""


def _compare(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError unless the tensors have the names, shapes and types of the wanted ones; one type of float serves
    as well as another, if all have it."""
    if missing := sorted(set(wanted) - set(tensors)):
        raise ValueError(f"{where}: {len(missing)} tensors are missing, the first is {missing[0]}")
    if unknown := sorted(set(tensors) - set(wanted)):
        raise ValueError(f"{where}: {len(unknown)} tensors are unknown, the first is {_name(unknown[0])}")
    usual = torch.get_default_dtype()
    found = {t.dtype: name for name, t in tensors.items() if wanted[name].dtype == usual}
    if len(found) > 1:
        said = ", ".join(f"{name} is {_type(kind)}" for kind, name in list(found.items())[:2])
        raise ValueError(f"{where}: weights have several types: {said}; write all of them in one")
    precision = next(iter(found), usual)
    if precision not in _PRECISIONS:
        allowed = " or ".join(map(_type, _PRECISIONS))
        raise ValueError(f"{where}: weights are {_type(precision)}, and a flow computes in {allowed}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{where}: {name} is {tuple(tensor.shape)}, and should be {tuple(wanted[name].shape)}")
        kinds = {wanted[name].dtype, precision} if wanted[name].is_floating_point() else {wanted[name].dtype}
        if tensor.dtype not in kinds:
            raise ValueError(f"{where}: {name} is {_type(tensor.dtype)}, and should be {_type(wanted[name].dtype)}")


def _build(config: FlowConfig, tensors: Mapping[str, Tensor], where: str) -> EIWFlow:
    """Return the flow of a config at its first weights.

    Building it is broken off where it has more parts, or numbers, than these tensors explain.
    """
    thread, parts, most = threading.get_ident(), 0, 256 + 16 * len(tensors)

    def count(*_: Any) -> None:
        nonlocal parts
        parts += threading.get_ident() == thread
        if parts > most:
            raise _TooLargeError

    hooks = [
        torch_module.register_module_parameter_registration_hook(count),
        torch_module.register_module_buffer_registration_hook(count),
        torch_module.register_module_module_registration_hook(count),
    ]
    try:
        numbers = _SPARE_NUMBERS + 4 * sum(t.numel() for t in tensors.values())
        with torch.random.fork_rng(devices=[]), _Bounded(numbers):  # loading leaves the caller's random numbers alone
            return EIWFlow(config)
    except _TooLargeError:
        raise ValueError(f"{where}: its config describes far more than the {len(tensors)} tensors it has") from None
    except (RuntimeError, OverflowError, MemoryError) as error:  # sizes that no tensor can have
        raise ValueError(f"{where}: there is no flow of its config ({_line(error)})") from error
    finally:
        for hook in hooks:
            hook.remove()


class _TooLargeError(Exception):
    """A flow is larger than its file."""


class _Bounded(TorchFunctionMode):
    """Lets a program create new tensors up to a number of elements."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self._left = elements

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch; raise `_TooLargeError` in place of one that creates more than is left."""
        kwargs = kwargs or {}
        if (kind := _CREATORS.get(func)) is not None:
            sizes = args or (kwargs.get("size", ()),)
            first = sizes[0] if isinstance(sizes[0], list | tuple) else sizes
            if kind == "square":
                first = (sizes[0], sizes[-1])
            elif kind == "row":
                first = [max(abs(int(n)) for n in sizes)]
            self._left -= math.prod(int(n) for n in first)
            if self._left < 0:
                raise _TooLargeError
        return func(*args, **kwargs)


def _orders(tensor: Tensor) -> bool:
    """Return whether a tensor holds whole numbers of which each row is an order of 0 to its length."""
    if tensor.dtype != torch.int64 or not tensor.ndim:
        return False
    row = torch.arange(tensor.shape[-1])
    return bool((tensor.sort(dim=-1).values == row).all())


def _header(path: str | Path) -> tuple[Path, dict[str, str]]:
    """Return the file, and the entries of its header that are not tensors."""
    if url := _URL.match(str(path)):
        if url["scheme"].lower() != "file":
            raise ValueError(
                f"{path}: this takes a folder or file of this machine; download what is at a URL first (the commands, "
                "e.g. python -m eiwtrain.sample, take URLs)"
            )
        path = "/" + str(path)[url.end() :].lstrip("/")
    path = Path(path)
    path = path / MODEL_FILE if path.is_dir() else path
    if not path.is_file():
        link = " (it is a link to a file that is not there)" if path.is_symlink() else ""
        raise FileNotFoundError(f"{path}: no such file{link}")
    try:
        with safe_open(path, framework="pt") as file:
            return path, file.metadata() or {}
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file: {_other(path) or _line(error)}") from error


def _other(path: Path) -> str:
    """Return what a file is that is no safetensors file, where its first bytes say it."""
    with path.open("rb") as file:
        begin = file.read(64)
    if not begin:
        return "it is empty"
    kind = next((kind for start, kind in _OTHER_FILES.items() if begin.lstrip().startswith(start)), "")
    if kind:
        return f"it is {kind}"
    size, says = path.stat().st_size, int.from_bytes(begin[:8], "little")
    return f"it ends early: {size} bytes, and its header alone has {says}" if size < says + 8 < 1 << 27 else ""


def _described(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    if "eiwtrain" not in header:
        raise ValueError(f"{path}: not a flow of eiwtrain: its header has no entry 'eiwtrain'")
    try:
        described = json.loads(header["eiwtrain"])
        form = described["format"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: the entry 'eiwtrain' of its header cannot be read") from error
    if form != _FORMAT:
        raise ValueError(f"{path}: format {str(form)[:_MOST_WORDS]!r} is unknown; this version reads {_FORMAT!r}")
    return dict(described)


def _config(values: Any, size: int, where: str) -> FlowConfig:
    """Return the config, none of whose numbers is above what tensors of `size` bytes can have."""
    try:
        _check_sizes(values, max(size, 1 << 16), "config")
        config = FlowConfig.from_dict(values)
        if config.dims > _MOST_DIMS:
            raise ValueError(f"image_shape: {config.image_shape} has over {_MOST_DIMS:,} numbers")
        return config
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}: {_line(error)}") from error


def _check_sizes(value: Any, most: int, name: str) -> None:
    if isinstance(value, dict):
        for key, entry in value.items():
            if key not in _NO_SIZES:
                _check_sizes(entry, most, str(key))
    elif isinstance(value, list | tuple):
        for entry in value:
            _check_sizes(entry, most, name)
    elif isinstance(value, int) and abs(value) > most:
        raise ValueError(f"{name}: a number of {value.bit_length()} bits is too large for the tensors that are there")


def _name(text: str) -> str:
    """Return a name that a file has for something, fit to be printed."""
    return text[:_MOST_WORDS] if text.isprintable() else repr(text[:_MOST_WORDS])


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _line(error: BaseException) -> str:
    """Return the first line of an error, cut to a readable length."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:_MOST_WORDS]
