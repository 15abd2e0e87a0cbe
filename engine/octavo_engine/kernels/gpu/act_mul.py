"""activation(gate) * up over the merged product of the MLP's first two matrices."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def act_mul(gate_up: Tensor, out: Tensor, activation: str = "silu") -> None:
    """gate_up: [num_tokens, 2 * inner], gate first; out: [num_tokens, inner]. Reference: kernels/act_mul.py."""
    tokens, inner = out.shape
    _act_mul[(tokens, triton.cdiv(inner, BLOCK))](
        gate_up, out, INNER=inner, BLOCK=BLOCK, ACTIVATION=activation, num_warps=4
    )


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """x: float32; ACTIVATION: of kernels/act_mul.py."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        # x / 2 * (1 + tanh(u)) is x * sigmoid(2 u), with u = sqrt(2 / pi) * (x + 0.044715 x^3).
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _act_mul(gate_up, out, INNER: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < INNER
    gate = tl.load(gate_up + token * 2 * INNER + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * INNER + INNER + column, mask=inside, other=0.0).to(tl.float32)
    # The activation is rounded before the product, as torch does it in two steps.
    gate = activated(gate, ACTIVATION).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + token * INNER + column, (gate * up).to(out.dtype.element_ty), mask=inside)
