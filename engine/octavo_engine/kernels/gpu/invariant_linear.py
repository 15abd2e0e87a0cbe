"""A product whose result for a token does not depend on how many there are, for --deterministic.

cuBLAS chooses tiles, and how it splits the inner dimension, by the number of tokens, and the fused products of a few
tokens are cut by it too. Here a tile has one size for a matrix whatever the batch, and sums its inner dimension from
end to end in one order. A single token fills one row of a tile of 64: the others cost arithmetic and no reading.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64
DEPTH = 64
GROUP = 8
"""Tiles of tokens that are neighbours in the grid, and find each other's weights in the second-level cache."""
WIDE_OUTPUTS = 16384
"""From so many outputs on, tiles of 128 are enough to fill the chip; a narrower matrix is cut into tiles of 64."""


def tile_width(outputs: int) -> int:
    return 128 if outputs >= WIDE_OUTPUTS else 64


def num_stages(width: int, shared_memory_bytes: int) -> int:
    """Steps in flight: four, or what a program's shared memory holds."""
    return max(min(4, shared_memory_bytes // (2 * DEPTH * (ROWS + width))), 1)


def invariant_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, shared_memory_bytes: int, add: bool = False
) -> None:
    """out = x · weightᵀ + bias. x: [tokens, inputs], weight: [outputs, inputs], out: [tokens, outputs].

    shared_memory_bytes: what a program may have on this device. add: to what is in `out`, the sum rounded once.
    """
    tokens, inputs = x.shape
    outputs = out.shape[1]
    width = tile_width(outputs)
    _invariant_linear[(triton.cdiv(tokens, ROWS) * triton.cdiv(outputs, width),)](
        x, weight, bias, out, tokens, INPUTS=inputs, OUTPUTS=outputs, ROWS=ROWS, WIDTH=width, DEPTH=DEPTH, GROUP=GROUP,
        STAGES=num_stages(width, shared_memory_bytes), ADD=add, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _invariant_linear(
    x, weight, bias, out, tokens, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    in_group = GROUP * tl.cdiv(OUTPUTS, WIDTH)
    first = program // in_group * GROUP
    size = tl.minimum(tl.cdiv(tokens, ROWS) - first, GROUP)
    token = (first + program % in_group % size) * ROWS + tl.arange(0, ROWS)
    output = program % in_group // size * WIDTH + tl.arange(0, WIDTH)
    inner = tl.arange(0, DEPTH)
    is_token, is_output = token < tokens, output < OUTPUTS
    at_x = token.to(tl.int64)[:, None] * INPUTS + inner[None, :]
    # Outputs past the end read the first one's weights: a mask on every load would cost more than the waste.
    at_weight = tl.where(is_output, output, 0).to(tl.int64)[None, :] * INPUTS + inner[:, None]
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in tl.range(0, INPUTS, DEPTH, num_stages=STAGES):
        if INPUTS % DEPTH == 0:
            v = tl.load(x + at_x + start, mask=is_token[:, None], other=0.0)
            w = tl.load(weight + at_weight + start)
        else:
            is_inner = start + inner < INPUTS
            v = tl.load(x + at_x + start, mask=is_token[:, None] & is_inner[None, :], other=0.0)
            w = tl.load(weight + at_weight + start, mask=is_inner[:, None], other=0.0)
        sums = tl.dot(v, w, sums)
    if bias is not None:
        sums += tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
    to = out + token.to(tl.int64)[:, None] * OUTPUTS + output[None, :]
    inside = is_token[:, None] & is_output[None, :]
    if ADD:
        sums += tl.load(to, mask=inside, other=0.0).to(tl.float32)
    tl.store(to, sums.to(out.dtype.element_ty), mask=inside)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float32."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float())
