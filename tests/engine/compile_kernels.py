"""Compile every Triton kernel for a target, without a GPU. Run by test_gpu_kernels_compile.py in a process of its own.

python compile_kernels.py cuda 90 32    prints a line for each variant: its name, the kernel, bytes of shared memory
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from octavo_engine.kernels.act_mul import ACTIVATIONS
from octavo_engine.kernels.gpu import (
    act_mul,
    adjusted,
    adjustments,
    decode_attention,
    invariant_attention,
    invariant_linear,
    logprobs,
    norm,
    prefill_attention,
    prefill_attention_hopper,
    rope_kv,
    sample,
    small_linear,
    state,
)
from octavo_engine.kernels.gpu.prefill_attention import TILE_WORDS
from octavo_engine.runner.device import LARGE_BLOCK_BYTES

HALF, FLOAT, INT, LONG = "*bf16", "*fp32", "*i32", "*i64"
TILE = "tensordesc<bf16[64,128]>"
SHORT = "*i16"
UNSCALED = {"key_scale": None, "value_scale": None}
CHANGED = {
    "RECORD": adjustments.record_words(128256), "MASK": adjustments.mask_words(128256), "ENTRIES": adjustments.ENTRIES,
    "HEADER": adjustments.HEADER,
}  # fmt: skip
UNCHANGED = {
    "special": None, "masks": None, "records": None, "words": None, "RECORD": 0, "MASK": 0, "ENTRIES": 0,
    "HEADER": 0,
}  # fmt: skip
CHUNKS = {"VOCAB": 128256, **sample.arrangement(128256)}
PICK = sample.pick_sizes(128256)
PLACES = [INT, INT, INT]
STATE = [FLOAT, INT, FLOAT, FLOAT, LONG]
PARTS = [FLOAT, INT, FLOAT, FLOAT]
OUT = [INT, INT, "i32", "i32", INT]
HEADS = {"KV_HEADS": 8, "GROUP": 4}
SHARED_MEMORY = {"80": 163 * 1024, "89": 99 * 1024, "90": 227 * 1024, "100": 227 * 1024, "gfx942": 64 * 1024}


def kernels(shared_memory: int) -> list[tuple[str, Any, list[str], dict[str, Any], int]]:
    """name, kernel, types of the arguments that are not compile-time values, those values, warps."""
    found: list[tuple[str, Any, list[str], dict[str, Any], int]] = [
        ("rms_norm", norm._rms_norm, [HALF] * 3 + ["fp32"], {"HIDDEN": 4096, "BLOCK": 4096}, 8),
        (
            "embed_rms_norm", norm._embed_rms_norm,
            [INT] * 4 + ["i32"] + [HALF] * 4 + [FLOAT, "fp32"], {"HIDDEN": 4096, "BLOCK": 4096}, 8,
        ),
        (
            "rope_kv", rope_kv._rope_kv,
            [HALF, "i32", HALF, HALF, INT, INT, INT, "i32"] + [HALF] * 4 + ["fp32"],
            {"HEADS": 32, "KV_HEADS": 8, "HALF": 64, "HALF_BLOCK": 64, "BLOCK_SIZE": 64, "AT_ONCE": 4,
             **UNSCALED}, 1,
        ),
        *(
            (f"act_mul_{name}", act_mul._act_mul, [HALF, HALF], {"INNER": 14336, "BLOCK": 1024, "ACTIVATION": name}, 4)
            for name in ACTIVATIONS
        ),
        (
            "decode_attention", decode_attention._decode,
            [HALF, "i32", HALF, HALF, HALF, HALF, INT, "i32", INT, FLOAT, FLOAT, INT, HALF, "fp32", "fp32", "fp32"],
            {**HEADS, "query_norm": None, "key_norm": None, "HALF": 64, "HALF_BLOCK": 64, "BLOCK_SIZE": 64,
             "WINDOW": 0, "SOFTCAP": False, "STAGES": 2, "WORDS": decode_attention.PART_WORDS,
             **UNSCALED}, 2,
        ),
        (
            "prefill_attention", prefill_attention._prefill,
            [HALF, "i32", TILE, TILE, INT, "i32", INT, HALF, "i32", FLOAT, FLOAT, INT, "fp32", "fp32"],
            {**HEADS, "DIM": 128, "DIM_BLOCK": 128, "BLOCK_SIZE": 64, "TILE": 64, "WINDOW": 0, "SOFTCAP": False,
             "STAGES": 3, "WORDS": TILE_WORDS, "value_scale": None}, 4,
        ),
        (
            "invariant_attention", invariant_attention._invariant,
            [HALF, "i32", TILE, TILE, INT, "i32", INT, HALF, "i32", "fp32", "fp32"],
            {**HEADS, "DIM": 128, "DIM_BLOCK": 128, "BLOCK_SIZE": 64, "TILE": 64, "WINDOW": 0, "SOFTCAP": False,
             "STAGES": 3, "WORDS": TILE_WORDS, "value_scale": None}, 4,
        ),
        (
            "noisy_best", sample._noisy_best, [HALF, *PLACES, *STATE, *PARTS],
            {**UNCHANGED, **CHUNKS, "AT_ONCE": 32}, sample.LANES // 32,
        ),
        (
            "pick", sample._pick, [HALF, *PLACES, *STATE, *PARTS, *OUT],
            {**UNCHANGED, **PICK, "UNUSED": 16, "AT_ONCE": 64}, 8,
        ),
        (
            "pick_special", sample._pick, [HALF, INT, INT, INT, SHORT, *PLACES, *STATE, *PARTS, *OUT],
            {**CHANGED, **PICK, "UNUSED": 0, "AT_ONCE": 32}, 4,
        ),
        (
            "note", adjusted._note, [INT, INT, SHORT, *PLACES, INT, "i32"],
            {"VOCAB": 128256, **CHANGED, "BAD_WORDS": adjustments.BAD_WORDS}, 4,
        ),
        (
            "noisy_best_special", sample._noisy_best, [HALF, INT, INT, INT, SHORT, *PLACES, *STATE, *PARTS],
            {**CHANGED, **CHUNKS, "AT_ONCE": 8}, sample.LANES // 32,
        ),
        (
            "logprobs_of_slice", logprobs._of_slice, [HALF, INT, INT, "i32", FLOAT, FLOAT, INT],
            {"VOCAB": 128256, "SLICE": 4096, "MOST": 20}, 4,
        ),
        (
            "logprobs_of_row", logprobs._of_row, [HALF, INT, INT, "i32", FLOAT, FLOAT, INT, INT],
            {"VOCAB": 128256, "SLICES": 32, "SLICES_BLOCK": 32, "MOST": 20, "MOST_BLOCK": 32}, 4,
        ),
        ("set_blocks", state._set_blocks, [INT, "i32", INT, "i32"], {"AT_ONCE": 256}, 4),
        ("set_sampling", state._set_sampling, [INT, FLOAT, INT, FLOAT, FLOAT, LONG], {"WORDS": 8}, 1),
    ]  # fmt: skip
    if shared_memory >= LARGE_BLOCK_BYTES:  # runner/device.py refuses it elsewhere
        large = "tensordesc<bf16[128,256]>"
        stages = prefill_attention.stages_for(128, 256, 3)
        found.append((
            "prefill_attention_large", prefill_attention._prefill,
            [HALF, "i32", large, large, INT, "i32", INT, HALF, "i32", FLOAT, FLOAT, INT, "fp32", "fp32"],
            {**HEADS, "DIM": 256, "DIM_BLOCK": 256, "BLOCK_SIZE": 128, "TILE": 64, "WINDOW": 0, "SOFTCAP": False,
             "STAGES": stages, "WORDS": TILE_WORDS, "value_scale": None}, 4,
        ))  # fmt: skip
        found.append((
            "decode_attention_large", decode_attention._decode,
            [HALF, "i32", HALF, HALF, HALF, HALF, INT, "i32", INT, FLOAT, FLOAT, INT, HALF, "fp32", "fp32", "fp32"],
            {**HEADS, **UNSCALED, "query_norm": None, "key_norm": None, "HALF": 128, "HALF_BLOCK": 128,
             "BLOCK_SIZE": 128, "WINDOW": 0, "SOFTCAP": False, "STAGES": 2,
             "WORDS": decode_attention.PART_WORDS}, 4,
        ))  # fmt: skip
    found += attention_of(80, 16, 100, softcap=True)
    one = small_linear.choose_shape(1, 14336, 4096, gated=True)
    nothing = {"bias": None, "residual": None, "next_norm": None, "shares": None}
    found.append((
        "one_token_linear", small_linear._one_token_linear, [HALF, HALF, FLOAT, "i32", HALF, "fp32"],
        {**nothing, "INPUTS": 4096, "OUTPUTS": 14336, "WIDTH": one.width, "DEPTH": one.depth, "STAGES": one.stages,
         "GATED": True, "ACTIVATION": "silu", "SHARES": 128}, one.warps,
    ))  # fmt: skip
    for outputs, add in ((4096, True), (28672, False)):
        width = invariant_linear.tile_width(outputs)
        found.append((
            f"invariant_linear_{width}", invariant_linear._invariant_linear, [HALF, HALF, HALF, "i32"],
            {"bias": None, "INPUTS": 4096, "OUTPUTS": outputs, "ROWS": invariant_linear.ROWS, "WIDTH": width,
             "DEPTH": invariant_linear.DEPTH, "GROUP": invariant_linear.GROUP,
             "STAGES": invariant_linear.num_stages(width, shared_memory), "ADD": add}, 4,
        ))  # fmt: skip
    for name, columns, outputs, inputs, gated in (
        ("small_linear_gated", 128, 14336, 4096, True), ("small_linear_down", 16, 4096, 14336, False),
    ):  # fmt: skip
        shape = small_linear.choose_shape(columns, outputs, inputs, gated, shared_memory)
        common = {
            "INPUTS": inputs, "OUTPUTS": outputs, "WIDTH": shape.width, "COLUMNS": columns, "DEPTH": shape.depth,
            "STAGES": shape.stages, "SPLITS": 2, "GATED": gated, "ACTIVATION": "gelu_tanh", "FULL": False,
            "LINES": 4,
        }  # fmt: skip
        if gated:
            types = [HALF, HALF, FLOAT, "i32", HALF, FLOAT, INT, "i32", "fp32"]
            found.append((name, small_linear._small_linear, types, {**nothing, **common, "SHARES": 128}, shape.warps))
        else:
            types = [HALF, HALF, "i32", HALF, HALF, FLOAT, HALF, FLOAT, INT, "i32", "fp32"]
            values = {"bias": None, "norm_shares": None, **common, "SHARES": 1}
            found.append((name, small_linear._small_linear, types, values, shape.warps))
    return found


def attention_of(
    dim: int, block_size: int, window: int, softcap: bool
) -> list[tuple[str, Any, list[str], dict[str, Any], int]]:
    """What depends on the shape of heads, with all that those above are without: norms of heads, a window, a cap."""
    block, name = triton.next_power_of_2(dim), f"{dim}_{block_size}_{window}"
    tile = f"tensordesc<bf16[{block_size},{block}]>"
    half = {"HALF": dim // 2, "HALF_BLOCK": triton.next_power_of_2(dim // 2), "BLOCK_SIZE": block_size}
    of_tiles = {
        **HEADS, "DIM": dim, "DIM_BLOCK": block, "BLOCK_SIZE": block_size, "TILE": 64, "WINDOW": window,
        "SOFTCAP": softcap, "STAGES": prefill_attention.stages_for(block_size, dim, 3), "WORDS": TILE_WORDS,
        "value_scale": None,
    }  # fmt: skip
    return [
        (
            f"rope_kv_{name}", rope_kv._rope_kv,
            [HALF, "i32", HALF, HALF, INT, INT, INT, "i32"] + [HALF] * 4 + ["fp32"],
            {"HEADS": 32, "KV_HEADS": 8, **half, "AT_ONCE": 4, **UNSCALED}, 1,
        ),
        (
            f"decode_attention_{name}", decode_attention._decode,
            [HALF, "i32", HALF, HALF, HALF, HALF, INT, "i32", INT, FLOAT, FLOAT, INT, HALF, HALF, HALF, "fp32", "fp32",
             "fp32"],
            {**HEADS, **UNSCALED, **half, "WINDOW": window, "SOFTCAP": softcap, "STAGES": 2,
             "WORDS": decode_attention.PART_WORDS}, 2 if block_size <= 64 else 4,
        ),
        (
            f"prefill_attention_{name}", prefill_attention._prefill,
            [HALF, "i32", tile, tile, INT, "i32", INT, HALF, "i32", FLOAT, FLOAT, INT, "fp32", "fp32"], of_tiles, 4,
        ),
        (
            f"invariant_attention_{name}", invariant_attention._invariant,
            [HALF, "i32", tile, tile, INT, "i32", INT, HALF, "i32", "fp32", "fp32"], of_tiles, 4,
        ),
    ]  # fmt: skip


WAYS = (("", False, False), ("-early", True, True), ("-at-once", True, False))
"""Name, whether it is launched before the kernel in front has ended, and whether it lets the next one start late.

