"""Products by cuBLAS, with the algorithm that was measured to be the fastest where its own choice is not.

cuBLAS ranks its algorithms by a model of the chip and takes the first; on an H100 others are up to 20 % faster. The
table names them by their place in that ranking, which is the same for a version of the library and a kind of device:
elsewhere it is not used, and torch takes what cuBLAS proposes. `benchmarks/tune_cublas.py` writes it.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("cublas_table.json")
"""{device: {version of cublasLt: {"outputs x inputs": {tokens: place}}}}, with " +" for products that are added."""
CANDIDATES = 8
"""Algorithms that cuBLAS is asked for: a place in the table counts in a ranking of so many. It knows no more."""
WORKSPACE_BYTES = 64 << 20
_BF16, _F32, _COMPUTE_F32 = 14, 0, 68
_TRANSPOSE_A, _MAX_WORKSPACE = 3, 1  # attributes of a product and of a preference

Places = Mapping[str, Mapping[str, int]]


def places(table: Mapping[str, Any], device: str, version: int) -> Places:
    """What the table holds for this device and library: nothing if it was measured with others."""
    found: Places = table.get(device, {}).get(str(version), {})
    return found


def entry(outputs: int, inputs: int, add: bool = False) -> str:
    """A matrix's name in the table. Added to what is there, its products are other kernels with other times."""
    return f"{outputs} x {inputs}" + " +" * add


def place(known: Places, tokens: int, outputs: int, inputs: int, add: bool = False) -> int | None:
    """The algorithm to take, or None where cuBLAS's own choice is the best known."""
    return known.get(entry(outputs, inputs, add), {}).get(str(tokens))


class Products:
    """x · weightᵀ on one device and one stream."""

    def __init__(self, device: torch.device) -> None:
        self._known: Places = {}
        self._taken: dict[tuple[int, int, int, bool], Algorithm | None] = {}
        if device.type == "cuda" and torch.version.cuda:
            self._lt = Lt(device)
            name = torch.cuda.get_device_name(device)
            self._known = places(json.loads(TABLE.read_text()), name, self._lt.version)

    def mm(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """x: [tokens, inputs], weight: [outputs, inputs], out: [tokens, outputs], all contiguous and of one type."""
        algorithm = self._algorithm(x, weight, add=False)
        if algorithm is None:
            torch.mm(x, weight.t(), out=out)
        else:
            self._lt.run(algorithm, x, weight, out)

    def add(self, x: Tensor, weight: Tensor, into: Tensor) -> None:
        """into += x · weightᵀ, the sum rounded once. Shapes as in `mm`."""
        algorithm = self._algorithm(x, weight, add=True)
        if algorithm is None:
            into.addmm_(x, weight.t())
        else:
            self._lt.run(algorithm, x, weight, into, add=True)

    def _algorithm(self, x: Tensor, weight: Tensor, add: bool) -> Algorithm | None:
        product = x.shape[0], weight.shape[0], weight.shape[1], add
        if product not in self._taken:
            number = place(self._known, *product) if x.dtype is torch.bfloat16 else None
            ranked = [] if number is None else self._lt.candidates(*product[:3])
            self._taken[product] = ranked[number] if number is not None and number < len(ranked) else None
        return self._taken[product]


class _Result(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8), ("workspace", ctypes.c_size_t), ("state", ctypes.c_int),
        ("waves", ctypes.c_float), ("reserved", ctypes.c_int * 4),
    )  # fmt: skip


@dataclass(frozen=True)
class Algorithm:
    """One way to compute products of one shape. layouts: of weight, x and out, columns first as cuBLAS counts."""

    layouts: tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    result: _Result


class Lt:
    """cublasLt, the library that torch has loaded, for bfloat16 summed in float32."""

    def __init__(self, device: torch.device) -> None:
        assert torch.version.cuda
        torch.cuda.init()
        self._library = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.partition('.')[0]}")
        self._library.cublasLtGetVersion.restype = ctypes.c_size_t
        self._handle = ctypes.c_void_p()
        self._call("cublasLtCreate", ctypes.byref(self._handle))
        self._product = ctypes.c_void_p()
        self._call("cublasLtMatmulDescCreate", ctypes.byref(self._product), _COMPUTE_F32, _F32)
        yes = ctypes.c_int32(1)
        self._call("cublasLtMatmulDescSetAttribute", self._product, _TRANSPOSE_A, ctypes.byref(yes), ctypes.c_size_t(4))
        self._preference = ctypes.c_void_p()
        self._call("cublasLtMatmulPreferenceCreate", ctypes.byref(self._preference))
        size = ctypes.c_uint64(WORKSPACE_BYTES)
        self._call(
            "cublasLtMatmulPreferenceSetAttribute", self._preference, _MAX_WORKSPACE, ctypes.byref(size),
            ctypes.c_size_t(8),
        )  # fmt: skip
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)

    @property
    def version(self) -> int:
        return int(self._library.cublasLtGetVersion())

    def candidates(self, tokens: int, outputs: int, inputs: int, many: int = CANDIDATES) -> list[Algorithm]:
        """The best algorithms for a shape in the order in which cuBLAS ranks them, `many` at most.

        The ranking does not know whether the product will be added, and `run` may refuse one of them then.
        """
        layouts = self._layout(inputs, outputs), self._layout(inputs, tokens), self._layout(outputs, tokens)
        results, found = (_Result * many)(), ctypes.c_int()
        self._call(
            "cublasLtMatmulAlgoGetHeuristic", self._handle, self._product, *layouts, layouts[2], self._preference, many,
            results, ctypes.byref(found),
        )  # fmt: skip
        return [Algorithm(layouts, result) for result in results[: found.value]]

    def run(self, algorithm: Algorithm, x: Tensor, weight: Tensor, out: Tensor, add: bool = False) -> None:
        """add: to what is in `out`, instead of writing over it."""
        of_weight, of_x, of_out = algorithm.layouts
        to = ctypes.c_void_p(out.data_ptr())
        factor = self._one if add else self._zero  # of the matrix that is added, which is `out` itself
        self._call(
            "cublasLtMatmul", self._handle, self._product, ctypes.byref(self._one),
            ctypes.c_void_p(weight.data_ptr()), of_weight, ctypes.c_void_p(x.data_ptr()), of_x,
            ctypes.byref(factor), to, of_out, to, of_out, ctypes.byref(algorithm.result),
            ctypes.c_void_p(self._workspace.data_ptr()), ctypes.c_size_t(WORKSPACE_BYTES),
            ctypes.c_void_p(torch.cuda.current_stream(out.device).cuda_stream),
        )  # fmt: skip

    def _layout(self, rows: int, columns: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        size = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows)
        self._call("cublasLtMatrixLayoutCreate", ctypes.byref(layout), _BF16, *size)
        return layout

    def _call(self, function: str, *arguments: Any) -> None:
        """Raises RuntimeError with the library's status."""
        if status := getattr(self._library, function)(*arguments):
            raise RuntimeError(f"{function} ended with status {status}")
