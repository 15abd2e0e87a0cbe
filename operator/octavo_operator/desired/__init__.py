"""Pure builders: a parsed LLMServer in, the objects that should exist out. One file per object."""

from __future__ import annotations

from typing import Any

from octavo_operator.desired.autoscalers import autoscaler
from octavo_operator.desired.cache import claim, prefetch_job
from octavo_operator.desired.deployment import deployment
from octavo_operator.desired.disruption import disruption_budget
from octavo_operator.desired.monitoring import pod_monitor, wants_pod_monitor
from octavo_operator.desired.network_policy import network_policy
from octavo_operator.desired.routes import routes
from octavo_operator.desired.service import service
from octavo_operator.settings import EngineDefaults
from octavo_operator.spec import Server

Object = dict[str, Any]


def objects(
    server: Server, defaults: EngineDefaults, *, pod_monitors_known: bool, sleeps: bool = False
) -> list[Object]:
    """All children of the server, in the order in which they are applied.

    pod_monitors_known: whether the cluster has the PodMonitor kind of the Prometheus operator.
    sleeps: whether its Service leads to the activator now.
    """
    children = [
        deployment(server, defaults),
        service(server),
        disruption_budget(server),
        *routes(server, defaults, sleeps=sleeps),
    ]
    template = children[0]["spec"]["template"]
    optional = (
        claim(server),
        prefetch_job(server, defaults, template["spec"]),
        network_policy(server, defaults),
        autoscaler(server),
    )
    children += [child for child in optional if child is not None]
    if wants_pod_monitor(server, pod_monitors_known=pod_monitors_known):
        children.append(pod_monitor(server, defaults))
    return children
