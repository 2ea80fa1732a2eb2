"""The share of a checkpoint that a rank writes: which tensors, copied to CPU memory, and as which bytes.

Not for where they are written (`eiwtrain.checkpoints.writer`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from eiwtrain.checkpoints.pinned import PinnedMemory

_DTYPES = {  # PyTorch's names, and those of safetensors
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def snapshot(
    tensors: Iterable[tuple[str, Tensor]], ranks: Sequence[int], world_size: int, pinned: PinnedMemory | None = None
) -> list[dict[str, Tensor]]:
    """Copy the shares of these ranks to CPU memory and return them; each tensor is in the share of the rank with the
    fewest bytes so far.

    Args:
        tensors: (name, whole tensor) in the same order on every rank; iterated once. If that is collective, so is this.
        pinned: memory for tensors of a GPU, whose previous content is no longer needed.
    """
    pinned = pinned or PinnedMemory()
    pinned.clear()
    shares: dict[int, dict[str, Tensor]] = {rank: {} for rank in ranks}
    load, on_gpu = [0] * world_size, False
    for name, tensor in tensors:
        owner = load.index(min(load))
        load[owner] += tensor.nbytes
        if (share := shares.get(owner)) is not None:
            on_gpu |= tensor.is_cuda
            share[name] = pinned.take(tensor) if tensor.is_cuda else torch.empty(tensor.shape, dtype=tensor.dtype)
            share[name].copy_(tensor.detach(), non_blocking=True)
    if on_gpu:
        torch.cuda.synchronize()
    return list(shares.values())


def pieces_of(share: dict[str, Tensor]) -> list[Any]:
    """Return the content of the safetensors file of a share, whose tensors are not copied."""
    # sorted by falling element size, so that each tensor is aligned
    names = sorted(share, key=lambda n: (-share[n].element_size(), n))
    entries, end = {}, 0
    for n in names:
        tensor = share[n]
        dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        offsets = [end, end := end + tensor.nbytes]
        entries[n] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    pieces: list[Any] = [len(text).to_bytes(8, "little") + text]
    pieces += [share[n].flatten().view(torch.uint8).numpy().data for n in names]
    return pieces


def digest_of(pieces: Iterable[Any]) -> str:
    """Return the SHA-256 in hex of these pieces, one after another."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
