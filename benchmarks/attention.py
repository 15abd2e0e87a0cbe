"""Attention alone, one layer of 32 query and 8 KV heads of 128: bytes and operations a second.

    PYTHONPATH=engine python benchmarks/attention.py [--decode] [--prefill]

Decode reads the cache, so that its measure is the rate of a large copy on the same device; prefill is measured in turns
with cuDNN's attention over contiguous tensors. Called by gpu.py as well, whose result file holds these lines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from octavo_engine.kernels.gpu.decode_attention import PART_WORDS, Scratch, decode_attention, plan_parts
from octavo_engine.kernels.gpu.invariant_attention import invariant_attention, tile_tokens
from octavo_engine.kernels.gpu.prefill_attention import (
    TILE_WORDS,
    CacheLoads,
    Chunk,
    parts_wanted,
    plan_tiles,
    prefill_attention,
)
from octavo_engine.kernels.gpu.prefill_attention import Scratch as TileScratch
from octavo_engine.kernels.gpu.prefill_attention_hopper import takes
from octavo_engine.kernels.kv_scales import stored

sys.path.insert(0, str(Path(__file__).parent))

HEADS, KV_HEADS, DIM, BLOCK_SIZE = 32, 8, 128, 64
BATCHES, CONTEXTS, PROMPTS = (32, 256), (1024, 4096, 16384), (2048, 8192, 16384)
CHUNKS, BEHIND = (64, 128, 256, 512), 8000
ROUNDS = 7
CACHE_KINDS = {"bfloat16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}


def decode(copy_bytes_per_s: float) -> dict[str, dict[str, float]]:
    """Of each batch and context: microseconds, bytes a second and their share of the copy's, by type of the cache."""
    rows: dict[str, dict[str, float]] = {}
    for batch in BATCHES:
        for context in CONTEXTS:
            row = rows[f"{batch}x{context}"] = {}
            for name, kind in CACHE_KINDS.items():
                us = _decode_us(batch, context, kind)
                read = batch * context * 2 * KV_HEADS * DIM * kind.itemsize
                row |= {
                    f"{name}_us": round(us, 1),
                    f"{name}_TBps": round(read / us / 1e6, 3),
                    f"{name}_of_copy": round(read / us * 1e6 / copy_bytes_per_s, 3),
                }
            print("decode attention", f"{batch}x{context}", row, flush=True)
    return rows


