"""Ways from outside the cluster to a server: Ingress, HTTPRoute, InferencePool."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from octavo_engine.status import API_PORT
from octavo_operator import names
from octavo_operator.desired import common
from octavo_operator.hostnames import refusal
from octavo_operator.settings import EngineDefaults
from octavo_operator.spec import Server

GATEWAY_API = "gateway.networking.k8s.io/v1"
INFERENCE_API = "inference.networking.k8s.io/v1"


def routes(server: Server, defaults: EngineDefaults, *, sleeps: bool = False) -> Iterator[dict[str, Any]]:
    """sleeps: no pod takes requests, and the Service leads to the activator. An InferencePool chooses among pods alone,
    so the HTTPRoute goes by the Service then. There are none for names that the namespace may not claim."""
    exposed = server.spec.expose
    if refusal(exposed, defaults.hostnames, server.namespace):
        return
    if exposed.ingress:
        yield _ingress(server, defaults)
    if exposed.inference_pool:
        yield _inference_pool(server)
    if exposed.gateway:
        yield _http_route(server, pooled=exposed.inference_pool is not None and not sleeps)


def _ingress(server: Server, defaults: EngineDefaults) -> dict[str, Any]:
    asked = server.spec.expose.ingress
    assert asked is not None
    backend = {"service": {"name": server.name, "port": {"name": names.API_PORT_NAME}}}
    spec: dict[str, Any] = {
        "rules": [
            {"host": asked.hostname, "http": {"paths": [{"path": "/", "pathType": "Prefix", "backend": backend}]}}
        ]
    }
    if asked.class_name:
        spec["ingressClassName"] = asked.class_name
    if asked.tls_secret_name:
        spec["tls"] = [{"hosts": [asked.hostname], "secretName": asked.tls_secret_name}]
    metadata = common.metadata(server)
    if defaults.ingress_annotations:
        metadata["annotations"] = dict(defaults.ingress_annotations)
    return {"apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": metadata, "spec": spec}


def _http_route(server: Server, *, pooled: bool) -> dict[str, Any]:
    asked = server.spec.expose.gateway
    assert asked is not None
    backend: dict[str, Any] = {"name": server.name, "port": server.spec.expose.service.port}
    if pooled:
        group = INFERENCE_API.partition("/")[0]
        backend = {"group": group, "kind": "InferencePool", "name": server.name}
    rule: dict[str, Any] = {"matches": [{"path": {"type": "PathPrefix", "value": "/"}}], "backendRefs": [backend]}
    if asked.request_timeout == "None":
        rule["timeouts"] = {"request": "0s", "backendRequest": "0s"}
    spec: dict[str, Any] = {
        "parentRefs": [parent.model_dump(by_alias=True, exclude_none=True) for parent in asked.parent_refs],
        "rules": [rule],
    }
    if asked.hostnames:
        spec["hostnames"] = list(asked.hostnames)
    return {"apiVersion": GATEWAY_API, "kind": "HTTPRoute", "metadata": common.metadata(server), "spec": spec}


def _inference_pool(server: Server) -> dict[str, Any]:
    asked = server.spec.expose.inference_pool
    assert asked is not None
    picker = asked.endpoint_picker
    return {
        "apiVersion": INFERENCE_API,
        "kind": "InferencePool",
        "metadata": common.metadata(server),
        "spec": {
            "selector": {"matchLabels": common.selector(server)},
            "targetPorts": [{"number": API_PORT}],
            "endpointPickerRef": {
                "name": picker.name,
                "port": {"number": picker.port},
                "failureMode": picker.failure_mode,
            },
        },
    }
