"""What a user may add to the engine pods beside the fields of their own: spec.podTemplate.

A list of what is allowed, not of what is forbidden: who may write LLMServers may not be allowed to make pods, and must
reach no secret, no service account, no path or network of a node, and no other namespace through one. So sidecars get
the security context that the engine has, volumes and variables come from a few harmless sources, and everything else is
refused by name. desired/pods.py merges it in.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, JsonValue, model_validator

from octavo_engine.status import API_PORT, MANAGEMENT_PORT
from octavo_operator import names
from octavo_operator.fields import (
    DNS_LABEL,
    DNS_SUBDOMAIN,
    IMAGE,
    KEEPS_UNKNOWN,
    SECRET_KEY,
    Part,
    Quantity,
    Resources,
    config,
    rule,
    rules,
)

RESERVED_LABELS = "^(octavo\\\\.dev|app\\\\.kubernetes\\\\.io)/.*"
RESERVED_ANNOTATIONS = (
    "^(octavo\\\\.dev|container\\\\.apparmor\\\\.security\\\\.beta\\\\.kubernetes\\\\.io|"
    "seccomp\\\\.security\\\\.alpha\\\\.kubernetes\\\\.io)/.*"
)
RESERVED_VARIABLES = "^(HOME|HF_HOME|HF_TOKEN|HF_HUB_OFFLINE|OCTAVO_.*|AWS_.*|LD_PRELOAD)$"
"""The operator sets them or they would go around the fields."""
OWN_VOLUMES = ("tmp", "cache", "shm", "models", "store", "api-keys", "tls")
OWN_PATHS = ("/tmp", "/dev", "/proc", "/sys", "/etc/octavo", "/models", "/var/cache/octavo", "/var/run/secrets")
"""What is mounted there, and what lies below, is the operator's or the kernel's."""
SOURCES = ("emptyDir", "configMap", "persistentVolumeClaim", "downwardAPI", "image")


def _is_under(path: str) -> str:
    """CEL: whether `path` is one of OWN_PATHS, lies below one or hides one."""
    return (
        f"{list(OWN_PATHS)}.exists(p, {path} == p || {path}.startsWith(p + '/') || p.startsWith({path} + '/') "
        f"|| {path} == '/')"
    )


def _one_of(*fields: str) -> str:
    return " + ".join(f"(has(self.{name}) ? 1 : 0)" for name in fields) + " == 1"


class PodMetadata(Part):
    model_config = config(
        rule(
            f"!has(self.labels) || !self.labels.exists(k, k.matches('{RESERVED_LABELS}'))",
            '"podTemplate.metadata.labels has \'" + '
            f"self.labels.map(k, k).filter(k, k.matches('{RESERVED_LABELS}'))[0]"
            ' + "\', which the operator sets: choose another name"',
            field_path=".labels",
        ),
        rule(
            f"!has(self.annotations) || !self.annotations.exists(k, k.matches('{RESERVED_ANNOTATIONS}'))",
            '"podTemplate.metadata.annotations has \'" + '
            f"self.annotations.map(k, k).filter(k, k.matches('{RESERVED_ANNOTATIONS}'))[0]"
            " + \"', which is the operator's or loosens the pods' security: remove it\"",
            field_path=".annotations",
        ),
    )
    labels: dict[str, Annotated[str, Field(max_length=63)]] | None = Field(
        None, max_length=32, description="More labels of the pods."
    )
    annotations: dict[str, Annotated[str, Field(max_length=4096)]] | None = Field(
        None, max_length=32, description="More annotations of the pods."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.labels or ():
            if _matches(RESERVED_LABELS, name):
                raise ValueError(
                    f"podTemplate.metadata.labels has '{name}', which the operator sets: choose another name"
                )
        for name in self.annotations or ():
            if _matches(RESERVED_ANNOTATIONS, name):
                raise ValueError(
                    f"podTemplate.metadata.annotations has '{name}', which is the operator's or loosens the pods' "
                    "security: remove it"
                )
        return self


class ConfigMapKey(Part):
    name: str = Field(pattern=DNS_SUBDOMAIN, max_length=253, description="Name of a ConfigMap in this namespace.")
    key: str = Field(pattern=SECRET_KEY, max_length=253, description="Key in it.")
    optional: bool | None = Field(None, description="Start without it where it is missing. Default: false.")


class FieldPath(Part):
    field_path: str = Field(
        max_length=256, pattern=r"^(metadata|status|spec)\..+$", description="Field of the pod: metadata.name."
    )


class ResourcePath(Part):
    resource: str = Field(max_length=128, description="Resource of the container: limits.memory.")
    container_name: str | None = Field(None, max_length=63, description="Default: the container itself.")
    divisor: Quantity | None = Field(None, description="Unit in which it is told. Default: 1.")


class VariableSource(Part):
    model_config = config(
        rule(
            _one_of("configMapKeyRef", "fieldRef", "resourceFieldRef"),
            "'expected one of configMapKeyRef, fieldRef, resourceFieldRef; secrets are refused here: name them in "
            "model.tokenSecretRef or expose.apiKeysSecretRef'",
        ),
        **KEEPS_UNKNOWN,
    )
    config_map_key_ref: ConfigMapKey | None = Field(None, description="Key of a ConfigMap.")
    field_ref: FieldPath | None = Field(None, description="Field of the pod.")
    resource_field_ref: ResourcePath | None = Field(None, description="Resource of a container.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _exactly_one(
            self,
            "expected one of configMapKeyRef, fieldRef, resourceFieldRef; secrets are refused here: name them in "
            "model.tokenSecretRef or expose.apiKeysSecretRef",
        )
        return self


class Variable(Part):
    model_config = config(
        rule(
            "!(has(self.value) && has(self.valueFrom))",
            '"the variable " + self.name + " has a value and a valueFrom: remove one of the two"',
        ),
    )
    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128, description="Name of the variable.")
    value: str | None = Field(None, max_length=4096, description="Its value.")
    value_from: VariableSource | None = Field(None, description="Where its value comes from.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.value is not None and self.value_from is not None:
            raise ValueError(f"the variable {self.name} has a value and a valueFrom: remove one of the two")
        return self


class Mount(Part):
    model_config = config(
        rule(
            f"!{_is_under('self.mountPath')}",
            "\"the mountPath '\" + self.mountPath + \"' is the operator's or the system's: choose another, such as "
            '/data"',
            field_path=".mountPath",
        ),
    )
    name: str = Field(pattern=DNS_LABEL, max_length=63, description="A volume of podTemplate.spec.volumes.")
    mount_path: str = Field(
        pattern=r"^(/[A-Za-z0-9_][A-Za-z0-9._-]*)+$", max_length=256, description="Where the container sees it."
    )
    sub_path: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*$",
        max_length=256,
        description="Folder or file in the volume. Default: all of it.",
    )
    read_only: bool | None = Field(None, description="Default: false.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(self.mount_path == own or self.mount_path.startswith(f"{own}/") or own.startswith(f"{self.mount_path}/")
               for own in OWN_PATHS):  # fmt: skip
            raise ValueError(
                f"the mountPath '{self.mount_path}' is the operator's or the system's: choose another, such as /data"
            )
        return self


class Port(Part):
    name: str | None = Field(None, pattern=DNS_LABEL, max_length=15, description="Name of the port.")
    container_port: int = Field(ge=1, le=65535, description="Number of the port.")
    protocol: Literal["TCP", "UDP", "SCTP"] | None = Field(None, description="Default: TCP.")


class HttpGet(Part):
    path: str | None = Field(None, max_length=512, description="Default: /.")
    port: int = Field(ge=1, le=65535, description="Port of the container.")
    scheme: Literal["HTTP", "HTTPS"] | None = Field(None, description="Default: HTTP.")


class TcpSocket(Part):
    port: int = Field(ge=1, le=65535, description="Port of the container.")


class Exec(Part):
    command: list[Annotated[str, Field(max_length=1024)]] = Field(
        min_length=1, max_length=32, description="Command and its arguments."
    )


class Probe(Part):
    http_get: HttpGet | None = Field(None, description="A request to the container.")
    tcp_socket: TcpSocket | None = Field(None, description="A connection to the container.")
    exec: Exec | None = Field(None, description="A command in the container.")
    initial_delay_seconds: int | None = Field(None, ge=0, le=3600, description="Before the first look.")
    period_seconds: int | None = Field(None, ge=1, le=3600, description="Between looks.")
    timeout_seconds: int | None = Field(None, ge=1, le=3600, description="Longest wait for the answer.")
    failure_threshold: int | None = Field(None, ge=1, le=10000, description="Failures in a row that count.")


class ContainerSecurity(Part):
    """The rest is set for every container: not privileged, no capabilities, no escalation, the runtime's seccomp."""

    model_config = config(**KEEPS_UNKNOWN)
    run_as_user: int | None = Field(None, ge=1, le=2**31 - 1, description="User, not root. Default: 10001.")
    run_as_group: int | None = Field(None, ge=1, le=2**31 - 1, description="Group, not root's. Default: 10001.")
    read_only_root_filesystem: bool | None = Field(None, description="Default: true.")
    privileged: Literal[False] | None = Field(None, description="Refused: it is false.")
    allow_privilege_escalation: Literal[False] | None = Field(None, description="Refused: it is false.")
    run_as_non_root: Literal[True] | None = Field(None, description="Refused: it is true.")


