"""The first columns of a matrix, brought into the second-level cache by the kernel in front of the one that reads it.

Between two kernels of a small step memory is idle for two to three microseconds: the last programs of the one end, the
other is launched, and its first loads are on their way. Meanwhile programs that have read all that they need themselves
ask for what the next matrix's programs read first, some lines of each of its rows. Nothing waits for it and no program
takes another's room, as kernels that are launched early do (early_launch.py); what is asked for is read once all the
same. Results cannot depend on it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from octavo_engine.kernels.gpu.early_launch import LINE, prefetch

ASKED_BYTES = 0
"""Of a matrix; 0 asks for nothing. Not measured yet: `benchmarks/gpu.py --ask-ahead MB` tries others."""
MAX_TOKENS = 256
"""Of a step whose kernels ask ahead, at most: with more, matrix units are what it waits for."""
SHARE = 512
"""Lines that one program asks for at most, so that 128 programs ask for eight megabytes."""
NOTHING: dict[str, Any] = {"ahead": None, "ahead_row_bytes": 0, "ahead_lines_log2": 0, "ahead_lines": 0, "AHEAD": 0}
"""The arguments of a launch that asks for nothing."""


def ask_ahead(weight: Tensor | None, tokens: int) -> dict[str, Any]:
    """What a launch in a step of so many tokens adds to its arguments. weight: [outputs, inputs], read next."""
    if weight is None or not ASKED_BYTES or not 1 < tokens <= MAX_TOKENS or triton.knobs.runtime.interpret:
        return NOTHING
    if triton.runtime.driver.active.get_current_target().backend != "cuda":
        return NOTHING
    outputs, row_bytes = weight.shape[0], weight.shape[1] * weight.element_size()
    lines = ASKED_BYTES // LINE.value
    of_row_log2 = max(min(lines // outputs, row_bytes // LINE.value), 1).bit_length() - 1
    return {
        "ahead": weight, "ahead_row_bytes": row_bytes, "ahead_lines_log2": of_row_log2,
        "ahead_lines": min(outputs << of_row_log2, lines), "AHEAD": SHARE,
    }  # fmt: skip


@triton.jit
def ask(ahead, row_bytes, of_row_log2, lines, program, AHEAD: tl.constexpr):
    """Ask for this program's share of `lines` lines, 2 ** of_row_log2 of each of the first rows."""
    line = program * AHEAD + tl.arange(0, AHEAD)
    row, column = line >> of_row_log2, line & ((1 << of_row_log2) - 1)
    prefetch(ahead.to(tl.int64) + row.to(tl.int64) * row_bytes + column * LINE, line < lines)
