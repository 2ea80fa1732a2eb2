"""A process that compiles nothing has torch's compiler in name alone, until something needs it."""

from __future__ import annotations

import subprocess
import sys

BEGIN = """
import sys
import torch
from eiwtrain.train import eager

eager.keep_compiler_out()
assert torch._dynamo.config.error_on_nested_fx_trace is True
assert "torch._dynamo" not in sys.modules
"""
SETTING = """
torch._dynamo.config.recompile_limit = 77
import torch._dynamo

assert torch._dynamo.config.recompile_limit == 77
assert torch._dynamo is sys.modules["torch._dynamo"]
"""
COMPILED = """
optimizer = torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1)
seen = []


def backend(graph, _):
    seen.append(graph)
    return graph.forward


assert torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2)).tolist() == [2, 2]
assert len(seen) == 1
assert torch._dynamo is sys.modules["torch._dynamo"]
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_setting_of_the_compiler_reaches_the_compiler():
    run(SETTING)


def test_what_is_compiled_later_is_compiled():
    run(COMPILED)