class Container(Part):
    """A container beside the engine; or, by the name `engine`, more variables and mounts of the engine."""

    model_config = config(
        rule(
            "self.name == 'engine' || has(self.image)",
            '"the container \'" + self.name + "\' needs an image; the engine\'s own container is named engine"',
            field_path=".image",
        ),
        rule(
            "self.name != 'engine' || !(has(self.image) || has(self.imagePullPolicy) || has(self.command) || "
            "has(self.args) || has(self.workingDir) || has(self.ports) || has(self.resources) || "
            "has(self.securityContext) || has(self.livenessProbe) || has(self.readinessProbe) || "
            "has(self.startupProbe) || has(self.restartPolicy))",
            "'of the container engine, podTemplate sets env and volumeMounts only; the rest has fields of its own: "
            "engine.image, engine.args, hardware.resources'",
        ),
        rule(
            f"self.name != 'engine' || !has(self.env) || !self.env.exists(e, e.name.matches('{RESERVED_VARIABLES}'))",
            "\"the engine's variable '\" + "
            f"self.env.filter(e, e.name.matches('{RESERVED_VARIABLES}'))[0].name"
            " + \"' is the operator's to set: remove it\"",
            field_path=".env",
        ),
        rule(
            f"self.name == 'engine' || !has(self.ports) || !self.ports.exists(p, p.containerPort in "
            f"[{API_PORT}, {MANAGEMENT_PORT}] || (has(p.name) && p.name in "
            f"['{names.API_PORT_NAME}', '{names.MANAGEMENT_PORT_NAME}']))",
            f"'the ports {API_PORT} (http) and {MANAGEMENT_PORT} (management) are the engine\\'s: choose others'",
            field_path=".ports",
        ),
        **KEEPS_UNKNOWN,
    )
    name: str = Field(pattern=DNS_LABEL, max_length=63, description="engine, or a name of its own for a sidecar.")
    image: str | None = Field(None, min_length=1, max_length=512, pattern=IMAGE, description="Image of a sidecar.")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        None, description="Default: Kubernetes' own."
    )
    command: list[Annotated[str, Field(max_length=4096)]] | None = Field(
        None, max_length=32, description="Instead of the image's entry point."
    )
    args: list[Annotated[str, Field(max_length=4096)]] | None = Field(
        None, max_length=64, description="Arguments; the engine's are engine.args."
    )
    working_dir: str | None = Field(None, max_length=256, description="Folder in which it starts.")
    env: list[Variable] | None = Field(
        None,
        max_length=64,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        description="Variables; not from secrets.",
    )
    ports: list[Port] | None = Field(None, max_length=16, description="Ports that it listens on; not the node's.")
    resources: Resources | None = Field(
        None, description="What it needs and may use; the engine's are hardware.resources."
    )
    volume_mounts: list[Mount] | None = Field(None, max_length=16, description="Volumes that it sees.")
    security_context: ContainerSecurity | None = Field(None, description="User and root file system.")
    liveness_probe: Probe | None = Field(None, description="Whether it lives.")
    readiness_probe: Probe | None = Field(None, description="Whether it is ready; the pod is when all are.")
    startup_probe: Probe | None = Field(None, description="Whether it has started.")
    restart_policy: Literal["Always"] | None = Field(
        None, description="Of an init container: it goes on beside the engine, and ends after it."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name != names.ENGINE_CONTAINER:
            if self.image is None:
                raise ValueError(
                    f"the container '{self.name}' needs an image; the engine's own container is named engine"
                )
            for port in self.ports or ():
                if port.container_port in (API_PORT, MANAGEMENT_PORT) or port.name in (
                    names.API_PORT_NAME,
                    names.MANAGEMENT_PORT_NAME,
                ):
                    raise ValueError(
                        f"the ports {API_PORT} (http) and {MANAGEMENT_PORT} (management) are the engine's: "
                        "choose others"
                    )
            return self
        if self.model_fields_set - {"name", "env", "volume_mounts"}:
            raise ValueError(
                "of the container engine, podTemplate sets env and volumeMounts only; the rest has fields of its own: "
                "engine.image, engine.args, hardware.resources"
            )
        for variable in self.env or ():
            if _matches(RESERVED_VARIABLES, variable.name):
                raise ValueError(f"the engine's variable '{variable.name}' is the operator's to set: remove it")
        return self


class EmptyDir(Part):
    medium: Literal["Memory"] | None = Field(None, description="Memory counts as the pod's. Default: the node's disk.")
    size_limit: Quantity | None = Field(None, description="Largest size. Default: none.")


class KeyToPath(Part):
    key: str = Field(pattern=SECRET_KEY, max_length=253, description="Key in the ConfigMap.")
    path: str = Field(pattern=r"^[A-Za-z0-9._][A-Za-z0-9._/-]*$", max_length=253, description="File in the volume.")


class ConfigMapVolume(Part):
    name: str = Field(pattern=DNS_SUBDOMAIN, max_length=253, description="Name of a ConfigMap in this namespace.")
    items: list[KeyToPath] | None = Field(None, max_length=32, description="Which keys. Default: all of them.")
    optional: bool | None = Field(None, description="Start without it where it is missing. Default: false.")


class ClaimVolume(Part):
    claim_name: str = Field(
        pattern=DNS_SUBDOMAIN, max_length=253, description="A PersistentVolumeClaim in this namespace."
    )
    read_only: bool | None = Field(None, description="Default: false.")


class DownwardItem(Part):
    path: str = Field(pattern=r"^[A-Za-z0-9._][A-Za-z0-9._/-]*$", max_length=253, description="File in the volume.")
    field_ref: FieldPath | None = Field(None, description="Field of the pod.")
    resource_field_ref: ResourcePath | None = Field(None, description="Resource of a container.")


class DownwardVolume(Part):
    items: list[DownwardItem] = Field(max_length=32, description="Its files.")


class ImageVolume(Part):
    reference: str = Field(pattern=IMAGE, max_length=512, description="Image whose files are mounted read-only.")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        None, description="Default: Kubernetes' own."
    )


