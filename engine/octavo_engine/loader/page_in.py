"""Bring a checkpoint's files into the page cache while torch is imported. Called by the engine process; knows no torch.

From a disk of 0.5 GB/s the 270 MB of SmolLM2 are there when the loader asks for them: 2.0 → 1.2 s. The kernel's own
reading ahead (POSIX_FADV_WILLNEED) is bounded for each call, by a disk's setting that is often 128 KiB, so threads read
and throw away what they got.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from octavo_engine.checkpoint import find_files
from octavo_engine.host import available_cpus, host_memory
from octavo_engine.status import FatalError

PIECE_BYTES = 16 * 2**20
"""The import keeps the interpreter for 5 ms at a time, and each piece needs it once: smaller ones would come slowly."""
MAX_THREADS = 4


class PageIn:
    """Reads from `begin` until all is there or somebody calls `stop`. It fails in silence: the loader says what is
    wrong.

    At most half of the free memory is filled: of a model larger than that the first files would be gone again before
    the loader comes to them.
    """

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self.threads: list[threading.Thread] = []

    def begin(self, folder: Path) -> None:
        with contextlib.suppress(FatalError, OSError):
            self._pieces = _pieces(find_files(folder), host_memory()[0] // 2)
            for index in range(min(MAX_THREADS, available_cpus())):
                self.threads.append(threading.Thread(target=self._read, name=f"page-in-{index}", daemon=True))
                self.threads[-1].start()

    def stop(self) -> None:
        self._stopped.set()

    def _read(self) -> None:
        buffer = bytearray(PIECE_BYTES)
        with contextlib.suppress(OSError):
            while not self._stopped.is_set():
                with self._lock:
                    piece = next(self._pieces, None)
                if piece is None:
                    return
                _bring(*piece, buffer)


def _pieces(files: list[Path], most_bytes: int) -> Iterator[tuple[Path, int, int]]:
    """(file, offset, bytes), in the order in which the loader reads."""
    for file in files:
        size = file.stat().st_size
        for offset in range(0, size, PIECE_BYTES):
            num_bytes = min(PIECE_BYTES, size - offset)
            most_bytes -= num_bytes
            if most_bytes < 0:
                return
            yield file, offset, num_bytes


def _bring(file: Path, offset: int, num_bytes: int, buffer: bytearray) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        if not is_cached(descriptor, offset + num_bytes - 1):
            os.preadv(descriptor, [memoryview(buffer)[:num_bytes]], offset)
    finally:
        os.close(descriptor)


def is_cached(descriptor: int, offset: int) -> bool:
    """Whether this byte can be had without waiting; False where the file system does not say.

    True as well where a very fast disk has read it meanwhile, once in forty times on a virtual one: the loader reads
    the rest of such a piece itself. (mincore would know, but says yes to all of a file that is another user's.)
    """
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:
        return False
