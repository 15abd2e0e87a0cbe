"""HTTPS: certificate and key from files, read again when they change. Called by server.py."""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path

from octavo_engine.config import ServerConfig
from octavo_engine.status import Failure, FailureCode, FatalError

log = logging.getLogger(__name__)


class Tls:
    """A context for the server's socket. New connections get what `refresh` last read; running ones keep theirs."""

    def __init__(
        self, certificate: Path, key: Path, authorities: Path | None, requirement: int, ciphers: str | None = None
    ) -> None:
        """requirement: of clients' certificates, as ssl.CERT_NONE, _OPTIONAL, _REQUIRED. ciphers: in OpenSSL's words;
        None: Python's choice. Raises FatalError."""
        self._certificate, self._key, self._authorities = certificate, key, authorities
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.verify_mode = ssl.VerifyMode(requirement)
        try:
            if ciphers is not None:
                self.context.set_ciphers(ciphers)
        except ssl.SSLError as error:
            raise FatalError(
                Failure(
                    FailureCode.INVALID_CONFIG,
                    f"--ssl-ciphers: {ciphers!r} names no cipher that this OpenSSL has.",
                    "write names as `openssl ciphers` lists them, with colons between, or leave the flag out",
                    detail=str(error),
                )
            ) from error
        try:
            self._stamps = self._read_stamps()
            self._load()
        except (OSError, ssl.SSLError) as error:
            raise FatalError(
                Failure(
                    FailureCode.INVALID_CONFIG,
                    f"--ssl-certfile {certificate} and --ssl-keyfile {key} cannot be used.",
                    "name readable PEM files of a certificate, with its chain, and of its private key",
                    detail=str(error),
                )
            ) from error

    @classmethod
    def from_config(cls, config: ServerConfig) -> Tls | None:
        if config.ssl_certfile is None or config.ssl_keyfile is None:
            return None
        authorities = Path(config.ssl_ca_certs) if config.ssl_ca_certs else None
        return cls(
            Path(config.ssl_certfile), Path(config.ssl_keyfile), authorities, config.ssl_cert_reqs, config.ssl_ciphers
        )

    def refresh(self) -> bool:
        """Whether the files had changed and were read. Files that do not fit leave what was read before."""
        try:
            stamps = self._read_stamps()
            if stamps == self._stamps:
                return False
            # Tried on a context of its own first: a key that does not fit must not take the good pair's place.
            trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            trial.load_cert_chain(self._certificate, self._key)
            self._load()
        except (OSError, ssl.SSLError) as error:
            # Half of the pair is there while it is being replaced: the next look finds the other.
            log.warning("TLS files cannot be read, keeping those that were: %s", error)
            return False
        self._stamps = stamps
        log.info("TLS files read again certificate=%s", self._certificate)
        return True

    def _load(self) -> None:
        self.context.load_cert_chain(self._certificate, self._key)
        if self._authorities is not None:
            self.context.load_verify_locations(self._authorities)

    def _read_stamps(self) -> list[tuple[int, int, int]]:
        files = [self._certificate, self._key, *([self._authorities] if self._authorities else [])]
        return [(status.st_mtime_ns, status.st_size, status.st_ino) for status in map(os.stat, files)]
