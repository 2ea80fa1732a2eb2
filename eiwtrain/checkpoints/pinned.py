"""Page-locked memory of the host, to which a GPU copies without a detour, kept from one checkpoint to the next.

Not for tensors that are on the host already. To lock pages takes longer than to copy into them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_BYTES = 64 << 20
_ALIGNED = 64  # bytes; more than any element has


class PinnedMemory:
    """Blocks of memory that are filled from the start by each checkpoint, and never given back."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._block = self._end = 0

    def clear(self) -> None:
        """Let the next tensors take the place of all that was taken so far."""
        self._block = self._end = 0

    def take(self, like: Tensor) -> Tensor:
        """Return memory for a tensor of this shape and dtype, with any content."""
        while self._block < len(self._blocks) and self._end + like.nbytes > self._blocks[self._block].nbytes:
            self._block, self._end = self._block + 1, 0
        if self._block == len(self._blocks):
            self._blocks.append(_lock(max(_BLOCK_BYTES, 1 << (like.nbytes - 1).bit_length())))
        piece = self._blocks[self._block][self._end : self._end + like.nbytes]
        self._end += -(-like.nbytes // _ALIGNED) * _ALIGNED
        return piece.view(like.dtype).view(like.shape)


def _lock(size: int) -> Tensor:
    """Return locked memory. Of a power of two, as torch takes no other sizes from CUDA."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
