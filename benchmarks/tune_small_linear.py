"""Find the fastest shapes of kernels/gpu/small_linear.py for a model's products, beside cuBLAS.

    PYTHONPATH=engine python benchmarks/tune_small_linear.py [--tokens 1,8,16,32,64,96,128] [--output FILE]

Each candidate runs over several weight matrices in a CUDA graph, so that none of them is found in the L2 cache. cuBLAS
does what its road does beside the product: gate and up are activated, and a branch's end is added to the residual and
normed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
from pathlib import Path

import torch
import triton

from octavo_engine.kernels.gpu.act_mul import act_mul
from octavo_engine.kernels.gpu.cublas import Products
from octavo_engine.kernels.gpu.norm import rms_norm
from octavo_engine.kernels.gpu.small_linear import MAX_SPLIT_OUTPUTS, Partial, Shape, num_shares, small_linear

# name: outputs, inputs, gated, ends a residual branch
PRODUCTS = {
    "qkv": (6144, 4096, False, False),
    "output": (4096, 4096, False, True),
    "gate_up": (14336, 4096, True, False),
    "down": (4096, 14336, False, True),
    "head": (128256, 4096, False, False),
}
SHARED_MEMORY = 220_000
SHARES_OF_MEMORY = (SHARED_MEMORY, 112_000, 74_000)


def candidates(tokens: int, outputs: int, inputs: int, gated: bool) -> list[Shape]:
    found = []
    if tokens == 1:
        for width, depth, stages, warps in itertools.product(
            (2, 4, 8, 16), (512, 1024, 2048, 4096), (1, 2, 3), (2, 4, 8)
        ):
            each = width * (2 if gated else 1) * depth // (warps * 32)
            staged = width * (2 if gated else 1) * depth * 2 * stages if stages > 1 else 0
            if 32 <= each <= 256 and inputs % depth == 0 and staged <= SHARED_MEMORY:
                found.append(Shape(width, depth, stages, warps))
        return found
    columns = max(16, triton.next_power_of_2(tokens))
    # Many tokens want many rows: they are read once for each program, from a cache of some 6 TB/s that the weights pass
    # through as well.
    for rows, depth, splits in itertools.product((16, 32, 64, 128, 256), (32, 64, 128, 256), (1, 2, 4, 8)):
        width = rows // 2 if gated else rows
        tile = (rows + columns) * depth * 2
        programs = outputs // width * splits
        if width < 16 or rows < columns // 2 or rows > 8 * columns or not 8192 <= tile <= 65536:
            continue
        if inputs % (splits * depth) or (splits > 1 and outputs * rows // width * splits > MAX_SPLIT_OUTPUTS):
            continue
        if not 100 <= programs <= (2100 if splits == 1 else 600):
            continue
        # As many stages as fit where one, two or three programs share a multiprocessor.
        for stages in sorted({min(8, budget // tile, inputs // splits // depth) for budget in SHARES_OF_MEMORY}):
            if stages >= 2 and tile * stages >= 32_000:
                # Of 255 registers a thread has, 32 to 128 hold its part of the sums.
                many = (2, 4) if rows <= 32 else (4,) if rows == 64 else (4, 8) if rows * columns <= 8192 else (8,)
                found += [Shape(width, depth, stages, warps, splits) for warps in many]
    return found


class Case:
    """The tensors of one product, and how it is called."""

    def __init__(self, name: str, tokens: int, copies: int) -> None:
        outputs, inputs, gated, ends = PRODUCTS[name]
        rows = outputs * (2 if gated else 1)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

        self.weights = [random(rows, inputs) for _ in range(copies)]
        self.x, self.out = random(tokens, inputs), random(tokens, outputs)
        self.wide = random(tokens, rows)
        self.gated, self.ends = gated, ends
        self.residual, self.norm = random(tokens, outputs), random(outputs)
        self.shares_in = torch.rand(128, tokens, device="cuda")
        self.partial = Partial.allocate(tokens, torch.device("cuda"))
        self.products = Products(torch.device("cuda"))
        self.tokens = tokens

    def call(self, shape: Shape, weight: torch.Tensor) -> None:
        if self.ends:
            shares = torch.empty(num_shares(self.out.shape[1], shape), self.tokens, device="cuda")
            small_linear(
                self.x, weight, self.out, shape=shape, residual=self.residual, next_norm=self.norm, shares=shares,
                partial=self.partial,
            )  # fmt: skip
        else:
            small_linear(
                self.x, weight, self.out, shape=shape, norm_shares=self.shares_in, eps=1e-5, gated=self.gated,
                partial=self.partial,
            )  # fmt: skip

    def cublas(self, weight: torch.Tensor) -> None:
        if self.ends:
            self.products.add(self.x, weight, self.residual)
            rms_norm(self.residual, self.norm, self.out, 1e-5)
            return
        self.products.mm(self.x, weight, self.wide)
        if self.gated:
            act_mul(self.wide, self.out, "silu")


def compile_all(job: tuple[str, int, list[Shape]]) -> None:
    name, tokens, shapes = job
    case = Case(name, tokens, 1)
    for shape in shapes:
        try:
            case.call(shape, case.weights[0])
        except Exception as error:  # noqa: BLE001 - a shape that does not compile is skipped, whatever the reason
            print("not compiled", name, tokens, shape, str(error)[:80], flush=True)


def timed(run: object, weights: list[torch.Tensor], repeats: int) -> float:
    """Microseconds of one call."""
    for weight in weights[:1]:
        run(weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            run(weight)
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / len(weights) * 1e3)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", default="1,8,16,32,64")
    parser.add_argument("--products", default=",".join(PRODUCTS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    jobs = [
        (name, int(tokens), candidates(int(tokens), *PRODUCTS[name][:3]))
        for tokens in arguments.tokens.split(",")
        for name in arguments.products.split(",")
    ]
    pieces = [(name, tokens, shapes[at : at + 8]) for name, tokens, shapes in jobs for at in range(0, len(shapes), 8)]
    print(sum(len(shapes) for _, _, shapes in jobs), "candidates", flush=True)
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, 14)) as pool:
        pool.map(compile_all, pieces, chunksize=1)
    rows = []
    for name, tokens, shapes in jobs:
        case = Case(name, tokens, 2 if name == "head" else 4 if name == "gate_up" else 8)
        call = case.call
        nbytes = case.weights[0].nbytes
        results = []
        for shape in shapes:
            try:
                results.append((timed(lambda w, s=shape, c=call: c(s, w), case.weights[:4], 3), shape))
            except Exception as error:  # noqa: BLE001 - a shape that does not compile is skipped, whatever the reason
                print(name, tokens, shape, str(error)[:80])
        results.sort(key=lambda pair: pair[0])
        finals = sorted(
            ((timed(lambda w, s=s, c=call: c(s, w), case.weights, 15), s) for _, s in results[:4]), key=lambda p: p[0]
        )
        cublas = timed(case.cublas, case.weights, 15)
        row = {
            "product": name, "tokens": tokens, "cublas_us": round(cublas, 2),
            "TBps": round(nbytes / finals[0][0] / 1e6, 3),
            "best": [(round(us, 2), s.width, s.depth, s.stages, s.warps, s.splits) for us, s in finals],
        }  # fmt: skip
        rows.append(row)
        print(json.dumps(row), flush=True)
    if arguments.output:
        arguments.output.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


if __name__ == "__main__":
    main()
