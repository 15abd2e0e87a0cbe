"""The Deployment of a server's engine pods.

The pod template is a function of the spec and of the engine defaults alone: nothing of the cluster's present state and
nothing of the operator's version may enter it, as every change of it restarts engines.
"""

from __future__ import annotations

from typing import Any

from octavo_engine.status import API_PORT, DEFAULT_TERMINATION_LOG, MANAGEMENT_PORT
from octavo_operator import names
from octavo_operator.desired import common
from octavo_operator.desired.additions import CONFINED, add
from octavo_operator.desired.cache import store_volume
from octavo_operator.digest import digest
from octavo_operator.model import MODELS_PATH, S3
from octavo_operator.placement import TopologySpread
from octavo_operator.settings import EngineDefaults
from octavo_operator.spec import API_KEYS_FILE, API_KEYS_PATH, TLS_PATH, Server

USER_ID = 10001
"""The image's user; numeric, as runAsNonRoot cannot check a name."""
CACHE_PATH = "/var/cache/octavo"
DRAIN_DELAY_SECONDS = 5
"""A pod that ends gets requests until every node has taken it out of the Service: so long it takes them."""
GRACE_MARGIN_SECONDS = 15 + DRAIN_DELAY_SECONDS
"""Besides the drain itself: its delay, and time to answer the last client, write the certificate and exit."""
STARTUP_PERIOD_SECONDS = 5
NEVER = 2**31 - 1

_STRATEGIES: dict[str, dict[str, Any]] = {
    "Surge": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
    "InPlace": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
    # null takes the other strategies' parameters away, whoever they came from.
    "Recreate": {"type": "Recreate", "rollingUpdate": None},
}


def strategy(kind: str) -> dict[str, Any]:
    """kind: Surge, InPlace or Recreate."""
    return _STRATEGIES[kind]


def deployment(server: Server, defaults: EngineDefaults) -> dict[str, Any]:
    """As the spec makes it; rollout.py decides when its template goes out, and whether by surge or in place."""
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {**common.metadata(server), "annotations": {names.ASKED_ANNOTATION: server.asked}},
        "spec": {
            "replicas": server.spec.desired_replicas,
            "selector": {"matchLabels": common.selector(server)},
            "strategy": strategy("Surge" if server.spec.strategy == "Auto" else server.spec.strategy),
            "revisionHistoryLimit": 3,
            # Loading has no deadline: it fails on a stall, which the engine notices itself.
            "progressDeadlineSeconds": NEVER,
            "template": pod_template(server, defaults),
        },
    }


def pod_template(server: Server, defaults: EngineDefaults) -> dict[str, Any]:
    extra = server.spec.pod_template.metadata
    template: dict[str, Any] = {
        "metadata": {"labels": {**(extra.labels or {}), **common.labels(server)}},
        "spec": _pod_spec(server, defaults),
    }
    annotations = {"kubectl.kubernetes.io/default-container": names.ENGINE_CONTAINER, **(extra.annotations or {})}
    if server.spec.restart.id is not None:
        annotations[names.RESTART_ANNOTATION] = server.spec.restart.id
    template["metadata"]["annotations"] = annotations
    template["metadata"]["labels"][names.REVISION_LABEL] = digest(template)
    return template


def revision(desired_deployment: dict[str, Any]) -> str:
    """Which pod template a desired Deployment has; its pods carry it as a label."""
    label: str = desired_deployment["spec"]["template"]["metadata"]["labels"][names.REVISION_LABEL]
    return label


def _pod_spec(server: Server, defaults: EngineDefaults) -> dict[str, Any]:
    hardware = server.spec.hardware
    spec: dict[str, Any] = {
        # An engine never speaks to the API server, and never learns of other Services by environment variables.
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": server.spec.lifecycle.drain_timeout_seconds + GRACE_MARGIN_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            # Without it the kubelet would change the owner of every file of a cache at each start.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(server, defaults)],
        "volumes": [volume for volume, _ in _volumes(server)],
    }
    if defaults.pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in defaults.pull_secrets]
    if hardware.node_selector:
        spec["nodeSelector"] = dict(hardware.node_selector)
    tolerations = [t.model_dump(by_alias=True, exclude_none=True) for t in hardware.tolerations or []]
    if hardware.gpus:
        # Nodes with GPUs are commonly tainted with the resource's name, to keep other pods away.
        tolerations.append({"key": hardware.resource_name, "operator": "Exists", "effect": "NoSchedule"})
    if tolerations:
        spec["tolerations"] = tolerations
    if hardware.priority_class_name:
        spec["priorityClassName"] = hardware.priority_class_name
    if hardware.runtime_class_name:
        spec["runtimeClassName"] = hardware.runtime_class_name
    if hardware.affinity:
        spec["affinity"] = hardware.affinity.document()
    if hardware.topology_spread:
        spec["topologySpreadConstraints"] = [_spread(server, spread) for spread in hardware.topology_spread]
    return add(spec, server.spec.pod_template.spec)


def _spread(server: Server, spread: TopologySpread) -> dict[str, Any]:
    return {
        **spread.model_dump(by_alias=True),
        "labelSelector": {"matchLabels": common.selector(server)},
        # Pods of the revision before are on their way out: they must not push the new ones to the wrong places.
        "matchLabelKeys": [names.REVISION_LABEL],
    }


