"""Tables of rotary position embedding for every position, with the scalings that checkpoints name."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from octavo_engine.models.config import RopeConfig


def tables(config: RopeConfig, head_dim: int, max_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [max_len, head_dim] float32, computed in float32 on the CPU.

    sin's first half is negated: x * cos + roll(x, head_dim / 2) * sin is then the whole rotation.
    """
    frequencies, amplitude = _frequencies(config, head_dim)
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), frequencies)
    cos, sin = angles.cos() * amplitude, angles.sin() * amplitude
    return torch.cat([cos, cos], -1).to(device), torch.cat([-sin, sin], -1).to(device)


def _frequencies(config: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """([head_dim / 2] angles per position, factor on cos and sin)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (config.theta**exponents)
    p = config.parameters
    match config.type:
        case "default":
            return plain, 1.0
        case "linear":
            return plain / p["factor"], 1.0
        case "llama3":
            return _llama3(plain, p["factor"], p["low_freq_factor"], p["high_freq_factor"],
                           p["original_max_position_embeddings"]), 1.0  # fmt: skip
        case "yarn":
            return _yarn(plain, config, head_dim)
        case other:
            raise AssertionError(f"RoPE type {other} was let through")


def _llama3(plain: Tensor, factor: float, low: float, high: float, original: float) -> Tensor:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / plain
    blend = ((original / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * plain / factor + blend * plain


def _yarn(plain: Tensor, config: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", 2023, §3."""
    p = config.parameters
    factor, original = p["factor"], p["original_max_position_embeddings"]

    def dimension_of(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension_of(p.get("beta_fast") or 32.0), dimension_of(p.get("beta_slow") or 1.0)
    if p.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    amplitude = p.get("attention_factor")
    if amplitude is None:
        amplitude = _amplitude(factor, 1.0)
        if p.get("mscale") and p.get("mscale_all_dim"):
            amplitude = _amplitude(factor, p["mscale"]) / _amplitude(factor, p["mscale_all_dim"])
    return plain / factor * ramp + plain * (1 - ramp), amplitude


def _amplitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
