"""Stream a checkpoint's tensors into the engine's arena. Called by the runner at start-up.

Several threads read pieces of the files, each into two page-locked buffers of its own: while one is filled, the other
is on its way to the GPU. On a CPU they read to where the bytes belong. (Merged matrices are only other destinations,
see models/layout.py.)
"""

from __future__ import annotations

import ctypes
import math
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from octavo_engine.checkpoint import TensorInfo, read_headers, unreadable
from octavo_engine.host import available_cpus
from octavo_engine.kernels.kv_scales import KvScales
from octavo_engine.models.config import DecoderConfig
from octavo_engine.models.layout import ALIGNMENT, Placement, placements, slots
from octavo_engine.status import Failure, FailureCode, FatalError

PIECE_BYTES = 16 * 2**20
MAX_THREADS = 8
"""Eight threads bring 31 GB/s from the page cache to an H200, one brings 5.6."""
DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""The format's names."""

OnProgress = Callable[[int, int], None]
"""(bytes done, bytes in all)"""

KV_SCALES = {
    "key": ("k_scale", "attn.k_scale", "k_proj.k_scale", "k_proj.output_scale", "kv_scale"),
    "value": ("v_scale", "attn.v_scale", "v_proj.v_scale", "v_proj.output_scale", "kv_scale"),
}
"""What tools that calibrate a cache of eight bits call its scales, behind model.layers.N.self_attn."""
IGNORED_SUFFIXES = (
    *(".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
    *(f".self_attn.{name}" for names in KV_SCALES.values() for name in names),
)
"""Buffers that old exports contain and that follow from the config; scales, which `kv_scales` reads."""


def allocate(config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The engine's tensors by slot name: views of one flat arena, content undefined."""
    layout = slots(config)
    last = list(layout.values())[-1]
    size = last.offset + -(-last.num_elements // ALIGNMENT) * ALIGNMENT
    arena = torch.empty(size, dtype=dtype, device=device)
    return {s.name: arena[s.offset : s.offset + s.num_elements].view(s.shape) for s in layout.values()}


@dataclass(frozen=True)
class Piece:
    """num_bytes of a file, from `offset` on, become elements of a slot from `element` on. dtype: as stored."""

    file: Path
    offset: int
    num_bytes: int
    dtype: torch.dtype
    slot: str
    element: int

    @property
    def num_elements(self) -> int:
        return self.num_bytes // self.dtype.itemsize


def plan_pieces(headers: dict[str, TensorInfo], targets: dict[str, Placement], most: int) -> list[Piece]:
    """All that is to be read, in the files' own order, so that reads stay nearly sequential on any disk."""
    pieces = []
    for name in sorted(targets, key=lambda n: (headers[n].file, headers[n].offset)):
        info, target = headers[name], targets[name]
        dtype = DTYPES[info.dtype]
        start = target.row * math.prod(target.shape[1:])
        for at in range(0, info.num_bytes, most):
            size = min(most, info.num_bytes - at)
            pieces.append(Piece(info.file, info.offset + at, size, dtype, target.slot, start + at // dtype.itemsize))
    return pieces


class Loading:
    """A load under way. `wait` returns when every tensor is in its place, or raises FatalError."""

    def __init__(self, folder: Path, config: DecoderConfig, tensors: dict[str, Tensor]) -> None:
        headers, targets = read_headers(folder), placements(config)
        _check(folder, headers, targets, config)
        pieces = plan_pieces(headers, targets, PIECE_BYTES)
        self.total_bytes = sum(piece.num_bytes for piece in pieces)
        self.done_bytes = 0
        self._tensors = tensors
        self._device = next(iter(tensors.values())).device
        self._done: queue.SimpleQueue[int | Exception] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._pieces = iter(pieces)
        self._lock = threading.Lock()
        self._running = min(MAX_THREADS, available_cpus(), max(len(pieces), 1))
        for index in range(self._running):
            threading.Thread(target=self._read, name=f"loader-{index}", daemon=True).start()

    def wait(self, on_progress: OnProgress) -> None:
        on_progress(self.done_bytes, self.total_bytes)
        while self._running:
            self._note(self._done.get())
            on_progress(self.done_bytes, self.total_bytes)

    def poll(self, on_progress: OnProgress) -> None:
        """What `wait` does, as far as it can be done at once."""
        while self._running and not self._done.empty():
            self._note(self._done.get())
        on_progress(self.done_bytes, self.total_bytes)

    def _note(self, what: int | Exception) -> None:
        if isinstance(what, Exception):
            self._stopped.set()
            raise what
        self.done_bytes += what
        self._running -= what == 0

    def _take(self) -> Iterator[Piece]:
        while not self._stopped.is_set():
            with self._lock:
                piece = next(self._pieces, None)
            if piece is None:
                return
            yield piece

    def _read(self) -> None:
        files: dict[Path, int] = {}
        try:
            target = _ToGpu(self._device) if self._device.type == "cuda" else _ToMemory()
            for piece in self._take():
                if piece.file not in files:
                    files[piece.file] = os.open(piece.file, os.O_RDONLY)
                to = self._tensors[piece.slot].view(-1)
                target.put(files[piece.file], piece, to[piece.element : piece.element + piece.num_elements])
                self._done.put(piece.num_bytes)
            target.finish()
            self._done.put(0)
        except OSError as error:
            self._done.put(unreadable(piece.file, str(error)))
        except Exception as error:  # noqa: BLE001 - raised again in the thread that waits
            self._done.put(error)
        finally:
            for file in files.values():
                os.close(file)


SWITCH_S = 0.0002


@contextmanager
def readers_first() -> Iterator[None]:
    """For what is computed while weights come: the threads that read them get the interpreter when they ask for it.

    Python lets a thread keep it for 5 ms, and a piece takes 3 ms to read: beside a thread that captures graphs, eight
    readers of pieces of 16 MiB brought 0.7 GB/s on two processors, with this 4.0.
    """
    usual = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


class _ToMemory:
    def put(self, file: int, piece: Piece, to: Tensor) -> None:
        same = to.dtype == piece.dtype
        read = to if same else torch.empty(piece.num_elements, dtype=piece.dtype)
        _read_exactly(file, piece, read)
        if not same:
            to.copy_(read)

    def finish(self) -> None:
        pass


class _ToGpu:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]
        self._turn = 0

    def put(self, file: int, piece: Piece, to: Tensor) -> None:
        self._turn ^= 1
        self._copied[self._turn].synchronize()
        source = self._buffers[self._turn][: piece.num_bytes]
        _read_exactly(file, piece, source)
        with torch.cuda.stream(self._stream):
            source = source.view(piece.dtype)
            if to.dtype != piece.dtype:
                source = source.to(self._device, non_blocking=True)
            to.copy_(source, non_blocking=True)
            self._copied[self._turn].record()

    def finish(self) -> None:
        self._stream.synchronize()


def _read_exactly(file: int, piece: Piece, into: Tensor) -> None:
    """Fill a contiguous tensor in memory with the piece's bytes, without holding the interpreter."""
    raw = memoryview((ctypes.c_char * piece.num_bytes).from_address(into.data_ptr())).cast("B")
    done = 0
    while done < piece.num_bytes:
        got = os.preadv(file, [raw[done:]], piece.offset + done)
        if got == 0:
            raise unreadable(piece.file, "it ended early; somebody may be writing it")
        done += got


def load(folder: Path, config: DecoderConfig, tensors: dict[str, Tensor], on_progress: OnProgress) -> None:
    """Fill `tensors` from the checkpoint. Raises FatalError (MODEL_INVALID, WEIGHTS_CORRUPT)."""
    Loading(folder, config, tensors).wait(on_progress)


def kv_scales(folder: Path, num_layers: int) -> list[KvScales]:
    """The checkpoint's own scales of each layer's keys and values, 1 where it has none. Raises FatalError."""
    headers = read_headers(folder)

    def scale(layer: int, part: str) -> float:
        names = (f"model.layers.{layer}.self_attn.{name}" for name in KV_SCALES[part])
        info = next((headers[name] for name in names if name in headers), None)
        if info is None:
            return 1.0
        value = float("nan")
        if info.dtype in DTYPES and info.num_bytes == DTYPES[info.dtype].itemsize:
            kept = torch.empty(1, dtype=DTYPES[info.dtype])
            with info.file.open("rb") as file:
                piece = Piece(info.file, info.offset, info.num_bytes, kept.dtype, info.name, 0)
                _read_exactly(file.fileno(), piece, kept)
            value = float(kept[0])
        if not 0 < value < math.inf:
            raise FatalError(
                Failure(
                    FailureCode.MODEL_INVALID,
                    f"{info.file}: {info.name} is no scale of the KV cache (one number above 0).",
                    "calibrate the checkpoint again, or leave --kv-cache-dtype at auto",
                )
            )
        return value

    return [KvScales(scale(layer, "key"), scale(layer, "value")) for layer in range(num_layers)]


def fill_with_noise(config: DecoderConfig, tensors: dict[str, Tensor], seed: int, on_progress: OnProgress) -> None:
    """--load-format dummy: weights of a plausible size, so that speed can be measured without a checkpoint."""
    generator = torch.Generator(device=next(iter(tensors.values())).device).manual_seed(seed)
    total, done = sum(t.nbytes for t in tensors.values()), 0
    for name, tensor in tensors.items():
        if name.endswith("norm"):
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, 1.0 / math.sqrt(config.hidden_size), generator=generator)
        done += tensor.nbytes
        on_progress(done, total)


def _check(folder: Path, headers: dict[str, TensorInfo], targets: dict[str, Placement], config: DecoderConfig) -> None:
    missing = [name for name in targets if name not in headers]
    if missing:
        raise FatalError(
            Failure(
                FailureCode.MODEL_INVALID,
                f"{folder} lacks {len(missing)} of the {len(targets)} tensors that its config.json asks for, "
                f"the first is {missing[0]}.",
                "check that config.json and the weight files belong to the same checkpoint",
            )
        )
    for name, target in targets.items():
        if headers[name].dtype not in DTYPES:
            raise FatalError(
                Failure(
                    FailureCode.UNSUPPORTED_MODEL,
                    f"{headers[name].file}: {name} is stored as {headers[name].dtype}, which is not known here.",
                    f"use a checkpoint that is stored as one of {', '.join(DTYPES)}",
                )
            )
        if headers[name].shape != target.shape:
            raise FatalError(
                Failure(
                    FailureCode.MODEL_INVALID,
                    f"{headers[name].file}: {name} has the shape {list(headers[name].shape)}, "
                    f"config.json asks for {list(target.shape)}.",
                    "check that config.json and the weight files belong to the same checkpoint",
                )
            )
    known = {"lm_head.weight"} if config.tied_embeddings else set()
    unknown = [n for n in headers if n not in targets and n not in known and not n.endswith(IGNORED_SUFFIXES)]
    if unknown:
        raise FatalError(
            Failure(
                FailureCode.UNSUPPORTED_MODEL,
                f"{folder} has {len(unknown)} tensors that a {config.architecture} does not have, "
                f"the first is {unknown[0]}.",
                "this is another model than its config.json says, or one that this version does not know",
            )
        )
