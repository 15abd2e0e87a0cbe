"""The Service in front of a server's pods."""

from __future__ import annotations

from typing import Any

from octavo_operator import names
from octavo_operator.desired import common
from octavo_operator.spec import Server


def service(server: Server) -> dict[str, Any]:
    exposed = server.spec.expose.service
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": common.metadata(server),
        "spec": {
            "type": exposed.type,
            "selector": common.selector(server),
            "ports": [
                {
                    "name": names.API_PORT_NAME,
                    "port": exposed.port,
                    "targetPort": names.API_PORT_NAME,
                    "protocol": "TCP",
                    "appProtocol": "https" if server.spec.expose.tls else "http",
                }
            ],
        },
    }


def url(server: Server) -> str:
    """The API's base URL for clients inside the cluster, as an OpenAI client wants it."""
    port, scheme = server.spec.expose.service.port, "https" if server.spec.expose.tls else "http"
    usual = port == (443 if scheme == "https" else 80)
    return f"{scheme}://{server.name}.{server.namespace}.svc{'' if usual else f':{port}'}/v1"
