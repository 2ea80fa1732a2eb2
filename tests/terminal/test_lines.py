import re
from pathlib import Path

import pytest

import eiwtrain
from eiwtrain.terminal.lines import is_out_of_memory, one_line, printable


@pytest.mark.parametrize(
    ("text", "limit", "line"),
    [(ValueError(" no such\n\tfile "), 200, "no such file"), ("a" * 300, 200, "a" * 200), ("a" * 300, None, "a" * 300)],
)
def test_the_text_of_an_error_is_one_line(text, limit, line):
    assert one_line(text, limit) == line


def test_no_other_file_joins_words_into_a_line_by_itself():
    root = Path(eiwtrain.__file__).parents[1]
    files = [f for package in ("eiwtrain", "data_prep", "cluster") for f in (root / package).rglob("*.py")]
    joins = re.compile(r"""["'] ["']\.join\(.*\.split\(\)\)""")
    assert [f.name for f in files if joins.search(f.read_text())] == ["lines.py"]


def test_names_of_others_do_not_command_a_terminal() -> None:
    assert printable("  ok\x1b[2J\nnext\r\x9b") == "  ok\ufffd[2J\ufffdnext\ufffd\ufffd"
    assert printable("höhe-写真 \\ x") == "höhe-写真 \\ x"


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", True),
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
        ("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'", True),
        ("NCCL error: unhandled cuda error\nLast error:\nFailed to CUDA calloc async 4194304 bytes", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`", False),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", False),
        ("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", False),
    ],
)
def test_every_librarys_words_for_too_little_gpu_memory_are_known(text, short):
    assert is_out_of_memory(RuntimeError(text)) == short
