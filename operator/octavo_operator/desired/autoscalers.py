"""Autoscalers of other projects over a server's own metrics, where spec.autoscaling asks for one of them."""

from __future__ import annotations

from typing import Any

from octavo_operator import names
from octavo_operator.desired import common
from octavo_operator.spec import Server

QUEUE_METRIC = "octavo:predicted_queue_seconds"
KV_METRIC = "vllm:kv_cache_usage_perc"
RUNNING_METRIC = "vllm:num_requests_running"
WAKES_ONE = "100000"
"""Held requests for one replica: more than are ever held. KEDA wakes from zero at the first."""


def autoscaler(server: Server) -> dict[str, Any] | None:
    spec = server.spec.autoscaling
    if spec is None or server.spec.suspend or spec.mode == "BuiltIn":
        return None
    target: dict[str, Any] = {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": server.name}
    wanted = [(QUEUE_METRIC, spec.target.queue_seconds * 1000), (KV_METRIC, spec.target.kv_usage_percent * 10)]
    if spec.target.running is not None:
        wanted.append((RUNNING_METRIC, spec.target.running * 1000))
    behavior = {"scaleDown": {"stabilizationWindowSeconds": spec.scale_down_delay_seconds}}
    if spec.mode == "HPA":
        return {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": common.metadata(server),
            "spec": {
                "scaleTargetRef": target,
                "minReplicas": spec.min_replicas,
                "maxReplicas": spec.max_replicas,
                "metrics": [
                    {
                        "type": "Pods",
                        "pods": {
                            "metric": {"name": metric},
                            "target": {"type": "AverageValue", "averageValue": f"{milli}m"},
                        },
                    }
                    for metric, milli in wanted
                ],
                "behavior": behavior,
            },
        }
    if spec.min_replicas == 0:
        # What wakes it is measured where requests wait, as no replica is there to measure it. One replica is enough
        # for any number of them: how many more it takes, its own metrics tell when it is there.
        held = f'octavo_activator_held_requests{{server="{server.namespace}/{server.name}"}}'
        woken = [(f"sum({held})", WAKES_ONE)]
    else:
        woken = []
    selector = f'namespace="{server.namespace}",octavo_dev_server="{server.name}"'
    queries = [(f"sum({metric}{{{selector}}})", f"{milli / 1000:g}") for metric, milli in wanted]
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": common.metadata(server),
        "spec": {
            "scaleTargetRef": target,
            "minReplicaCount": spec.min_replicas,
            "maxReplicaCount": spec.max_replicas,
            "cooldownPeriod": spec.idle_seconds,
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behavior}},
            "triggers": [
                {
                    "type": "prometheus",
                    "metricType": "AverageValue",
                    "metadata": {
                        "serverAddress": spec.prometheus_address,
                        "query": query,
                        "threshold": threshold,
                    },
                }
                for query, threshold in (*queries, *woken)
            ],
        },
    }
