"""Which pages of other origins may call the API from a browser. Pure; called by app.py around every request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from octavo_engine.config import ServerConfig

ALL_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
MAX_AGE_S = 600
"""How long a browser may remember a preflight's answer."""


@dataclass(frozen=True)
class Cors:
    """`*` among the origins, methods or headers stands for all of them."""

    origins: tuple[str, ...]
    methods: tuple[str, ...]
    headers: tuple[str, ...]
    credentials: bool

    @classmethod
    def from_config(cls, config: ServerConfig) -> Cors:
        return cls(config.allowed_origins, config.allowed_methods, config.allowed_headers, config.allow_credentials)

    def preflight(self, request: Mapping[str, str]) -> tuple[int, dict[str, str], str] | None:
        """Status, headers and text for a browser's question before its request; None when it is none.

        request: headers of an OPTIONS request.
        """
        origin, method = request.get("Origin"), request.get("Access-Control-Request-Method")
        if origin is None or method is None:
            return None
        wanted = [name.strip() for name in request.get("Access-Control-Request-Headers", "").split(",") if name.strip()]
        refused = []
        if not self._allows(origin):
            refused.append("origin")
        if "*" not in self.methods and method not in self.methods:
            refused.append("method")
        allowed = {name.lower() for name in self.headers}
        if "*" not in self.headers and any(name.lower() not in allowed for name in wanted):
            refused.append("headers")
        headers = self.response(origin)
        headers["Access-Control-Allow-Methods"] = ", ".join(ALL_METHODS if "*" in self.methods else self.methods)
        headers["Access-Control-Max-Age"] = str(MAX_AGE_S)
        if names := wanted if "*" in self.headers else self.headers:
            headers["Access-Control-Allow-Headers"] = ", ".join(names)
        if refused:
            return 400, headers, "Disallowed CORS " + ", ".join(refused)
        return 200, headers, "OK"

    def response(self, origin: str | None) -> dict[str, str]:
        """Headers of an answer to a request of this origin; none to one that is no browser's or not allowed."""
        if origin is None or not self._allows(origin):
            return {}
        everyone = "*" in self.origins
        headers = {"Access-Control-Allow-Origin": "*" if everyone else origin}
        headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"
        if not everyone:
            headers["Vary"] = "Origin"
        if self.credentials:
            headers["Access-Control-Allow-Credentials"] = "true"
        return headers

    def _allows(self, origin: str) -> bool:
        return "*" in self.origins or origin in self.origins
