"""The EndpointSlice by which a server's Service leads to the activator while no pod of the server is ready."""

from __future__ import annotations

from typing import Any

from octavo_operator import names
from octavo_operator.desired import common
from octavo_operator.spec import Server
from octavo_operator.wake import Waking


def endpoint_slice(server: Server, waking: Waking, *, leads: bool) -> dict[str, Any] | None:
    """None where no request wakes the server. leads: whether the Service is to lead to the activator now.

    It is there with no endpoints while pods are ready, so that the server keeps its port.
    """
    if waking.port is None:
        return None
    metadata = common.metadata(server)
    metadata["labels"] |= {
        names.SERVICE_NAME_LABEL: server.name,
        names.SLICE_MANAGED_BY_LABEL: names.MANAGED_BY,
        names.ACTIVATOR_PORT_LABEL: str(waking.port),
    }
    addresses = waking.addresses if leads else ()
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": metadata,
        "addressType": "IPv6" if any(":" in address for address in waking.addresses) else "IPv4",
        # The Service's port finds this one by its name.
        "ports": [{"name": names.API_PORT_NAME, "port": waking.port, "protocol": "TCP", "appProtocol": "http"}],
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}} for address in addresses],
    }
