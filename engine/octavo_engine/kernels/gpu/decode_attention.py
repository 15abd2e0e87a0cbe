"""Attention of one new token per sequence over its keys and values in blocks, and all that stands around it.

The work is bound by reading the cache, so it is cut into parts of roughly equal size: a *part* is a run of blocks of
one sequence for one KV head. The host lists the parts (`plan_parts`); long sequences yield several, and the program
that finishes last combines them, always in the same order. (Dao et al., "Flash-Decoding for long-context inference",
2023) Keys fill the rows of the matrix unit and the query heads of a KV head its columns, of which there are eight: as
rows, four heads were padded to sixteen, in the products as in the softmax.

A card at its power limit pays for instructions with its clock: a layer of 128 and 256 sequences took 305 and 505 us
with heads as rows and takes 284 and 484 (an H200 at 700 W, products by cuBLAS), though attention alone gains 3 %.

Rotating the query and writing the new key and value are done here too: a kernel of their own took 2.5 to 4 us a layer,
2 % of a step. Each part rotates the query for itself; the part with the last block writes before it reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_engine.kernels.gpu import rope_kv
from octavo_engine.kernels.gpu.early_launch import LINE, early_launch, prefetch, release, wait
from octavo_engine.kernels.kv_scales import UNSCALED, KvScales

PROGRAMS_WANTED = 264
"""Parts times KV heads that fill the chip: two for each of the 132 multiprocessors of an H100 or H200."""
PROGRAMS_GAINING = 400
"""So many are faster where each has PART_KEYS keys: three or four programs hide each other's softmax. On an H200 24
sequences of 1,120 tokens take 34.7 us for 38.7, 32 of 4,096 132 for 148; 8 of 1,120, cut finer, 18.0 for 17.2."""
PART_KEYS = 768
GAINING_FROM = 64
"""Sequences times KV heads: fewer have more parts to combine than they gain, 35.5 us for 30.6 at one of 16,384."""
EVENING_OUT = 4
"""Sequences longer than their mean may be cut into so many times more parts: at 500 sequences of 260 tokens and one
of 16,000, 297 us became 214 (197 is the time to read them)."""
MIN_COLUMNS = {"cuda": 8, "hip": 16}
"""Of a matrix unit, to which the query heads of a KV head are padded."""
STAGES = 2
"""As fast as three for any number of sequences, as are two warps as four: of 128 sequences 139 us for 139 and 142. Of
warps blocks of 128 tokens want four, 141 us for 152, and so do eight bits, 118 for 125."""
MIN_BLOCKS_PER_PART = 2
"""Below 128 tokens in a part, starting and combining it costs more than reading it."""
LOG2_E = math.log2(math.e)


PART_WORDS = 8
"""token, row, position, first block, blocks, first part of the sequence, parts of the sequence, nothing.

