"""The activator as the operator sees it: its pods' addresses, for whom it holds requests, and whether it is needed.

The activator runs while some server may go to zero, and not otherwise: the chart makes its Deployment, and its replicas
are set here. Its pods are asked, never listened to: each has one long question open (`/held`), which is answered when a
server comes or goes among those for which it holds requests.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import aiohttp
from pydantic import ValidationError

from octavo_operator import names
from octavo_operator.cache import Cache
from octavo_operator.cluster import Cluster, Refusal, UnavailableError
from octavo_operator.desired.network_policy import Peers, activator_policy, clients_elsewhere
from octavo_operator.expose import NetworkPolicy
from octavo_operator.names import Key, Name, Namespace
from octavo_operator.wake import port_for, port_of

log = logging.getLogger(__name__)

MANAGEMENT_PORT = 8081
POLL_S = 2.0
"""Between looks at which of its pods are ready, while it is needed."""
SCALED_POLL_S = 30.0
"""Between looks at whether its Deployment still has the replicas that it should have: a release may have set them."""
ASK_TIMEOUT_S = 45.0
"""Longer than the activator waits with an answer while nothing changes."""
RETRY_S = 1.0
MAX_BYTES = 2**20


class Activators:
    def __init__(
        self, cluster: Cluster, cache: Cache, wake: Callable[[Key], None], namespace: str, name: str, replicas: int
    ) -> None:
        """name: of its Deployment and its Service; empty where it is off."""
        self._cluster, self._cache, self._wake = cluster, cache, wake
        self._namespace, self._name, self._replicas = namespace, name, replicas
        self._needed: dict[Key, bool] = {}
        self._ports: dict[int, Key] = {}
        self._questions: dict[str, asyncio.Task[None]] = {}
        self._held: dict[str, frozenset[Key]] = {}
        self._session: aiohttp.ClientSession | None = None
        self._scaled: int | None = None
        self._scaled_at = 0.0
        self._allowed: dict[int, Peers] | None = None
        """By port, as the activator's policy says; None while this process has not written it."""
        self._guarding = asyncio.Lock()
        self.addresses: tuple[str, ...] = ()
        """Of its pods that are ready."""

    @property
    def on(self) -> bool:
        return bool(self._name)

    @property
    def _policy_name(self) -> str:
        return f"{self._name}-ports"

    def asked(self, key: Key) -> bool:
        """Whether a request is held for the server."""
        return any(key in held for held in self._held.values())

    def need(self, key: Key, *, needed: bool) -> None:
        """What a look at the server found: whether requests may have to be held for it."""
        self._needed[key] = needed
        if not needed:
            self._ports = {port: owner for port, owner in self._ports.items() if owner != key}

    def know(self, key: Key) -> None:
        """A look at the server found nothing new of that."""
        self._needed.setdefault(key, False)

    async def guard(self, key: Key, port: int) -> str:
        """Has only those reach the server's port whom the server lets in. Why that cannot be; empty when it is so."""
        async with self._guarding:
            if self._allowed is not None and self._allowed.get(port) == self._clients(key):
                return ""
            deployment = await self._cluster.get("Deployment", self._namespace, self._name)
            if deployment is None:
                return f"there is no Deployment {self._name} in {self._namespace}: install the chart with its activator"
            owners = {**self._ports, port: key}
            allowed = {at: clients for at, owner in owners.items() if (clients := self._clients(owner)) is not None}
            answer = await self._cluster.apply(activator_policy(deployment, self._policy_name, allowed))
            if isinstance(answer, Refusal):
                return f"the API server refused the activator's NetworkPolicy {self._policy_name}: {answer.message}"
            self._allowed = allowed
            return ""

    def _clients(self, key: Key) -> Peers | None:
        """Whom the server's policy lets in; None where it has none. A policy that cannot be read lets in nobody."""
        seen = self._cache.seen(key)
        raw = ((seen.resource.get("spec") or {}).get("expose") or {}).get("networkPolicy") if seen else None
        if raw is None:
            return None
        try:
            return clients_elsewhere(NetworkPolicy.model_validate(raw, context=[]), key[0])
        except ValidationError:
            return []

    def forget(self, key: Key) -> None:
        self.need(key, needed=False)
        del self._needed[key]

    def port(self, key: Key, present: Mapping[str, Any] | None) -> int | None:
        """The server's port; None where all are given out. present: its EndpointSlice."""
        if not self._ports:
            self._ports = ports_given_out(self._cache)
        port = port_for(key, present, self._ports)
        if port is not None:
            self._ports[port] = key
        return port

    async def close(self) -> None:
        for task in self._questions.values():
            task.cancel()
        await asyncio.gather(*self._questions.values(), return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def tend(self) -> None:
        """Never returns. Errors of the API server are for the next round."""
        while True:
            if self.on:
                try:
                    await self._look()
                except UnavailableError as error:
                    log.warning("the activator could not be looked at: %s", error)
            await asyncio.sleep(POLL_S)

    async def _look(self) -> None:
        wanted = self._wanted()
        if wanted is not None:
            await self._scale(wanted)
        ready, all_of_them = await self._endpoints() if wanted or self.addresses else ((), ())
        for address in all_of_them:
            if address not in self._questions or self._questions[address].done():
                self._questions[address] = asyncio.create_task(self._go_on_asking(address))
        for address in self._questions.keys() - set(all_of_them):
            self._questions.pop(address).cancel()
            self._held.pop(address, None)
        if ready != self.addresses:
            log.info("activator ready=%d of=%d", len(ready), len(all_of_them))
            self.addresses = ready
            self._wake_needed()

    def _wake_needed(self) -> None:
        for key, needed in self._needed.items():
            if needed:
                self._wake(key)

    def _wanted(self) -> int | None:
        """Its replicas; None while it is not known yet, as not all servers have been looked at."""
        if any(self._needed.values()):
            return self._replicas
        return 0 if all(key in self._needed for key in self._cache.present()) else None

    async def _scale(self, wanted: int) -> None:
        now = time.monotonic()
        if self._scaled == wanted and now - self._scaled_at < SCALED_POLL_S:
            return
        self._scaled, self._scaled_at = wanted, now
        if await self._cluster.get("NetworkPolicy", self._namespace, self._policy_name) is None:
            self._allowed = None
            self._wake_needed()  # it comes back with their look, where somebody took it away
        deployment = await self._cluster.get("Deployment", self._namespace, self._name)
        if deployment is None or deployment["spec"].get("replicas") == wanted:
            return
        answer = await self._cluster.scale(deployment, wanted)
        if isinstance(answer, Refusal):
            log.warning("the activator could not be scaled: %s", answer.message)
            self._scaled = None
        else:
            log.info("activator scaled to=%d", wanted)

    async def _endpoints(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Addresses of pods that are ready, and of all that run: one that ends may hold requests yet."""
        labels = f"{names.SERVICE_NAME_LABEL}={self._name}"
        slices = await self._cluster.list("EndpointSlice", self._namespace, labels=labels)
        # One family of addresses: the Services of servers are of the cluster's first one, as its own Service is.
        endpoints = [endpoint for document in slices for endpoint in document.get("endpoints") or []]
        every = sorted((endpoint["addresses"][0], endpoint.get("conditions") or {}) for endpoint in endpoints)
        return tuple(address for address, is_ in every if is_.get("ready")), tuple(address for address, _ in every)

    async def _go_on_asking(self, address: str) -> None:
        seen = ""
        while True:
            try:
                seen, held = await self._ask(address, seen)
            except (TimeoutError, aiohttp.ClientError, OSError, ValueError, KeyError, TypeError) as error:
                log.info("an activator does not tell address=%s: %s %s", address, type(error).__name__, error)
                # What it held is let go: a dead one would keep its servers awake for ever.
                self._held.pop(address, None)
                seen = ""
                await asyncio.sleep(RETRY_S)
                continue
            news = held - self._held.get(address, frozenset())
            self._held[address] = held
            for key in news:
                if self._needed.get(key):
                    self._wake(key)

    async def _ask(self, address: str, seen: str) -> tuple[str, frozenset[Key]]:
        if self._session is None:
            # Straight to the pod: a proxy in the environment leads out of the cluster.
            timeout = aiohttp.ClientTimeout(total=ASK_TIMEOUT_S, sock_connect=RETRY_S)
            connector = aiohttp.TCPConnector(force_close=True)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False)
        host = f"[{address}]" if ":" in address else address
        query = {"seen": seen} if seen else {}
        async with self._session.get(f"http://{host}:{MANAGEMENT_PORT}/held", params=query) as answer:
            if answer.status != 200:
                raise ValueError(f"status {answer.status}")
            body = b""
            while len(body) <= MAX_BYTES and (chunk := await answer.content.readany()):
                body += chunk
        return read_held(json.loads(body))


def read_held(document: Mapping[str, Any]) -> tuple[str, frozenset[Key]]:
    servers: Iterable[Mapping[str, Any]] = document["servers"]
    held = frozenset((Namespace(str(one["namespace"])), Name(str(one["name"]))) for one in servers)
    return str(int(document["version"])), held


def ports_given_out(cache: Cache) -> dict[int, Key]:
    """By the EndpointSlices that are there. Of two servers with one port, the first by name keeps it."""
    found: dict[int, Key] = {}
    for key, document in sorted(cache.documents("EndpointSlice"), key=lambda pair: pair[0]):
        port = port_of(document)
        if port is not None:
            found.setdefault(port, key)
    return found
