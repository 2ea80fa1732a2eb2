"""The memory that a GPU's tensors are copied into, and that is kept."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eiwtrain.checkpoints import pinned, writer
from eiwtrain.checkpoints.pinned import PinnedMemory

DTYPES = (torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.uint8, torch.bool)


@pytest.fixture(scope="module")
def locked():
    """Sizes of the memory that was locked, which is impossible without a GPU."""
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pinned, "_BLOCK_BYTES", 256)
        patch.setattr(pinned, "_lock", lambda size: sizes.append(size) or torch.empty(size, dtype=torch.uint8))
        yield sizes


def filled(memory, tensors):
    memory.clear()
    copies = [memory.take(t).copy_(t) for t in tensors]
    assert all(torch.equal(copy, t) and copy.dtype == t.dtype for copy, t in zip(copies, tensors, strict=True))
    assert all(copy.data_ptr() % copy.element_size() == 0 for copy in copies)


@given(shapes=st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=3)), max_size=20))
def test_pieces_hold_what_was_copied_and_are_taken_again(shapes, locked):
    memory = PinnedMemory()
    locked.clear()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        filled(memory, [torch.randint(0, 2, shape, generator=generator).to(dtype) for dtype, shape in shapes])
        if seed == 0:
            once = list(locked)
    assert locked == once
    assert all(size & (size - 1) == 0 for size in once)


def test_a_checkpoint_of_a_gpus_tensors_locks_memory_once(locked, monkeypatch):
    class OnGpu(torch.Tensor):
        is_cuda = True

    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    memory = PinnedMemory()
    locked.clear()
    for step in range(3):
        tensors = {f"t{i}": torch.full((20,), float(step + i)).as_subclass(OnGpu) for i in range(5)}
        (share,) = writer.snapshot(tensors.items(), [0], 1, memory)
        assert all(float(share[f"t{i}"].sum()) == 20.0 * (step + i) for i in range(5))
        if step == 0:
            once = list(locked)
    assert locked == once != []
    assert len(waited) == 3
