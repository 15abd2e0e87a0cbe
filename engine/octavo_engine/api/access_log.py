"""A line for each HTTP request, with --access-log. Called by app.py when a request has been answered."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from aiohttp import web

from octavo_engine.config import ServerConfig

log = logging.getLogger("octavo.access")

MAX_PATH_CHARS = 200


@dataclass(frozen=True)
class AccessLog:
    """left_out: paths, as clients send them, that are not worth a line."""

    left_out: Sequence[str]

    @classmethod
    def from_config(cls, config: ServerConfig) -> Self | None:
        if not config.access_log:
            return None
        paths = (config.disable_access_log_for_endpoints or "").split(",")
        return cls([path.strip() for path in paths if path.strip()])

    def add(self, request: web.Request, id: str, status: int, seconds: float) -> None:
        # As it was sent, encoded: a decoded path can hold line ends. Without the query, which can hold secrets.
        path = request.rel_url.raw_path[:MAX_PATH_CHARS]
        if path in self.left_out:
            return
        fields = {"request_id": id, "method": request.method[:20], "path": path, "status": status}
        log.info(
            "%s %s %s %d %.3fs id=%s", request.remote or "-", fields["method"], path, status, seconds, id,
            extra={**fields, "seconds": round(seconds, 6)},
        )  # fmt: skip
