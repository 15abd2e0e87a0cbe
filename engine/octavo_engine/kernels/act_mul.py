"""The gated activation between the two products of the MLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"),
}  # fmt: skip


def reference(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """activation(gate) * up. gate_up: [num_tokens, 2 * intermediate], gate first. → [num_tokens, intermediate]"""
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up
