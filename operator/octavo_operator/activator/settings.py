"""The activator's settings, read once from the environment by cli.py. The chart sets them, in activator.yaml."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from octavo_operator.activator.bounds import Bounds
from octavo_operator.logs import FORMATS
from octavo_operator.settings import LOG_LEVELS, choice, number, words
from octavo_operator.wake import PORTS


@dataclass(frozen=True)
class ActivatorSettings:
    watch_namespaces: tuple[str, ...] = ()
    """Namespaces whose servers are woken; none means all of them."""
    listen_host: str = "0.0.0.0"
    management_port: int = 8081
    """/healthz, /readyz, /metrics, and /held for the operator."""
    ports: range = PORTS
    """One for each server that may sleep; the operator gives them out."""
    bounds: Bounds = field(default_factory=Bounds)
    leave_s: float = 8.0
    """How long a process that is to end takes requests yet: until no Service leads to it."""
    grace_s: float = 300.0
    """How long it goes on with the requests that it has."""
    log_level: str = "info"
    log_format: str = "text"


def from_environment(environ: Mapping[str, str] = os.environ) -> ActivatorSettings:
    """Raises SettingsError."""
    default, bounds = ActivatorSettings(), Bounds()
    mib = 2**20
    hold_s = number(environ, "OCTAVO_ACTIVATOR_HOLD_SECONDS", bounds.hold_s, 1, 3600)
    return ActivatorSettings(
        watch_namespaces=words(environ, "OCTAVO_WATCH_NAMESPACES"),
        listen_host=environ.get("OCTAVO_LISTEN_HOST") or default.listen_host,
        management_port=int(number(environ, "OCTAVO_LISTEN_PORT", default.management_port, 1, 65535)),
        bounds=Bounds(
            requests_per_server=int(
                number(environ, "OCTAVO_ACTIVATOR_REQUESTS_PER_SERVER", bounds.requests_per_server, 1, 10_000)
            ),
            requests=int(number(environ, "OCTAVO_ACTIVATOR_REQUESTS", bounds.requests, 1, 10_000)),
            body_bytes=int(number(environ, "OCTAVO_ACTIVATOR_BODY_MIB", bounds.body_bytes // mib, 1, 1024)) * mib,
            bytes=int(number(environ, "OCTAVO_ACTIVATOR_BYTES_MIB", bounds.bytes // mib, 1, 65536)) * mib,
            hold_s=hold_s,
        ),
        leave_s=number(environ, "OCTAVO_ACTIVATOR_LEAVE_SECONDS", default.leave_s, 0, 60),
        grace_s=hold_s,
        log_level=choice(environ, "OCTAVO_LOG_LEVEL", LOG_LEVELS, default.log_level),
        log_format=choice(environ, "OCTAVO_LOG_FORMAT", FORMATS, default.log_format),
    )
