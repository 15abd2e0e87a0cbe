"""Kernels that are launched before the one in front of them has ended ("programmatic dependent launch", Hopper on).

A kernel so launched may begin while the last programs of the one in front still run: it asks for what nobody writes,
its weights, and waits before it reads anything else. A step of one token is 160 kernels of 10 to 60 us, each of which
would else begin with an empty memory pipe: 4.15 -> 4.07 ms of the 8B shape on an H200. With 8 tokens it is 4 % slower
and with 32 5 %, as waiting programs take the room of running ones; norms and activations between cuBLAS's products,
launched so, gain nothing.

The rule that keeps this right: every program of a kernel launched early calls `begin` before it reads what an earlier
kernel wrote and before it writes anything, also if it has nothing to do. `begin` waits for the kernel in front to be
complete, which had itself waited for the one before.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

TOKENS = 1
"""Of a step whose kernels are launched early, at most. `benchmarks/gpu.py --early-launch N` tries others."""
ATTENTION_TOKENS = 64
"""Of a step whose attention is launched early, beyond TOKENS without asking for keys before it waits: 6.98 -> 6.94 ms
at 64 tokens on an H200, where asking made it 6.99; at 128 and 256 it gains nothing."""

ASKING_TOKENS = 1
"""Of a step whose attention, launched early, asks for keys and values before it waits. `benchmarks/gpu.py --asks-early
TOKENS,BLOCKS` tries others; of more tokens only 64 were."""
ASKED_BLOCKS = 1
"""By each of its programs."""

LINE = tl.constexpr(128)
"""Bytes that one prefetch brings into the second-level cache."""


def early_launch(tokens: int, most: int | None = None) -> dict[str, Any]:
    """What a launch for so many tokens adds to its arguments: EARLY for the kernel, and Triton's option for it.

    most: tokens up to which it is early, where not TOKENS.
    """
    if tokens > (TOKENS if most is None else most) or triton.knobs.runtime.interpret:
        return {"EARLY": False}
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda" or target.arch < 90:
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


def blocks_asked_early(tokens: int) -> int:
    """Blocks of keys and values that a program of attention, launched early, asks for before it waits."""
    return ASKED_BLOCKS if tokens <= ASKING_TOKENS else 0


@triton.jit
def begin():
    """Wait for the kernel in front and everything that it wrote, and let the one behind start."""
    gdc_wait()
    gdc_launch_dependents()


@triton.jit
def prefetch(pointers, wanted=None):
    """Bring the lines of memory at `pointers`, or the wanted of them, into the second-level cache, and do not wait."""
    if wanted is None:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // $0", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
            "=r,l,r", [pointers.to(tl.int64), wanted.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
