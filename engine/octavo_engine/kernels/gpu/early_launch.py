"""Kernels that are launched before the one in front of them has ended ("programmatic dependent launch", Hopper on).

A kernel so launched may begin while the last programs of the one in front still run: it asks for what nobody writes,
its weights, and waits before it reads anything else. Between two kernels memory would else be idle for some 3 us.

The rule that keeps this right: every program of a kernel launched early calls `wait` before it reads what an earlier
kernel wrote and before it writes anything, also if it has nothing to do. `wait` waits for the kernel in front to be
complete, which had itself waited for the one before.

When a kernel lets the next one start decides what it is worth. In a step of one token each does at once: 160 kernels of
10 to 60 us, 4.15 -> 4.07 ms of the 8B shape on an H200. With more tokens a program holds so much of a multiprocessor
that those which wait take the room of those which run: let start at once, steps of 8 tokens are 4 % slower and of 32
5 %. There a program lets the next kernel start when it has read all of its own: a layer of 8, 32 and 64 sequences goes
from 137.9, 167.7 and 208.0 to 132.8, 161.3 and 204.0 us, with what a product's end needs asked for before it; of 48 it
gains a quarter of a per cent, and of 96 and more nothing.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

TOKENS = 64
"""Of a step whose kernels are launched early, at most. `benchmarks/gpu.py --early-launch N` tries others."""
AT_ONCE_TOKENS = 1
"""Of a step whose kernels let the next one start at once, at most."""
ASKED_BYTES = 4 << 20
"""Of a matrix, asked for before a product waits: a microsecond's worth. Of nothing, 4 and 16 MB a layer of 8 sequences
takes 131.3, 129.3 and 130.6 us, one of 32 163.6, 163.9 and 167.8."""

LINE = tl.constexpr(128)
"""Bytes that one prefetch brings into the second-level cache."""


def early_launch(tokens: int) -> dict[str, Any]:
    """What a launch for so many tokens adds to its arguments: Triton's option for it, and for the kernel whether it is
    EARLY and whether it lets the next one start LATE, when it has read all of its own.
    """
    if tokens > TOKENS or triton.knobs.runtime.interpret:
        return {"EARLY": False, "LATE": False}
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda" or target.arch < 90:
        return {"EARLY": False, "LATE": False}
    return {"EARLY": True, "LATE": tokens > AT_ONCE_TOKENS, "launch_pdl": True}


def asked_lines(rows: int, row_bytes: int) -> int:
    """A power of two: lines of each of a matrix's rows that a product asks for before it waits, or 0."""
    lines = min(ASKED_BYTES // (rows * LINE.value), row_bytes // LINE.value)
    return 1 << (lines.bit_length() - 1) if lines else 0


@triton.jit
def wait(EARLY: tl.constexpr, LATE: tl.constexpr):
    """Wait for the kernel in front and everything that it wrote, and let the one behind start, unless LATE."""
    if EARLY:
        gdc_wait()
        if not LATE:
            gdc_launch_dependents()


@triton.jit
def release(LATE: tl.constexpr):
    """Let the kernel behind start."""
    if LATE:
        gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Bring the lines of memory at `pointers` into the second-level cache, and do not wait for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )
