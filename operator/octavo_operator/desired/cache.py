"""The disk of a downloaded model, and the Job that fills it before pods start."""

from __future__ import annotations

from typing import Any

from octavo_engine.config import EngineConfig, ServerConfig, to_args
from octavo_engine.status import MANAGEMENT_PORT
from octavo_operator import names
from octavo_operator.desired import common
from octavo_operator.desired.additions import CONFINED, add
from octavo_operator.model import MODELS_PATH
from octavo_operator.pod_template import PodSpec
from octavo_operator.settings import EngineDefaults
from octavo_operator.spec import Server

NEVER = 2**31 - 1
PREFETCH_RESOURCES = {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "2Gi"}}
"""A download hashes what it writes; its memory is a few buffers, and page cache that is given back."""


def store_volume(server: Server) -> tuple[dict[str, Any], dict[str, Any]]:
    """The store's volume with its mount."""
    cache = server.spec.cache
    mount = {"name": "store", "mountPath": MODELS_PATH}
    if claim := store_claim(server):
        return {"name": "store", "persistentVolumeClaim": {"claimName": claim}}, mount
    if cache.storage_class_name is not None:
        template = {"spec": _claim_spec(server, "ReadWriteOnce")}
        return {"name": "store", "ephemeral": {"volumeClaimTemplate": template}}, mount
    return {"name": "store", "emptyDir": {"sizeLimit": str(cache.size)} if cache.size else {}}, mount


def store_claim(server: Server) -> str | None:
    """The claim that pods share, made or given."""
    cache = server.spec.cache
    return cache.claim_name or (server.name if cache.makes_claim else None)


def claim(server: Server) -> dict[str, Any] | None:
    """The PersistentVolumeClaim that is made. One that is to be retained has no owner who would take it along."""
    cache = server.spec.cache
    if not (server.spec.model.is_downloaded and cache.makes_claim):
        return None
    metadata = common.metadata(server)
    if cache.deletion_policy == "Retain":
        metadata.pop("ownerReferences", None)
    spec = _claim_spec(server, "ReadWriteMany")
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def prefetch_job(server: Server, defaults: EngineDefaults, pod: dict[str, Any]) -> dict[str, Any] | None:
    """pod: the engine's own pod, of which the Job's has what concerns a download: where it runs, disk, token, proxy."""
    if not (server.spec.model.is_downloaded and server.spec.cache.prefetch):
        return None
    labels = {**common.labels(server), names.PREFETCH_LABEL: server.name, "app.kubernetes.io/component": "prefetch"}
    # Without it: the Service would send requests to it, and the PodDisruptionBudget would count it.
    del labels[names.SERVER_LABEL]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": common.metadata(server),
        "spec": {
            # It is tried for as long as it is wanted, by the kubelet, which waits longer and longer: a hub that is down
            # for a day must not leave a server that is never looked after again.
            "backoffLimit": NEVER,
            "template": {"metadata": {"labels": labels}, "spec": _pod(server, defaults, pod)},
        },
    }


def _pod(server: Server, defaults: EngineDefaults, pod: dict[str, Any]) -> dict[str, Any]:
    (engine,) = [c for c in pod["containers"] if c["name"] == names.ENGINE_CONTAINER]
    volumes = [volume for volume in pod["volumes"] if volume["name"] in ("tmp", "cache", "store")]
    mounts = [mount for mount in engine["volumeMounts"] if mount["name"] in ("tmp", "cache", "store")]
    kept = ("imagePullSecrets", "nodeSelector", "tolerations", "affinity", "priorityClassName")
    container = {
        "name": names.ENGINE_CONTAINER,
        "image": engine["image"],
        "imagePullPolicy": engine["imagePullPolicy"],
        "args": _arguments(server),
        "env": engine["env"],
        "ports": [{"name": names.MANAGEMENT_PORT_NAME, "containerPort": MANAGEMENT_PORT, "protocol": "TCP"}],
        "resources": PREFETCH_RESOURCES,
        "terminationMessagePath": engine["terminationMessagePath"],
        "terminationMessagePolicy": engine["terminationMessagePolicy"],
        "securityContext": CONFINED,
        "volumeMounts": mounts,
    }
    made = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "OnFailure",
        "securityContext": pod["securityContext"],
        "containers": [container],
        "volumes": volumes,
        **{name: pod[name] for name in kept if name in pod},
    }
    return add(made, _for_downloads(server.spec.pod_template.spec))


def _for_downloads(extra: PodSpec) -> PodSpec:
    """Of podTemplate, the engine's mounts and names: a proxy's certificates, a mirror's address. Its variables are in
    the engine's environment already, and sidecars would keep the Job from ending."""
    engine = [c.model_copy(update={"env": None}) for c in extra.containers or () if c.name == names.ENGINE_CONTAINER]
    mounted = {mount.name for c in engine for mount in c.volume_mounts or ()}
    volumes = [volume for volume in extra.volumes or () if volume.name in mounted]
    return PodSpec(containers=engine or None, volumes=volumes or None, host_aliases=extra.host_aliases)


def _arguments(server: Server) -> list[str]:
    engine, config = server.engine_config, server.server_config
    chosen = EngineConfig(
        model=engine.model,
        revision=engine.revision,
        model_store=engine.model_store,
        model_store_size=engine.model_store_size,
    )
    serves = ServerConfig(host=config.host, startup_stall_s=config.startup_stall_s)
    # The port is written out: the command's own default is a free one.
    return ["download", *to_args(chosen), *to_args(serves), f"--management-port={MANAGEMENT_PORT}"]


def _claim_spec(server: Server, access: str) -> dict[str, Any]:
    cache = server.spec.cache
    spec: dict[str, Any] = {"accessModes": [access], "resources": {"requests": {"storage": str(cache.size)}}}
    if cache.storage_class_name is not None:
        spec["storageClassName"] = cache.storage_class_name
    return spec
