"""Which Triton kernels the engine launches, read from its source: a test that has forgotten one can be told."""

from __future__ import annotations

import re
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "engine" / "octavo_engine" / "kernels" / "gpu"


def launched_kernels() -> set[str]:
    """`_name[grid](` at the beginning of a line is a launch."""
    return {
        name for file in KERNELS.glob("*.py") for name in re.findall(r"^ +(_\w+)\[", file.read_text(), re.MULTILINE)
    }
