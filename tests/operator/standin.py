"""Answers GET /statusz on every address with what the test wrote for that address. Run inside the cluster's network.

Any other request, on the port of the API, gets its own first line and headers back, with the address that it came to.

A pod on a staged node has an address of the loopback network; FOLDER/ADDRESS.json is what its engine says. An address
without a file gets that of its network, FOLDER/10.245.json, where there is one: engines that all say the same.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import cast

FOLDER = Path(sys.argv[1])


class Engine(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        address, port = self.transport.get_extra_info("sockname")[:2]
        if port == 8000:
            self.answer(f"{address}\n".encode() + data, "200 OK", "text/plain")
            self.transport.close()
            return
        body = b""
        for name in (address, ".".join(address.split(".")[:2])):
            document = FOLDER / f"{name}.json"
            if document.exists():
                body = document.read_bytes()
                break
        status = "200 OK" if body else "503 Service Unavailable"
        self.answer(body, status, "application/json")
        if b"connection: close" in data.lower():
            self.transport.close()

    def answer(self, body: bytes, status: str, kind: str) -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)


async def main() -> None:
    await asyncio.get_running_loop().create_server(Engine, "0.0.0.0", 8000, backlog=1024)
    server = await asyncio.get_running_loop().create_server(Engine, "0.0.0.0", 8001, backlog=1024)
    await server.serve_forever()


asyncio.run(main())
