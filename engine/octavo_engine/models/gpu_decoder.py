"""The decoder family on a GPU: the same function as decoder.py, as kernels over buffers that are allocated once.

Up to FUSED_TOKENS tokens a step is bound by reading the weights, and takes the fused road of
kernels/gpu/small_linear.py; beyond, the products are cuBLAS's, which adds them to the residual itself (1 % of a
prompt), and norms and activations kernels of their own, but for the gated product of up to GATED_TOKENS, which stays
fused. With --deterministic every step takes the second road, with products and an attention that are the same for any
number of tokens. Called by runner/gpu_steps.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo_engine.kernels.gpu import prefill_attention_hopper
from octavo_engine.kernels.gpu.act_mul import act_mul
from octavo_engine.kernels.gpu.cublas import Products
from octavo_engine.kernels.gpu.decode_attention import Scratch, decode_attention
from octavo_engine.kernels.gpu.invariant_attention import invariant_attention, tile_tokens
from octavo_engine.kernels.gpu.invariant_linear import invariant_linear
from octavo_engine.kernels.gpu.norm import embed_rms_norm, rms_norm
from octavo_engine.kernels.gpu.prefill_attention import CacheLoads, parts_wanted, prefill_attention
from octavo_engine.kernels.gpu.prefill_attention import Scratch as TileScratch
from octavo_engine.kernels.gpu.rope_kv import rope_kv
from octavo_engine.kernels.gpu.small_linear import (
    Partial,
    Shape,
    choose_shape,
    num_shares,
    shared_memory_bytes,
    small_linear,
)
from octavo_engine.kernels.kv_scales import UNSCALED, KvScales
from octavo_engine.models.config import DecoderConfig

MAX_SPLIT_DIM = 128
"""Of heads whose prompts' attention is split over programs: with 256 the kernel has no registers left for it."""
FUSED_TOKENS = 64
"""Up to as many tokens a step takes the fused road: beyond, cuBLAS gains more than the fused kernels save."""
GATED_TOKENS = 128
"""Up to as many tokens gate and up are one product with their activation: 67.9 us for cuBLAS's 71.2 with the activation
behind it, and a step of 128 9.60 ms for 9.75 (H200). Of the other three cuBLAS's are as fast or faster.
"""


@dataclass(frozen=True)
class DeviceStep:
    """The tokens of one step on the device; those of decodes, one each, come first.

    ids, rows, positions: [num_tokens] int32, ids negative where token_ids holds the id. parts: [n, PART_WORDS] int32
    of the decodes, by sliding window. tiles: [n, TILE_WORDS] int32 of the prompts' chunks, or None; of decodes as well
    where there are no parts. logit_tokens: [m] int32, the tokens that yield logits, or None when each of them does.
    scored: `logits_of` is asked for more tokens than these afterwards. wide: tiles have `wide_tile_tokens`.
    """

    ids: Tensor
    rows: Tensor
    positions: Tensor
    num_decodes: int
    parts: dict[int | None, Tensor]
    tiles: Tensor | None
    logit_tokens: Tensor | None
    scored: bool = False
    wide: bool = False


