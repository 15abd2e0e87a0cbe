"""Residual add and RMSNorm in one pass over the row."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(norm(x + residual) * weight, x + residual).

    x, residual: [num_tokens, hidden], weight: [hidden], all of one dtype. The mean of squares is taken in float32
    and the result rounded before the weight is applied, as published checkpoints were trained. (Zhang & Sennrich,
    "Root Mean Square Layer Normalization", 2019)
    """
    if residual is not None:
        x = x + residual
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight, x


def reference_heads(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension of [num_tokens, num_heads, head_dim]: the QK-norm of Qwen3."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
