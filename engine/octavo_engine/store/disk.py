"""The store: a folder of whole models, which pods on several nodes may share.

    ROOT/models/KEY/            a whole model: its files and octavo-manifest.json, written last, then renamed here
    ROOT/partial/KEY/           a download, gone on with by whoever comes next
    ROOT/locks/KEY              held exclusively while KEY is filled or removed, shared while an engine serves it
    ROOT/refs/SOURCE.json       which key a source's revision was last seen to be, for when the source is out of reach

The life of a model in it: listed → locked → each file downloaded and verified → manifest → renamed. A reader sees all
of it or nothing. Whoever is killed on the way leaves a partial folder and a lock that the kernel lets go of.
Where a file system has no locks, everybody downloads into a folder of their own, and the first rename wins.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from octavo_engine.store.listing import MANIFEST, Listing, RemoteFile, slug
from octavo_engine.store.transfer import DamagedError, Get, fetch

FILES_AT_ONCE = 4
WAIT_S = 0.5
ROUNDS = 3
"""Downloads of a file that arrives damaged, before the source is to blame."""

Report = Callable[[int, int], None]
"""(done_bytes, total_bytes) so far; called from any thread."""

_held: list[int] = []
"""Locks of the models that this process serves. The kernel lets go of them when it ends, however it ends."""


class NoRoomError(Exception):
    """The model does not fit. The text tells how much is needed and what there is."""


class Store:
    def __init__(self, root: Path, limit_bytes: int | None = None) -> None:
        """limit_bytes: whole models beyond this are removed, those unused for longest first, when a new one comes."""
        self.root, self._limit = root, limit_bytes
        for name in ("models", "partial", "locks", "refs"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def find(self, key: str) -> Path | None:
        """The folder of a whole model."""
        folder = self.root / "models" / key
        return folder if _is_whole(folder) else None

    def hold(self, key: str) -> None:
        """As long as this process lives, nobody removes the model. Also notes that it is used now."""
        handle = os.open(self.root / "locks" / key, os.O_RDWR | os.O_CREAT, 0o666)
        with contextlib.suppress(OSError):  # no locks here: then nothing is removed here either
            fcntl.flock(handle, fcntl.LOCK_SH)
        _held.append(handle)
        os.utime(handle)

    def remember(self, source: str, revision: str | None, key: str) -> None:
        path = self._ref(source)
        known = self._refs(path) | {revision or "": key}
        partial = path.with_suffix(f".{uuid.uuid4().hex}")
        partial.write_text(json.dumps({"source": source, "keys": known}))
        partial.rename(path)

    def recall(self, source: str, revision: str | None) -> str | None:
        """The key that this revision was last seen to be."""
        return self._refs(self._ref(source)).get(revision or "")

    def fill(self, listing: Listing, get: Get, report: Report, pause: Callable[[float], None] = time.sleep) -> Path:
        """The folder of the whole model, downloaded if need be. Raises NoRoomError, and what transfer.fetch raises."""
        key, total = listing.key, listing.num_bytes
        if found := self.find(key):
            return found
        with self._locked(key, lambda: report(self._size(key), total), pause) as own:
            if found := self.find(key):  # somebody else was faster
                return found
            self._make_room(key, total)
            partial = self.root / "partial" / (key if own else f"{key}.{uuid.uuid4().hex}")
            partial.mkdir(exist_ok=True)
            self._download(listing, partial, get, report, pause)
            _write(partial / MANIFEST, json.dumps(listing.manifest(), indent=1))
            return self._publish(partial, self.root / "models" / key)

    def _download(
        self, listing: Listing, folder: Path, get: Get, report: Report, pause: Callable[[float], None]
    ) -> None:
        done, total, lock = 0, listing.num_bytes, Lock()

        def moved(num_bytes: int) -> None:
            nonlocal done
            with lock:
                done += num_bytes
                report(done, total)

        def one(file: RemoteFile) -> None:
            for again in range(ROUNDS - 1, -1, -1):
                came = 0

                def count(num_bytes: int) -> None:
                    nonlocal came
                    came += num_bytes
                    moved(num_bytes)

                try:
                    return fetch(file, folder / file.name, get, count, pause)
                except DamagedError:
                    moved(-came)
                    if not again:
                        raise

        for stray in {path.name for path in folder.iterdir()} - {file.name for file in listing.files}:
            (folder / stray).unlink()
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            # The largest first, so that the end is not one long file alone.
            tasks = [pool.submit(one, file) for file in sorted(listing.files, key=lambda file: -file.size)]
            try:
                for task in tasks:
                    task.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _publish(self, partial: Path, target: Path) -> Path:
        _sync_folder(partial)
        if target.exists() and not _is_whole(target):
            self._remove(target)  # somebody reached into it
        try:
            partial.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not _is_whole(target):
                raise
            shutil.rmtree(partial, ignore_errors=True)
        _sync_folder(target.parent)
        return target

    def _make_room(self, key: str, needed: int) -> None:
        partial = self._size(key)
        while True:
            kept = [path for path in (self.root / "models").iterdir() if path.name != key]
            used = sum(_size(path) for path in kept)
            free = shutil.disk_usage(self.root).free
            over = self._limit is not None and used + needed > self._limit
            if not over and free + partial >= needed:
                return
            if not self._evict_one(kept):
                have = f"{free / 2**30:.1f} GiB are free"
                if over:
                    have = f"of its {(self._limit or 0) / 2**30:.1f} GiB, {used / 2**30:.1f} GiB are in use by others"
                raise NoRoomError(f"the model takes {needed / 2**30:.1f} GiB, and {have}")

    def _evict_one(self, folders: list[Path]) -> bool:
        """Removes the model that was unused for longest, of those that nobody serves."""
        for folder in sorted(folders, key=lambda folder: _used_at(self.root / "locks" / folder.name)):
            with contextlib.suppress(OSError), (self.root / "locks" / folder.name).open("a+") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._remove(folder)
                return True
        return False

    def _remove(self, folder: Path) -> None:
        """Renamed first: a model that is half removed must not be taken for a whole one."""
        trash = self.root / "partial" / f"trash.{uuid.uuid4().hex}"
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self, key: str, waiting: Callable[[], None], pause: Callable[[float], None]) -> Iterator[bool]:
        """True while we hold the lock; False where there are no locks."""
        with (self.root / "locks" / key).open("a+") as handle:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    waiting()
                    pause(WAIT_S)
                except OSError:
                    yield False
                    return
                else:
                    yield True
                    return

    def _size(self, key: str) -> int:
        return _size(self.root / "partial" / key)

    def _ref(self, source: str) -> Path:
        return self.root / "refs" / f"{slug(source)}.json"

    @staticmethod
    def _refs(path: Path) -> dict[str, str]:
        try:
            found: dict[str, str] = json.loads(path.read_text())["keys"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return found


def revision_of(folder: Path) -> str | None:
    manifest = _manifest(folder)
    return manifest.get("revision") if manifest else None


def _is_whole(folder: Path) -> bool:
    manifest = _manifest(folder)
    if manifest is None:
        return False
    try:
        return all((folder / file["name"]).stat().st_size == file["size"] for file in manifest["files"])
    except (OSError, KeyError, TypeError):
        return False


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("version") == 1 else None


def _size(folder: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                total += path.stat().st_size
    return total


def _used_at(lock: Path) -> float:
    try:
        return lock.stat().st_mtime
    except OSError:
        return 0.0


def _write(path: Path, text: str) -> None:
    with path.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some network file systems sync no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
