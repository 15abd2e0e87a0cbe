"""Reads /statusz of engine pods, all at once and with one deadline. Called by reconcile.py and the activator."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable

import aiohttp

from octavo_engine.status import MANAGEMENT_PORT, Statusz
from octavo_operator.observed import Pod

MAX_BYTES = 64 * 1024
"""More than any engine says of itself. A pod is not trusted to end its answer."""
CONNECTIONS = 64


class EngineClient:
    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def statuses(self, pods: Iterable[Pod]) -> dict[str, Statusz]:
        """By pod name, what each running engine says. Pods that do not answer in time are left out."""
        asked = {pod.name: pod.ip for pod in pods if pod.running and pod.ip}
        answers = await asyncio.gather(*map(self.statusz, asked.values()))
        return {name: answer for name, answer in zip(asked, answers, strict=True) if answer is not None}

    async def statusz(self, address: str) -> Statusz | None:
        """What the engine at a pod's address says; None where it does not answer in time."""
        if self._session is None:
            # Straight to the pod: a proxy in the environment leads out of the cluster. A fresh connection each time,
            # as pods come and go and an idle one would keep a draining engine's socket open.
            connector = aiohttp.TCPConnector(limit=CONNECTIONS, force_close=True)
            timeout = aiohttp.ClientTimeout(total=self._timeout_s)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False)
        host = f"[{address}]" if ":" in address else address
        try:
            async with self._session.get(f"http://{host}:{MANAGEMENT_PORT}/statusz") as answer:
                body = await answer.content.read(MAX_BYTES)
                while not answer.content.at_eof() and len(body) < MAX_BYTES:
                    body += await answer.content.read(MAX_BYTES - len(body))
            return Statusz.from_dict(json.loads(body))
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError, TypeError, KeyError, AttributeError):
            return None  # absent is the answer: the pod's stage becomes unreachable
