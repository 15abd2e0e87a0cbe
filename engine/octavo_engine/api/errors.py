"""Errors as OpenAI clients know them: one exception with a status, and the JSON body made from it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_ADDRESS = re.compile(r"( at)? 0x[0-9a-fA-F]{4,}")
_PATH = re.compile(r"(?<![\w.:/])/(?:[\w.+@-]+/)+(?=[\w.+@-])")


class ApiError(Exception):
    """A refused or failed request.

    type: the word clients switch on; param: the request's field at fault; retry_after_s: when to come again.
    """

    def __init__(
        self, status: int, type: str, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.type, self.param, self.retry_after_s = status, type, param, retry_after_s
        # An object's repr can carry a heap address into a message (CVE-2026-22778 was that).
        self.message = _ADDRESS.sub("", message)

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.status}}

    def body_bytes(self) -> bytes:
        return json.dumps(self.body(), ensure_ascii=False).encode("utf-8", "replace")

    def renamed(self, names: Mapping[str, str]) -> ApiError:
        """Of a field that the client knows by another name: names, ours to theirs. In the message where it leads."""
        if self.param is not None and (name := names.get(self.param)) is not None:
            self.message = re.sub(rf"^{re.escape(self.param)}\b", lambda _: name, self.message)
            self.param = name
        return self

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


def without_folders(message: str) -> str:
    """What went wrong, for who may not know where on the server's disk: of each absolute path only the last part."""
    return _PATH.sub("", message)


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, "BadRequestError", message, param=param)


def malformed(message: str, param: str | None = None) -> ApiError:
    """The body is not what the route's schema says; vLLM gives these a type of their own."""
    return ApiError(400, "Bad Request", message, param=param)


def unknown_model(name: str) -> ApiError:
    return ApiError(404, "NotFoundError", f"The model `{name[:200]}` does not exist.", param="model")


def unauthorized() -> ApiError:
    return ApiError(
        401, "AuthenticationError",
        "Missing or wrong API key: send one as `Authorization: Bearer KEY` or as `X-Api-Key: KEY`.",
    )  # fmt: skip


def overloaded(message: str, retry_after_s: int) -> ApiError:
    return ApiError(429, "RateLimitError", message, retry_after_s=retry_after_s)


def unavailable(message: str, retry_after_s: int) -> ApiError:
    return ApiError(503, "ServiceUnavailableError", message, retry_after_s=retry_after_s)


def internal(message: str = "The server failed on this request; its log says why.") -> ApiError:
    return ApiError(500, "InternalServerError", message)
