"""Attention over keys and values in blocks: causal, grouped queries, optional sliding window.

The torch reference gathers each sequence's blocks and calls torch's own attention. Decodes of similar length go
through one call together; a prompt's chunk has a call of its own. What to gather is the same in every layer, so
`plan_gathers` computes it once per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo_engine.kernels.kv_scales import UNSCALED, KvScales, restored


@dataclass(frozen=True)
class Gather:
    """Sequences that attend together.

    queries: the rows of the query tensor, [n * q_len], sequence by sequence.
    index: [n, num_kv_heads, blocks] into the cache seen as [num_blocks * num_kv_heads, block_size * head_dim].
    positions: [n, q_len] of the queries; context: keys to look at, the longest of the sequences.
    """

    queries: Tensor | slice
    index: Tensor
    positions: Tensor
    num_sequences: int
    q_len: int
    context: int
    masks: dict[int | None, Tensor | None]


def plan_gathers(
    starts: Sequence[int],
    counts: Sequence[int],
    block_tables: Tensor,
    block_size: int,
    num_kv_heads: int,
    bytes_per_block: int,
    scratch_bytes: int,
) -> list[Gather]:
    """Group the step's sequences, in their order in the batch.

    starts, counts: tokens already in the cache and tokens of this step, per sequence.
    block_tables: [n, >= blocks of the longest] int64. bytes_per_block: keys and values of a block in one layer.
    """
    device = block_tables.device
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (start, count) in enumerate(zip(starts, counts, strict=True)):
        blocks = -(-(start + count) // block_size)
        # Lengths within a factor of two share a call; beyond that padding would cost more than the call.
        key = (1, 1 << (blocks - 1).bit_length()) if count == 1 else (count, -1 - i)
        groups.setdefault(key, []).append(i)

    gathers = []
    for members in groups.values():
        longest = max(-(-(starts[i] + counts[i]) // block_size) for i in members)
        at_once = max(scratch_bytes // (longest * bytes_per_block), 1)
        gathers += [
            _gather(members[i : i + at_once], starts, counts, offsets, block_tables, block_size, num_kv_heads)
            for i in range(0, len(members), at_once)
        ]
    assert all(g.index.device == device for g in gathers)
    return gathers


def reference(
    query: Tensor, kv_cache: Tensor, gathers: Sequence[Gather], scale: float, window: int | None = None,
    scales: KvScales = UNSCALED,
) -> Tensor:  # fmt: skip
    """softmax(q·k * scale, over the keys that q may see) · v.

    query: [num_tokens, num_heads, head_dim]; kv_cache: [2, num_blocks, num_kv_heads, block_size, head_dim].
    window: a query at position p sees keys p - window + 1 to p; None: 0 to p. → like query
    """
    _, num_blocks, num_kv_heads, block_size, head_dim = kv_cache.shape
    num_heads = query.shape[1]
    group = num_heads // num_kv_heads
    keys, values = kv_cache.view(2, num_blocks * num_kv_heads, block_size * head_dim)
    out = torch.empty_like(query)
    for g in gathers:
        n, flat = g.num_sequences, g.index.view(-1)
        k = keys.index_select(0, flat).view(n, num_kv_heads, -1, head_dim)[:, :, : g.context]
        v = values.index_select(0, flat).view(n, num_kv_heads, -1, head_dim)[:, :, : g.context]
        k, v = restored(k, scales.key, query.dtype), restored(v, scales.value, query.dtype)
        q = query[g.queries].view(n, g.q_len, num_kv_heads, group, head_dim)
        mask = _mask(g, window)
        if g.q_len == 1:
            # The heads of a group are rows that see the same keys: no key is repeated.
            result = F.scaled_dot_product_attention(
                q.squeeze(1), k, v, attn_mask=None if mask is None else mask.to(q.dtype), scale=scale
            )  # [n, num_kv_heads, group, head_dim]
            out[g.queries] = result.reshape(n, num_heads, head_dim)
        else:
            heads = q.permute(0, 2, 3, 1, 4).reshape(n, num_heads, g.q_len, head_dim)
            result = F.scaled_dot_product_attention(
                heads, k, v, attn_mask=None if mask is None else mask.to(q.dtype), is_causal=mask is None, scale=scale,
                enable_gqa=group > 1,
            )  # fmt: skip  # [n, num_heads, q_len, head_dim]
            out[g.queries] = result.transpose(1, 2).reshape(n * g.q_len, num_heads, head_dim)
    return out


def _gather(
    members: Sequence[int],
    starts: Sequence[int],
    counts: Sequence[int],
    offsets: Sequence[int],
    block_tables: Tensor,
    block_size: int,
    num_kv_heads: int,
) -> Gather:
    device = block_tables.device
    q_len = counts[members[0]]
    context = max(starts[i] + counts[i] for i in members)
    blocks = -(-context // block_size)
    rows: Tensor | slice
    if list(members) == list(range(members[0], members[-1] + 1)):
        rows = slice(offsets[members[0]], offsets[members[-1] + 1])
        tables = block_tables[members[0] : members[-1] + 1, :blocks]
    else:  # only decodes are grouped, so there is one row each
        rows = torch.tensor([offsets[i] for i in members], device=device)
        tables = block_tables[torch.tensor(members, device=device), :blocks]
    needed = [-(-(starts[i] + counts[i]) // block_size) for i in members]
    if min(needed) < blocks:
        # The shorter ones are padded with a block of their own: masked or not, another's may hold a NaN.
        own = torch.arange(blocks, device=device) < torch.tensor(needed, device=device).unsqueeze(1)
        tables = torch.where(own, tables, tables[:, :1])
    heads = torch.arange(num_kv_heads, device=device).view(1, -1, 1)
    index = tables.unsqueeze(1) * num_kv_heads + heads
    first = torch.tensor([starts[i] for i in members], device=device).unsqueeze(1)
    positions = first + torch.arange(q_len, device=device)
    # Without padding and, for a chunk, without cached context, no mask is needed at all.
    plain = all(starts[i] + 1 == context for i in members) if q_len == 1 else starts[members[0]] == 0
    masks: dict[int | None, Tensor | None] = {None: None} if plain else {}
    return Gather(rows, index, positions, len(members), q_len, context, masks)


def _mask(g: Gather, window: int | None) -> Tensor | None:
    """[n, 1, q_len, context], 0 where a query sees a key and -inf where not; None where it sees all it should."""
    if window is not None and window >= g.context:
        window = None
    if window not in g.masks:
        keys = torch.arange(g.context, device=g.positions.device)
        positions = g.positions.unsqueeze(-1)
        seen = keys <= positions
        if window is not None:
            seen &= keys > positions - window
        mask = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))
        g.masks[window] = mask.unsqueeze(1)
    return g.masks[window]
