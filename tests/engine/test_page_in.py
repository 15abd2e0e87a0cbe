"""A checkpoint's files come into the page cache while the engine process imports torch."""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from octavo_engine.core import process
from octavo_engine.core.channel import Channel
from octavo_engine.core.messages import Start
from octavo_engine.loader import page_in
from octavo_engine.loader.page_in import PageIn

PIECE = 2**20
PAGE = mmap.PAGESIZE


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_in, "PIECE_BYTES", PIECE)


def paged(folder: Path) -> None:
    paging = PageIn()
    paging.begin(folder)
    for thread in paging.threads:
        thread.join(30)
        assert not thread.is_alive()


def missing(file: Path) -> list[int]:
    """Pages of the file that are not in the page cache, without a read, which would have the kernel read ahead."""
    libc, size = ctypes.CDLL(None, use_errno=True), file.stat().st_size
    libc.mmap.restype = ctypes.c_void_p
    with file.open("r+b") as opened:
        at = ctypes.c_void_p(libc.mmap(None, ctypes.c_size_t(size), 1, 1, opened.fileno(), ctypes.c_long(0)))
    there = (ctypes.c_ubyte * -(-size // PAGE))()
    try:
        assert libc.mincore(at, ctypes.c_size_t(size), there) == 0, os.strerror(ctypes.get_errno())
    finally:
        libc.munmap(at, ctypes.c_size_t(size))
    return [PAGE * index for index, state in enumerate(there) if not state & 1]


def drop(file: Path) -> None:
    """Out of the page cache, whole: a page that another processor has just written may stay at the first time."""
    with file.open("rb") as opened:
        for _ in range(50):
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if PAGE * len(missing(file)) >= file.stat().st_size:
                return
            time.sleep(0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files that are on the disk alone."""
    for name, size in (("model-1.safetensors", 3 * PIECE + 5000), ("model-2.safetensors", 2 * PIECE)):
        with (tmp_path / name).open("wb") as file:
            file.write(os.urandom(1000) * (size // 1000) + b"x" * (size % 1000))
            file.flush()
            os.fsync(file.fileno())
        drop(tmp_path / name)
    if not missing(tmp_path / "model-1.safetensors"):
        pytest.skip("this file system keeps its files in memory")
    return tmp_path


def test_every_weight_file_comes_into_the_page_cache(folder, monkeypatch):
    (folder / "notes.txt").touch()
    # A disk as fast as these tests' may have read the byte before the kernel answers, and is_cached says yes.
    monkeypatch.setattr(
        page_in, "is_cached",
        lambda descriptor, offset: offset // PAGE * PAGE not in missing(Path(f"/proc/self/fd/{descriptor}")),
    )  # fmt: skip

    paged(folder)

    assert [missing(file) for file in sorted(folder.glob("*.safetensors"))] == [[], []]


def test_what_is_there_is_not_read_again(folder, monkeypatch):
    paged(folder)
    reads, read = [], os.preadv

    def counted(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        reads.append(flags)
        return read(descriptor, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", counted)
    paged(folder)

    assert reads == [os.RWF_NOWAIT] * 6


def test_no_more_than_half_of_the_free_memory_is_filled(folder, monkeypatch):
    brought = []
    monkeypatch.setattr(page_in, "_bring", lambda file, offset, num_bytes, _: brought.append((file.name, num_bytes)))
    monkeypatch.setattr(page_in, "host_memory", lambda: (2 * (4 * PIECE + 5000), 0))

    paged(folder)

    first, second = "model-1.safetensors", "model-2.safetensors"
    assert sorted(brought) == [(first, 5000), *[(first, PIECE)] * 3, (second, PIECE)]


def test_nothing_is_read_once_the_loader_reads(folder):
    paging = PageIn()
    paging.stop()
    paging.begin(folder)

    assert missing(folder / "model-2.safetensors")


@pytest.mark.parametrize("index", [None, "no index", '{"weight_map": {"w": "gone.safetensors"}}'])
def test_a_damaged_checkpoint_is_left_to_the_loader(tmp_path, index):
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(index)

    paged(tmp_path)


def test_the_engine_process_begins_when_it_is_told_of_the_model(monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)  # it ends itself when the other side is gone
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    begun, start = [], Start("/models/m", None, "/models/m")
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            Channel(ours).send(start)
        with pytest.raises(SystemExit):
            process._read(Channel(theirs), inbox, begun.append)

    assert inbox.get(timeout=60) == start
    assert begun == [start]
