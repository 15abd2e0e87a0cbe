"""Whether a Prometheus takes what is made for it, and what is told where none does."""

from __future__ import annotations

from typing import Any

import pytest
from build import server

from octavo_operator.monitoring import Alerts, Monitoring, judge, selecting

KPS = {"matchLabels": {"release": "kps"}}
ALERTS = Alerts("octavo-operator", "octavo-system", kind_known=True, labels={"release": "kps"})


def prometheus(kind: str = "Prometheus", **spec: Any) -> dict[str, Any]:
    return {"kind": kind, "metadata": {"namespace": "monitoring", "name": "k8s"}, "spec": spec}


def one_of(key: str, operator: str, *values: str) -> dict[str, Any]:
    return {"matchExpressions": [{"key": key, "operator": operator, **({"values": [*values]} if values else {})}]}


EVERYWHERE: dict[str, Any] = {"podMonitorNamespaceSelector": {}}
NAMED = "kubernetes.io/metadata.name"


@pytest.mark.parametrize(
    ("spec", "takes"),
    [
        (EVERYWHERE | {"podMonitorSelector": {}}, True),
        (EVERYWHERE | {"podMonitorSelector": KPS}, True),
        (EVERYWHERE | {"podMonitorSelector": {"matchLabels": {"release": "other"}}}, False),
        (EVERYWHERE | {"podMonitorSelector": one_of("release", "In", "a", "kps")}, True),
        (EVERYWHERE | {"podMonitorSelector": one_of("release", "NotIn", "kps")}, False),
        (EVERYWHERE | {"podMonitorSelector": one_of("release", "Exists")}, True),
        (EVERYWHERE | {"podMonitorSelector": one_of("release", "DoesNotExist")}, False),
        # No selector takes none, no selector of namespaces takes its own alone.
        (EVERYWHERE | {"serviceMonitorSelector": {}}, False),
        ({"podMonitorSelector": {}}, False),
        ({"podMonitorSelector": {}, "podMonitorNamespaceSelector": {"matchLabels": {NAMED: "ml"}}}, True),
        ({"podMonitorSelector": {}, "podMonitorNamespaceSelector": one_of(NAMED, "In", "x")}, False),
        # Which other labels a namespace has is not known; nor what stands in a configuration that is written by hand.
        ({"podMonitorSelector": {}, "podMonitorNamespaceSelector": {"matchLabels": {"team": "x"}}}, True),
        ({}, True),
    ],
)
def test_a_prometheus_takes_what_its_selectors_say(spec, takes):
    assert bool(selecting([prometheus(**spec)], "podMonitor", {"release": "kps"}, "ml")) is takes


def told(seen: Monitoring, known: bool = True, **observability: Any) -> tuple[bool, str, str]:
    made = server(**({"observability": observability} if observability else {}))
    found = judge(made, seen, pod_monitors_known=known, unannotated=None)
    assert not found.trouble
    return found.holds, found.reason, found.message


TAKES = prometheus(podMonitorSelector=KPS, ruleSelector=KPS, ruleNamespaceSelector={}, **EVERYWHERE)
OWN_ONLY = prometheus(podMonitorSelector={}, ruleSelector={})
NO_RULE = Alerts("octavo-operator", "octavo-system", kind_known=True, labels=None)
NO_KIND = Alerts("octavo-operator", "octavo-system", kind_known=False, labels=None)
UNLABELLED = Alerts("octavo-operator", "octavo-system", kind_known=True, labels={})
LABELLED = {"labels": {"release": "kps"}}


@pytest.mark.parametrize(
    ("seen", "observability", "holds", "reason", "words"),
    [
        (Monitoring(), {}, True, "PodMonitor", "needs observability.labels"),
        (Monitoring((TAKES,)), {}, False, "NotSelected", "wants the label release=kps. Next: set observability.labels"),
        (Monitoring((OWN_ONLY,)), {}, False, "NotSelected", "does not look into the namespace default"),
        (Monitoring((TAKES,)), LABELLED, True, "PodMonitor", "and Prometheus monitoring/k8s selects it."),
        (Monitoring((TAKES,), labels=(("release", "kps"),)), {}, True, "PodMonitor", "selects it"),
        (Monitoring((TAKES,), ALERTS), LABELLED, True, "PodMonitor", "Alerts: PrometheusRule octavo-system/octavo-op"),
        (Monitoring((TAKES,), NO_RULE), LABELLED, False, "AlertsMissing", "helm upgrade makes it"),
        (Monitoring((TAKES,), UNLABELLED), LABELLED, False, "AlertsNotSelected", "Next: set the Helm value alerts."),
        (Monitoring((TAKES,), "off"), LABELLED, True, "PodMonitor", "Alerts are off (Helm value alerts.enabled)"),
        (Monitoring(boards="grafana"), LABELLED, True, "PodMonitor", "boards: ConfigMaps in grafana"),
        (Monitoring(boards=""), LABELLED, True, "PodMonitor", "Boards are off"),
    ],
)  # fmt: skip
def test_what_is_missing_on_the_way_to_an_alert_is_told(seen, observability, holds, reason, words):
    found = told(seen, **observability)

    assert found[:2] == (holds, reason)
    assert words in found[2]


def test_an_agent_scrapes_and_alerts_nobody():
    agent = prometheus("PrometheusAgent", podMonitorSelector={}, **EVERYWHERE)

    assert told(Monitoring((agent,), UNLABELLED))[:2] == (True, "PodMonitor")


def test_without_the_kind_of_alerts_the_way_to_have_them_is_told():
    holds, reason, message = told(Monitoring(alerts=NO_KIND), known=False)

    assert (holds, reason) == (True, "ScrapeAnnotations")
    assert "install the Prometheus operator, or give the chart's files/rules.yaml to your Prometheus" in message
