"""The socket between the two processes: length-prefixed msgpack frames of the types in messages.py.

Decoding is typed and builds nothing but those dataclasses, so a peer cannot make the other side run code
(engines that unpickled here have had remote execution holes).
"""

from __future__ import annotations

import socket
import struct
from typing import Any, Final

import msgspec

from octavo_engine.core.messages import (
    Abort,
    Fatal,
    FromEngine,
    Ready,
    Shutdown,
    StageChanged,
    Start,
    StepOutput,
    Submit,
    ToEngine,
)

HEADER: Final = struct.Struct("<IB")  # length of the body, kind of message
MAX_FRAME_BYTES: Final = 256 * 2**20

_KINDS: Final = (Start, Submit, Abort, Shutdown, StageChanged, Ready, StepOutput, Fatal)
_KIND_OF: Final = {kind: index for index, kind in enumerate(_KINDS)}
_DECODERS: Final[list[msgspec.msgpack.Decoder[Any]]] = [msgspec.msgpack.Decoder(kind) for kind in _KINDS]
_ENCODER: Final = msgspec.msgpack.Encoder()


class ChannelClosedError(ConnectionError):
    """The other process is gone."""


def encode(message: ToEngine | FromEngine) -> bytes:
    """One frame, header included."""
    body = _ENCODER.encode(message)
    return HEADER.pack(len(body), _KIND_OF[type(message)]) + body


def decode(kind: int, body: bytes | memoryview) -> ToEngine | FromEngine:
    message: ToEngine | FromEngine = _DECODERS[kind].decode(body)
    return message


class Channel:
    """A blocking end of the channel: one thread sends, one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def send(self, message: ToEngine | FromEngine) -> None:
        """Raises ChannelClosedError when the peer is gone."""
        try:
            self._socket.sendall(encode(message))
        except OSError as error:
            raise ChannelClosedError("the other process has gone") from error

    def receive(self) -> ToEngine | FromEngine:
        """The next message. Raises ChannelClosedError when the peer is gone."""
        length, kind = HEADER.unpack(self._read(HEADER.size))
        assert length <= MAX_FRAME_BYTES, length
        return decode(kind, self._read(length))

    def close(self) -> None:
        self._socket.close()

    def _read(self, size: int) -> bytes:
        chunks = bytearray()
        while len(chunks) < size:
            try:
                chunk = self._socket.recv(size - len(chunks))
            except OSError as error:
                raise ChannelClosedError("the other process has gone") from error
            if not chunk:
                raise ChannelClosedError("the other process has gone")
            chunks += chunk
        return bytes(chunks)