One record tells a program all that it needs, where arrays by token and row were a chain of four dependent loads.
A record without blocks is no work."""


def max_parts(num_sequences: int, kv_heads: int) -> int:
    """Upper bound of the parts that `plan_parts` makes of so many sequences or fewer, so that grids and buffers can be
    fixed.
    """
    if _cuts(num_sequences, kv_heads) == 1:
        return num_sequences + EVENING_OUT * max(PROGRAMS_WANTED // kv_heads, 1)
    return num_sequences + _room(num_sequences, kv_heads) + num_sequences // 2


def _cuts(num_sequences: int, kv_heads: int) -> int:
    """Parts that a sequence of mean length is cut into at most, where they are long enough: as many for each."""
    return max((_room(num_sequences, kv_heads) + num_sequences // 2) // max(num_sequences, 1), 1)


def _room(num_sequences: int, kv_heads: int) -> int:
    """Parts that fill the chip and gain by it."""
    programs = PROGRAMS_GAINING if num_sequences * kv_heads >= GAINING_FROM else PROGRAMS_WANTED
    return max(programs // kv_heads, 1)


def plan_parts(
    rows: Sequence[int], positions: Sequence[int], block_size: int, kv_heads: int, window: int | None = None,
    blocks_per_part: int | None = None,
) -> list[int]:  # fmt: skip
    """Cut the sequences whose new tokens are at these rows and positions into parts: PART_WORDS for each.

    The longest sequences come first: a long part that starts last is waited for by the whole chip.
    blocks_per_part: fixed, so that a sequence's parts do not depend on its neighbours (needs room for as many parts);
    None chooses it so that the chip is full and there are at most `max_parts`.
    """
    lasts = [position // block_size + 1 for position in positions]
    firsts = [0] * len(lasts) if window is None else [max(p + 1 - window, 0) // block_size for p in positions]
    if blocks_per_part is None:
        room, many = max(PROGRAMS_WANTED // kv_heads, 1), max(len(rows), 1)
        total, cuts = sum(lasts) - sum(firsts), _cuts(len(rows), kv_heads)
        if cuts == 1:
            # The sequences alone fill the chip: cutting one of mean length gains nothing and costs 5 %, but a long one
            # holds up all others.
            wanted = max(-(-total // (EVENING_OUT * room)), -(-total // many))
        else:
            long_enough = -(-total * block_size // (many * PART_KEYS))
            wanted = min(-(-total // room), -(-total // (many * min(cuts, long_enough))))
        blocks_per_part = max(wanted, MIN_BLOCKS_PER_PART)
    words: list[int] = []
    sizes = [last - first for first, last in zip(firsts, lasts, strict=True)]
    for token in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        row, position, first, last = rows[token], positions[token], firsts[token], lasts[token]
        if last - first <= blocks_per_part:
            words += (token, row, position, first, last - first, 0, 1, 0)
            continue
        begin, count = len(words) // PART_WORDS, -(-(last - first) // blocks_per_part)
        for start in range(first, last, blocks_per_part):
            words += (token, row, position, start, min(blocks_per_part, last - start), begin, count, 0)
    return words


def decode_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, block_tables: Tensor, parts: Tensor, scratch: Scratch,
    out: Tensor, scale: float, *, query_norm: Tensor | None = None,
    key_norm: Tensor | None = None, eps: float = 0.0, window: int | None = None, softcap: float = 0.0,
    scales: KvScales = UNSCALED,
) -> None:  # fmt: skip
    """Write each token's key and value, then softmax(q·k * scale) · v over it and the keys before it.

    qkv: [>= num_sequences, (heads + 2 * kv_heads) * head_dim]: query, key and value before rotation.
    cos, sin: [max_len, head_dim / 2]. parts: [n, PART_WORDS] int32 from `plan_parts`, zeros behind the last one.
    kv_cache: [2, num_blocks, kv_heads, block_size, head_dim]. out: [num_sequences, heads * head_dim].
    query_norm, key_norm: [head_dim] weights of RMSNorm over each head before rotation, or None.
    window: keys a query sees, itself included. softcap: 0 is off. scales: for a cache of eight bits.
    """
    _, _, kv_heads, block_size, dim = kv_cache.shape
    tokens, group = out.shape[0], out.shape[1] // dim // kv_heads
    of_keys, of_values = rope_kv.of_cache(kv_cache, scales)
    # The heads of a part are neighbours in the grid as they are in memory, and every long part starts early.
    _decode[(kv_heads, parts.shape[0])](
        qkv, qkv.stride(0), cos, sin, kv_cache[0], kv_cache[1], block_tables, block_tables.stride(0), parts,
        scratch.partial, scratch.lse, scratch.finished, out, query_norm, key_norm, eps,
        scale * LOG2_E * (of_keys or 1.0), softcap, of_keys, of_values, KV_HEADS=kv_heads, GROUP=group,
        HALF=dim // 2, HALF_BLOCK=triton.next_power_of_2(dim // 2), BLOCK_SIZE=block_size,
        COLUMNS=_columns(group), WINDOW=window or 0, SOFTCAP=softcap > 0, STAGES=STAGES, WORDS=PART_WORDS,
        num_warps=4 if block_size > 64 or kv_cache.element_size() == 1 else 2, **early_launch(tokens),
    )  # fmt: skip


def _columns(group: int) -> int:
    backend = "cuda" if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().backend
    return max(MIN_COLUMNS[backend], triton.next_power_of_2(group))


@dataclass(frozen=True)
class Scratch:
    """Where the parts of a sequence meet."""

    partial: Tensor  # [parts, kv_heads, group, head_dim] float32
    lse: Tensor  # [parts, kv_heads, group] float32
    finished: Tensor  # [num_sequences, kv_heads] int32, zero between launches

    @classmethod
    def allocate(cls, num_sequences: int, heads: int, kv_heads: int, dim: int, device: torch.device) -> Scratch:
        parts, group = max_parts(num_sequences, kv_heads), heads // kv_heads
        return cls(
            torch.empty(parts, kv_heads, group, dim, dtype=torch.float32, device=device),
            torch.empty(parts, kv_heads, group, dtype=torch.float32, device=device),
            torch.zeros(num_sequences, kv_heads, dtype=torch.int32, device=device),
        )


@triton.jit
def _rotated(at, inside, column, cos, sin, norm, eps, HALF: tl.constexpr):
    """Heads at `at` ([n, HALF] pointers to their lower halves), normed and rotated: both halves in the type of `at`."""
    kind = at.dtype.element_ty
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    if norm is not None:
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]
        low_weight = tl.load(norm + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
        high_weight = tl.load(norm + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
        low = ((low * scale).to(kind).to(tl.float32) * low_weight).to(kind).to(tl.float32)
        high = ((high * scale).to(kind).to(tl.float32) * high_weight).to(kind).to(tl.float32)
    return (low * cos - high * sin).to(kind), (high * cos + low * sin).to(kind)


@triton.jit(do_not_specialize=["stride_table"], do_not_specialize_on_alignment=["parts"])
def _decode(
    qkv, stride_token, cos, sin, keys, values, block_tables, stride_table, parts, partial, partial_lse, finished, out,
    query_norm, key_norm, eps, scale, softcap, key_scale, value_scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, STAGES: tl.constexpr,
    WORDS: tl.constexpr, EARLY: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    part = tl.program_id(1)
    DIM: tl.constexpr = 2 * HALF
    record = parts + part * WORDS
    token = tl.load(record).to(tl.int64)
    table = block_tables + tl.load(record + 1).to(tl.int64) * stride_table
    position = tl.load(record + 2)
    first = tl.load(record + 3)
    num_blocks = tl.load(record + 4)
    first_part = tl.load(record + 5)
    count = tl.load(record + 6)
    # The record and the tables were written before the step, and the first blocks' keys and values too, but for the
    # newest, which a prefetch may miss. A step of 64 tokens that asks is slower by the 0.7 % that it gains.
    if EARLY and not LATE:
        SIZE: tl.constexpr = keys.dtype.element_ty.primitive_bitwidth // 8
        LINES: tl.constexpr = BLOCK_SIZE * DIM * SIZE // LINE
        line = tl.arange(0, triton.next_power_of_2(LINES)) % LINES * (LINE // SIZE)
        asked = tl.load(table + first, mask=num_blocks > 0, other=0).to(tl.int64)
        at_asked = (asked * KV_HEADS + kv_head) * (BLOCK_SIZE * DIM)
        prefetch(keys + at_asked + line)
        prefetch(values + at_asked + line)
    column = tl.arange(0, HALF_BLOCK)
    in_half = column < HALF
    c = tl.load(cos + position * HALF + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + position * HALF + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
    wait(EARLY, LATE)
    if num_blocks == 0:
        return
    length = position + 1
    end = first + num_blocks

    head = tl.arange(0, COLUMNS)
    key = tl.arange(0, BLOCK_SIZE)
    in_group = (head < GROUP)[:, None] & in_half[None, :]
    base = qkv + token * stride_token
    if end == position // BLOCK_SIZE + 1:
        # One row of a tile: a vector of its own would need other code for the same rotation.
        at_key = tl.zeros([1, 1], tl.int32) + (GROUP * KV_HEADS + kv_head) * DIM + column[None, :]
        key_low, key_high = _rotated(base + at_key, in_half[None, :], column, c, s, key_norm, eps, HALF)
        at_value = base + at_key + KV_HEADS * DIM
        value_low = tl.load(at_value, mask=in_half[None, :], other=0.0)
        value_high = tl.load(at_value + HALF, mask=in_half[None, :], other=0.0)
        block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
        to = ((block * KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE) * DIM + column[None, :]
        if key_scale is not None:
            key_low = rope_kv.stored(key_low, key_scale, keys.dtype.element_ty)
            key_high = rope_kv.stored(key_high, key_scale, keys.dtype.element_ty)
            value_low = rope_kv.stored(value_low, value_scale, keys.dtype.element_ty)
            value_high = rope_kv.stored(value_high, value_scale, keys.dtype.element_ty)
        tl.store(keys + to, key_low, mask=in_half[None, :])
        tl.store(keys + to + HALF, key_high, mask=in_half[None, :])
        tl.store(values + to, value_low, mask=in_half[None, :])
        tl.store(values + to + HALF, value_high, mask=in_half[None, :])
        tl.debug_barrier()  # the loop reads what was written
    # Behind the branch, so that the first keys can be asked for while the query is rotated: a layer of 64 sequences
    # 206.8 -> 204.0 us, one of 128 286.2 -> 284.8, one of 8 131.3 -> 132.1 (H200, two processes).
    at_query = (kv_head * GROUP + head)[:, None] * DIM + column[None, :]
    query_low, query_high = _rotated(base + at_query, in_group, column, c, s, query_norm, eps, HALF)
    query_low, query_high = tl.trans(query_low), tl.trans(query_high)  # [HALF, COLUMNS]

    best = tl.full([COLUMNS], float("-inf"), tl.float32)
    totals = tl.zeros([BLOCK_SIZE, COLUMNS], tl.float32)
    sums_low = tl.zeros([HALF_BLOCK, COLUMNS], tl.float32)
    sums_high = tl.zeros([HALF_BLOCK, COLUMNS], tl.float32)
    for index in tl.range(first, end, num_stages=STAGES):
        block = tl.load(table + index).to(tl.int64)
        start = (block * KV_HEADS + kv_head) * (BLOCK_SIZE * DIM)
        at = index * BLOCK_SIZE + key
        seen = at < length
        if WINDOW > 0:
            seen = seen & (at >= length - WINDOW)
        at_k = keys + start + key[:, None] * DIM + column[None, :]  # [BLOCK_SIZE, HALF]
        at_v = values + start + key[None, :] * DIM + column[:, None]  # [HALF, BLOCK_SIZE]
        # What lies behind the last key is another request's leftover: finite or not, it must not be added up, and
        # not be read either, half a block per sequence on average.
        if HALF == HALF_BLOCK:
            readable, readable_value = seen[:, None], seen[None, :]
        else:
            readable, readable_value = seen[:, None] & in_half[None, :], seen[None, :] & in_half[:, None]
        k_low = tl.load(at_k, mask=readable, other=0.0).to(query_low.dtype)
        k_high = tl.load(at_k + HALF, mask=readable, other=0.0).to(query_low.dtype)
        scores = tl.dot(k_high, query_high, tl.dot(k_low, query_low)) * scale  # [BLOCK_SIZE, COLUMNS]
        if SOFTCAP:
            # In units of log2 e: softcap * tanh(x / softcap) with x = scores / log2 e.
            x = scores * (0.6931471805599453 / softcap)
            scores = (2.0 / (1.0 + tl.exp2(-2.8853900817779268 * x)) - 1.0) * (softcap * 1.4426950408889634)
        scores = tl.where(seen[:, None], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 0))
        shrink = tl.exp2(best - new_best)[None, :]
        weights = tl.exp2(scores - new_best[None, :])
        totals = totals * shrink + weights
        best = new_best
        v_low = tl.load(at_v, mask=readable_value, other=0.0).to(query_low.dtype)
        v_high = tl.load(at_v + HALF, mask=readable_value, other=0.0).to(query_low.dtype)
        weights = weights.to(v_low.dtype)
        sums_low = tl.dot(v_low, weights, sums_low * shrink)
        sums_high = tl.dot(v_high, weights, sums_high * shrink)
    release(LATE)
    total = tl.sum(totals, 0)
    result_low = sums_low / total[None, :]
    result_high = sums_high / total[None, :]
    if value_scale is not None:
        result_low *= value_scale
        result_high *= value_scale
    is_sum = (head < GROUP)[None, :] & in_half[:, None]
    at_part = head[None, :] * DIM + column[:, None]
    to_out = out + token * (KV_HEADS * GROUP * DIM) + kv_head * (GROUP * DIM) + at_part
    if count == 1:
        tl.store(to_out, result_low.to(out.dtype.element_ty), mask=is_sum)
        tl.store(to_out + HALF, result_high.to(out.dtype.element_ty), mask=is_sum)
    else:
        of_part = (part * KV_HEADS + kv_head) * GROUP
        tl.store(partial + of_part * DIM + at_part, result_low, mask=is_sum)
        tl.store(partial + of_part * DIM + at_part + HALF, result_high, mask=is_sum)
        tl.store(partial_lse + of_part + head, best + tl.log2(total), mask=head < GROUP)
        tl.debug_barrier()  # every thread's part is written before the count says so
        counter = finished + token * KV_HEADS + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel") == count - 1:
            tl.store(counter, 0)
            best = tl.full([COLUMNS], float("-inf"), tl.float32)
            total = tl.zeros([COLUMNS], tl.float32)
            sums_low = tl.zeros([HALF_BLOCK, COLUMNS], tl.float32)
            sums_high = tl.zeros([HALF_BLOCK, COLUMNS], tl.float32)
            for other in tl.range(first_part, first_part + count, num_stages=4):
                of = (other * KV_HEADS + kv_head) * GROUP
                # From the second-level cache: the first-level one of this processor may hold an older layer's.
                lse = tl.load(partial_lse + of + head, mask=head < GROUP, other=0.0, cache_modifier=".cg")
                low = tl.load(partial + of * DIM + at_part, mask=is_sum, other=0.0, cache_modifier=".cg")
                high = tl.load(partial + of * DIM + at_part + HALF, mask=is_sum, other=0.0, cache_modifier=".cg")
                new_best = tl.maximum(best, lse)
                shrink = tl.exp2(best - new_best)
                weight = tl.exp2(lse - new_best)
                sums_low = sums_low * shrink[None, :] + low * weight[None, :]
                sums_high = sums_high * shrink[None, :] + high * weight[None, :]
                total = total * shrink + weight
                best = new_best
            tl.store(to_out, (sums_low / total[None, :]).to(out.dtype.element_ty), mask=is_sum)
            tl.store(to_out + HALF, (sums_high / total[None, :]).to(out.dtype.element_ty), mask=is_sum)


def reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, block_tables: Tensor, rows: Tensor, positions: Tensor,
    heads: int, scale: float, *, query_norm: Tensor | None = None, key_norm: Tensor | None = None, eps: float = 0.0,
    window: int | None = None, softcap: float = 0.0, scales: KvScales = UNSCALED,
) -> Tensor:  # fmt: skip
    """The same, a sequence at a time, in float32; writes kv_cache. → [num_sequences, heads * head_dim]"""
    qkv = qkv.clone()
    rope_kv.reference(qkv, cos, sin, rows, positions, block_tables, kv_cache, query_norm, key_norm, eps, scales)
    results = [
        reference_one(qkv[i : i + 1], kv_cache, block_tables[row], position, heads, scale, window, softcap, scales)
        for i, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True))
    ]
    return torch.cat(results).to(qkv.dtype)


def reference_one(
    qkv: Tensor, kv_cache: Tensor, table: Tensor, position: int, heads: int, scale: float, window: int | None,
    softcap: float, scales: KvScales = UNSCALED,
) -> Tensor:  # fmt: skip
    """Queries of consecutive positions from `position` on, one sequence. qkv: [n, …] → [n, heads * head_dim] float32"""
    _, _, kv_heads, block_size, dim = kv_cache.shape
    n = qkv.shape[0]
    length = position + n
    blocks = table[: -(-length // block_size)].long()
    k, v = kv_cache[:, blocks].float().transpose(1, 2).reshape(2, kv_heads, -1, dim)[:, :, :length]
    k, v = k * scales.key, v * scales.value
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