def _decode_us(batch: int, context: int, kind: torch.dtype) -> float:
    torch.cuda.empty_cache()
    blocks = -(-context // BLOCK_SIZE)
    size = 2 * batch * blocks * KV_HEADS * BLOCK_SIZE * DIM * kind.itemsize
    # Several layers, so that none of it is in the second-level cache when its turn comes.
    layers = max(1, min(4, int(12e9 / size)))
    caches = [_cache(batch * blocks, BLOCK_SIZE, kind) for _ in range(layers)]
    tables = torch.randperm(batch * blocks, device="cuda").int().view(batch, blocks)
    qkv = torch.randn(batch, (HEADS + 2 * KV_HEADS) * DIM, device="cuda", dtype=torch.bfloat16)
    turns = torch.randn(context, DIM // 2, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(batch, HEADS * DIM, device="cuda", dtype=torch.bfloat16)
    scratch = Scratch.allocate(batch, HEADS, KV_HEADS, DIM, torch.device("cuda"))
    words = plan_parts(list(range(batch)), [context - 1] * batch, BLOCK_SIZE, KV_HEADS)
    parts = torch.tensor(words, device="cuda").int().view(-1, PART_WORDS)

    def run() -> None:
        for cache in caches:
            decode_attention(qkv, turns, turns, cache, tables, parts, scratch, out, DIM**-0.5)

    return 1e3 * milliseconds({"": graph_of(run)})[""] / layers


def prefill() -> dict[str, dict[str, float]]:
    """Of each length: TFLOP/s of what causality leaves, ours, with --deterministic, and cuDNN's."""
    rows = {"48x170": _short_prompts(), **{f"{tokens}@{BEHIND}": _chunk(tokens) for tokens in CHUNKS}}
    print("prefill attention", rows, flush=True)
    for tokens in PROMPTS:
        rates = _prefill(tokens)
        rates |= {"of_cudnn": rates["default"] / rates["cudnn"]}
        rows[str(tokens)] = {name: round(rate, 3 if rate < 2 else 1) for name, rate in rates.items()}
        print("prefill attention", tokens, rows[str(tokens)], flush=True)
    return rows


def _prefill(tokens: int) -> dict[str, float]:
    torch.manual_seed(0)
    qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * DIM, device="cuda", dtype=torch.bfloat16)
    query, key, value = (
        part.view(1, tokens, -1, DIM).transpose(1, 2).contiguous()
        for part in qkv.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=1)
    )
    blocks = tokens // BLOCK_SIZE
    table = torch.randperm(blocks, device="cuda").int()
    caches = {name: torch.empty(2, blocks, KV_HEADS, BLOCK_SIZE, DIM, device="cuda").to(kind)
              for name, kind in CACHE_KINDS.items()}  # fmt: skip
    for cache in caches.values():
        for part, given in zip(cache, (key, value), strict=True):
            ordered = given[0].view(KV_HEADS, blocks, BLOCK_SIZE, DIM).transpose(0, 1)
            part.view(torch.uint8)[table.long()] = stored(ordered, 1.0, cache.dtype).view(torch.uint8)
    out = torch.empty(tokens, HEADS * DIM, device="cuda", dtype=torch.bfloat16)
    chunk = [Chunk(0, 0, 0, tokens)]
    loads = {name: CacheLoads.of(cache) for name, cache in caches.items()}
    loads["default"] = CacheLoads.of(caches["bfloat16"], takes(caches["bfloat16"], torch.bfloat16))
    wide, tiles, alike = (
        torch.tensor(plan_tiles(chunk, rows), device="cuda").int().view(-1, TILE_WORDS)
        for rows in (loads["default"].tile_rows, loads["bfloat16"].tile_rows, tile_tokens(HEADS // KV_HEADS))
    )
    rest = (out, KV_HEADS, BLOCK_SIZE, DIM**-0.5)

    def cudnn() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    runs: dict[str, Callable[[], object]] = {
        "default": lambda: prefill_attention(qkv, loads["default"], table[None], wide, *rest),
        "portable": lambda: prefill_attention(qkv, loads["bfloat16"], table[None], tiles, *rest),
        "fp8_e4m3": lambda: prefill_attention(qkv, loads["fp8_e4m3"], table[None], tiles, *rest),
        "deterministic": lambda: invariant_attention(qkv, loads["bfloat16"], table[None], alike, *rest),
        "cudnn": cudnn,
    }
    expected = cudnn()[0].transpose(0, 1).reshape(tokens, HEADS * DIM).float()
    for name, run in runs.items():
        if name != "cudnn":
            run()
            error = ((out.float() - expected).norm() / expected.norm()).item()
            assert error < (0.05 if name == "fp8_e4m3" else 0.01), (name, error)
    operations = 4 * HEADS * DIM * tokens * (tokens + 1) / 2
    return {name: operations / ms / 1e9 for name, ms in milliseconds(runs).items()}


def _short_prompts() -> dict[str, float]:
    """Microseconds for 48 prompts of 170 tokens at once, with the kernel that the device gets and the portable one."""
    count, tokens, blocks = 48, 170, 3
    qkv = torch.randn(count * tokens, (HEADS + 2 * KV_HEADS) * DIM, device="cuda", dtype=torch.bfloat16)
    cache = _cache(count * blocks, BLOCK_SIZE, torch.bfloat16)
    table = torch.randperm(count * blocks, device="cuda").int().view(count, blocks)
    out = torch.empty(count * tokens, HEADS * DIM, device="cuda", dtype=torch.bfloat16)
    chunks = [Chunk(row * tokens, row, 0, tokens) for row in range(count)]
    runs: dict[str, Callable[[], object]] = {}
    for name, wide in (("default_us", takes(cache, torch.bfloat16)), ("portable_us", False)):
        loads = CacheLoads.of(cache, wide)
        tiles = torch.tensor(plan_tiles(chunks, loads.tile_rows), device="cuda").int().view(-1, TILE_WORDS)
        runs[name] = partial(
            prefill_attention, qkv, loads, table, tiles, out, KV_HEADS, BLOCK_SIZE, DIM**-0.5
        )  # fmt: skip
    return {name: round(1e3 * ms, 1) for name, ms in milliseconds(runs).items()}


def _chunk(tokens: int) -> dict[str, float]:
    """A chunk in the middle of a prompt of 16,000 tokens: microseconds and TFLOP/s with its keys split over programs,
    with the same tiles whole, and likewise with wide ones.
    """
    torch.cuda.empty_cache()
    columns = -(-(BEHIND + tokens) // BLOCK_SIZE)
    # Several layers, as for decodes.
    caches = [_cache(columns, BLOCK_SIZE, torch.bfloat16) for _ in range(4)]
    table = torch.randperm(columns, device="cuda").int()[None]
    qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * DIM, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(tokens, HEADS * DIM, device="cuda", dtype=torch.bfloat16)
    scratch = TileScratch.allocate(HEADS, DIM, torch.device("cuda"))
    ways = {"split": (False, parts_wanted(HEADS)), "whole": (False, 0)}
    if takes(caches[0], torch.bfloat16):
        ways |= {"wide_split": (True, parts_wanted(HEADS, wide=True)), "wide": (True, 0)}
    runs: dict[str, Callable[[], object]] = {}
    for name, (wide, room) in ways.items():
        loads = [CacheLoads.of(cache, wide) for cache in caches]
        one = [Chunk(0, 0, BEHIND, tokens)]
        words = plan_tiles(one, loads[0].tile_rows, BLOCK_SIZE, room, loads[0].tile_step)
        tiles = torch.tensor(words, device="cuda").int().view(-1, TILE_WORDS)

        def run(loads: list[CacheLoads] = loads, tiles: torch.Tensor = tiles) -> None:
            for layer in loads:
                prefill_attention(
                    qkv, layer, table, tiles, out, KV_HEADS, BLOCK_SIZE, DIM**-0.5, scratch=scratch
                )  # fmt: skip

        runs[name] = graph_of(run)
    operations = 4 * HEADS * DIM * tokens * (BEHIND + (tokens + 1) / 2)
    row: dict[str, float] = {}
    for name, ms in milliseconds(runs).items():
        row |= {f"{name}_us": round(1e3 * ms / 4, 1), f"{name}_TFLOPs": round(operations * 4 / ms / 1e9, 1)}
    return row


def _cache(blocks: int, block_size: int, kind: torch.dtype) -> torch.Tensor:
    cache = torch.empty((2, blocks, KV_HEADS, block_size, DIM), dtype=kind, device="cuda")
    # Numbers from 0 to 1, as their bits: a tensor of floats to be converted would take four times the room.
    if kind.itemsize == 1:
        cache.view(torch.uint8).random_(0, 0x38)
    else:
        cache.view(torch.int16).random_(0, 0x3F80)
    return cache


def graph_of(run: Callable[[], object]) -> Callable[[], object]:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return partial(_replay, graph, run)


def _replay(graph: torch.cuda.CUDAGraph, captured: Callable[[], object]) -> None:
    """captured: held, as the tensors that it holds are what the graph reads."""
    graph.replay()


def milliseconds(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median of a call each, the candidates in turns, as the clock falls while the chip is busy."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            run()
            begin.record()
            for _ in range(3):
                run()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / 3)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    from gpu import copy_rate

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--prefill", action="store_true")
    asked = parser.parse_args()
    both = asked.decode == asked.prefill
    copy = copy_rate()
    torch.cuda.empty_cache()
    found: dict[str, object] = {"gpu": torch.cuda.get_device_name(), "copy_TBps": round(copy, 3)}
    if asked.decode or both:
        found["decode"] = decode(copy * 1e12)
    if asked.prefill or both:
        found["prefill"] = prefill()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
