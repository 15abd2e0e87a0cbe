"""Every algorithm that cuBLAS knows for the products of a step, timed beside the one that torch takes.

    python benchmarks/tune_cublas.py [--tokens 80,128,...] [--algorithms 32]

Prints, for each product and number of tokens: microseconds with torch.mm, with the best algorithm, its place in the
heuristic's list, and the share of the floor (weights read at --copy TB/s, or the products at --matrix TFLOP/s).
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from functools import partial

import torch

SHAPES = {
    "qkv": (6144, 4096),
    "output": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
BF16, F32, COMPUTE_F32 = 14, 0, 68
WORKSPACE = 64 << 20


class Result(ctypes.Structure):
    _fields_ = [
        ("algo", ctypes.c_uint64 * 8), ("workspace", ctypes.c_size_t), ("state", ctypes.c_int),
        ("waves", ctypes.c_float), ("reserved", ctypes.c_int * 4),
    ]  # fmt: skip


class Lt:
    """out [m, n] = x [m, k] · weight [n, k]ᵀ through cublasLt, with an algorithm of one's choice."""

    def __init__(self) -> None:
        torch.cuda.init()
        torch.mm(torch.zeros(8, 8, device="cuda"), torch.zeros(8, 8, device="cuda"))
        major = torch.version.cuda.split(".")[0]
        self.lib = ctypes.CDLL(f"libcublasLt.so.{major}")
        self.handle = ctypes.c_void_p()
        self.check(self.lib.cublasLtCreate(ctypes.byref(self.handle)))
        self.workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")

    def check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"cublasLt status {status}")

    def plans(self, m: int, n: int, k: int, many: int) -> tuple[tuple, list[Result]]:
        c = ctypes
        desc = c.c_void_p()
        self.check(self.lib.cublasLtMatmulDescCreate(c.byref(desc), COMPUTE_F32, F32))
        one = c.c_int32(1)
        self.check(self.lib.cublasLtMatmulDescSetAttribute(desc, 3, c.byref(one), c.c_size_t(4)))
        layouts = []
        for rows, columns in ((k, n), (k, m), (n, m)):
            layout = c.c_void_p()
            self.check(
                self.lib.cublasLtMatrixLayoutCreate(
                    c.byref(layout), BF16, c.c_uint64(rows), c.c_uint64(columns), c.c_int64(rows)
                )
            )
            layouts.append(layout)
        pref = c.c_void_p()
        self.check(self.lib.cublasLtMatmulPreferenceCreate(c.byref(pref)))
        size = c.c_uint64(WORKSPACE)
        self.check(self.lib.cublasLtMatmulPreferenceSetAttribute(pref, 1, c.byref(size), c.c_size_t(8)))
        results = (Result * many)()
        got = c.c_int()
        self.check(
            self.lib.cublasLtMatmulAlgoGetHeuristic(
                self.handle, desc, layouts[0], layouts[1], layouts[2], layouts[2], pref, many, results, c.byref(got)
            )
        )
        return (desc, *layouts), list(results[: got.value])

    def run(self, plan: tuple, result: Result, x: torch.Tensor, out: torch.Tensor, weight: torch.Tensor) -> None:
        c = ctypes
        desc, a, b, d = plan
        alpha, beta = c.c_float(1.0), c.c_float(0.0)
        self.check(
            self.lib.cublasLtMatmul(
                self.handle,
                desc,
                c.byref(alpha),
                c.c_void_p(weight.data_ptr()),
                a,
                c.c_void_p(x.data_ptr()),
                b,
                c.byref(beta),
                c.c_void_p(out.data_ptr()),
                d,
                c.c_void_p(out.data_ptr()),
                d,
                c.byref(result.algo),
                c.c_void_p(self.workspace.data_ptr()),
                c.c_size_t(WORKSPACE),
                c.c_void_p(torch.cuda.current_stream().cuda_stream),
            )
        )


def _mm(x: torch.Tensor, out: torch.Tensor, weight: torch.Tensor) -> None:
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
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(3):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3 / 3 / rounds / len(weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", default="64,80,96,112,128,160,192,224,256,320,384,512,640,768,896,1024,2048,8192")
    parser.add_argument("--algorithms", type=int, default=32)
    parser.add_argument("--copy", type=float, default=3.03)
    parser.add_argument("--matrix", type=float, default=690)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    lt = Lt()
    layers = {"qkv": 32, "output": 32, "gate_up": 32, "down": 32, "head": 1}
    for m in map(int, arguments.tokens.split(",")):
        sums = [0.0, 0.0, 0.0]
        for name, (n, k) in SHAPES.items():
            if arguments.only and name not in arguments.only:
                continue
            many = max(1, min(6, (200 << 20) // (n * k * 2)))
            weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(many)]
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
            torch_us = timed(partial(_mm, x, out), weights)
            plan, results = lt.plans(m, n, k, arguments.algorithms)
            times = []
            for index, result in enumerate(results):
                try:
                    times.append((timed(partial(lt.run, plan, result, x, out), weights), index))
                except RuntimeError as error:
                    print("  refused", index, error)
            torch.mm(x, weights[0].t(), out=out)
            expected = out.clone()
            best_us, best = min(times)
            lt.run(plan, results[best], x, out, weights[0])
            assert torch.allclose(out.float(), expected.float(), atol=0.05, rtol=0.05)
            floor = max(n * k * 2 / arguments.copy / 1e6, 2 * m * n * k / arguments.matrix / 1e6)
            first = next(t for t, i in times if i == 0)
            print(
                f"{m:5d} {name:8s} torch {torch_us:8.1f}  first {first:8.1f}  best {best_us:8.1f} (#{best} of"
                f" {len(results)}, {torch_us / best_us:.3f} x)  floor {floor:8.1f} {floor / torch_us:.2f} ->"
                f" {floor / best_us:.2f}  algo {[hex(word) for word in results[best].algo[:4]]}", flush=True,
            )  # fmt: skip
            for position, us in enumerate((torch_us, best_us, floor)):
                sums[position] += us * layers[name]
        print(
            f"{m:5d} step: torch {sums[0] / 1e3:.2f} ms, best {sums[1] / 1e3:.2f}, floor {sums[2] / 1e3:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
