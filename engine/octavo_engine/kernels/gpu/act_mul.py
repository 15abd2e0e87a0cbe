"""activation(gate) * up over the merged product of the MLP's first two matrices."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo_engine.kernels.gpu.ask_ahead import ask, ask_ahead

BLOCK = 1024


def act_mul(gate_up: Tensor, out: Tensor, activation: str = "silu", ahead: Tensor | None = None) -> None:
    """gate_up: [num_tokens, 2 * inner], gate first; out: [num_tokens, inner]. Reference: kernels/act_mul.py.

    ahead: the matrix that is read next.
    """
    tokens, inner = out.shape
    _act_mul[(tokens, triton.cdiv(inner, BLOCK))](
        gate_up, out, INNER=inner, BLOCK=BLOCK, ACTIVATION=activation, num_warps=4, **ask_ahead(ahead, tokens)
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


@triton.jit(do_not_specialize=["ahead_row_bytes", "ahead_lines_log2", "ahead_lines"])
def _act_mul(
    gate_up, out, ahead, ahead_row_bytes, ahead_lines_log2, ahead_lines, INNER: tl.constexpr, BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    if AHEAD:
        program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        ask(ahead, ahead_row_bytes, ahead_lines_log2, ahead_lines, program, AHEAD)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < INNER
    gate = tl.load(gate_up + token * 2 * INNER + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * INNER + INNER + column, mask=inside, other=0.0).to(tl.float32)
    # The activation is rounded before the product, as torch does it in two steps.
    gate = activated(gate, ACTIVATION).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + token * INNER + column, (gate * up).to(out.dtype.element_ty), mask=inside)
