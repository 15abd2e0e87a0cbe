"""Find how a tile of prefill attention is best computed, for 32 query and 8 KV heads of 128, beside cuDNN.

    PYTHONPATH=engine python benchmarks/tune_prefill_attention.py [--tokens 2048 8192 16384]

Causal attention of one prompt, its keys and values in blocks of 64 or 128 tokens. Prints TFLOP/s, only what causality
leaves counted, and the share of cuDNN's attention over contiguous tensors, measured in turns with it, since the clock
falls while the chip is busy. Each variant is first compared with cuDNN's result; those in Gluon in a process of their
own, as warps that wait for each other for ever cannot be stopped in this one.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.errors import TritonError

from octavo_engine.kernels.gpu.prefill_attention import CacheLoads, Chunk, How, plan_tiles, prefill_attention

sys.path.insert(0, str(Path(__file__).parent))
import prefill_attention_gluon
from attention import DIM, HEADS, KV_HEADS, milliseconds

TRIAL_S = 75
"""For importing torch, compiling the candidates in Gluon and running each of them once."""


def variants() -> list[tuple[int, How]]:
    """(block size, how) of everything that compiles for an H100 without spilling registers."""
    shapes = ((64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3), (128, 64, 4, 2), (128, 128, 8, 2))
    return [
        (block_size, How(rows, warps, stages, overlap, registers))
        for (block_size, rows, warps, stages), overlap, registers in itertools.product(
            shapes, (False, True), (False, True)
        )
    ]


def candidates(
    qkv: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, gluon: bool
) -> Iterator[tuple[str, Callable[[], object], torch.Tensor]]:
    """(name, call, where it writes) of each variant for the cache's size of blocks, in Gluon or not; one prompt."""
    tokens, block_size = qkv.shape[0], cache.shape[3]

    def tiles(rows: int) -> torch.Tensor:
        return torch.tensor(plan_tiles([Chunk(0, 0, 0, tokens)], rows), device="cuda").int().view(-1, 4)

    for of_block_size, how in () if gluon else variants():
        if of_block_size == block_size:
            out = torch.zeros(tokens, HEADS * DIM, device="cuda", dtype=qkv.dtype)
            run = partial(
                prefill_attention, qkv, CacheLoads.of(cache), table[None], tiles(how.rows), out, KV_HEADS, block_size,
                DIM**-0.5, how=how,
            )  # fmt: skip
            yield f"blocks of {block_size}, {how}", run, out
    for stages in () if not gluon else (2, 3, 4, 6) if block_size == 64 else (2, 3):
        out = torch.zeros(tokens, HEADS * DIM, device="cuda", dtype=qkv.dtype)
        run = partial(
            prefill_attention_gluon.prefill_attention, qkv, prefill_attention_gluon.descriptors(cache), table[None],
            tiles(prefill_attention_gluon.ROWS), out, KV_HEADS, block_size, DIM**-0.5, stages,
        )  # fmt: skip
        yield f"blocks of {block_size}, Gluon, {stages} stages", run, out


def agreeing(tokens: int, kinds: Iterable[bool]) -> dict[str, Callable[[], object]]:
    """cuDNN's attention and each candidate that gives its result. kinds: whether in Gluon."""
    torch.manual_seed(0)
    qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * DIM, device="cuda", dtype=torch.bfloat16)
    query, key, value = (
        part.view(1, tokens, -1, DIM).transpose(1, 2).contiguous()
        for part in qkv.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=1)
    )

    def peer() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    expected = peer()[0].transpose(0, 1).reshape(tokens, HEADS * DIM).float()
    runs: dict[str, Callable[[], object]] = {"cuDNN": peer}
    for block_size in (64, 128):
        blocks = tokens // block_size
        table = torch.randperm(blocks, device="cuda").int()
        cache = torch.empty(2, blocks, KV_HEADS, block_size, DIM, device="cuda", dtype=torch.bfloat16)
        for part, given in zip(cache, (key, value), strict=True):
            part[table.long()] = given[0].view(KV_HEADS, blocks, block_size, DIM).transpose(0, 1)
        for name, run, out in itertools.chain.from_iterable(candidates(qkv, cache, table, kind) for kind in kinds):
            try:
                run()
                torch.cuda.synchronize()
            except (TritonError, RuntimeError) as error:  # a variant that does not run here is a result, too
                print(f"{name}: {type(error).__name__}: {str(error)[:150]}", flush=True)
                continue
            apart = ((out.float() - expected).norm() / expected.norm()).item()
            if not apart < 0.01:  # NaN is not below anything
                print(f"{name}: differs from cuDNN by {apart:.3f}", flush=True)
                continue
            runs[name] = run
    return runs


def measure(tokens: int, kinds: Iterable[bool]) -> dict[str, float]:
    """→ name: TFLOP/s"""
    operations = 4 * HEADS * DIM * tokens * (tokens + 1) / 2
    return {name: operations / ms / 1e9 for name, ms in milliseconds(agreeing(tokens, kinds)).items()}


def gluon_agrees() -> bool:
    try:
        return subprocess.run([sys.executable, __file__, "--try-gluon"], timeout=TRIAL_S).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"the candidates in Gluon did not end within {TRIAL_S} s", flush=True)
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--try-gluon", action="store_true", help="only tell whether the candidates in Gluon agree")
    asked = parser.parse_args()
    if asked.try_gluon:
        sys.exit(0 if len(agreeing(1024, [True])) > 1 else 1)
    kinds = (False, True) if gluon_agrees() else (False,)
    for tokens in asked.tokens:
        rates = measure(tokens, kinds)
        print(f"{tokens} tokens", flush=True)
        for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
            print(f"  {rate:6.1f} TFLOP/s  {rate / rates['cuDNN']:6.1%}  {name}", flush=True)


if __name__ == "__main__":
    main()
