"""The operator's own settings, read once from the environment by cli.py and passed on as a value."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from octavo_engine import __version__
from octavo_operator import hostnames
from octavo_operator.logs import FORMATS
from octavo_operator.spec import Profile, problems_of_profile

SERVICE_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
LOG_LEVELS = ("debug", "info", "warning", "error")
PULL_POLICIES = ("IfNotPresent", "Always", "Never")


class SettingsError(Exception):
    """A setting outside its range; the text names the variable, the value and what would be right."""


@dataclass(frozen=True)
class EngineDefaults:
    """What goes into every engine pod. A change here changes pod templates, and with that restarts engines."""

    image: str = f"octavo/octavo-engine:{__version__}"
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    """Variables of every engine, such as a mirror's address."""
    ingress_annotations: Mapping[str, str] = field(default_factory=dict)
    """On every Ingress: timeouts and buffering of the cluster's controller. Not in pod templates."""
    pod_monitor_labels: Mapping[str, str] = field(default_factory=dict)
    """On every PodMonitor, by which the cluster's Prometheus selects it. Not in pod templates."""
    hostnames: tuple[str, ...] = ()
    """Patterns of the names that an Ingress or a route may claim (hostnames.py); none means all names. Not in pods."""
    operator_namespace: str = "default"
    """Where the operator is, for network policies to let it in. Not in pod templates either."""
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    """By name, for spec.hardware.profile."""


@dataclass(frozen=True)
class Settings:
    engine: EngineDefaults = field(default_factory=EngineDefaults)
    watch_namespaces: tuple[str, ...] = ()
    """Namespaces to serve; none means all of them."""
    namespace: str = "default"
    """Where the operator itself lives: its Lease is there."""
    identity: str = "octavo-operator"
    """The holder's name in the Lease. A pod's name: a restarted container takes over its own Lease at once."""
    listen_host: str = "0.0.0.0"
    listen_port: int = 8080
    log_level: str = "info"
    log_format: str = "text"
    alerts_rule: str | None = None
    """Name of the PrometheusRule that the chart made beside the operator; "" where it was told to make none, None where
    there is no chart."""
    boards_namespace: str | None = None
    """Where the chart put Grafana's boards; "" and None as above."""
    lease_seconds: int = 15
    """How long a dead operator's Lease keeps the others waiting."""
    loading_poll_s: float = 1.0
    """Between looks at a server that is not settled; the status is at most this, and a request, behind the engine."""
    settled_poll_s: float = 20.0
    """Between looks at a server where nothing is expected to change but its load."""
    resync_s: float = 30.0
    """Between lists of everything's metadata, which find what a watch has lost."""
    statusz_timeout_s: float = 1.0
    """Longest wait for an engine's /statusz."""
    activator: str = ""
    """Name of the activator's Deployment and Service, beside the operator; empty where it is off."""
    activator_replicas: int = 2
    """Its replicas, while some server may go to zero."""


