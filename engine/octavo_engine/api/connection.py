"""What a connection answers to bytes that are no HTTP request. Used by server.py.

aiohttp would say it in plain text, with a piece of what was sent and the versions of itself and Python; and log the
piece with a traceback, and a key may be in it.
"""

from __future__ import annotations

import logging

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_request import BaseRequest

from octavo_engine.api.errors import ApiError, internal

log = logging.getLogger(__name__)


class ApiRunner(web.AppRunner):
    """An AppRunner whose connections answer in the shape of the API whatever they are sent."""

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        server.__class__ = _Server
        return server


class _Server(web.Server):
    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(RequestHandler):
    __slots__ = ()

    def log_exception(self, *args: object, exc_info: BaseException | None = None, **rest: object) -> None:
        if isinstance(exc_info, (HttpProcessingError, web.RequestPayloadError)):
            log.debug("not an HTTP request kind=%s", type(exc_info).__name__)
        else:
            super().log_exception(*args, exc_info=exc_info, **rest)

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        self.log_exception("Error handling request", exc_info=exc)
        error = _refusal(exc) if isinstance(exc, HttpProcessingError) else internal()
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun: no other can be given")
        response = web.Response(
            status=error.status, body=error.body_bytes(), content_type="application/json", headers={"Server": "octavo"}
        )
        response.force_close()
        return response


def _refusal(error: HttpProcessingError) -> ApiError:
    if isinstance(error, LineTooLong):
        return ApiError(431, "Request Header Fields Too Large", "A line of the request's head is too long.")
    if "Too many headers" in error.message:
        return ApiError(431, "Request Header Fields Too Large", "The request has too many headers.")
    return ApiError(400, "Bad Request", "What was sent is not an HTTP/1.1 request.")
