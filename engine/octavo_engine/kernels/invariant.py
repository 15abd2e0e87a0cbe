"""Torch operations whose result for one token does not depend on the tokens beside it, for --deterministic on a CPU.

Libraries choose the order of a sum by the shape that they are given, so that a token's last bits change with the size
of its batch. Here every call has one shape, whatever the batch: products in blocks of a fixed number of rows, the
activation a row at a time, attention a token at a time over tiles of keys that are counted from position 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo_engine.kernels import act_mul
from octavo_engine.kernels.kv_scales import UNSCALED, KvScales, restored
from octavo_engine.kernels.paged_attention import Gather

BLOCK_ROWS = (16, 8, 4, 2, 1)
"""Rows of a block, the best first: 16 cost a single token little more than one row does."""
TILE_KEYS = 256


@dataclass(frozen=True)
class Invariant:
    """The operations of a decoder. block_rows: from `block_rows`, for the weights that `linear` is called with."""

    block_rows: int

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: [n, inputs], weight: [outputs, inputs] → [n, outputs]"""
        n, rows = x.shape[0], self.block_rows
        padded = x.new_zeros(-(-n // rows) * rows, x.shape[1])
        padded[:n] = x
        return torch.cat([F.linear(block, weight, bias) for block in padded.split(rows)])[:n]

    def act_mul(self, gate_up: Tensor, activation: str) -> Tensor:
        # The end of what a thread computes is computed by other instructions, wherever in the batch it lies.
        return torch.cat([act_mul.reference(row, activation) for row in gate_up.split(1)])

    def attention(
        self, query: Tensor, kv_cache: Tensor, gathers: Sequence[Gather], scale: float, window: int | None = None,
        scales: KvScales = UNSCALED,
    ) -> Tensor:  # fmt: skip
        """As kernels/paged_attention.py, computed in float32."""
        _, num_blocks, kv_heads, block_size, dim = kv_cache.shape
        flat = kv_cache.view(2, num_blocks * kv_heads, block_size * dim)
        group = query.shape[1] // kv_heads
        heads = (query.float() * scale).view(-1, kv_heads, group, dim)
        out = torch.empty_like(query)
        for g in gathers:
            rows = torch.arange(query.shape[0], device=query.device)[g.queries].view(g.num_sequences, g.q_len)
            for index, tokens, positions in zip(g.index, rows.tolist(), g.positions.tolist(), strict=True):
                keys, values = (
                    _tiles(restored(part[index], of_part, torch.float32), positions[-1] + 1, dim)
                    for part, of_part in zip(flat, (scales.key, scales.value), strict=True)
                )
                for token, position in zip(tokens, positions, strict=True):
                    out[token] = _attend(heads[token], keys, values, position, window).view(-1, dim)
        return out


def block_rows(weights: Iterable[Tensor]) -> int:
    """The largest of BLOCK_ROWS at which products with these weights give a row the same bits at each place.

    What a library does inside a block is its own business, so it is tried, once for each shape of a weight.
    """
    shapes = {weight.shape: weight for weight in weights}
    for rows in BLOCK_ROWS[:-1]:
        if all(_places_are_alike(weight, rows) for weight in shapes.values()):
            return rows
    return BLOCK_ROWS[-1]


def _places_are_alike(weight: Tensor, rows: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, weight.shape[1], generator=generator).to(weight)
    # Two blocks and a part of one, as they lie in memory when a batch is computed.
    results = Invariant(rows).linear(x.repeat(2 * rows + 1, 1), weight)
    return bool((results == results[0]).all())


def _tiles(blocks: Tensor, length: int, dim: int) -> Tensor:
    """The first `length` keys of blocks [kv_heads, n, block_size * dim] → [tiles, kv_heads, TILE_KEYS, dim] float32"""
    kv_heads, count = blocks.shape[0], -(-length // TILE_KEYS)
    # Zeros behind the end: a key that nobody sees weighs nothing, but nothing times a NaN is a NaN.
    padded = blocks.new_zeros(kv_heads, count * TILE_KEYS, dim, dtype=torch.float32)
    padded[:, :length] = blocks.reshape(kv_heads, -1, dim)[:, :length]
    return padded.view(kv_heads, count, TILE_KEYS, dim).transpose(0, 1).contiguous()


def _attend(query: Tensor, keys: Tensor, values: Tensor, position: int, window: int | None) -> Tensor:
    """One token, its tiles in the order of their keys. query: [kv_heads, group, dim], scaled → like query"""
    first = 0 if window is None else max(position - window + 1, 0)
    best = query.new_full((*query.shape[:2], 1), float("-inf"))
    total, sums = torch.zeros_like(best), torch.zeros_like(query)
    for tile in range(first // TILE_KEYS, position // TILE_KEYS + 1):
        scores = torch.bmm(query, keys[tile].transpose(1, 2))  # [kv_heads, group, TILE_KEYS]
        start = tile * TILE_KEYS
        if position + 1 < start + TILE_KEYS:
            scores[..., position + 1 - start :] = float("-inf")
        if first > start:
            scores[..., : first - start] = float("-inf")
        new_best = torch.maximum(best, scores.amax(-1, keepdim=True))
        shrink, weights = (best - new_best).exp(), (scores - new_best).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        sums = sums * shrink + torch.bmm(weights, values[tile])
        best = new_best
    return sums / total
