"""What the engine's process leaves out of torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from octavo_engine.runner.quick_torch import import_torch  # noqa: E402

ENGINE = """
import sys
from octavo_engine.runner.quick_torch import LEFT_OUT, import_torch
import_torch()
import octavo_engine.runner.model_runner
try:
    import triton, octavo_engine.runner.gpu_steps
except ImportError:
    pass
assert "torch._decomp" not in sys.modules and LEFT_OUT not in sys.modules, "something imports it after all"
import torch
shape = lambda: torch.linalg.householder_product(torch.empty(4, 3, device="meta"), torch.empty(3, device="meta")).shape
try:
    shape()
except NotImplementedError:
    import torch._meta_registrations
    assert shape() == (4, 3)
else:
    raise AssertionError("it was not left out")
"""


def test_nothing_of_the_engine_needs_what_is_left_out_and_who_does_can_import_it_later():
    subprocess.run([sys.executable, "-c", ENGINE], check=True, timeout=300)


def test_where_torch_is_there_already_nothing_is_taken_from_it():
    import_torch()
    assert hasattr(torch, "_meta_registrations")
