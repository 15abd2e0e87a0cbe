"""API keys: from flags, the environment and a file that may be rotated under the running server."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from octavo_engine.config import ServerConfig
from octavo_engine.status import Failure, FailureCode, FatalError

log = logging.getLogger(__name__)

KEY_VARIABLES = ("OCTAVO_API_KEY", "VLLM_API_KEY")
OPEN_PATHS = frozenset({"/", "/health", "/ping", "/version", "/metrics"})
"""Everything else needs a key when there is one; vLLM guards only /v1 and has had holes from it. The page at / holds
nothing: what it asks for needs the key."""

MAX_KEYS_TRIED = 4
"""Headers of one request that are looked at."""


class Keys:
    """Which requests may pass. Only digests are kept."""

    def __init__(self, keys: Iterable[str], file: Path | None = None) -> None:
        """Raises FatalError(INVALID_CONFIG) when the file cannot be read or holds no key."""
        self._fixed = tuple(_digest(key) for key in keys if key)
        self._file = file
        self._stamp: tuple[int, int, int] | None = None
        self._from_file: tuple[bytes, ...] = ()
        if file is not None:
            try:
                self._read(file)
            except (OSError, ValueError) as error:
                raise _bad_file(file, "cannot be read", str(error)) from error
            if not self._from_file:
                raise _bad_file(file, "holds no key", None)

    @classmethod
    def from_config(cls, config: ServerConfig, environ: Mapping[str, str]) -> Keys:
        # Flags overrule the environment, as in vLLM.
        keys = config.api_key or tuple(environ[name] for name in KEY_VARIABLES if environ.get(name))
        return cls(keys, Path(config.api_key_file) if config.api_key_file else None)

    @property
    def required(self) -> bool:
        return bool(self._fixed) or self._file is not None

    def admits(self, *authorizations: str) -> bool:
        """Whether a request with one of these values of Authorization may pass. As slow for every wrong key."""
        if not self.required:
            return True
        self._refresh()
        known = False
        for authorization in authorizations[:MAX_KEYS_TRIED]:
            scheme, _, key = authorization.partition(" ")
            digest, is_bearer = _digest(key.strip()), scheme.lower() == "bearer"
            for candidate in (*self._fixed, *self._from_file):
                known |= hmac.compare_digest(digest, candidate) and is_bearer
        return known

    def _refresh(self) -> None:
        if self._file is None:
            return
        try:
            if _stamp(self._file) != self._stamp:
                self._read(self._file)
                log.info("API keys read again count=%d", len(self._from_file))
        except (OSError, ValueError) as error:
            # A secret that is being replaced is gone for a moment: the keys that were valid stay so.
            log.warning("API key file cannot be read, keeping the known keys: %s", error)

    def _read(self, file: Path) -> None:
        stamp = _stamp(file)
        lines = file.read_text(encoding="utf-8").splitlines()
        self._from_file = tuple(_digest(line.strip()) for line in lines if line.strip())
        self._stamp = stamp


def _stamp(file: Path) -> tuple[int, int, int]:
    status = os.stat(file)
    return status.st_mtime_ns, status.st_size, status.st_ino


def _digest(key: str) -> bytes:
    # Digests have one length, so that comparing does not tell the length of a key.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _bad_file(file: Path, what: str, detail: str | None) -> FatalError:
    fix = "name a readable file with one key a line"
    return FatalError(Failure(FailureCode.INVALID_CONFIG, f"--api-key-file: {file} {what}.", fix, detail=detail))
