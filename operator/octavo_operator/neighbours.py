"""What of other projects the cluster has: kinds that their CRDs bring, and what Prometheus asks of objects.

Asked for every few seconds, as nothing tells of it: no watch is worth its memory for what changes once a year.
Called by reconcile.py and doctor.py.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from octavo_operator.cluster import Cluster, UnavailableError, together
from octavo_operator.monitoring import PROMETHEUSES, SELECTORS, Monitoring, alerts_of
from octavo_operator.settings import Settings

log = logging.getLogger(__name__)


class Neighbours:
    def __init__(self, cluster: Cluster, settings: Settings) -> None:
        self._cluster, self._settings = cluster, settings
        # An operator of some namespaces has no rights beyond them.
        self._sees_prometheuses = not settings.watch_namespaces

    async def kinds(self, wanted: Collection[str]) -> frozenset[str]:
        known = await together(self._cluster.knows(kind) for kind in wanted)
        return frozenset(kind for kind, is_known in zip(wanted, known, strict=True) if is_known)

    async def monitoring(self) -> Monitoring:
        """Raises UnavailableError. What may not be seen is not told of, and not asked for again."""
        name, namespace = self._settings.alerts_rule, self._settings.namespace
        known = bool(name) and await self._cluster.knows("PrometheusRule")
        rule = await self._cluster.get("PrometheusRule", namespace, str(name)) if known else None
        labels = tuple(sorted(self._settings.engine.pod_monitor_labels.items()))
        alerts = alerts_of(self._settings, rule, kind_known=known)
        return Monitoring(await self._prometheuses(), alerts, self._settings.boards_namespace, labels)

    async def _prometheuses(self) -> tuple[dict[str, Any], ...]:
        found: list[dict[str, Any]] = []
        try:
            for kind in await self.kinds(PROMETHEUSES) if self._sees_prometheuses else ():
                found += [_asks(kind, document) for document in await self._cluster.list(kind)]
        except UnavailableError as error:
            if error.status != 403:
                raise
            log.info("whether Prometheus selects PodMonitors is not looked at: %s", error)
            self._sees_prometheuses = False
            return ()
        return tuple(sorted(found, key=lambda one: str(one["metadata"])))


def _asks(kind: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """What of a Prometheus says which objects it takes; the rest of it would only make it differ."""
    return {
        "kind": kind,
        "metadata": {name: document["metadata"][name] for name in ("namespace", "name")},
        "spec": {name: document["spec"][name] for name in SELECTORS if name in document["spec"]},
    }
