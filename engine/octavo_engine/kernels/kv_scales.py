"""Keys and values in a cache of eight bits: x / scale, with one scale for a layer's keys and one for its values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KvScales:
    key: float = 1.0
    value: float = 1.0


UNSCALED = KvScales()


def is_scaled(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 1


def stored(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """What a cache of this type keeps of x; beyond its range the largest number, as torch would make a NaN."""
    if not is_scaled(dtype):
        return x.to(dtype)
    most = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-most, most).to(dtype)


def restored(kept: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Of what a cache keeps, in the type to compute with."""
    return kept if kept.dtype == dtype else (kept.float() * scale).to(dtype)
