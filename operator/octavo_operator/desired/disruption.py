"""The PodDisruptionBudget: evictions, as in a node's drain, take one engine at a time."""

from __future__ import annotations

from typing import Any

from octavo_operator.desired import common
from octavo_operator.spec import Server


def disruption_budget(server: Server) -> dict[str, Any]:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": common.metadata(server),
        "spec": {
            # Not minAvailable: with one replica that would make its node impossible to drain.
            "maxUnavailable": 1,
            "selector": {"matchLabels": common.selector(server)},
            # A pod that serves nobody must not keep a node from being drained.
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }
