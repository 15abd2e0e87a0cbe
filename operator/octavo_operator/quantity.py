"""Kubernetes' notation for amounts (4Gi, 500m, 2). Standard library only."""

from __future__ import annotations

import re
from decimal import Decimal

_SCALES = {
    "": Decimal(1), "m": Decimal("0.001"), "k": Decimal(10**3),
    "M": Decimal(10**6), "G": Decimal(10**9), "T": Decimal(10**12), "P": Decimal(10**15),
    "E": Decimal(10**18), "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30), "Ti": Decimal(2**40),
    "Pi": Decimal(2**50), "Ei": Decimal(2**60),
}  # fmt: skip


def parse_quantity(text: str | int) -> Decimal:
    """'1.5Gi' → 1610612736. Raises ValueError for what is no quantity."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([MGTPE]i?|Ki|k|m)?", str(text))
    if not match:
        raise ValueError(f"not a quantity: {text!r}")
    return Decimal(match[1]) * _SCALES[match[2] or ""]


def gib(num_bytes: int) -> str:
    """15231233024 → '14.2 GiB', as people compare it with a GPU's memory; small amounts in MiB."""
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**30:.1f} GiB"
