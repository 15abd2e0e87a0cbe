"""Rotary position embedding of queries and keys, and the write of keys and values into their blocks."""

from __future__ import annotations

from torch import Tensor

from octavo_engine.kernels.kv_scales import UNSCALED, KvScales, stored


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    blocks: Tensor,
    offsets: Tensor,
    scales: KvScales = UNSCALED,
) -> Tensor:
    """Rotate query and key, store key and value, return the rotated query.

    query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_kv_heads, head_dim].
    cos, sin: [num_tokens, 1, head_dim] float32 (the two halves equal), of each token's position.
    kv_cache: [2, num_blocks, num_kv_heads, block_size, head_dim], keys first; written at (blocks, offsets).
    blocks, offsets: [num_tokens] int64, each pair at most once.
    (Su et al., "RoFormer", 2021; halves rotated against each other as in GPT-NeoX)
    """
    cos, sin = cos.to(query.dtype), sin.to(query.dtype)
    key = _rotate(key, cos, sin)
    # [num_blocks, block_size, num_kv_heads, head_dim] as a view: one assignment writes all tokens.
    keys, values = kv_cache.transpose(2, 3)
    keys[blocks, offsets] = stored(key, scales.key, kv_cache.dtype)
    values[blocks, offsets] = stored(value, scales.value, kv_cache.dtype)
    return _rotate(query, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = x.roll(half, dims=-1)
    # roll gives (x2, x1); rotation needs (-x2, x1). The sign is folded into sin's first half by the caller's table.
    return x * cos + turned * sin
