"""Names that a namespace may not claim, on a real API server. The table of patterns is in test_desired.py."""

from __future__ import annotations

import pytest
from stage import Operator, wait_for

pytestmark = pytest.mark.cluster


def test_a_name_that_is_another_namespaces_is_refused_in_a_condition_and_its_ingress_taken_back(cluster, api, stage):
    """The setting may come when the Ingress is there."""
    stage.serve(replicas=0, expose={"ingress": {"hostname": "llm.example.com"}})
    mine = f"chat.{stage.namespace}.example.com"
    before = Operator(cluster, "before", 18084)
    try:
        wait_for(lambda: stage.get("ingresses", "qwen"), "the Ingress")
    finally:
        before.stop()
    operator = Operator(cluster, "names", 18085, OCTAVO_HOSTNAMES="*.{namespace}.example.com")
    try:
        told = stage.wait_condition("Ready", "False", "HostnameRefused")
        wait_for(lambda: stage.get("ingresses", "qwen") is None, "the Ingress to be gone")
        stage.wait_event("Warning", "HostnameRefused")
        stage.patch("qwen", {"expose": {"ingress": {"hostname": mine}}})
        made = wait_for(lambda: stage.get("ingresses", "qwen"), "the Ingress of a name of its own")
        stage.wait_condition("Ready", "False", "ScaledToZero")
    finally:
        operator.stop()

    assert "expose.ingress.hostname has 'llm.example.com', which this namespace may not claim" in told["message"]
    assert f"names may be *.{stage.namespace}.example.com (Helm value tenancy.hostnames" in told["message"]
    assert made["spec"]["rules"][0]["host"] == mine