_OTHER_SOURCES = (
    f"expected exactly one of {', '.join(SOURCES)}: secrets, projected tokens, paths of the node and network file "
    "systems are refused"
)


class Volume(Part):
    model_config = config(
        rule(_one_of(*SOURCES), f'"the volume \'" + self.name + "\' is refused, {_OTHER_SOURCES}"'),
        rule(
            f"!(self.name in {list(OWN_VOLUMES)})",
            "\"the volume's name '\" + self.name + \"' is the operator's: choose another\"",
            field_path=".name",
        ),
        **KEEPS_UNKNOWN,
    )
    name: str = Field(pattern=DNS_LABEL, max_length=63, description="Name for volumeMounts.")
    empty_dir: EmptyDir | None = Field(None, description="Empty when the pod starts, gone when it ends.")
    config_map: ConfigMapVolume | None = Field(None, description="A ConfigMap's keys as files.")
    persistent_volume_claim: ClaimVolume | None = Field(None, description="A claim of this namespace.")
    downward_api: DownwardVolume | None = Field(None, alias="downwardAPI", description="Facts about the pod as files.")
    image: ImageVolume | None = Field(None, description="An image's files; the cluster must have ImageVolume.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _exactly_one(self, f"the volume '{self.name}' is refused, {_OTHER_SOURCES}", but=("name",))
        if self.name in OWN_VOLUMES:
            raise ValueError(f"the volume's name '{self.name}' is the operator's: choose another")
        return self


class HostAlias(Part):
    ip: str = Field(pattern=r"^[0-9a-fA-F.:]+$", max_length=45, description="Address.")
    hostnames: list[Annotated[str, Field(pattern=DNS_SUBDOMAIN, max_length=253)]] = Field(
        min_length=1, max_length=16, description="Names that mean it inside the pods."
    )


_NAMES_KEYED: dict[str, JsonValue] = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}


