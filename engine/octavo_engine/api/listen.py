"""Bind the process's two ports before anything else happens."""

from __future__ import annotations

import errno
import os
import socket
import stat

from octavo_engine.status import Failure, FailureCode, FatalError

BACKLOG = 2048
"""Connections that may wait for the event loop, which comes up a second after the port."""


def listen(host: str, port: int, flag: str) -> socket.socket:
    """A listening TCP socket. Raises FatalError: PORT_IN_USE, or INVALID_CONFIG for an address that is not ours.

    flag: the flag that sets the port, for the error message.
    """
    address_flag = "--host"
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise _bad_host(address_flag, host, error) from error
    # "localhost" often resolves to ::1 first, but 127.0.0.1 is what clients are told to use.
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Without it a restart within a minute would find the last process's closed connections in the way.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise _in_use(f"Port {port} of {host}", f"`ss -ltnp 'sport = :{port}'`", f"port with {flag}") from error
        if error.errno == errno.EACCES:
            raise FatalError(
                Failure(
                    FailureCode.INVALID_CONFIG,
                    f"Port {port} of {host} may not be bound by this user.",
                    f"choose a port above 1023 with {flag}",
                )
            ) from error
        raise _bad_host(address_flag, host, error) from error
    return sock


def listen_unix(path: str) -> socket.socket:
    """A listening Unix socket. What is left of a process that is gone is replaced. Raises FatalError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_abandoned(path):
            os.unlink(path)
        sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise FatalError(
                    Failure(FailureCode.PORT_IN_USE, f"{path} is there already and is no socket.",
                            "remove it, or choose another path with --uds")
                ) from error  # fmt: skip
            raise _in_use(path, f"`ss -lxp src {path}`", "path with --uds") from error
        raise FatalError(
            Failure(
                FailureCode.INVALID_CONFIG,
                f"--uds: no socket can be made at {path!r}.",
                "name a path of at most 107 bytes in a folder that exists and may be written to",
                detail=str(error),
            )
        ) from error
    return sock


def _is_abandoned(path: str) -> bool:
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
    return False


def port_of(sock: socket.socket) -> int:
    port: int = sock.getsockname()[1]
    return port


def _in_use(what: str, who: str, other: str) -> FatalError:
    return FatalError(
        Failure(
            FailureCode.PORT_IN_USE,
            f"{what} is in use by another process.",
            f"end that process ({who} names it) or choose another {other}",
        )
    )


def _bad_host(flag: str, host: str, error: OSError) -> FatalError:
    return FatalError(
        Failure(
            FailureCode.INVALID_CONFIG,
            f"{flag}: {host!r} is not an address of this machine.",
            "use localhost, 0.0.0.0 for all addresses, or one of this machine's own",
            detail=str(error),
        )
    )
