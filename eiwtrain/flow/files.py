"""A flow as files: model.safetensors, which is enough to load it, and config.json, for people to read.

Not for checkpoints of a training run (`eiwtrain.checkpoints`). Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import FlowConfig
from .multiscale import EIWFlow

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_FORMAT = "eiwtrain.flow/1"


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

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a flow, or tensors are missing, unknown or of other shapes.
    """
    path, header = _header(path)
    config = _config(path, header)
    with safe_open(path, framework="pt") as file:
        # Cloned, as the file's own packing is not aligned and matrix products may round by alignment: a loaded flow
        # is to give the same bits as the one that was saved.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    with torch.random.fork_rng(devices=[]):  # so that loading leaves the caller's random numbers as they are
        flow = EIWFlow(config)
    wanted = flow.state_dict()
    if missing := sorted(set(wanted) - set(tensors)):
        raise ValueError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}")
    if unknown := sorted(set(tensors) - set(wanted)):
        raise ValueError(f"{path}: {len(unknown)} tensors are unknown, the first is {unknown[0]}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{path}: {name} is {tuple(tensor.shape)}, and should be {tuple(wanted[name].shape)}")
    flow.load_state_dict(tensors, assign=True)  # assign: a flow saved in float64 comes back in float64
    return flow.eval()


def metadata(path: str | Path) -> dict[str, Any]:
    """Read the metadata that `save` was given; weights are not read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a flow.
    """
    path, header = _header(path)
    _config(path, header)
    kept = json.loads(header["eiwtrain"]).get("metadata")
    return kept if isinstance(kept, dict) else {}


def _header(path: str | Path) -> tuple[Path, dict[str, str]]:
    """Return the file, and the entries of its header that are not tensors."""
    path = Path(path)
    path = path / MODEL_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return path, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from error


def _config(path: Path, header: dict[str, str]) -> FlowConfig:
    if "eiwtrain" not in header:
        raise ValueError(f"{path}: not a flow of eiwtrain: its header has no entry 'eiwtrain'")
    try:
        described = json.loads(header["eiwtrain"])
        form, config = described["format"], described.get("config")
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: the entry 'eiwtrain' of its header cannot be read") from error
    if form != _FORMAT:
        raise ValueError(f"{path}: format {form!r} is unknown; this version reads {_FORMAT!r}")
    try:
        return FlowConfig.from_dict(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
