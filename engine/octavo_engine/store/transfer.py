"""One file from a source: gone on with where it broke off, hashed as it comes, refused if damaged."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from io import RawIOBase
from pathlib import Path
from typing import Any, Protocol

from octavo_engine.store.listing import RemoteFile

TRIES = 6
"""In a row without a single new byte; a source that cuts every answer short is still a source."""
PAUSE_S, PAUSE_MAX_S = 0.5, 10.0
READ_TIMEOUT_S = 30.0
CHUNK = 1 << 20


class DamagedError(Exception):
    """What came is not what the source announced."""


class TransientError(Exception):
    """Worth another try: no answer, a cut one, an overloaded source."""


class Answer(Protocol):
    status: int
    headers: Mapping[str, str]

    def chunks(self) -> Iterator[bytes]: ...


Get = Callable[[str, Mapping[str, str]], AbstractContextManager[Answer]]
"""(URL, headers) → the answer. Raises TransientError, and the client's own errors for what no try mends."""


def fetch(
    file: RemoteFile, target: Path, get: Get, moved: Callable[[int], None], pause: Callable[[float], None]
) -> None:
    """Blocks until `target` is the whole file. moved: bytes that came, negative for those thrown away.

    Raises DamagedError (and removes the target, so that the next try begins anew), and TransientError after TRIES.
    """
    hasher = _hasher(file)
    have = target.stat().st_size if target.exists() else 0
    if have > file.size:
        target.unlink()
        have = 0
    if have:
        with target.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                hasher.update(chunk)
        moved(have)
    tries = 0
    with target.open("ab", buffering=0) as stream:
        while have < file.size:
            before = have
            try:
                url, headers = file.request()
                more = {"Range": f"bytes={have}-"} if have else {}
                with get(url, {**headers, **more}) as answer:
                    if have and answer.status != 206:  # a source that knows no ranges begins anew
                        stream.truncate(0)
                        moved(-have)
                        have, hasher = 0, _hasher(file)
                    for chunk in answer.chunks():
                        if have + len(chunk) > file.size:
                            raise _damaged(file, target, f"more than the announced {file.size:,} bytes came")
                        _write(stream, chunk)
                        hasher.update(chunk)
                        have += len(chunk)
                        moved(len(chunk))
                    hasher.saw(answer.headers)
                if have < file.size:
                    raise TransientError(f"the answer ended after {have:,} of {file.size:,} bytes")
            except TransientError:
                tries = 0 if have > before else tries + 1
                if tries >= TRIES:
                    raise
                pause(min(PAUSE_S * 2**tries, PAUSE_MAX_S))
        _sync(stream)
    if not hasher.agrees(file.digest):
        raise _damaged(file, target, f"its digest is not {file.digest}")


def client(http: Any, errors: tuple[type[BaseException], ...], check: Callable[[Any], None]) -> Get:
    """A Get over the Hub client's HTTP session, which knows proxies and certificates.

    errors: those of the session that another try may mend. check: raises for a refusal.
    """

    class _Answer:
        def __init__(self, response: Any) -> None:
            self._response = response
            self.status: int = response.status_code
            self.headers: Mapping[str, str] = response.headers

        def chunks(self) -> Iterator[bytes]:
            yield from self._response.iter_raw()  # as it comes: what is here is on the disk, should we be killed

    @contextmanager
    def get(url: str, headers: Mapping[str, str]) -> Iterator[Answer]:
        try:
            with http.stream("GET", url, headers=dict(headers), timeout=READ_TIMEOUT_S) as response:
                if response.status_code in (408, 425, 429) or response.status_code >= 500:
                    raise TransientError(f"HTTP {response.status_code}")
                if response.status_code >= 400:
                    response.read()
                check(response)
                yield _Answer(response)
        except errors as error:
            raise TransientError(f"{type(error).__name__} {error}".strip()) from error

    return get


class _Hasher:
    def __init__(self, kind: str, size: int) -> None:
        self._kind = kind
        self._hash = {"sha256": hashlib.sha256, "git": hashlib.sha1, "etag": hashlib.md5}.get(kind, hashlib.sha256)(
            usedforsecurity=False
        )
        self._trusted = True
        if kind == "git":
            self._hash.update(f"blob {size}\0".encode())

    def update(self, chunk: bytes) -> None:
        self._hash.update(chunk)

    def saw(self, headers: Mapping[str, str]) -> None:
        # The ETag of an object that S3 encrypts with a key of its own is no digest of the content.
        if self._kind == "etag" and any(n.lower().startswith("x-amz-server-side-encryption") and v != "AES256"
                                        for n, v in headers.items()):  # fmt: skip
            self._trusted = False

    def agrees(self, digest: str | None) -> bool:
        value = (digest or "").partition(":")[2]
        lengths = {"sha256": 64, "git": 40, "etag": 32}
        # Of an object that came in parts, the ETag is no digest of the content; the Hub's placeholders are none either.
        if not self._trusted or not (len(value) == lengths.get(self._kind) and re.fullmatch("[0-9a-f]+", value)):
            return True
        return self._hash.hexdigest() == value


def _hasher(file: RemoteFile) -> _Hasher:
    return _Hasher((file.digest or "").partition(":")[0], file.size)


def _damaged(file: RemoteFile, target: Path, why: str) -> DamagedError:
    target.unlink(missing_ok=True)
    return DamagedError(f"{file.name} arrived damaged: {why}")


def _write(stream: RawIOBase, chunk: bytes) -> None:
    while chunk:  # a disk that is almost full takes a part, and refuses the next
        chunk = chunk[stream.write(chunk) or 0 :]


def _sync(stream: Any) -> None:
    os.fsync(stream.fileno())


def sleep(seconds: float) -> None:
    time.sleep(seconds)