def from_environment(environ: Mapping[str, str] = os.environ) -> Settings:
    """Raises SettingsError. Every variable is named in helm/octavo/templates/deployment.yaml."""
    default = Settings()
    return Settings(
        engine=EngineDefaults(
            image=environ.get("OCTAVO_ENGINE_IMAGE") or default.engine.image,
            pull_policy=choice(environ, "OCTAVO_ENGINE_IMAGE_PULL_POLICY", PULL_POLICIES, default.engine.pull_policy),
            pull_secrets=words(environ, "OCTAVO_ENGINE_IMAGE_PULL_SECRETS"),
            env=_variables(environ, "OCTAVO_ENGINE_ENV"),
            ingress_annotations=_texts(environ, "OCTAVO_INGRESS_ANNOTATIONS"),
            pod_monitor_labels=_texts(environ, "OCTAVO_POD_MONITOR_LABELS"),
            hostnames=_hostnames(environ, "OCTAVO_HOSTNAMES"),
            operator_namespace=environ.get("OCTAVO_NAMESPACE") or _own_namespace(),
            profiles=_profiles(environ, "OCTAVO_ENGINE_PROFILES"),
        ),
        watch_namespaces=words(environ, "OCTAVO_WATCH_NAMESPACES"),
        namespace=environ.get("OCTAVO_NAMESPACE") or _own_namespace(),
        identity=environ.get("OCTAVO_IDENTITY") or f"{socket.gethostname()}-{os.getpid()}",
        listen_host=environ.get("OCTAVO_LISTEN_HOST") or default.listen_host,
        listen_port=int(number(environ, "OCTAVO_LISTEN_PORT", default.listen_port, 0, 65535)),
        log_level=choice(environ, "OCTAVO_LOG_LEVEL", LOG_LEVELS, default.log_level),
        log_format=choice(environ, "OCTAVO_LOG_FORMAT", FORMATS, default.log_format),
        alerts_rule=environ.get("OCTAVO_ALERTS_RULE"),
        boards_namespace=environ.get("OCTAVO_BOARDS_NAMESPACE"),
        lease_seconds=int(number(environ, "OCTAVO_LEASE_SECONDS", default.lease_seconds, 3, 3600)),
        loading_poll_s=number(environ, "OCTAVO_LOADING_POLL_SECONDS", default.loading_poll_s, 0.1, 60),
        settled_poll_s=number(environ, "OCTAVO_SETTLED_POLL_SECONDS", default.settled_poll_s, 1, 3600),
        resync_s=number(environ, "OCTAVO_RESYNC_SECONDS", default.resync_s, 1, 3600),
        activator=environ.get("OCTAVO_ACTIVATOR") or default.activator,
        activator_replicas=int(number(environ, "OCTAVO_ACTIVATOR_REPLICAS", default.activator_replicas, 1, 100)),
    )


def _hostnames(environ: Mapping[str, str], name: str) -> tuple[str, ...]:
    patterns = words(environ, name)
    for pattern in patterns:
        if not hostnames.is_pattern(pattern):
            raise SettingsError(f"{name}: got {pattern!r}, expected {hostnames.EXPECTED}")
    return patterns


def _profiles(environ: Mapping[str, str], name: str) -> dict[str, Profile]:
    """A JSON object: name of a profile -> its fields."""
    try:
        found = json.loads(environ.get(name) or "{}")
    except ValueError as error:
        raise SettingsError(f"{name}: it is no JSON: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(profile, dict) for profile in found.values()):
        raise SettingsError(f"{name}: expected an object of objects, the profiles by their names")
    for profile, given in found.items():
        if problems := problems_of_profile(given):
            raise SettingsError(f"{name}: profile {profile}: {'; '.join(problems)}")
    return found


def _variables(environ: Mapping[str, str], name: str) -> tuple[tuple[str, str], ...]:
    """A JSON list as a container's env is."""
    try:
        return tuple((str(one["name"]), str(one["value"])) for one in json.loads(environ.get(name) or "[]"))
    except (ValueError, KeyError, TypeError):
        raise SettingsError(f'{name}: got {environ[name]!r}, expected [{{"name": ..., "value": ...}}, ...]') from None


def _texts(environ: Mapping[str, str], name: str) -> dict[str, str]:
    """A JSON object of texts."""
    try:
        return {str(key): str(value) for key, value in json.loads(environ.get(name) or "{}").items()}
    except (ValueError, AttributeError):
        raise SettingsError(f"{name}: got {environ[name]!r}, expected an object of texts") from None


def words(environ: Mapping[str, str], name: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in environ.get(name, "").split(",") if word.strip())


def choice(environ: Mapping[str, str], name: str, choices: tuple[str, ...], default: str) -> str:
    value = environ.get(name) or default
    if value not in choices:
        raise SettingsError(f"{name}: got {value!r}, expected one of {', '.join(choices)}")
    return value


def number(environ: Mapping[str, str], name: str, default: float, low: float, high: float) -> float:
    text = environ.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        raise SettingsError(f"{name}: got {text!r}, expected a number from {low:g} to {high:g}") from None
    if not low <= value <= high:
        raise SettingsError(f"{name}: got {text!r}, expected {low:g} to {high:g}")
    return value


def _own_namespace() -> str:
    try:
        return SERVICE_ACCOUNT_NAMESPACE.read_text().strip()
    except OSError:
        return Settings.namespace
