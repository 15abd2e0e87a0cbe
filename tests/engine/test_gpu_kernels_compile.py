"""Every Triton kernel compiles for every kind of device that Octavo names, on a machine that has none of them.

AMD's gfx942 is experimental: that it compiles is all that is tried.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))

from launched import launched_kernels

SHARED_MEMORY = {"80": 163 * 1024, "89": 99 * 1024, "90": 227 * 1024, "100": 227 * 1024, "gfx942": 64 * 1024}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="other tests run the kernels here, and its minutes are short")
@pytest.mark.parametrize("target", ["cuda 80 32", "cuda 89 32", "cuda 90 32", "cuda 100 32", "hip gfx942 64"])
def test_every_kernel_compiles_and_fits_into_shared_memory(target):
    # In a process of its own: here the kernels may be interpreted ones, which cannot be compiled.
    script = Path(__file__).parent / "compile_kernels.py"
    done = subprocess.run(
        [sys.executable, str(script), *target.split()], capture_output=True, text=True, timeout=280,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    sizes = {name: int(size) for name, _, size in lines}
    assert {kernel for _, kernel, _ in lines} == launched_kernels() - (
        {"_prefill_hopper"} if "90" not in target else set()
    )
    for kind in ("-early", "-at-once"):
        assert any(name.endswith(kind) for name in sizes) == (target in ("cuda 90 32", "cuda 100 32"))
    assert any("-fp8" in name for name in sizes)
    assert max(sizes.values()) <= SHARED_MEMORY[target.split()[1]], sizes