class GpuDecoder:
    """tensors: by slot name (models/layout.py). cos, sin: [max_len, head_dim / 2] in the weights' type."""

    def __init__(
        self, config: DecoderConfig, tensors: dict[str, Tensor], cos: Tensor, sin: Tensor, kv_cache: Tensor,
        token_ids: Tensor, block_tables: Tensor, max_tokens: int, max_seqs: int, deterministic: bool = False,
        kv_scales: Sequence[KvScales] = (),
    ) -> None:  # fmt: skip
        """kv_scales: of each layer, for a cache of eight bits."""
        self.config = config
        self._tensors = tensors
        self._cos, self._sin = cos, sin
        self._kv_cache = kv_cache
        self._kv_scales = kv_scales or [UNSCALED] * config.num_layers
        self._token_ids, self._block_tables = token_ids, block_tables
        self._layers = [
            {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{layer}.")}
            for layer in range(config.num_layers)
        ]
        self._head = tensors["embedding" if config.tied_embeddings else "head"]
        self._scale = 1.0 / math.sqrt(config.head_dim)
        like = tensors["embedding"]
        wide = not deterministic and prefill_attention_hopper.takes(kv_cache, like.dtype)
        self._loads = [CacheLoads.of(layer) for layer in kv_cache]
        self._wide_loads = [CacheLoads.of(layer, wide=True) for layer in kv_cache] if wide else []
        width = config.num_heads * config.head_dim

        def buffer(*shape: int, dtype: torch.dtype = like.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=like.device)

        self._residual = buffer(max_tokens, config.hidden_size)
        self._normed = buffer(max_tokens, config.hidden_size)
        self._qkv = buffer(max_tokens, config.qkv_size)
        self._attended = buffer(max_tokens, width)
        self._gate_up = buffer(max_tokens, 2 * config.intermediate_size)
        self._active = buffer(max_tokens, config.intermediate_size)
        self.logits = buffer(max_seqs, config.vocab_size)
        self._end_residual = buffer(max_seqs, config.hidden_size)
        self._end_attended = buffer(max_seqs, width)
        self._scratch = Scratch.allocate(max_seqs, config.num_heads, config.num_kv_heads, config.head_dim, like.device)
        self._tile_scratch = None
        if not deterministic and config.head_dim <= MAX_SPLIT_DIM and not any(config.windows):
            self._tile_scratch = TileScratch.allocate(config.num_heads, config.head_dim, like.device)
        self._shares = buffer(2, -(-config.hidden_size // 4) * FUSED_TOKENS, dtype=torch.float32)
        self._partial = Partial.allocate(FUSED_TOKENS, like.device)
        self._shared_memory = shared_memory_bytes(like.device)
        self._products = Products(like.device)
        self.deterministic = deterministic
        self._can_fuse = not config.mlp_bias and not deterministic

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile of attention, at most."""
        if self.deterministic:
            return tile_tokens(self.config.num_heads // self.config.num_kv_heads)
        return self._loads[0].tile_rows

    @property
    def wide_tile_tokens(self) -> int | None:
        """Of a tile where there are many, None where these are the same."""
        return self._wide_loads[0].tile_rows if self._wide_loads else None

    @property
    def tile_room(self) -> int:
        """Parts of tiles that fill the chip; 0 where none is split."""
        return parts_wanted(self.config.num_heads) if self._tile_scratch else 0

    @property
    def wide_tile_room(self) -> int:
        return parts_wanted(self.config.num_heads, wide=True) if self._tile_scratch else 0

    @property
    def wide_tile_step(self) -> int:
        """Blocks of keys that a wide tile reads at a time."""
        return self._wide_loads[0].tile_step if self._wide_loads else 1

    def forward(self, step: DeviceStep) -> Tensor:
        """Logits of the tokens that yield some, [m, vocab], in a buffer that the next call overwrites.

        Writes the tokens' keys and values, and their ids to token_ids.
        """
        if step.ids.shape[0] <= FUSED_TOKENS and self._can_fuse and step.logit_tokens is None:
            return self._fused(step)
        return self._plain(step)

    def _plain(self, step: DeviceStep) -> Tensor:
        config, count, ends = self.config, step.ids.shape[0], step.logit_tokens
        residual, normed = self._residual[:count], self._normed[:count]
        qkv, attended = self._qkv[:count], self._attended[:count]
        embed_rms_norm(
            step.ids, step.rows, step.positions, self._token_ids, self._tensors["embedding"],
            self._layers[0]["attention_norm"], residual, normed, config.norm_eps,
        )  # fmt: skip
        for index, weights in enumerate(self._layers):
            if index:
                rms_norm(residual, weights["attention_norm"], normed, config.norm_eps)
            self._linear(normed, weights["qkv"], weights.get("qkv_bias"), qkv)
            self._attend(index, weights, step, qkv, attended)
            if ends is not None and not step.scored and index + 1 == config.num_layers:
                # What the last layer makes of the other tokens nobody reads: 2.4 % of a prompt of 8,192.
                attended = _rows(attended, ends, self._end_attended)
                residual = _rows(residual, ends, self._end_residual)
            self._after_attention(weights, attended, residual)
        if ends is not None and step.scored:
            residual = _rows(residual, ends, self._end_residual)
        normed = self._normed[: residual.shape[0]]
        rms_norm(residual, self._tensors["final_norm"], normed, config.norm_eps)
        logits = self.logits[: residual.shape[0]]
        self._linear(normed, self._head, None, logits)
        return logits

    def _after_attention(self, weights: dict[str, Tensor], attended: Tensor, residual: Tensor) -> None:
        """The rest of a layer, token by token; writes the residual."""
        count = attended.shape[0]
        normed, gate_up, active = self._normed[:count], self._gate_up[:count], self._active[:count]
        self._add(attended, weights["output"], weights.get("output_bias"), residual)
        rms_norm(residual, weights["mlp_norm"], normed, self.config.norm_eps)
        if FUSED_TOKENS < count <= GATED_TOKENS and self._can_fuse:
            shape = self._shape(count, active.shape[1], normed.shape[1], gated=True)
            small_linear(normed, weights["gate_up"], active, shape=shape, gated=True, activation=self.config.activation)
        else:
            self._linear(normed, weights["gate_up"], weights.get("gate_up_bias"), gate_up)
            act_mul(gate_up, active, self.config.activation)
        self._add(active, weights["down"], weights.get("down_bias"), residual)

    def logits_of(self, first: int, end: int) -> Tensor:
        """Logits of a few tokens of the last step, [end - first, vocab], newly allocated.

        Only after a step that was scored: in others the last layer left them out.
        """
        residual = self._residual[first:end]
        normed = torch.empty_like(residual)
        rms_norm(residual, self._tensors["final_norm"], normed, self.config.norm_eps)
        logits = residual.new_empty(end - first, self.config.vocab_size)
        self._linear(normed, self._head, None, logits)
        return logits

    def _fused(self, step: DeviceStep) -> Tensor:
        config, count = self.config, step.ids.shape[0]
        hidden, inner = config.hidden_size, config.intermediate_size
        residual, normed = self._residual[:count], self._normed[:count]
        qkv, attended, active = self._qkv[:count], self._attended[:count], self._active[:count]
        out_shape = self._shape(count, hidden, attended.shape[1])
        down_shape = self._shape(count, hidden, inner)
        qkv_shape = self._shape(count, config.qkv_size, hidden)
        gate_shape = self._shape(count, inner, hidden, gated=True)

        def shares(which: int, many: int) -> Tensor:
            return self._shares[which, : many * count].view(many, count)

        before = shares(0, 1)
        after_out = shares(1, num_shares(hidden, out_shape))
        after_down = shares(0, num_shares(hidden, down_shape))
        embed_rms_norm(
            step.ids, step.rows, step.positions, self._token_ids, self._tensors["embedding"],
            self._layers[0]["attention_norm"], residual, normed, config.norm_eps, before,
        )  # fmt: skip
        for index, weights in enumerate(self._layers):
            small_linear(
                normed, weights["qkv"], qkv, shape=qkv_shape, bias=weights.get("qkv_bias"), norm_shares=before,
                eps=config.norm_eps, partial=self._partial,
            )  # fmt: skip
            self._attend(index, weights, step, qkv, attended)
            small_linear(
                attended, weights["output"], normed, shape=out_shape, bias=weights.get("output_bias"),
                residual=residual, next_norm=weights["mlp_norm"], shares=after_out, partial=self._partial,
            )  # fmt: skip
            small_linear(
                normed, weights["gate_up"], active, shape=gate_shape, norm_shares=after_out, eps=config.norm_eps,
                gated=True, activation=config.activation, partial=self._partial,
            )  # fmt: skip
            last = index + 1 == config.num_layers
            following = self._tensors["final_norm"] if last else self._layers[index + 1]["attention_norm"]
            small_linear(
                active, weights["down"], normed, shape=down_shape, bias=weights.get("down_bias"), residual=residual,
                next_norm=following, shares=after_down, partial=self._partial,
            )  # fmt: skip
            before = after_down
        logits = self.logits[:count]
        head_shape = self._shape(count, config.vocab_size, hidden)
        small_linear(
            normed, self._head, logits, shape=head_shape, norm_shares=before, eps=config.norm_eps, partial=self._partial
        )
        return logits

    def _shape(self, tokens: int, outputs: int, inputs: int, gated: bool = False) -> Shape:
        return choose_shape(tokens, outputs, inputs, gated, self._shared_memory)

    def _attend(self, index: int, weights: dict[str, Tensor], step: DeviceStep, qkv: Tensor, attended: Tensor) -> None:
        config, window = self.config, self.config.windows[index]
        cache, many = self._kv_cache[index], step.num_decodes
        norms = weights.get("query_norm"), weights.get("key_norm")
        scales = self._kv_scales[index]
        if self.deterministic:
            assert step.tiles is not None
            rope_kv(
                qkv, self._cos, self._sin, step.rows, step.positions, self._block_tables, cache, *norms,
                config.norm_eps, scales,
            )  # fmt: skip
            invariant_attention(
                qkv, self._loads[index], self._block_tables, step.tiles, attended, config.num_kv_heads, cache.shape[3],
                self._scale, window, scales=scales,
            )  # fmt: skip
            return
        if many:
            decode_attention(
                qkv, self._cos, self._sin, cache, self._block_tables, step.parts[window], self._scratch,
                attended[:many], self._scale, query_norm=norms[0], key_norm=norms[1], eps=config.norm_eps,
                window=window, scales=scales,
            )  # fmt: skip
        if step.tiles is not None:
            rope_kv(
                qkv[many:], self._cos, self._sin, step.rows[many:], step.positions[many:], self._block_tables, cache,
                *norms, config.norm_eps, scales,
            )  # fmt: skip
            loads = self._wide_loads if step.wide else self._loads
            prefill_attention(
                qkv, loads[index], self._block_tables, step.tiles, attended, config.num_kv_heads,
                cache.shape[3], self._scale, window, scales=scales, scratch=self._tile_scratch,
            )  # fmt: skip

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        if self.deterministic:
            invariant_linear(x, weight, bias, out, self._shared_memory)
        elif bias is None:
            self._products.mm(x, weight, out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)

    def _add(self, x: Tensor, weight: Tensor, bias: Tensor | None, into: Tensor) -> None:
        """into += x · weightᵀ + bias"""
        if self.deterministic:
            invariant_linear(x, weight, bias, into, self._shared_memory, add=True)
            return
        if bias is not None:
            into.add_(bias)
        self._products.add(x, weight, into)


def _rows(of: Tensor, indices: Tensor, buffer: Tensor) -> Tensor:
    out = buffer[: indices.shape[0]]
    torch.index_select(of, 0, indices, out=out)
    return out