def _refused(what: str) -> dict[str, JsonValue]:
    return rules(rule("false", f"'{what}'"))


class PodSpec(Part):
    """Sidecars, volumes and a few settings. What else a pod's spec has is refused."""

    model_config = config(**KEEPS_UNKNOWN)
    containers: list[Container] | None = Field(
        None,
        max_length=8,
        json_schema_extra=_NAMES_KEYED,
        description="Sidecars, and by the name engine more variables and mounts of the engine.",
    )
    init_containers: list[Container] | None = Field(
        None,
        max_length=8,
        json_schema_extra={
            **_NAMES_KEYED,
            **rules(
                rule(
                    "!self.exists(c, c.name == 'engine')",
                    "'podTemplate.spec.initContainers has \\'engine\\', the name of the engine\\'s own container: "
                    "choose another'",
                )
            ),
        },
        description="Containers that run before the engine starts, or beside it with restartPolicy Always.",
    )
    volumes: list[Volume] | None = Field(
        None, max_length=16, json_schema_extra=_NAMES_KEYED, description="Volumes for the containers' volumeMounts."
    )
    scheduler_name: str | None = Field(
        None,
        pattern=DNS_SUBDOMAIN,
        max_length=253,
        description="Who gives the pods to nodes. Default: Kubernetes.",
    )
    host_aliases: list[HostAlias] | None = Field(
        None, max_length=16, description="Names that the pods know beside DNS, for registries without it."
    )
    host_network: bool | None = Field(
        None,
        json_schema_extra=_refused("podTemplate.spec.hostNetwork is refused: engine pods stay off nodes\\' network"),
        description="Refused.",
    )
    host_pid: bool | None = Field(
        None,
        alias="hostPID",
        json_schema_extra=_refused("podTemplate.spec.hostPID is refused: engine pods see no processes of the node"),
        description="Refused.",
    )
    host_ipc: bool | None = Field(
        None,
        alias="hostIPC",
        json_schema_extra=_refused("podTemplate.spec.hostIPC is refused: use hardware.sharedMemory for /dev/shm"),
        description="Refused.",
    )
    service_account_name: str | None = Field(
        None,
        max_length=253,
        json_schema_extra=_refused("podTemplate.spec.serviceAccountName is refused: engine pods have no account"),
        description="Refused.",
    )
    node_name: str | None = Field(
        None,
        max_length=253,
        json_schema_extra=_refused(
            "podTemplate.spec.nodeName is refused, as it goes around the scheduler: use hardware.nodeSelector"
        ),
        description="Refused.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("host_network", "host_pid", "host_ipc", "service_account_name", "node_name"):
            if getattr(self, name) is not None:
                alias = type(self).model_fields[name].alias
                raise ValueError(f"podTemplate.spec.{alias} is refused: engine pods take nothing from the node")
        own = [c.name for c in (*(self.containers or ()), *(self.init_containers or ()))]
        if any(c.name == names.ENGINE_CONTAINER for c in self.init_containers or ()):
            raise ValueError(
                "podTemplate.spec.initContainers has 'engine', the name of the engine's own container: choose another"
            )
        if len(set(own)) < len(own):
            raise ValueError(f"podTemplate.spec has a container's name twice: {', '.join(own)}")
        volumes = [volume.name for volume in self.volumes or ()]
        if len(set(volumes)) < len(volumes):
            raise ValueError(f"podTemplate.spec.volumes has a name twice: {', '.join(volumes)}")
        for container in (*(self.containers or ()), *(self.init_containers or ())):
            for mount in container.volume_mounts or ():
                if mount.name not in volumes:
                    raise ValueError(
                        f"the container '{container.name}' mounts '{mount.name}', which is not in "
                        f"podTemplate.spec.volumes: there are {', '.join(volumes) or 'none'}"
                    )
        return self


class PodTemplate(Part):
    """What is added to the engine pods."""

    metadata: PodMetadata = Field(PodMetadata(), description="Labels and annotations.")
    spec: PodSpec = Field(PodSpec(), description="Sidecars, volumes and a few settings; all else is refused.")


def document(part: BaseModel) -> dict[str, Any]:
    """A part as Kubernetes has it: amounts as text, absent fields absent."""
    return {
        name: value
        for name, value in part.model_dump(by_alias=True, exclude_none=True, mode="json").items()
        if name != "securityContext"
    }


def _exactly_one(part: BaseModel, message: str, but: tuple[str, ...] = ()) -> None:
    given = [name for name in type(part).model_fields if name not in but and getattr(part, name) is not None]
    if len(given) != 1:
        raise ValueError(message)


def _matches(cel_pattern: str, text: str) -> bool:
    return re.search(cel_pattern.replace("\\\\", "\\"), text) is not None
