"""Where each tensor of a checkpoint goes: merged matrices in one arena. Pure; used by the loader.

Queries, keys and values are one matrix, gate and up another: one product reads its input once. Merging costs
nothing at load time, as it is only another destination for the same bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from octavo_engine.models.config import DecoderConfig


@dataclass(frozen=True)
class Slot:
    """One tensor of the engine; `offset` counts elements from the arena's start."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Placement:
    """A checkpoint's tensor becomes rows [row, row + shape[0]) of a slot."""

    slot: str
    row: int
    shape: tuple[int, ...]


ALIGNMENT = 128
"""Elements: 256 bytes in bfloat16, what the widest loads and cuBLAS's fastest kernels want."""


def slots(config: DecoderConfig) -> dict[str, Slot]:
    """Every tensor of the engine by name, laid out one after the other in the order of use."""
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        for name, (shape, _) in _layer(config, layer).items():
            shapes[f"{layer}.{name}"] = shape
    shapes["final_norm"] = (config.hidden_size,)
    if not config.tied_embeddings:
        shapes["head"] = (config.vocab_size, config.hidden_size)
    result, offset = {}, 0
    for name, shape in shapes.items():
        result[name] = Slot(name, shape, offset)
        offset += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
    return result


def placements(config: DecoderConfig) -> dict[str, Placement]:
    """Where each tensor of the checkpoint goes, by the checkpoint's name."""
    hidden = config.hidden_size
    result = {
        "model.embed_tokens.weight": Placement("embedding", 0, (config.vocab_size, hidden)),
        "model.norm.weight": Placement("final_norm", 0, (hidden,)),
    }
    if not config.tied_embeddings:
        result["lm_head.weight"] = Placement("head", 0, (config.vocab_size, hidden))
    for layer in range(config.num_layers):
        for name, (shape, parts) in _layer(config, layer).items():
            row = 0
            for source, rows in parts:
                result[source] = Placement(f"{layer}.{name}", row, (rows, *shape[1:]))
                row += rows
            assert row == shape[0], (name, row, shape)
    return result


_Layer = dict[str, tuple[tuple[int, ...], list[tuple[str, int]]]]


def _layer(config: DecoderConfig, layer: int) -> _Layer:
    """Slot name → its shape and the (checkpoint name, rows) that fill it from the top."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.num_heads * dim, config.num_kv_heads * dim
    at = f"model.layers.{layer}."
    attention, mlp = at + "self_attn.", at + "mlp."
    qkv = [(attention + "q_proj", query), (attention + "k_proj", key), (attention + "v_proj", key)]
    gate_up = [(mlp + "gate_proj", inner), (mlp + "up_proj", inner)]
    result: _Layer = {
        "attention_norm": ((hidden,), [(at + "input_layernorm.weight", hidden)]),
        "qkv": ((config.qkv_size, hidden), [(name + ".weight", rows) for name, rows in qkv]),
    }
    if config.qkv_bias:
        result["qkv_bias"] = ((config.qkv_size,), [(name + ".bias", rows) for name, rows in qkv])
    if config.qk_norm:
        result["query_norm"] = ((dim,), [(attention + "q_norm.weight", dim)])
        result["key_norm"] = ((dim,), [(attention + "k_norm.weight", dim)])
    result["output"] = ((hidden, query), [(attention + "o_proj.weight", hidden)])
    if config.output_bias:
        result["output_bias"] = ((hidden,), [(attention + "o_proj.bias", hidden)])
    result["mlp_norm"] = ((hidden,), [(at + "post_attention_layernorm.weight", hidden)])
    result["gate_up"] = ((2 * inner, hidden), [(name + ".weight", rows) for name, rows in gate_up])
    if config.mlp_bias:
        result["gate_up_bias"] = ((2 * inner,), [(name + ".bias", rows) for name, rows in gate_up])
    result["down"] = ((hidden, inner), [(mlp + "down_proj.weight", hidden)])
    if config.mlp_bias:
        result["down_bias"] = ((hidden,), [(mlp + "down_proj.bias", hidden)])
    return result
