"""Leader election by a Lease: of several operators one works, the others wait. Called by run.py.

A Lease is taken when it is free, when it is our own already (a restarted container of the same pod), or when its
holder has not renewed it for the time that the holder promised. That time is measured on our own clock, from when we
saw the renewal, so that clocks need not agree. Losing it ends the process: what it was doing belongs to another now.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from octavo_operator import names
from octavo_operator.cluster import Cluster, Refusal, UnavailableError

log = logging.getLogger(__name__)

RENEWALS_PER_LEASE = 5
GIVE_UP_SHARE = 2 / 3
"""A holder that could not renew for this share of the lease stops, well before another may take it."""


@dataclass(frozen=True)
class Sighting:
    """A renewal as we saw it: what stood in the Lease, and when that was on our clock."""

    holder: str
    renewed: str
    seen_at: float


def may_take(spec: dict[str, Any], me: str, sighting: Sighting | None, monotonic: float) -> bool:
    """Whether the Lease can be ours now. sighting: of the renewal that stands in it, None if it is seen first now."""
    holder = spec.get("holderIdentity") or ""
    if holder in ("", me):
        return True
    if sighting is None or (sighting.holder, sighting.renewed) != (holder, spec.get("renewTime")):
        return False
    return monotonic - sighting.seen_at > float(spec.get("leaseDurationSeconds") or 0)


class Leader:
    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        identity: str,
        lease_s: int,
        *,
        clock: Callable[[], datetime],
        monotonic: Callable[[], float],
    ) -> None:
        self._cluster, self._namespace, self._identity, self._lease_s = cluster, namespace, identity, lease_s
        self._clock, self._monotonic = clock, monotonic
        self._sighting: Sighting | None = None
        self.reached = False
        """Whether the API server has answered once: what readiness says of an operator that waits for its turn."""

    async def acquire(self) -> None:
        """Returns when the Lease is ours."""
        waiting = False
        while not await self._try():
            if not waiting:
                holder = self._sighting.holder if self._sighting else "nobody yet"
                log.info("waiting for the lease namespace=%s holder=%s", self._namespace, holder)
                waiting = True
            await asyncio.sleep(self._lease_s / RENEWALS_PER_LEASE)
        log.info("leading identity=%s namespace=%s", self._identity, self._namespace)

    async def hold(self) -> None:
        """Renews the Lease, and returns when it is lost."""
        renewed_at = self._monotonic()
        while (left := renewed_at + self._lease_s * GIVE_UP_SHARE - self._monotonic()) > 0:
            began, renewed = self._monotonic(), False
            # A renewal that hangs, or that waits for an API server which is busy, must not outlast what it renews.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await asyncio.sleep(self._lease_s / RENEWALS_PER_LEASE)
                    began, renewed = self._monotonic(), await self._try()
            if renewed:
                renewed_at = began
            elif self._sighting and self._sighting.holder != self._identity:
                break
        log.error("the lease is lost identity=%s", self._identity)

    async def release(self) -> None:
        """Lets the next one take over at once. Without it, or when it fails, that takes the length of the lease."""
        try:
            lease = await self._cluster.get("Lease", self._namespace, names.LEASE)
            if lease is not None and lease["spec"].get("holderIdentity") == self._identity:
                await self._cluster.replace({**lease, "spec": {**lease["spec"], "holderIdentity": ""}})
        except UnavailableError as error:
            log.warning("the lease could not be released: %s", error)

    async def _try(self) -> bool:
        try:
            lease = await self._cluster.get("Lease", self._namespace, names.LEASE)
            self.reached = True
            if lease is None:
                metadata = {"name": names.LEASE, "namespace": self._namespace}
                answer = await self._cluster.create(
                    {
                        "apiVersion": "coordination.k8s.io/v1",
                        "kind": "Lease",
                        "metadata": metadata,
                        "spec": self._spec({}),
                    }
                )
                return not isinstance(answer, Refusal)
            spec = lease.get("spec", {})
            if not may_take(spec, self._identity, self._sighting, self._monotonic()):
                self._look_at(spec)
                return False
            # With the resourceVersion that was read: of two that try, one gets a conflict.
            answer = await self._cluster.replace({**lease, "spec": self._spec(spec)})
            return not isinstance(answer, Refusal)
        except UnavailableError as error:
            log.warning("the lease could not be read or written: %s", error)
            return False

    def _look_at(self, spec: dict[str, Any]) -> None:
        seen = Sighting(spec.get("holderIdentity", ""), spec.get("renewTime", ""), self._monotonic())
        if self._sighting is None or (seen.holder, seen.renewed) != (self._sighting.holder, self._sighting.renewed):
            self._sighting = seen

    def _spec(self, before: dict[str, Any]) -> dict[str, Any]:
        now = self._clock().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        ours = before.get("holderIdentity") == self._identity
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._lease_s,
            "acquireTime": before.get("acquireTime", now) if ours else now,
            "renewTime": now,
            "leaseTransitions": int(before.get("leaseTransitions") or 0) + (0 if ours else 1),
        }
