"""The decoder family as one function of weights and data. Called by the runner; knows no requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo_engine.kernels import act_mul, paged_attention, rms_norm, rope_kv_write
from octavo_engine.kernels.kv_scales import UNSCALED, KvScales
from octavo_engine.kernels.paged_attention import Gather
from octavo_engine.models.config import DecoderConfig


@dataclass(frozen=True)
class Batch:
    """The tokens of one step. T tokens, of which those at `logit_rows` yield logits.

    input_ids, positions, blocks, offsets: [T] int64; logit_rows: [m] int64, or None when every token yields logits.
    """

    input_ids: Tensor
    positions: Tensor
    blocks: Tensor
    offsets: Tensor
    gathers: Sequence[Gather]
    logit_rows: Tensor | None


class Operations(Protocol):
    """What may be computed in more than one way."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...

    def act_mul(self, gate_up: Tensor, activation: str) -> Tensor: ...

    def attention(
        self, query: Tensor, kv_cache: Tensor, gathers: Sequence[Gather], scale: float, window: int | None = None,
        scales: KvScales = UNSCALED,
    ) -> Tensor: ...  # fmt: skip


class Fastest:
    """As torch does it best for the size of the batch. The other way is kernels/invariant.py."""

    linear = staticmethod(F.linear)
    act_mul = staticmethod(act_mul.reference)
    attention = staticmethod(paged_attention.reference)


class Decoder:
    """tensors: by slot name (models/layout.py). cos, sin: [max_len, head_dim], as layers/rotary.py makes them."""

    def __init__(
        self, config: DecoderConfig, tensors: dict[str, Tensor], cos: Tensor, sin: Tensor,
        operations: Operations | None = None, kv_scales: Sequence[KvScales] = (),
    ) -> None:  # fmt: skip
        """kv_scales: of each layer, for a cache of eight bits."""
        self.config = config
        self._operations: Operations = operations or Fastest()
        self._kv_scales = kv_scales or [UNSCALED] * config.num_layers
        self._tensors = tensors
        self._cos, self._sin = cos, sin
        # Looked up once: thirty layers of dictionary look-ups by built-up names cost half a millisecond a step.
        self._layers = [
            {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{layer}.")}
            for layer in range(config.num_layers)
        ]

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_cache: Tensor) -> Tensor:
        """Logits of batch.logit_rows, [m, vocab] in the weights' dtype; writes the tokens' keys and values.

        kv_cache: [num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim].
        """
        return self.logits(self.hidden(batch, kv_cache), batch.logit_rows)

    @torch.inference_mode()
    def logits(self, hidden: tuple[Tensor, Tensor], rows: Tensor | slice | None) -> Tensor:
        """[m, vocab] of these rows of what `hidden` gave; None: of all."""
        x, residual = hidden if rows is None else (hidden[0][rows], hidden[1][rows])
        x, _ = rms_norm.reference(x, self._tensors["final_norm"], self.config.norm_eps, residual)
        return self._operations.linear(x, self._tensors["embedding" if self.config.tied_embeddings else "head"])

    @torch.inference_mode()
    def hidden(self, batch: Batch, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Every token's last layer and its residual, [T, hidden] each, before the final norm. Writes as `forward`."""
        config, linear = self.config, self._operations.linear
        cos = self._cos[batch.positions].unsqueeze(1)  # [T, 1, head_dim]
        sin = self._sin[batch.positions].unsqueeze(1)
        residual = None
        x = F.embedding(batch.input_ids, self._tensors["embedding"])  # [T, hidden]
        for layer, weights in enumerate(self._layers):
            x, residual = rms_norm.reference(x, weights["attention_norm"], config.norm_eps, residual)
            x = self._attention(x, weights, cos, sin, batch, kv_cache[layer], layer)
            x, residual = rms_norm.reference(x, weights["mlp_norm"], config.norm_eps, residual)
            x = linear(x, weights["gate_up"], weights.get("gate_up_bias"))  # [T, 2 * intermediate]
            x = linear(self._operations.act_mul(x, config.activation), weights["down"], weights.get("down_bias"))
        assert residual is not None
        return x, residual

    def _attention(
        self, x: Tensor, weights: dict[str, Tensor], cos: Tensor, sin: Tensor, batch: Batch, kv_cache: Tensor,
        layer: int,
    ) -> Tensor:  # fmt: skip
        config, linear = self.config, self._operations.linear
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        scales = self._kv_scales[layer]
        qkv = linear(x, weights["qkv"], weights.get("qkv_bias")).view(-1, heads + 2 * kv_heads, dim)
        query, key, value = qkv.split([heads, kv_heads, kv_heads], dim=1)
        if config.qk_norm:
            query = rms_norm.reference_heads(query, weights["query_norm"], config.norm_eps)
            key = rms_norm.reference_heads(key, weights["key_norm"], config.norm_eps)
        query = rope_kv_write.reference(query, key, value, cos, sin, kv_cache, batch.blocks, batch.offsets, scales)
        out = self._operations.attention(
            query, kv_cache, batch.gathers, 1.0 / math.sqrt(dim), config.windows[layer], scales
        )
        return linear(out.view(-1, heads * dim), weights["output"], weights.get("output_bias"))
