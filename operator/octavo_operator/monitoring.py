"""Whether monitoring reaches from a server to somebody who looks, and what is still missing. Pure.

A PodMonitor that no Prometheus selects is the usual reason for boards without data, and nobody tells of it: Prometheus
is content with what it selects, and so is the PodMonitor. What Prometheus objects ask for is public, so it is compared.
Called by conditions.py and doctor.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from octavo_operator.desired import common
from octavo_operator.desired.monitoring import pod_monitor_labels
from octavo_operator.settings import Settings
from octavo_operator.spec import Server
from octavo_operator.wake import NAMESPACE_NAME

Document = Mapping[str, Any]
What = Literal["podMonitor", "rule"]
PROMETHEUSES = ("Prometheus", "PrometheusAgent")
_SCRAPED = ("serviceMonitor", "podMonitor", "probe", "scrapeConfig")
SELECTORS = tuple(f"{what}{which}" for what in (*_SCRAPED, "rule") for which in ("Selector", "NamespaceSelector"))
"""Fields of a Prometheus that say what it takes."""


@dataclass(frozen=True)
class Alerts:
    """The PrometheusRule of the operator's chart."""

    name: str
    namespace: str
    kind_known: bool
    labels: Mapping[str, str] | None
    """None: there is no such object."""


@dataclass(frozen=True)
class Monitoring:
    """What the cluster has, as far as the operator may see it."""

    prometheuses: tuple[Document, ...] = ()
    """Prometheus and PrometheusAgent objects; none where there are none, or where they may not be listed."""
    alerts: Alerts | Literal["off"] | None = None
    """off: the chart was told to leave them out. None: the operator was installed by other means."""
    boards: str | None = None
    """Namespace of the ConfigMaps with Grafana's boards; empty where the chart was told to leave them out."""
    labels: tuple[tuple[str, str], ...] = ()
    """That every PodMonitor gets, beside those of its server."""


@dataclass(frozen=True)
class Judgement:
    holds: bool
    reason: str
    message: str
    trouble: bool = False


def judge(server: Server, seen: Monitoring, *, pod_monitors_known: bool, unannotated: str | None) -> Judgement:
    """Of the MonitoringReady condition. unannotated: why pods could not be annotated, where they should be."""
    metrics = _metrics(server, seen, pod_monitors_known, unannotated)
    if not metrics.holds:
        return metrics
    alerts = _alerts(seen)
    told = " ".join(filter(None, (metrics.message, alerts.message, _boards(seen))))
    return Judgement(alerts.holds, metrics.reason if alerts.holds else alerts.reason, told)


def _metrics(server: Server, seen: Monitoring, known: bool, unannotated: str | None) -> Judgement:
    match server.spec.observability.pod_monitor:
        case "Disabled":
            message = "observability.podMonitor is Disabled: Prometheus is not told of the pods."
            return Judgement(False, "Disabled", message)
        case "Enabled" if not known:
            message = (
                "observability.podMonitor is Enabled, but the cluster has no PodMonitor kind: install the Prometheus "
                "operator, or set Auto for scrape annotations."
            )
            return Judgement(False, "PodMonitorKindMissing", message, trouble=True)
        case _ if known:
            labels = pod_monitor_labels(server, dict(seen.labels))
            text = f"The PodMonitor {server.name} selects the pods"
            reached = selecting(seen.prometheuses, "podMonitor", labels, server.namespace)
            if seen.prometheuses and not reached:
                why = why_none(seen.prometheuses, "podMonitor", labels, server.namespace)
                return Judgement(False, "NotSelected", f"{text}, but no Prometheus selects it: {why}.")
            if reached:
                return Judgement(True, "PodMonitor", f"{text}, and {called(reached[0])} selects it.")
            own = labels.keys() - common.labels(server).keys()
            return Judgement(True, "PodMonitor", f"{text}.{'' if own else _LABELS_HINT}")
        case _ if unannotated:
            message = f"The pods could not be annotated for Prometheus: {unannotated}"
            return Judgement(False, "AnnotationRefused", message, trouble=True)
        case _:
            message = "The pods carry prometheus.io/scrape annotations, as the cluster has no PodMonitor kind."
            return Judgement(True, "ScrapeAnnotations", message)


_LABELS_HINT = " It has no label of its own: a Prometheus that selects by one needs observability.labels."


def _alerts(seen: Monitoring) -> Judgement:
    alerts = seen.alerts
    if alerts is None:
        return Judgement(True, "", "")
    if alerts == "off":
        return Judgement(True, "", "Alerts are off (Helm value alerts.enabled).")
    name = f"{alerts.namespace}/{alerts.name}"
    if not alerts.kind_known:
        missing = "There are no alerts, as the cluster has no PrometheusRule kind: install the Prometheus operator, or "
        return Judgement(True, "", f"{missing}give the chart's files/rules.yaml to your Prometheus.")
    if alerts.labels is None:
        message = f"The alerts' PrometheusRule {name} is not there: helm upgrade makes it."
        return Judgement(False, "AlertsMissing", message)
    with_rules = [p for p in seen.prometheuses if p["kind"] == "Prometheus"]
    reached = selecting(with_rules, "rule", alerts.labels, alerts.namespace)
    if with_rules and not reached:
        why = why_none(with_rules, "rule", alerts.labels, alerts.namespace)
        message = f"No Prometheus selects the alerts' PrometheusRule {name}: {why}."
        return Judgement(False, "AlertsNotSelected", message)
    return Judgement(True, "", f"Alerts: PrometheusRule {name}.")


