"""The gated activation between the two products of the MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def reference(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. gate_up: [num_tokens, 2 * intermediate], gate first. → [num_tokens, intermediate]"""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
