"""RMSNorm, and the embedding in front of the first one. The residual's sum is the products' (models/gpu_decoder.py).

One program per token, the row in registers: a row of 8,192 numbers is 64 registers of a thread in eight warps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_engine.kernels import rms_norm as plain
from octavo_engine.kernels.gpu.early_launch import early_launch, release, wait


def rms_norm(x: Tensor, weight: Tensor, out: Tensor, eps: float) -> None:
    """out = norm(x) * weight. x, out: [num_tokens, hidden] of one dtype; weight [hidden]."""
    tokens, hidden = x.shape
    _rms_norm[(tokens,)](
        x, weight, out, eps, HIDDEN=hidden, BLOCK=triton.next_power_of_2(hidden), num_warps=_warps(hidden)
    )


def embed_rms_norm(
    ids: Tensor, rows: Tensor, positions: Tensor, token_ids: Tensor, embedding: Tensor, weight: Tensor,
    residual: Tensor, out: Tensor, eps: float, shares: Tensor | None = None,
) -> None:  # fmt: skip
    """Resolve each token's id, keep it in the state, embed it: residual = embedding[id], out = its norm * weight.

    shares: [1, num_tokens] float32, gets the sums of squares, and out is the embedding times weight, not yet normed
    (small_linear.py norms it).

    ids: [num_tokens] int32, negative where the id is the one that an earlier step left in token_ids at (row, position).
    rows, positions: [num_tokens] int32. token_ids: [num_rows, max_len] int32, written at (row, position).
    """
    tokens, hidden = residual.shape
    _embed_rms_norm[(tokens,)](
        ids, rows, positions, token_ids, token_ids.stride(0), embedding, weight, residual, out, shares, eps, hidden,
        triton.next_power_of_2(hidden), num_warps=_warps(hidden), **early_launch(tokens),
    )  # fmt: skip


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return plain.reference(x, weight, eps)[0]


def _warps(hidden: int) -> int:
    return 4 if hidden <= 2048 else 8


@triton.jit
def _normed(v, w, eps, HIDDEN: tl.constexpr):
    # Rounded to the storage type before the weight, as published checkpoints were trained.
    scale = tl.rsqrt(tl.sum(v * v) / HIDDEN + eps)
    return (v * scale).to(w.dtype).to(tl.float32) * w.to(tl.float32)


@triton.jit
def _rms_norm(x, weight, out, eps, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    at = token * HIDDEN + column
    w = tl.load(weight + column, mask=inside, other=0.0)  # beside the row, not after its sum
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    y = _normed(v, w, eps, HIDDEN)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["stride_row"], do_not_specialize_on_alignment=["ids", "rows", "positions"])
def _embed_rms_norm(
    ids, rows, positions, token_ids, stride_row, embedding, weight, residual, out, shares, eps,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    wait(EARLY, LATE)
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    slot = token_ids + tl.load(rows + token).to(tl.int64) * stride_row + tl.load(positions + token)
    given = tl.load(ids + token)
    index = tl.where(given >= 0, given, tl.load(slot)).to(tl.int64)
    tl.store(slot, index.to(tl.int32))
    w = tl.load(weight + column, mask=inside, other=0.0)
    v = tl.load(embedding + index * HIDDEN + column, mask=inside, other=0.0)
    release(LATE)
    tl.store(residual + token * HIDDEN + column, v, mask=inside)
    wide = v.to(tl.float32)
    if shares is not None:
        tl.store(shares + token, tl.sum(wide * wide))
        y = wide * w.to(tl.float32)
    else:
        y = _normed(wide, w, eps, HIDDEN)
    tl.store(out + token * HIDDEN + column, y.to(out.dtype.element_ty), mask=inside)


def reference_embed(
    ids: Tensor, rows: Tensor, positions: Tensor, token_ids: Tensor, embedding: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(norm(embedding) * weight, embedding); writes token_ids."""
    row, position = rows.long(), positions.long()
    index = torch.where(ids >= 0, ids, token_ids[row, position])
    token_ids[row, position] = index
    return plain.reference(embedding[index.long()], weight, eps)