The first variant of a kernel is compiled in each way, any other in the first two, which have between them all that the
ways differ by.
"""


def main() -> None:
    backend, arch, warp_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, warp_size)
    can_launch_early = backend == "cuda" and int(arch) >= 90
    # Triton compiles e4m3 from compute capability 8.9 on, and runner/device.py refuses it before.
    eight_bits = "fp8e5" if arch == "80" else "fp8e4nv"
    found = kernels(SHARED_MEMORY[arch])
    found += [with_cache_of(eight_bits, *of) for of in found if "value_scale" in of[3]]
    seen: set[Any] = set()
    for name, kernel, types, values, warps in found:
        if kernel is decode_attention._decode:
            values = {**values, "COLUMNS": decode_attention.MIN_COLUMNS[backend]}
        many = 1 if "EARLY" not in kernel.arg_names or not can_launch_early else 2 if kernel in seen else len(WAYS)
        seen.add(kernel)
        for way, early, late in WAYS[:many]:
            shared = compile_one(kernel, types, {**values, "EARLY": early, "LATE": late}, warps, target)
            print(name + way, kernel.fn.__name__, shared, flush=True)
    for name, shared in compile_for_hopper(target) if arch == "90" else ():
        print(name, "_prefill_hopper", shared, flush=True)


def compile_for_hopper(target: GPUTarget) -> Iterator[tuple[str, int]]:
    """(name, bytes of shared memory) of the kernel in Gluon, whose tensor descriptors say how they are laid out."""
    kernel = prefill_attention_hopper._prefill_hopper
    for dim, block_size, window in ((128, 64, 0), (128, 16, 100), (64, 128, 100), (64, 64, 0)):
        loads = prefill_attention_hopper.descriptors(torch.empty(2, 1, 8, block_size, dim, dtype=torch.bfloat16))[0]
        tile = f"tensordesc<bf16{loads.block_shape},{loads.layout!r}>"
        types = [HALF, "i32", tile, tile, INT, "i32", INT, HALF, "i32", FLOAT, FLOAT, INT, "fp32"]
        values = {
            **HEADS, "SPLIT": not window, "DIM": dim, "BLOCK_SIZE": block_size,
            "KEYS": prefill_attention_hopper.KEYS, "WINDOW": window, "STAGES": prefill_attention_hopper.STAGES,
            "REGISTERS": prefill_attention_hopper.REGISTERS,
            "WORDS": TILE_WORDS, "EARLY": False,
        }  # fmt: skip
        yield f"prefill_hopper_{dim}_{block_size}_{window}", compile_one(kernel, types, values, 4, target)


def with_cache_of(
    kind: str, name: str, kernel: Any, types: list[str], values: dict[str, Any], warps: int
) -> tuple[str, Any, list[str], dict[str, Any], int]:
    """The variant of a kernel for keys and values in eight bits: their two arguments, and a scale or two at the end."""
    first = [n for n in kernel.arg_names if n not in values].index("keys")
    cache = [types[first].replace("bf16", kind)] * 2
    scales = ["fp32"] * sum(value in ("key_scale", "value_scale") for value in values)
    rest = {name: value for name, value in values.items() if name not in ("key_scale", "value_scale")}
    return f"{name}-{kind}", kernel, [*types[:first], *cache, *types[first + 2 :], *scales], rest, warps


def compile_one(kernel: Any, types: list[str], values: dict[str, Any], warps: int, target: GPUTarget) -> int:
    """→ bytes of shared memory"""
    arguments = iter(types)
    signature = {n: "constexpr" if n in values else next(arguments) for n in kernel.arg_names}
    constants = {(kernel.arg_names.index(n),): value for n, value in values.items() if n in signature}
    aligned = {(index,): [["tt.divisibility", 16]] for index, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "launch_pdl": values["EARLY"]} if target.backend == "cuda" else {"num_warps": warps}
    return int(triton.compile(source, target=target, options=options).metadata.shared)


if __name__ == "__main__":
    main()
