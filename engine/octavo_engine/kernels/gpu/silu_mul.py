"""silu(gate) * up over the merged product of the MLP's first two matrices."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """gate_up: [num_tokens, 2 * inner], gate first; out: [num_tokens, inner]. Reference: kernels/silu_mul.py."""
    tokens, inner = out.shape
    _silu_mul[(tokens, triton.cdiv(inner, BLOCK))](gate_up, out, inner, BLOCK, num_warps=4)


@triton.jit
def _silu_mul(gate_up, out, INNER: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < INNER
    gate = tl.load(gate_up + token * 2 * INNER + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * INNER + INNER + column, mask=inside, other=0.0).to(tl.float32)
    # The activation is rounded before the product, as torch does it in two steps.
    gate = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + token * INNER + column, (gate * up).to(out.dtype.element_ty), mask=inside)
