"""Find how decode attention is best cut, for the shape of 32 query and 8 KV heads of 128.

    PYTHONPATH=engine python benchmarks/tune_decode_attention.py

Prints microseconds of one layer with (programs wanted, least blocks of a part, stages), the best five first.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch

from octavo_engine.kernels.gpu import decode_attention

sys.path.insert(0, str(Path(__file__).parent))
from tune_small_linear import timed

HEADS, KV_HEADS, DIM, BLOCK_SIZE = 32, 8, 128, 64
DEFAULT = decode_attention.PROGRAMS_WANTED, decode_attention.MIN_BLOCKS_PER_PART, decode_attention.STAGES
CASES = ((1, 1120), (8, 1120), (32, 1120), (64, 1120), (128, 1120), (256, 1120), (1, 16384), (16, 16384))


def measure(batch: int, context: int) -> list[tuple[float, int, int, int]]:
    blocks = -(-context // BLOCK_SIZE)
    layer_bytes = batch * blocks * BLOCK_SIZE * KV_HEADS * DIM * 4
    layers = max(1, min(8, int(24e9 / layer_bytes)))
    shape = (2, batch * blocks, KV_HEADS, BLOCK_SIZE, DIM)
    caches = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(layers)]
    tables = torch.randperm(batch * blocks, device="cuda").int().view(batch, blocks)
    qkv = torch.randn(batch, (HEADS + 2 * KV_HEADS) * DIM, device="cuda", dtype=torch.bfloat16)
    cos = torch.randn(context, DIM // 2, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(batch, HEADS * DIM, device="cuda", dtype=torch.bfloat16)
    scratch = decode_attention.Scratch.allocate(batch + 200, HEADS, KV_HEADS, DIM, torch.device("cuda"))
    results = []
    for wanted, least in itertools.product((132, 264, 528), (1, 2, 3)):
        decode_attention.PROGRAMS_WANTED, decode_attention.MIN_BLOCKS_PER_PART = wanted, least
        words = decode_attention.plan_parts(list(range(batch)), [context - 1] * batch, BLOCK_SIZE, KV_HEADS)
        parts = torch.tensor(words, device="cuda").int().view(-1, decode_attention.PART_WORDS)
        for stages in (2, 3, 4):
            decode_attention.STAGES = stages

            def run(cache: torch.Tensor, parts=parts) -> None:
                decode_attention.decode_attention(qkv, cos, cos, cache, tables, parts, scratch, out, DIM**-0.5)

            results.append((round(timed(run, caches, 9), 2), wanted, least, stages))
    decode_attention.PROGRAMS_WANTED, decode_attention.MIN_BLOCKS_PER_PART, decode_attention.STAGES = DEFAULT
    return sorted(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", default=",".join(f"{batch}x{context}" for batch, context in CASES))
    for batch, context in (map(int, case.split("x")) for case in parser.parse_args().cases.split(",")):
        results = measure(batch, context)
        rate = batch * context * KV_HEADS * DIM * 4 / results[0][0] / 1e6
        print(
            f"{batch} x {context}: {rate:.2f} TB/s",
            results[:5],
            "default",
            [row for row in results if row[1:] == DEFAULT],
            flush=True,
        )


if __name__ == "__main__":
    main()
