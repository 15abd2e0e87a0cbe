"""Compile every kernel that a model's steps launch, for a GPU that is not there.

The decoder runs over tensors without memory while launches stop after compiling, so that what is compiled here is what
a step launches, found on the same road and under the same keys. Called by `octavo compile-kernels`, and by several of
it at once where an engine starts without its kernels (compile_beside.py).
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import build, driver
from triton.runtime.jit import JITFunction

from octavo_engine.kernels.gpu import prebuilt
from octavo_engine.kernels.gpu.adjusted import sample_adjusted
from octavo_engine.kernels.gpu.adjustments import Adjustments, mask_words
from octavo_engine.kernels.gpu.decode_attention import PART_WORDS, max_parts
from octavo_engine.kernels.gpu.early_launch import early_launch
from octavo_engine.kernels.gpu.logprobs import MOST, TOLD_WORDS, LogprobScratch, logprobs
from octavo_engine.kernels.gpu.prefill_attention import TILE_WORDS
from octavo_engine.kernels.gpu.sample import SamplingScratch, SamplingState, sample
from octavo_engine.kernels.gpu.state import SAMPLING_WORDS, set_blocks, set_sampling
from octavo_engine.loader import weights
from octavo_engine.models.config import DecoderConfig
from octavo_engine.models.gpu_decoder import GATED_TOKENS, DeviceStep, GpuDecoder
from octavo_engine.runner.device import E4M3_CAPABILITY
from octavo_engine.runner.gpu_steps import GRAPH_SIZES

ARCHITECTURES = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_89": (GPUTarget("cuda", 89, 32), 99 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * 1024),
}
"""Name as NVIDIA gives it: what Triton compiles for, and the bytes of shared memory that a program may have."""
META = torch.device("meta")


def compile_kernels(
    model: DecoderConfig, architecture: str, folder: Path, block_size: int, dtype: torch.dtype = torch.bfloat16,
    share: tuple[int, int] = (0, 1),
) -> int:  # fmt: skip
    """Fill `folder` with the kernels of this model; returns how many were compiled and not there yet.

    share: (i, n) for every n-th kernel from the i-th on, so that n processes fill the folder together.
    """
    target, shared_memory = ARCHITECTURES[architecture]
    compilations = prebuilt.use()
    folder.mkdir(parents=True, exist_ok=True)
    with _absent_gpu(target, shared_memory, folder, share) as launched:
        _launch_all(model, block_size, dtype, e4m3=int(target.arch) >= 10 * E4M3_CAPABILITY[0] + E4M3_CAPABILITY[1])
        _build_launchers(launched)
    return compilations.count


class Absent:
    """A model without memory, whose steps are launched as an engine's are."""

    MAX_SEQS = 256

    def __init__(self, model: DecoderConfig, block_size: int, dtype: torch.dtype) -> None:
        self.model, self.block_size, self.dtype = model, block_size, dtype
        self.max_seqs, self.max_tokens, self.columns = self.MAX_SEQS, 512, 64
        length = self.columns * block_size
        self.half = torch.empty((length, model.head_dim // 2), dtype=dtype, device=META)
        self.token_ids, self.block_tables = ints(self.max_seqs, length), ints(self.max_seqs, self.columns)
        self.tensors = weights.allocate(model, dtype, META)
        self.state = SamplingState.allocate(self.max_seqs, META)
        self.scratch = SamplingScratch.allocate(self.max_seqs, model.vocab_size, META)

    def decoder(self, kv_dtype: torch.dtype, deterministic: bool = False) -> GpuDecoder:
        model = self.model
        kv_cache = torch.empty(
            (model.num_layers, 2, self.columns, model.num_kv_heads, self.block_size, model.head_dim),
            dtype=kv_dtype, device=META,
        )  # fmt: skip
        return GpuDecoder(
            model, self.tensors, self.half, self.half, kv_cache, self.token_ids, self.block_tables, self.max_tokens,
            self.max_seqs, deterministic,
        )  # fmt: skip

    def step(self, decoder: GpuDecoder, decodes: int, chunk: int, wide: bool = False) -> None:
        total = decodes + chunk
        parts = max_parts(decodes, self.model.num_kv_heads)
        described = DeviceStep(
            ints(total), ints(total), ints(total), num_decodes=decodes,
            parts={window: ints(parts, PART_WORDS) for window in set(self.model.windows)},
            tiles=ints(1, TILE_WORDS) if chunk or decoder.deterministic else None,
            logit_tokens=ints(1) if chunk else None, wide=wide,
        )  # fmt: skip
        logits = decoder.forward(described)
        tokens, out = ints(logits.shape[0]), ints(logits.shape[0])
        sample(logits, tokens, described.rows, described.positions, self.state, self.scratch, self.token_ids, out)


def ints(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=META)


def _launch_all(model: DecoderConfig, block_size: int, dtype: torch.dtype, e4m3: bool) -> None:
    """e4m3: whether the device has that type of eight bits."""
    absent = Absent(model, block_size, dtype)
    set_blocks(ints(1, 3), absent.block_tables)
    set_sampling(ints(1, SAMPLING_WORDS), absent.state)
    usual = absent.decoder(dtype)
    for size in GRAPH_SIZES:
        if size <= GATED_TOKENS:
            absent.step(usual, size, 0)
    absent.step(usual, 0, 16)
    for decodes in unlike_decodes():
        absent.step(usual, decodes, 16)
    if usual.wide_tile_tokens:
        absent.step(usual, 1, 16, wide=True)
    deterministic = absent.decoder(dtype, deterministic=True)
    for decodes in unlike_decodes():
        absent.step(deterministic, decodes, 0)
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2) if e4m3 else (torch.float8_e5m2,):
        small = absent.decoder(kind)
        for decodes in unlike_decodes():
            absent.step(small, decodes, 16)
        absent.step(absent.decoder(kind, deterministic=True), 16, 0)
    vocab, max_seqs = model.vocab_size, absent.max_seqs
    sample_adjusted(
        usual.logits, ints(1, 3), ints(1, mask_words(vocab)), ints(1), ints(1), ints(1), absent.state,
        Adjustments.allocate(max_seqs, vocab, META), absent.scratch, absent.token_ids, ints(max_seqs),
    )  # fmt: skip
    logprobs(usual.logits, ints(1), ints(max_seqs), MOST, LogprobScratch.allocate(1, vocab, META), ints(1, TOLD_WORDS))


def unlike_decodes() -> list[int]:
    """Of each way in which decodes are launched one number: each is a kernel of its own."""
    found: dict[object, int] = {}
    for size in GRAPH_SIZES:
        found.setdefault(tuple(early_launch(size).items()), size)
    return [size for size in found.values() if size <= Absent.MAX_SEQS]


@contextmanager
def _absent_gpu(
    target: GPUTarget, shared_memory: int, folder: Path, share: tuple[int, int] = (0, 1)
) -> Iterator[list[Any]]:
    """Launches compile for `target` into `folder` and end there; yields the list of what was compiled."""
    compiled: list[Any] = []
    run, compile_one = JITFunction.run, JITFunction._do_compile
    number: dict[Any, int] = {}
    first, step = share

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel is not None and kernel not in compiled:
            compiled.append(kernel)
        return kernel

    def only_the_share(self: Any, key: Any, *args: Any, **options: Any) -> Any:
        # Numbered as they come, which is the same in each process.
        if number.setdefault((self, key), len(number)) % step != first:
            return None
        return compile_one(self, key, *args, **options)

    properties = {"max_shared_mem": shared_memory}
    absent = SimpleNamespace(
        # Functions keep what they compiled by device: each target is one of its own.
        get_current_device=lambda: 1000 + int(target.arch), get_current_stream=lambda _: 0,
        get_current_target=lambda: target, utils=SimpleNamespace(get_device_properties=lambda _: properties),
    )  # fmt: skip
    with (
        triton.knobs.cache.scope(),
        triton.knobs.compilation.scope(),
        patch.object(JITFunction, "run", only_compile),
        patch.object(JITFunction, "_do_compile", only_the_share),
        patch.object(driver, "_active", absent),
    ):
        triton.knobs.cache.dir = str(folder)
        triton.knobs.compilation.store_binary_only = True
        yield compiled


def _build_launchers(kernels: list[Any]) -> None:
    """Build the C functions that launch these kernels, and Triton's own helper, as it would at the first launch.

    They are linked with the driver's library, which is not here: one of the same name takes its place that has the same
    functions and does nothing. (An empty one would be dropped by a linker that keeps only what is needed.)
    """
    from triton.backends.nvidia import driver as nvidia
    from triton.backends.nvidia.driver import include_dirs, libraries, library_dirs

    helper = Path(nvidia.dirname, "driver.c").read_text()
    functions = set(re.findall(r"\bcu[A-Z]\w+", helper + inspect.getsource(nvidia.make_launcher)))
    with tempfile.TemporaryDirectory() as folder:
        source, stub = Path(folder, "stub.c"), Path(folder, "libcuda.so.1")
        source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(functions)))
        compiler = os.environ.get("CC") or shutil.which("gcc") or "cc"  # as Triton looks for one
        subprocess.run([compiler, "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(stub), str(source)], check=True)
        built = SimpleNamespace(launch=None)
        with (
            triton.knobs.nvidia.scope(),
            patch.object(build, "_load_module_from_path", lambda name, path: built),
        ):
            triton.knobs.nvidia.libcuda_path = folder
            nvidia.libcuda_dirs.cache_clear()
            build.compile_module_from_src(
                src=helper, name="cuda_utils",
                library_dirs=library_dirs(), include_dirs=include_dirs, libraries=libraries,
            )  # fmt: skip
            for kernel in kernels:
                nvidia.CudaLauncher(kernel.src, kernel.metadata)
        nvidia.libcuda_dirs.cache_clear()