def _boards(seen: Monitoring) -> str:
    if seen.boards is None:
        return ""
    return f"Grafana's boards: ConfigMaps in {seen.boards}." if seen.boards else "Boards are off (dashboards.enabled)."


def alerts_of(settings: Settings, rule: Document | None, *, kind_known: bool) -> Alerts | Literal["off"] | None:
    """rule: the object of the name that the settings give, where there is one."""
    if not settings.alerts_rule:
        return None if settings.alerts_rule is None else "off"
    labels = None if rule is None else dict(rule["metadata"].get("labels") or {})
    return Alerts(settings.alerts_rule, settings.namespace, kind_known, labels)


def selecting(
    prometheuses: Sequence[Document], what: What, labels: Mapping[str, str], namespace: str
) -> list[Document]:
    """Those of the Prometheus objects that take an object with these labels from that namespace."""
    return [p for p in prometheuses if _takes(p, what, labels, namespace)]


def _takes(prometheus: Document, what: What, labels: Mapping[str, str], namespace: str) -> bool:
    spec = prometheus["spec"]
    if what == "podMonitor" and all(spec.get(f"{kind}Selector") is None for kind in _SCRAPED):
        return True  # its configuration is written by hand: who knows
    return _from(prometheus, what, namespace) and _fits(spec.get(f"{what}Selector"), labels)


def _from(prometheus: Document, what: What, namespace: str) -> bool:
    selector = prometheus["spec"].get(f"{what}NamespaceSelector")
    if selector is None:
        return str(prometheus["metadata"]["namespace"]) == namespace
    # Of a namespace its name alone is known, which Kubernetes writes into a label; other labels may well be there.
    wanted = {k: v for k, v in (selector.get("matchLabels") or {}).items() if k == NAMESPACE_NAME}
    asked = [e for e in selector.get("matchExpressions") or [] if e["key"] == NAMESPACE_NAME]
    return _fits({"matchLabels": wanted, "matchExpressions": asked}, {NAMESPACE_NAME: namespace})


def _fits(selector: Document | None, labels: Mapping[str, str]) -> bool:
    """As Kubernetes reads a label selector; none at all fits nothing."""
    if selector is None:
        return False
    if any(labels.get(name) != value for name, value in (selector.get("matchLabels") or {}).items()):
        return False
    return all(_holds(expression, labels) for expression in selector.get("matchExpressions") or [])


def _holds(expression: Document, labels: Mapping[str, str]) -> bool:
    key, values = expression["key"], expression.get("values") or []
    match expression["operator"]:
        case "In":
            return labels.get(key) in values
        case "NotIn":
            return labels.get(key) not in values
        case "Exists":
            return key in labels
        case _:
            return key not in labels


ADVICE: Mapping[What, str] = {
    "podMonitor": "set observability.labels, or for all servers the Helm value engine.podMonitorLabels",
    "rule": "set the Helm value alerts.labels",
}


def why_none(prometheuses: Sequence[Document], what: What, labels: Mapping[str, str], namespace: str) -> str:
    """Why none of them takes such an object, and what to do."""
    why = "; ".join(_why_not(one, what, labels, namespace) for one in prometheuses[:3])
    if any(_from(one, what, namespace) for one in prometheuses):
        return f"{why}. Next: {ADVICE[what]}"
    return f"{why}. Next: let one look there"


def _why_not(prometheus: Document, what: What, labels: Mapping[str, str], namespace: str) -> str:
    name, selector = called(prometheus), prometheus["spec"].get(f"{what}Selector")
    if not _from(prometheus, what, namespace):
        return f"{name} does not look into the namespace {namespace} ({what}NamespaceSelector)"
    if selector is None:
        return f"{name} selects none at all (its {what}Selector is absent)"
    wanted = [f"{k}={v}" for k, v in (selector.get("matchLabels") or {}).items() if labels.get(k) != v]
    wanted += [_written(e) for e in selector.get("matchExpressions") or [] if not _holds(e, labels)]
    return f"{name} wants the label {' and '.join(wanted)}"


def _written(expression: Document) -> str:
    values = ", ".join(expression.get("values") or [])
    return f"{expression['key']} {expression['operator']}" + (f" ({values})" if values else "")


def called(prometheus: Document) -> str:
    metadata = prometheus["metadata"]
    return f"{prometheus['kind']} {metadata['namespace']}/{metadata['name']}"