def _container(server: Server, defaults: EngineDefaults) -> dict[str, Any]:
    lifecycle = server.spec.lifecycle
    return {
        "name": names.ENGINE_CONTAINER,
        "image": server.spec.engine.image or defaults.image,
        "imagePullPolicy": defaults.pull_policy,
        "args": server.args,
        "env": _environment(server, defaults),
        "ports": [
            {"name": names.API_PORT_NAME, "containerPort": API_PORT, "protocol": "TCP"},
            {"name": names.MANAGEMENT_PORT_NAME, "containerPort": MANAGEMENT_PORT, "protocol": "TCP"},
        ],
        "resources": _resources(server),
        "startupProbe": _probe(
            "/startupz", period=STARTUP_PERIOD_SECONDS,
            failures=-(-lifecycle.startup_stall_seconds // STARTUP_PERIOD_SECONDS), timeout=3,
        ),
        "livenessProbe": _probe("/livez", period=10, failures=6, timeout=5),
        "readinessProbe": _probe("/readyz", period=2, failures=3, timeout=3),
        # Returns when the last request is done, so that SIGTERM finds an idle engine.
        "lifecycle": {
            "preStop": {
                "httpGet": {"path": f"/drain?after={DRAIN_DELAY_SECONDS}", "port": names.MANAGEMENT_PORT_NAME}
            }
        },
        "terminationMessagePath": DEFAULT_TERMINATION_LOG,
        # An engine writes its death certificate itself; one that could not leaves its last words.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": CONFINED,
        "volumeMounts": [mount for _, mount in _volumes(server)],
    }  # fmt: skip


def _probe(path: str, *, period: int, failures: int, timeout: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": names.MANAGEMENT_PORT_NAME},
        "periodSeconds": period,
        "failureThreshold": failures,
        "timeoutSeconds": timeout,
    }


def _environment(server: Server, defaults: EngineDefaults) -> list[dict[str, Any]]:
    environment: list[dict[str, Any]] = [
        # The root file system is read-only: libraries that write beneath the home directory find room in the cache.
        {"name": "HOME", "value": CACHE_PATH},
        {"name": "HF_HOME", "value": f"{CACHE_PATH}/huggingface"},
        *({"name": name, "value": value} for name, value in defaults.env),
    ]
    if not server.spec.model.is_downloaded:
        # All that is needed is in its file system: whatever tries the network is wrong, and should fail at once.
        environment.append({"name": "HF_HUB_OFFLINE", "value": "1"})
    if s3 := server.spec.model.s3:
        environment += _s3_variables(s3)
    if token := server.spec.model.token_secret_ref:
        reference = {"name": token.name, "key": token.key}
        environment.append({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": reference}})
    return environment


def _s3_variables(s3: S3) -> list[dict[str, Any]]:
    plain = {"AWS_ENDPOINT_URL": s3.endpoint, "AWS_REGION": s3.region}
    variables: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in plain.items() if value]
    if s3.secret_ref:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            reference: dict[str, Any] = {"name": s3.secret_ref.name, "key": name}
            reference |= {"optional": True} if name == "AWS_SESSION_TOKEN" else {}
            variables.append({"name": name, "valueFrom": {"secretKeyRef": reference}})
    return variables


def _resources(server: Server) -> dict[str, Any]:
    hardware = server.spec.hardware
    resources: dict[str, Any] = hardware.resources.document() if hardware.resources else {}
    if hardware.gpus:
        # Extended resources need no request beside the limit, and must not differ from it.
        resources.setdefault("limits", {})[hardware.resource_name] = str(hardware.gpus)
    return resources


def _volumes(server: Server) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each volume with its mount: what the engine may write, and what it reads."""
    volumes: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"name": "tmp", "emptyDir": {}}, {"name": "tmp", "mountPath": "/tmp"}),
        ({"name": "cache", "emptyDir": {}}, {"name": "cache", "mountPath": CACHE_PATH}),
    ]
    if size := server.spec.hardware.shared_memory_bytes:
        shm = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": str(size)}}
        volumes.append((shm, {"name": "shm", "mountPath": "/dev/shm"}))
    if image := server.spec.model.image:
        mount = {"name": "models", "mountPath": MODELS_PATH, "readOnly": True}
        volumes.append(({"name": "models", "image": {"reference": image, "pullPolicy": "IfNotPresent"}}, mount))
    if claim := server.spec.model.claim:
        source = {"claimName": claim, "readOnly": True}
        mount = {"name": "models", "mountPath": MODELS_PATH, "readOnly": True}
        volumes.append(({"name": "models", "persistentVolumeClaim": source}, mount))
    if server.spec.model.is_downloaded:
        volumes.append(store_volume(server))
    if tls := server.spec.expose.tls:
        secret = {"secretName": tls.secret_name, "defaultMode": 0o440}
        volumes.append(({"name": "tls", "secret": secret}, {"name": "tls", "mountPath": TLS_PATH, "readOnly": True}))
    if keys := server.spec.expose.api_keys_secret_ref:
        # 0440 with the fsGroup: the engine's user reads it, nobody writes it.
        items = [{"key": keys.key, "path": API_KEYS_FILE}]
        secret = {"secretName": keys.name, "items": items, "defaultMode": 0o440}
        mount = {"name": "api-keys", "mountPath": API_KEYS_PATH, "readOnly": True}
        volumes.append(({"name": "api-keys", "secret": secret}, mount))
    return volumes
