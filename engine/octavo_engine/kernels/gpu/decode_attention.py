"""Attention of one new token per sequence over its keys and values in blocks.

The work is bound by reading the cache, so it is cut into parts of roughly equal size: a *part* is a run of blocks of
one sequence for one KV head. The host lists the parts (`plan_parts`), long sequences yield several, and a second small
kernel combines those. All query heads of a KV head are rows of one product, padded to the 16 rows of a matrix unit.
(Dao et al., "Flash-Decoding for long-context inference", 2023)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS_WANTED = 528
"""Parts times KV heads that fill the chip: four for each of the 132 multiprocessors of an H100 or H200."""
MIN_BLOCKS_PER_PART = 2
"""Below 128 tokens in a part, starting and combining it costs more than reading it."""
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Parts:
    """token, first_block: of each part. first_part, num_parts: of each sequence. All in the order of the batch."""

    token: list[int]
    first_block: list[int]
    first_part: list[int]
    num_parts: list[int]
    blocks_per_part: int


def max_parts(num_sequences: int, kv_heads: int) -> int:
    """Upper bound of the parts that `plan_parts` makes, so that grids and buffers can be fixed."""
    return num_sequences + PROGRAMS_WANTED // kv_heads


def plan_parts(
    lengths: Sequence[int],
    block_size: int,
    kv_heads: int,
    window: int | None = None,
    blocks_per_part: int | None = None,
) -> Parts:
    """Cut sequences of these lengths (keys to see, the new one included) into parts.

    blocks_per_part: fixed, so that a sequence's parts do not depend on its neighbours (needs room for as many parts);
    None chooses it so that the chip is full and `max_parts` holds.
    """
    firsts = [0] * len(lengths) if window is None else [max(n - window, 0) // block_size for n in lengths]
    counts = [-(-n // block_size) - first for n, first in zip(lengths, firsts, strict=True)]
    if blocks_per_part is None:
        room = max(PROGRAMS_WANTED // kv_heads, 1)
        blocks_per_part = max(-(-sum(counts) // room), MIN_BLOCKS_PER_PART)
    token: list[int] = []
    first_block: list[int] = []
    first_part: list[int] = []
    num_parts: list[int] = []
    for index, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        first_part.append(len(token))
        if count <= blocks_per_part:
            num_parts.append(1)
            token.append(index)
            first_block.append(first)
        else:
            starts = range(first, first + count, blocks_per_part)
            num_parts.append(len(starts))
            token += [index] * len(starts)
            first_block += starts
    return Parts(token, first_block, first_part, num_parts, blocks_per_part)


@dataclass(frozen=True)
class PartTensors:
    """`Parts` on the device, int32. header: [2], the number of parts and the blocks of each; grids may be larger."""

    header: Tensor
    token: Tensor
    first_block: Tensor
    first_part: Tensor
    num_parts: Tensor


def decode_attention(
    qkv: Tensor, kv_cache: Tensor, block_tables: Tensor, rows: Tensor, positions: Tensor, parts: PartTensors,
    partial: Tensor, partial_lse: Tensor, out: Tensor, scale: float, window: int | None = None, softcap: float = 0.0,
    num_stages: int = 2,
) -> None:  # fmt: skip
    """softmax(q·k * scale) · v of the token at each position over itself and the keys before it.

    qkv: [>= num_sequences, (heads + 2 * kv_heads) * head_dim], queries first and rotated.
    kv_cache: [2, num_blocks, kv_heads, block_size, head_dim]; rows, positions: [num_sequences] int32.
    partial: [>= parts, kv_heads, group, head_dim] float32, partial_lse: [>= parts, kv_heads, group] float32: scratch.
    out: [num_sequences, heads * head_dim]. window: keys a query sees, itself included. softcap: 0 is off.
    """
    _, _, kv_heads, block_size, dim = kv_cache.shape
    num = out.shape[0]
    heads = out.shape[1] // dim
    group = heads // kv_heads
    common = {
        "KV_HEADS": kv_heads, "GROUP": group, "DIM": dim, "DIM_BLOCK": triton.next_power_of_2(dim),
    }  # fmt: skip
    grid = (min(parts.token.shape[0], max_parts(num, kv_heads)), kv_heads)
    _decode[grid](
        qkv, qkv.stride(0), kv_cache[0], kv_cache[1], block_tables, block_tables.stride(0), rows, positions,
        parts.header, parts.token, parts.first_block, parts.num_parts, partial, partial_lse, out, scale * LOG2_E,
        softcap, BLOCK_SIZE=block_size, ROWS=max(16, triton.next_power_of_2(group)), WINDOW=window or 0,
        SOFTCAP=softcap > 0, STAGES=num_stages, num_warps=2 if block_size <= 64 else 4, **common,
    )  # fmt: skip
    _combine[(num, heads)](
        partial, partial_lse, out, parts.first_part, parts.num_parts, AT_ONCE=16, num_warps=1, **common
    )


@triton.jit
def _decode(
    qkv, stride_token, keys, values, block_tables, stride_table, rows, positions, header, part_token, part_first_block,
    num_parts, partial, partial_lse, out, scale, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    kv_head = tl.program_id(1)
    if part >= tl.load(header):
        return
    token = tl.load(part_token + part).to(tl.int64)
    first = tl.load(part_first_block + part)
    table = block_tables + tl.load(rows + token).to(tl.int64) * stride_table
    length = tl.load(positions + token) + 1
    end = tl.minimum(tl.cdiv(length, BLOCK_SIZE), first + tl.load(header + 1))

    row = tl.arange(0, ROWS)
    column = tl.arange(0, DIM_BLOCK)
    key = tl.arange(0, BLOCK_SIZE)
    in_dim = column < DIM
    at_query = (kv_head * GROUP + row)[:, None] * DIM + column[None, :]
    in_group = (row < GROUP)[:, None] & in_dim[None, :]
    query = tl.load(qkv + token * stride_token + at_query, mask=in_group, other=0.0)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM_BLOCK], tl.float32)
    for index in tl.range(first, end, num_stages=STAGES):
        block = tl.load(table + index).to(tl.int64)
        base = (block * KV_HEADS + kv_head) * (BLOCK_SIZE * DIM)
        at = index * BLOCK_SIZE + key
        seen = at < length
        if WINDOW > 0:
            seen = seen & (at >= length - WINDOW)
        if DIM == DIM_BLOCK:
            k = tl.load(keys + base + key[None, :] * DIM + column[:, None])  # [DIM, BLOCK_SIZE]
        else:
            k = tl.load(keys + base + key[None, :] * DIM + column[:, None], mask=in_dim[:, None], other=0.0)
        scores = tl.dot(query, k) * scale
        if SOFTCAP:
            # In units of log2 e: softcap * tanh(x / softcap) with x = scores / log2 e.
            x = scores * (0.6931471805599453 / softcap)
            scores = (2.0 / (1.0 + tl.exp2(-2.8853900817779268 * x)) - 1.0) * (softcap * 1.4426950408889634)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        shrink = tl.exp2(best - new_best)
        weights = tl.exp2(scores - new_best[:, None])
        total = total * shrink + tl.sum(weights, 1)
        best = new_best
        # What lies behind the last key is another request's leftover: finite or not, it must not be read.
        v = tl.load(
            values + base + key[:, None] * DIM + column[None, :], mask=seen[:, None] & in_dim[None, :], other=0.0
        )  # [BLOCK_SIZE, DIM]
        sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
    result = sums / total[:, None]
    if tl.load(num_parts + token) == 1:
        tl.store(out + token * (KV_HEADS * GROUP * DIM) + at_query, result.to(out.dtype.element_ty), mask=in_group)
    else:
        to = (part * KV_HEADS + kv_head) * GROUP + row
        tl.store(partial + to[:, None] * DIM + column[None, :], result, mask=in_group)
        tl.store(partial_lse + to, best + tl.log2(total), mask=row < GROUP)


@triton.jit
def _combine(
    partial, partial_lse, out, first_part, num_parts,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    count = tl.load(num_parts + token)
    if count == 1:
        return
    first = tl.load(first_part + token)
    column = tl.arange(0, DIM_BLOCK)
    in_dim = column < DIM
    best = float("-inf")
    total = 0.0
    sums = tl.zeros([DIM_BLOCK], tl.float32)
    for start in range(0, count, AT_ONCE):
        index = start + tl.arange(0, AT_ONCE)
        inside = index < count
        at = (first + index) * (KV_HEADS * GROUP) + head
        lse = tl.load(partial_lse + at, mask=inside, other=float("-inf"))
        new_best = tl.maximum(best, tl.max(lse, 0))
        weights = tl.exp2(lse - new_best)
        shrink = tl.exp2(best - new_best)
        part = tl.load(
            partial + at[:, None] * DIM + column[None, :], mask=inside[:, None] & in_dim[None, :], other=0.0
        )  # [AT_ONCE, DIM]
        sums = sums * shrink + tl.sum(part * weights[:, None], 0)
        total = total * shrink + tl.sum(weights, 0)
        best = new_best
    result = sums / total
    tl.store(out + (token * (KV_HEADS * GROUP) + head) * DIM + column, result.to(out.dtype.element_ty), mask=in_dim)


def reference(
    qkv: Tensor, kv_cache: Tensor, block_tables: Tensor, rows: Tensor, positions: Tensor, heads: int, scale: float,
    window: int | None = None, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """The same, a sequence at a time, in float32. → [num_sequences, heads * head_dim]"""
    results = []
    for i, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        results.append(
            reference_one(qkv[i : i + 1], kv_cache, block_tables[row], position, heads, scale, window, softcap)
        )
    return torch.cat(results).to(qkv.dtype)


def reference_one(
    qkv: Tensor, kv_cache: Tensor, table: Tensor, position: int, heads: int, scale: float, window: int | None,
    softcap: float,
) -> Tensor:  # fmt: skip
    """Queries of consecutive positions from `position` on, one sequence. qkv: [n, …] → [n, heads * head_dim] float32"""
    _, _, kv_heads, block_size, dim = kv_cache.shape
    n = qkv.shape[0]
    length = position + n
    blocks = table[: -(-length // block_size)].long()
    k, v = kv_cache[:, blocks].float().transpose(1, 2).reshape(2, kv_heads, -1, dim)[:, :, :length]
    query = qkv[:, : heads * dim].float().view(n, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("nhgd,hkd->hgnk", query, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(position, length, device=qkv.device).unsqueeze(1)
    keys = torch.arange(length, device=qkv.device)
    seen = keys <= at
    if window is not None:
        seen = seen & (keys > at - window)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hgnk,hkd->nhgd", weights, v).reshape(n, heads * dim)
