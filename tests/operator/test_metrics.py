"""The operator's own metrics: what the alerts are made of."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from octavo_operator.metrics import ServersCollector
from octavo_operator.names import Name, Namespace

STATUS = {
    "ready": "1/3",
    "readyReplicas": 1,
    "updatedReplicas": 2,
    "conditions": [
        {"type": "Ready", "status": "True", "reason": "SomeReplicasReady"},
        {"type": "Schedulable", "status": "False", "reason": "InsufficientGPU"},
        {"type": "Fits", "status": "Unknown", "reason": "NotPlannedYet"},
    ],
}


def test_a_server_is_told_by_its_status_until_it_is_gone():
    servers, registry = ServersCollector(), CollectorRegistry()
    registry.register(servers)
    key = (Namespace("ml"), Name("qwen"))
    servers.tell(key, STATUS)
    text = generate_latest(registry).decode()
    servers.forget(key)

    for line in (
        'octavo_server_replicas{namespace="ml",server="qwen",state="desired"} 3.0',
        'octavo_server_replicas{namespace="ml",server="qwen",state="updated"} 2.0',
        'octavo_server_condition{namespace="ml",reason="SomeReplicasReady",server="qwen",type="Ready"} 1.0',
        'octavo_server_condition{namespace="ml",reason="InsufficientGPU",server="qwen",type="Schedulable"} 0.0',
    ):
        assert line in text, text
    assert "Fits" not in text
    assert "qwen" not in generate_latest(registry).decode()
