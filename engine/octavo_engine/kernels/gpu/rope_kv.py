"""Rotate queries and keys in place, norm them first where the model does, and write keys and values into their blocks.

One program per token and group of heads. In place is safe as a program reads both halves of its heads before it
writes them, and no other program touches them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_engine.kernels import kv_scales, rms_norm
from octavo_engine.kernels.kv_scales import UNSCALED, KvScales

HEADS_AT_ONCE = 4


def rope_kv(
    qkv: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, positions: Tensor, block_tables: Tensor, kv_cache: Tensor,
    query_norm: Tensor | None, key_norm: Tensor | None, eps: float, scales: KvScales = UNSCALED,
) -> None:  # fmt: skip
    """qkv: [num_tokens, (heads + 2 * kv_heads) * head_dim], the queries are rotated in place.

    cos, sin: [max_len, head_dim / 2]. rows, positions: [num_tokens] int32.
    block_tables: [num_rows, max_blocks] int32. kv_cache: [2, num_blocks, kv_heads, block_size, head_dim].
    query_norm, key_norm: [head_dim] weights of RMSNorm over each head (Qwen3), or None.
    scales: for a cache of eight bits.
    """
    _, _, kv_heads, block_size, dim = kv_cache.shape
    total = qkv.shape[1] // dim
    grid = (qkv.shape[0], triton.cdiv(total, HEADS_AT_ONCE))
    _rope_kv[grid](
        qkv, qkv.stride(0), cos, sin, rows, positions, block_tables, block_tables.stride(0), kv_cache[0], kv_cache[1],
        query_norm, key_norm, eps, *of_cache(kv_cache, scales), HEADS=total - 2 * kv_heads, KV_HEADS=kv_heads,
        HALF=dim // 2, HALF_BLOCK=triton.next_power_of_2(dim // 2), BLOCK_SIZE=block_size, AT_ONCE=HEADS_AT_ONCE,
        num_warps=1,
    )  # fmt: skip


def of_cache(kv_cache: Tensor, scales: KvScales) -> tuple[float | None, float | None]:
    """What kernels are given of the scales: nothing where the cache is not scaled."""
    return (scales.key, scales.value) if kv_scales.is_scaled(kv_cache.dtype) else (None, None)


@triton.jit
def stored(x, scale, KIND: tl.constexpr):
    """What a cache of eight bits keeps of x; beyond its range the largest number."""
    MOST: tl.constexpr = 448.0 if tl.float8e4nv == KIND else 57344.0
    return tl.clamp(x.to(tl.float32) / scale, -MOST, MOST).to(KIND)


@triton.jit
def _head_norm(low, high, weight, column, inside, eps, HALF: tl.constexpr):
    scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]
    w_low = tl.load(weight + column, mask=inside, other=0.0)
    w_high = tl.load(weight + HALF + column, mask=inside, other=0.0)
    low = (low * scale).to(w_low.dtype).to(tl.float32) * w_low.to(tl.float32)
    high = (high * scale).to(w_low.dtype).to(tl.float32) * w_high.to(tl.float32)
    return low.to(w_low.dtype).to(tl.float32), high.to(w_low.dtype).to(tl.float32)


@triton.jit(do_not_specialize=["stride_table"], do_not_specialize_on_alignment=["rows", "positions"])
def _rope_kv(
    qkv, stride_token, cos, sin, rows, positions, block_tables, stride_table, keys, values, query_norm, key_norm, eps,
    key_scale, value_scale, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    column = tl.arange(0, HALF_BLOCK)
    inside = column < HALF
    mask = (head < HEADS + 2 * KV_HEADS)[:, None] & inside[None, :]
    position = tl.load(positions + token)

    at = qkv + token * stride_token + head[:, None] * (2 * HALF) + column[None, :]
    low = tl.load(at, mask=mask, other=0.0).to(tl.float32)  # [AT_ONCE, HALF]
    high = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    is_query = (head < HEADS)[:, None]
    is_value = (head >= HEADS + KV_HEADS)[:, None]
    if query_norm is not None:
        q_low, q_high = _head_norm(low, high, query_norm, column, inside, eps, HALF)
        k_low, k_high = _head_norm(low, high, key_norm, column, inside, eps, HALF)
        low = tl.where(is_value, low, tl.where(is_query, q_low, k_low))
        high = tl.where(is_value, high, tl.where(is_query, q_high, k_high))
    c = tl.load(cos + position * HALF + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + position * HALF + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    turned_low = tl.where(is_value, low, low * c - high * s).to(qkv.dtype.element_ty)
    turned_high = tl.where(is_value, high, high * c + low * s).to(qkv.dtype.element_ty)
    tl.store(at, turned_low, mask=mask & is_query)
    tl.store(at + HALF, turned_high, mask=mask & is_query)

    row = tl.load(rows + token).to(tl.int64)
    block = tl.load(block_tables + row * stride_table + position // BLOCK_SIZE).to(tl.int64)
    kv_head = (head - HEADS) % KV_HEADS
    to = ((block * KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE)[:, None] * (2 * HALF) + column[None, :]
    is_key = (head >= HEADS)[:, None] & (head < HEADS + KV_HEADS)[:, None]
    if key_scale is not None:
        scale = tl.where(is_value, value_scale, key_scale)
        kept_low = stored(turned_low, scale, keys.dtype.element_ty)
        kept_high = stored(turned_high, scale, keys.dtype.element_ty)
    else:
        kept_low, kept_high = turned_low, turned_high
    tl.store(keys + to, kept_low, mask=mask & is_key)
    tl.store(keys + to + HALF, kept_high, mask=mask & is_key)
    tl.store(values + to, kept_low, mask=mask & is_value)
    tl.store(values + to + HALF, kept_high, mask=mask & is_value)


def reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, positions: Tensor, block_tables: Tensor, kv_cache: Tensor,
    query_norm: Tensor | None, key_norm: Tensor | None, eps: float, scales: KvScales = UNSCALED,
) -> None:  # fmt: skip
    """The same in torch, in float32 between load and store."""
    _, _, kv_heads, block_size, dim = kv_cache.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    query, key, value = qkv.view(qkv.shape[0], -1, dim).split([heads, kv_heads, kv_heads], 1)
    position = positions.long()
    c, s = cos[position].float().unsqueeze(1), sin[position].float().unsqueeze(1)

    def turned(x: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            x = rms_norm.reference_heads(x, norm, eps)
        low, high = x.float().chunk(2, -1)
        return torch.cat([low * c - high * s, high * c + low * s], -1).to(qkv.dtype)

    key, rotated = turned(key, key_norm), turned(query, query_norm)
    blocks, offsets = block_tables[rows.long(), position // block_size].long(), position % block_size
    kv_cache[0].transpose(1, 2)[blocks, offsets] = kv_scales.stored(key, scales.key, kv_cache.dtype)
    kv_cache[1].transpose(1, 2)[blocks, offsets] = kv_scales.stored(value, scales.value, kv_cache.dtype)
    query.copy_(rotated)
