"""The algorithms that cuBLAS ranks best for the products of a step, timed beside the one that torch takes.

    PYTHONPATH=engine python benchmarks/tune_cublas.py [--tokens 80,128,...] [--table FILE]

Prints, for each product and number of tokens: microseconds with torch, with the best algorithm, its place in the
ranking, and the share of the floor (weights read at --copy TB/s, which is measured unless given, or the products at
--matrix TFLOP/s). --table: what kernels/gpu/cublas_table.json holds, with what was found for this device and version
put in.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from gpu import copy_rate

from octavo_engine.kernels.gpu.cublas import TABLE, Lt, entry
from octavo_engine.runner.gpu_steps import GRAPH_SIZES

SHAPES = {
    "qkv": (6144, 4096),
    "output": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
ADDED = ("output", "down")
"""Products that a step adds to the residual."""
FEWEST = 24
"""Tokens: where the fused road ends differs by device, and fewer always take it."""
WORTH_IT = 1.02
"""An algorithm is taken in place of torch's choice from this ratio of their times on: below, it is noise."""

LONG_ENOUGH_US = 15e3
"""Measured for so long, a time varies by less than WORTH_IT."""


def _torchs(x: torch.Tensor, out: torch.Tensor, add: bool, weight: torch.Tensor) -> None:
    if add:
        out.addmm_(x, weight.t())
    else:
        torch.mm(x, weight.t(), out=out)


def timed(call: Callable[[torch.Tensor], None], weights: list[torch.Tensor]) -> float:
    """us of one call, over weights that do not stay in the cache."""
    call(weights[0])
    graph = torch.cuda.CUDAGraph()
    rounds = max(2, 12 // len(weights))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for weight in weights:
                call(weight)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def us(replays: int) -> float:
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e3 / replays / rounds / len(weights)

    us(1)
    return us(max(3, int(LONG_ENOUGH_US / us(1) / rounds / len(weights))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sizes = [*(size for size in GRAPH_SIZES if size >= FEWEST), 2048, 4096, 8192]
    parser.add_argument("--tokens", default=",".join(map(str, sizes)))
    parser.add_argument("--copy", type=float)
    parser.add_argument("--matrix", type=float, default=690)
    parser.add_argument("--only", default="")
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    copy = arguments.copy or copy_rate()
    lt = Lt(torch.device("cuda"))
    layers = {"qkv": 32, "output": 32, "gate_up": 32, "down": 32, "head": 1}
    table = json.loads(TABLE.read_text())
    known = table.setdefault(torch.cuda.get_device_name(), {}).setdefault(str(lt.version), {})
    for m in map(int, arguments.tokens.split(",")):
        sums = [0.0, 0.0, 0.0]
        for name, (n, k) in SHAPES.items():
            if arguments.only and name not in arguments.only:
                continue
            many = max(1, min(6, (200 << 20) // (n * k * 2)))
            weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(many)]
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            add = name in ADDED
            start = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
            out = start.clone()
            # Timed, products are added to the same sums again and again, which stay far from infinity.
            torch_us = timed(partial(_torchs, x, out, add), weights)
            ranked = lt.candidates(m, n, k)
            expected = torch.mm(x, weights[0].t()).float() + (start.float() if add else 0)
            times = []
            for place, algorithm in enumerate(ranked):

                def run(weight: torch.Tensor, algorithm=algorithm, x=x, out=out, add=add) -> None:
                    lt.run(algorithm, x, weight, out, add)

                out.copy_(start)
                try:
                    run(weights[0])
                except RuntimeError as error:
                    print(f"{m:5d} {name:8s} no. {place}: {error}", flush=True)
                    continue
                if not (out.float() - expected).norm() < 0.01 * expected.norm():
                    print(f"{m:5d} {name:8s} no. {place} computes something else", flush=True)
                    continue
                times.append((timed(run, weights), place))
            if not times:
                continue
            best_us, best = min(times)
            of_shape = known.setdefault(entry(n, k, add), {})
            of_shape.pop(str(m), None)
            if torch_us / best_us >= WORTH_IT:
                of_shape[str(m)] = best
            floor = max(n * k * 2 / copy / 1e6, 2 * m * n * k / arguments.matrix / 1e6)
            print(
                f"{m:5d} {name:8s} torch {torch_us:8.1f}  best {best_us:8.1f} (no. {best} of {len(ranked)},"
                f" {torch_us / best_us:.3f} x)  floor {floor:8.1f} {floor / torch_us:.2f} -> {floor / best_us:.2f}",
                flush=True,
            )
            for position, us in enumerate((torch_us, min(torch_us, best_us), floor)):
                sums[position] += us * layers[name]
        print(
            f"{m:5d} step: torch {sums[0] / 1e3:.2f} ms, best {sums[1] / 1e3:.2f}, floor {sums[2] / 1e3:.2f}",
            flush=True,
        )
        if arguments.table:  # what is measured is kept, whatever becomes of the rest
            arguments.table.write_text(text_of(table))


def text_of(table: dict) -> str:
    """JSON with a line for each shape, its tokens in order."""
    for versions in table.values():
        for shapes in versions.values():
            for shape in shapes:
                shapes[shape] = dict(sorted(shapes[shape].items(), key=lambda item: int(item[0])))
    text = json.dumps(table, indent=1)
    return re.sub(r"\{\s*((?:\"\d+\": \d+,?\s*)+)\}", lambda m: "{" + " ".join(m.group(1).split()) + "}", text) + "\n"


if __name__ == "__main__":
    main()
