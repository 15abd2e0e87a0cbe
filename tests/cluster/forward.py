"""Listen on this machine's loopback and connect to an address inside a cluster's network. Started by cluster.py.

forward.py NETWORK_NAMESPACE HOST:PORT PORT_FILE LISTEN_PORT

The listening socket is made first and stays in this machine's network; then the process moves into the cluster's
network, where every connection that it opens belongs. It is started in the cluster's PID namespace, so it ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import sys
from pathlib import Path

CLONE_NEWNET = 0x40000000


async def serve(listener: socket.socket, host: str, port: int) -> None:
    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(host, port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))
        for end in (writer, far_writer):
            end.close()

    server = await asyncio.start_server(relay, sock=listener)
    await server.serve_forever()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    # One direction's end is passed on as such: HTTP clients may close their half and still wait for the answer.
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.write_eof()


def main() -> None:
    namespace, target, port_file, listen_port = sys.argv[1:]
    listener = socket.create_server(("127.0.0.1", int(listen_port)))
    with open(namespace, "rb") as handle:
        if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    # Renamed into place, so that a reader never sees half a number.
    partial = Path(f"{port_file}.{os.getpid()}")
    partial.write_text(str(listener.getsockname()[1]))
    partial.rename(port_file)
    host, _, port = target.rpartition(":")
    asyncio.run(serve(listener, host, int(port)))


if __name__ == "__main__":
    main()
