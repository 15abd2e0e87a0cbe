"""Hugging Face's own cache as a target: its layout, so that other tools find the files and we find theirs.

Its client hashes nothing and begins a broken download anew at each start. Here a file is gone on with where it broke
off, and gets its name only when its digest agrees.

    ROOT/models--org--name/blobs/DIGEST                     a file
    ROOT/models--org--name/snapshots/COMMIT/NAME            a link to it
    ROOT/models--org--name/refs/REVISION                    the commit that a branch or tag was last
    ROOT/.locks/models--org--name/DIGEST.lock               held while the file is written, as the client holds it
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from octavo_engine.store.disk import Report
from octavo_engine.store.listing import Listing, RemoteFile
from octavo_engine.store.transfer import DamagedError, Get, fetch

FILES_AT_ONCE = 4
LOCK_PAUSE_S = 0.5
ATTEMPTS = 3
"""For a file that arrives damaged."""


def fill(
    listing: Listing,
    root: Path,
    repo: str,
    revision: str | None,
    get: Get,
    report: Report,
    pause: Callable[[float], None],
) -> Path:
    """The snapshot's folder, whole. Every file of the listing has a digest, and the listing a commit.

    Raises DamagedError, TransientError, OSError and the Hub client's errors.
    """
    assert listing.revision is not None
    home = root / ("models--" + repo.replace("/", "--"))
    snapshot = home / "snapshots" / listing.revision
    name = revision or "main"
    ref = None if name == listing.revision else home / "refs" / name
    if (ref is None or _says(ref, listing.revision)) and all(_has(snapshot, home, file) for file in listing.files):
        # Nothing is written where there is nothing to bring: such a cache may be mounted read-only.
        report(listing.num_bytes, listing.num_bytes)
        return snapshot
    for folder in (home / "blobs", snapshot, home / "refs", root / ".locks" / home.name):
        folder.mkdir(parents=True, exist_ok=True)
    done, total, counting = 0, listing.num_bytes, Lock()
    report(0, total)

    def moved(count: int) -> None:
        nonlocal done
        with counting:
            done += count
            report(max(done, 0), total)

    def wait() -> None:
        # Whoever holds the lock makes progress, or ends: a wait for it is no stall of ours.
        moved(0)
        pause(LOCK_PAUSE_S)

    def bring(file: RemoteFile) -> None:
        blob = home / "blobs" / _digest(file)
        with _locked(root / ".locks" / home.name / f"{blob.name}.lock", wait):
            if blob.exists():
                moved(file.size)
            else:
                _download(file, blob, get, moved, pause)
        _link(snapshot / file.name, blob)

    with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="download") as pool:
        for result in [pool.submit(bring, file) for file in listing.files]:
            result.result()
    if ref is not None:
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(listing.revision)
    return snapshot


def is_whole(snapshot: Path, *, weights: bool) -> bool:
    """Whether what a model is loaded from is there: somebody may have downloaded its text alone."""
    if not (snapshot / "config.json").is_file():
        return False
    if not weights:
        return True
    index = snapshot / "model.safetensors.index.json"
    if not index.is_file():
        return any(snapshot.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError):
        return False
    return all((snapshot / name).is_file() for name in names)


def _download(
    file: RemoteFile, blob: Path, get: Get, moved: Callable[[int], None], pause: Callable[[float], None]
) -> None:
    part = blob.with_name(blob.name + ".octavo-part")
    came = 0

    def count(moved_bytes: int) -> None:
        nonlocal came
        came += moved_bytes
        moved(moved_bytes)

    for attempt in range(1, ATTEMPTS + 1):
        try:
            if file.size == 0:
                part.touch()
            fetch(file, part, get, count, pause)
            break
        except DamagedError:
            moved(-came)
            came = 0
            if attempt == ATTEMPTS:
                raise
    part.rename(blob)


def _has(snapshot: Path, home: Path, file: RemoteFile) -> bool:
    blob = home / "blobs" / _digest(file)
    return blob.is_file() and (snapshot / file.name).is_file() and os.path.samefile(snapshot / file.name, blob)


def _says(ref: Path, commit: str) -> bool:
    return ref.is_file() and ref.read_text().strip() == commit


def _digest(file: RemoteFile) -> str:
    assert file.digest is not None
    return file.digest.partition(":")[2]


def _link(link: Path, blob: Path) -> None:
    target = os.path.relpath(blob, link.parent)
    if link.is_symlink() and os.readlink(link) == target:
        return
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(target)
    except OSError:  # a disk without links
        os.link(blob, link)


@contextlib.contextmanager
def _locked(path: Path, wait: Callable[[], object]) -> Iterator[None]:
    """Calls wait as long as another process holds the lock."""
    with path.open("a") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                wait()
            except OSError:  # a file system without locks: then two write the same bytes
                break
            else:
                break
        yield
