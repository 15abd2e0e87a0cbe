"""Our objects of other projects' kinds, by those projects' own schemas, rules and defaults; and what Prometheus asks.

The definitions come from the projects' modules (tests/cluster/definitions.py). No controller of theirs runs: what is
shown is that the API server takes our objects, that what it adds to them is left alone, and what is told of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import definitions
import pytest
import yaml
from stage import ApiError, Operator, is_served, wait_for
from test_commands_on_a_real_api_server import command

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
EVERY_WAY = {
    "autoscaling": {"mode": "KEDA", "minReplicas": 0, "maxReplicas": 3, "prometheusAddress": "http://p:9090"},
    "expose": {
        "gateway": {
            "parentRefs": [{"name": "g", "namespace": "infra", "sectionName": "https"}, {"name": "h"}],
            "hostnames": ["llm.example.com", "*.llm.example.com"],
        },
        "inferencePool": {"endpointPicker": {"name": "picker", "failureMode": "FailClose"}},
    },
}
THEIRS = {
    "httproutes": "/apis/gateway.networking.k8s.io/v1",
    "inferencepools": "/apis/inference.networking.k8s.io/v1",
    "scaledobjects": "/apis/keda.sh/v1alpha1",
    "podmonitors": "/apis/monitoring.coreos.com/v1",
}
MONITORING = "/apis/monitoring.coreos.com/v1/namespaces"


@pytest.fixture(scope="module")
def defined(api) -> Iterator[None]:
    if not definitions.are_there():
        pytest.skip("the definitions are not there: run `python tests/cluster/cluster.py build definitions`")
    bodies = [yaml.safe_load(path.read_text()) for path in sorted(definitions.folder().iterdir())]
    names = [body["metadata"]["name"] for body in bodies]
    try:
        for body in bodies:
            api.request("POST", CRDS, body)
        wait_for(lambda: all(is_served(api.get(f"{CRDS}/{name}") or {}) for name in names), "the kinds to be served")
        yield
    finally:
        for name in names:
            with contextlib.suppress(ApiError):
                api.request("DELETE", f"{CRDS}/{name}")
        wait_for(lambda: not any(api.get(f"{CRDS}/{name}") for name in names), "the kinds to be gone")


@pytest.fixture(scope="module")
def running(cluster, defined) -> Iterator[Operator]:
    quick = {"OCTAVO_RESYNC_SECONDS": "1", "OCTAVO_SETTLED_POLL_SECONDS": "1"}
    made = Operator(cluster, "definitions", 18170, **quick, OCTAVO_ALERTS_RULE="octavo-operator")
    try:
        made.wait_leading()
        yield made
    finally:
        made.stop()


def theirs(stage, plural: str) -> dict | None:
    return stage.api.get(f"{THEIRS[plural]}/namespaces/{stage.namespace}/{plural}/qwen")


def test_the_api_server_takes_our_objects_and_nobody_argues_about_its_defaults(running, stage):
    stage.serve(replicas=0, **EVERY_WAY)
    made = {plural: wait_for(lambda plural=plural: theirs(stage, plural), plural, 60) for plural in THEIRS}
    stage.wait_condition("Progressing", "False", "Settled")
    stage.patch("qwen", {"lifecycle": {"drainTimeoutSeconds": 60}})
    wait_for(lambda: stage.status(), "another look")
    after = {plural: theirs(stage, plural) for plural in THEIRS}

    # What their definitions fill in is there, and we have not written a second time.
    assert made["httproutes"]["spec"]["parentRefs"][0]["kind"] == "Gateway"
    assert made["httproutes"]["spec"]["rules"][0]["timeouts"] == {"request": "0s", "backendRequest": "0s"}
    assert made["inferencepools"]["spec"]["endpointPickerRef"]["kind"] == "Service"
    for plural, before in made.items():
        assert after[plural]["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"], plural
    stage.patch("qwen", {"expose": None, "autoscaling": None})
    wait_for(lambda: not any(theirs(stage, p) for p in THEIRS if p != "podmonitors"), "them to be gone")


def test_a_scaled_object_that_keda_cannot_work_with_is_told_while_it_lasts(running, stage):
    def keda_says(status: str, reason: str, message: str) -> None:
        ready = {"type": "Ready", "status": status, "reason": reason, "message": message}
        path = f"{THEIRS['scaledobjects']}/namespaces/{stage.namespace}/scaledobjects/qwen"
        stage.api.merge(f"{path}/status", {"status": {"conditions": [ready]}})

    stage.serve(replicas=0, autoscaling=EVERY_WAY["autoscaling"])
    stage.wait_condition("Progressing", "False", "Settled")
    keda_says("False", "TriggerError", "Triggers defined in ScaledObject are not working correctly")
    told = stage.wait_condition("Progressing", "False", "NotScaling")
    keda_says("True", "ScaledObjectReady", "ScaledObject is defined correctly and is ready for scaling")

    stage.wait_condition("Progressing", "False", "Settled")
    assert "Triggers defined in ScaledObject are not working correctly. Next: check" in told["message"]


def test_a_pod_monitor_that_no_prometheus_selects_is_told_with_the_label_that_it_lacks(running, stage, cluster):
    stage.serve(replicas=0)
    stage.wait_condition("MonitoringReady", "False", "AlertsMissing")
    # What kube-prometheus-stack makes, as far as it matters here.
    asks = {"matchLabels": {"release": "kps"}}
    selectors = {"podMonitorSelector": asks, "podMonitorNamespaceSelector": {}, "ruleSelector": asks}
    selectors |= {"ruleNamespaceSelector": {}, "replicas": 0}
    body = {"apiVersion": "monitoring.coreos.com/v1", "kind": "Prometheus", "metadata": {"name": "k8s"}}
    prometheus = f"{MONITORING}/{stage.namespace}/prometheuses"
    stage.api.request("POST", prometheus, body | {"spec": selectors})
    rule = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule", "spec": {"groups": []}}
    rules = f"{MONITORING}/octavo-system/prometheusrules"
    stage.api.request("POST", rules, rule | {"metadata": {"name": "octavo-operator"}})
    try:
        told = stage.wait_condition("MonitoringReady", "False", "NotSelected")
        examined = command(cluster, "doctor").stdout
        stage.patch("qwen", {"observability": {"labels": {"release": "kps"}}})
        unalarmed = stage.wait_condition("MonitoringReady", "False", "AlertsNotSelected")
        stage.api.merge(f"{rules}/octavo-operator", {"metadata": {"labels": {"release": "kps"}}})
        ready = stage.wait_condition("MonitoringReady", "True", "PodMonitor")
    finally:
        stage.api.request("DELETE", f"{rules}/octavo-operator")
        stage.api.request("DELETE", f"{prometheus}/k8s")

    called = f"Prometheus {stage.namespace}/k8s"
    assert f"{called} wants the label release=kps" in told["message"]
    assert "observability.labels" in told["message"]
    assert f"no Prometheus selects the PodMonitor {stage.namespace}/qwen: {called} wants" in examined
    assert "alerts.labels" in unalarmed["message"]
    assert f"{called} selects it" in ready["message"]
    assert "Alerts: PrometheusRule octavo-system/octavo-operator" in ready["message"]
    assert theirs(stage, "podmonitors")["metadata"]["labels"]["release"] == "kps"
