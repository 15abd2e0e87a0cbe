"""The LLMServer resource as people write it: fields, defaults, bounds and rules. Parsed here, once.

crd.py generates the schema of the CustomResourceDefinition from these models, so that the API server refuses what
`parse` would refuse, also while the operator is down. A rule between fields stands here twice, in CEL for the API
server and below it as a validator for `parse`, which also reads manifests that no API server has seen; one table of
tests holds both to the same answers. Bounds of the engine's settings are taken from EngineConfig.
Nothing here is accepted and ignored: every field ends up in a child object or in a flag of the engine, and one that
does nothing beside the others that are there is refused (fields.without_effect).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, model_validator
from pydantic_core import ErrorDetails

from octavo_engine.config import (
    BLOCK_SIZES,
    DTYPES,
    ConfigError,
    EngineConfig,
    ServerConfig,
    managed_flags,
    to_args,
)
from octavo_engine.status import API_PORT, MANAGEMENT_PORT
from octavo_operator.autoscaling import Autoscaling
from octavo_operator.digest import digest
from octavo_operator.expose import Expose
from octavo_operator.fields import DNS_SUBDOMAIN, IMAGE, Part, Quantity, Resources, Text, config, rule, without_effect
from octavo_operator.model import MODELS_PATH, Model
from octavo_operator.model_cache import ModelCache
from octavo_operator.placement import Affinity, Toleration, TopologySpread
from octavo_operator.pod_template import PodTemplate
from octavo_operator.quantity import parse_quantity

NAME_MAX = 45
"""Children and their pods add up to 18 characters to a server's name, and a label's value has at most 63."""
SERVER_SIDE_DEFAULT = "x-octavo-default"
"""Marks a default that the API server writes into the object. Only replicas has one: without it /scale would say 0, and
autoscalers would stand still. Other defaults stay out of the object, so that it holds what its owner wrote."""
API_KEYS_PATH = "/etc/octavo/api-keys"
API_KEYS_FILE = "keys"
TLS_PATH = "/etc/octavo/tls"

ARG = "^--[a-z][a-z0-9_-]*(=.*)?$"


def _low(name: str) -> int | None:
    """Lowest value of an engine setting that the engine takes, so that resource and flag cannot disagree."""
    return _bound(EngineConfig, name, "low")


def _high(name: str) -> int | None:
    return _bound(EngineConfig, name, "high")


def _server_low(name: str) -> int | None:
    return _bound(ServerConfig, name, "low")


def _server_high(name: str) -> int | None:
    return _bound(ServerConfig, name, "high")


def _bound(config: type[EngineConfig | ServerConfig], name: str, which: str) -> int | None:
    bound = next(f for f in fields(config) if f.name == name).metadata[which]
    return None if bound is None else int(bound)


# What the operator sets itself, or has a field for. A second road to the same setting would let args win over the
# field silently; and addresses, ports, keys and life cycle are what probes, Service and drain are wired to.
TAKEN_FLAGS: tuple[str, ...] = managed_flags()
"""Flags that spec.engine.args may not hold."""


NO_PROFILES: Mapping[str, Mapping[str, Any]] = {}


_TWO_SIZES = (
    "engine.gpuMemoryUtilization says what is left for the KV cache, and engine.kvCacheMemory says its size: remove "
    "one of the two"
)


class Engine(Part):
    """How the engine runs. What is left out is for the engine to decide."""

    model_config = config(
        rule(
            "!has(self.maxNumBatchedTokens) || !has(self.maxNumSeqs) || self.maxNumBatchedTokens >= self.maxNumSeqs",
            "'engine.maxNumBatchedTokens must be at least engine.maxNumSeqs, one token for each running request: raise "
            "the first or lower the second'",
            field_path=".maxNumBatchedTokens",
        ),
        rule(
            "!has(self.gpuMemoryUtilization) || !has(self.kvCacheMemory)",
            f"'{_TWO_SIZES}'",
            field_path=".gpuMemoryUtilization",
        ),
    )

    image: str | None = Field(
        None,
        min_length=1,
        max_length=512,
        pattern=IMAGE,
        description="Image of the engine. Default: the one that the operator was installed with.",
    )
    max_model_len: int | None = Field(
        None,
        ge=_low("max_model_len"),
        le=_high("max_model_len"),
        description="Longest prompt plus output, in tokens. Default: the model's own limit, or what fits in memory "
        "where that is less.",
    )
    dtype: str | None = Field(
        None,
        json_schema_extra={"enum": list(DTYPES)},
        description="Type of weights and activations. Default: auto, the checkpoint's own type.",
    )
    gpu_memory_utilization: str | None = Field(
        None,
        max_length=8,
        json_schema_extra={
            "x-kubernetes-validations": [
                rule(
                    r"self.matches('^(0\\.[0-9]{1,4}|1(\\.0{1,4})?)$') && double(self) >= 0.01",
                    "\"engine.gpuMemoryUtilization is '\" + self + \"', expected a share from '0.01' to '1.0', "
                    'as text in quotes"',
                )
            ]
        },
        description='Share of the GPU\'s memory that the engine may use in all, as text: "0.90". Default: "0.9".',
    )
    max_num_seqs: int | None = Field(
        None,
        ge=_low("max_num_seqs"),
        le=_high("max_num_seqs"),
        description="Requests computed together in one step. Default: 1024 on a GPU of 60 GiB or more, else 256.",
    )
    max_num_batched_tokens: int | None = Field(
        None,
        ge=_low("max_num_batched_tokens"),
        le=_high("max_num_batched_tokens"),
        description="Tokens computed in one step: the bound on a prompt's chunk. Default: 8192 on a GPU of 60 GiB or "
        "more, else 2048.",
    )
    block_size: int | None = Field(
        None,
        json_schema_extra={"enum": list(BLOCK_SIZES)},
        description="Tokens in one block of the KV cache. Default: 64.",
    )
    enable_prefix_caching: bool | None = Field(
        None, description="Keep finished blocks and reuse them for prompts with the same beginning. Default: true."
    )
    enable_chunked_prefill: bool | None = Field(
        None, description="Split long prompts over several steps, so that running requests go on. Default: true."
    )
    kv_cache_memory: Quantity | None = Field(
        None,
        description="Size of the KV cache (4Gi), instead of what gpuMemoryUtilization leaves for it.",
    )
    tensor_parallel: int | None = Field(
        None,
        ge=_low("tensor_parallel_size"),
        le=_high("tensor_parallel_size"),
        description="GPUs that share each layer. Default: hardware.gpus divided by pipelineParallel.",
    )
    pipeline_parallel: int | None = Field(
        None,
        ge=_low("pipeline_parallel_size"),
        le=_high("pipeline_parallel_size"),
        description="Groups of GPUs that share the layers in sequence. Default: 1.",
    )
    args: list[Annotated[str, Field(max_length=1024)]] | None = Field(
        None,
        max_length=32,
        json_schema_extra={
            "x-kubernetes-validations": [
                rule(
                    f"self.all(a, a.matches('{ARG}'))",
                    f"\"engine.args has '\" + self.filter(a, !a.matches('{ARG}'))[0] + \"', "
                    'expected one word per setting, as in --seed=7"',
                ),
                rule(
                    f"!self.exists(a, a.split('=')[0].replace('_', '-') in {list(TAKEN_FLAGS)})",
                    "\"engine.args has '\" + self.filter(a, a.split('=')[0].replace('_', '-') in "
                    f"{list(TAKEN_FLAGS)})[0] + \"', which has a field of its own in the LLMServer or is set by the "
                    'operator: remove it from args"',
                ),
            ]
        },
        description="More flags for `octavo serve`, one word each (--seed=7). Refused: flags with a field of their own "
        "here, addresses, ports and keys.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for arg in self.args or ():
            if not re.fullmatch(ARG, arg):
                raise ValueError(f"engine.args has '{arg}', expected one word per setting, as in --seed=7")
            if arg.partition("=")[0].replace("_", "-") in TAKEN_FLAGS:
                raise ValueError(
                    f"engine.args has '{arg}', which has a field of its own in the LLMServer or is set by the "
                    "operator: remove it from args"
                )
        tokens, requests = self.max_num_batched_tokens, self.max_num_seqs
        if tokens is not None and requests is not None and tokens < requests:
            raise ValueError(
                "engine.maxNumBatchedTokens must be at least engine.maxNumSeqs, one token for each running request: "
                "raise the first or lower the second"
            )
        return self

    @model_validator(mode="after")
    def _has_effect(self, info: ValidationInfo) -> Self:
        if self.gpu_memory_utilization is not None and self.kv_cache_memory is not None:
            without_effect(info, _TWO_SIZES)
        return self


_NAMES_NO_GPU = (
    "hardware.resourceName says how nodes call the GPUs, and hardware.gpus is 0: remove resourceName, or set gpus"
)


class Hardware(Part):
    """What each engine pod needs of a node."""

    model_config = config(
        rule(
            "!has(self.resources) || ((!has(self.resources.requests) || !self.resources.requests.exists(r, r == "
            "(has(self.resourceName) ? self.resourceName : 'nvidia.com/gpu'))) && (!has(self.resources.limits) || "
            "!self.resources.limits.exists(r, r == (has(self.resourceName) ? self.resourceName : 'nvidia.com/gpu'))))",
            "'hardware.resources asks for ' + (has(self.resourceName) ? self.resourceName : 'nvidia.com/gpu') + "
            "', which hardware.gpus sets: remove it from resources'",
            field_path=".resources",
        ),
        rule(
            "!has(self.resourceName) || !has(self.gpus) || self.gpus > 0 || has(self.profile)",
            f"'{_NAMES_NO_GPU}'",
            field_path=".resourceName",
        ),
    )

    profile: str | None = Field(
        None,
        pattern=DNS_SUBDOMAIN,
        max_length=63,
        description="Name of a profile of the operator's settings (Helm value engine.profiles): fields of hardware and "
        "engine.image that hold where this LLMServer says nothing else.",
    )
    gpus: int = Field(1, ge=0, le=64, description="GPUs of each pod; 0 computes on the CPU. Default: 1.")
    resource_name: str = Field(
        "nvidia.com/gpu",
        pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$",
        max_length=128,
        description="Name by which nodes offer the GPUs. Default: nvidia.com/gpu.",
    )
    resources: Resources | None = Field(
        None, description="CPU, memory and ephemeral storage of each pod. Default: none, which is best effort."
    )
    node_selector: dict[str, Text] | None = Field(None, max_length=32, description="Labels that a node must have.")
    tolerations: list[Toleration] | None = Field(
        None,
        max_length=32,
        description="Taints that the pods tolerate, beside the one named like the GPU resource.",
    )
    affinity: Affinity | None = Field(None, description="Which nodes and which neighbours the pods need or prefer.")
    topology_spread: list[TopologySpread] | None = Field(
        None, max_length=8, description="How the server's pods are spread over nodes and zones."
    )
    shared_memory: Quantity | None = Field(
        None,
        description='Size of /dev/shm (8Gi), which counts as memory of the pod; "0" leaves the runtime\'s 64 MiB. '
        "Default: 8Gi with several GPUs, else 0.",
    )
    priority_class_name: str | None = Field(
        None, pattern=DNS_SUBDOMAIN, max_length=253, description="PriorityClass of the pods."
    )
    runtime_class_name: str | None = Field(
        None, pattern=DNS_SUBDOMAIN, max_length=253, description="RuntimeClass of the pods, such as nvidia."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = self.resources or Resources()
        if self.resource_name in {**(given.requests or {}), **(given.limits or {})}:
            raise ValueError(
                f"hardware.resources asks for {self.resource_name}, which hardware.gpus sets: remove it from resources"
            )
        return self

    @model_validator(mode="after")
    def _has_effect(self, info: ValidationInfo) -> Self:
        # A profile's name for the GPUs is for those servers of it that have some.
        if "resource_name" in self.model_fields_set and not self.gpus and self.profile is None:
            without_effect(info, _NAMES_NO_GPU)
        return self

    @property
    def shared_memory_bytes(self) -> int:
        if self.shared_memory is None:
            # NCCL moves data between the GPUs of a pod through it and hangs or fails with 64 MiB.
            return 8 * 2**30 if self.gpus > 1 else 0
        return int(parse_quantity(self.shared_memory))


class Lifecycle(Part):
    """How long starting and ending may take."""

    drain_timeout_seconds: int = Field(
        120,
        ge=0,
        le=86400,
        description="Longest wait for running requests when a pod ends. Default: 120.",
    )
    startup_stall_seconds: int = Field(
        300,
        ge=1,
        le=86400,
        description="Start-up fails when it made no progress for this long, however long it takes in all. "
        "Default: 300.",
    )


_LABELS_OF_NONE = (
    "observability.labels are the PodMonitor's, and observability.podMonitor is Disabled: remove labels, or set "
    "podMonitor to Auto or Enabled"
)


class Observability(Part):
    """How Prometheus finds the metrics."""

    model_config = config(
        rule(
            "!has(self.labels) || !has(self.podMonitor) || self.podMonitor != 'Disabled'",
            f'"{_LABELS_OF_NONE}"',
            field_path=".labels",
        ),
    )

    pod_monitor: Literal["Auto", "Enabled", "Disabled"] = Field(
        "Auto",
        description="Auto: a PodMonitor where the cluster knows them, else prometheus.io/scrape annotations on the "
        "pods. Enabled: a PodMonitor, and a condition that says so where there can be none. Disabled: neither. "
        "Default: Auto.",
    )
    labels: dict[str, Text] | None = Field(
        None,
        max_length=32,
        description="Labels of the PodMonitor, by which a Prometheus selects it (release: kube-prometheus-stack).",
    )

    @model_validator(mode="after")
    def _has_effect(self, info: ValidationInfo) -> Self:
        if self.labels is not None and self.pod_monitor == "Disabled":
            without_effect(info, _LABELS_OF_NONE)
        return self


class Verify(Part):
    """One request of the operator's user, which every new pod must answer before it gets any other."""

    prompt: str = Field(
        min_length=1,
        max_length=2048,
        pattern=r"\S",
        description="What is asked, as a user's message where the model has a chat template, else as a text to be gone "
        "on with. The answer is the likeliest one (temperature 0).",
    )
    max_tokens: int = Field(
        16,
        ge=_server_low("verify_max_tokens"),
        le=_server_high("verify_max_tokens"),
        description="Longest answer, in tokens. Default: 16.",
    )
    expect: str | None = Field(
        None,
        min_length=1,
        max_length=512,
        description="What the answer must contain, as it is written. Default: any text will do.",
    )
    min_tokens_per_second: int | None = Field(
        None,
        ge=1,
        le=100000,
        description="How fast the answer must come, the wait for its first token included. Default: it does not "
        "matter.",
    )


_NEVER_IDLE = (
    "rollout.idleTimeoutSeconds is the longest wait of rollout.waitForIdle: set waitForIdle to true, or remove "
    "idleTimeoutSeconds"
)


class Rollout(Part):
    """How pods are replaced when their template changes."""

    model_config = config(
        rule(
            "!has(self.idleTimeoutSeconds) || (has(self.waitForIdle) && self.waitForIdle)",
            f"'{_NEVER_IDLE}'",
            field_path=".idleTimeoutSeconds",
        ),
    )

    strategy: Literal["Auto", "Surge", "InPlace", "Recreate"] | None = Field(
        None,
        description="Surge starts the new pod first and needs room for it. InPlace ends an old pod first, one at a "
        "time. Recreate ends all of them first. Auto surges, and goes on in place where the scheduler finds no room "
        "for one more pod. Default: Auto.",
    )
    wait_for_idle: bool = Field(
        False,
        description="Change the pods when no request runs or waits, or after idleTimeoutSeconds. Requests are finished "
        "in any case. Default: false.",
    )
    idle_timeout_seconds: int = Field(300, ge=0, le=86400, description="Longest wait of waitForIdle. Default: 300.")
    verify: Verify | None = Field(
        None,
        description="What a new pod must answer, beside the generation that it warms up with. One that does not is "
        "never ready, and a revision of such pods is rolled back. A change restarts the pods, as they are asked when "
        "they start. Default: nothing is asked.",
    )
    update_policy: Literal["OnSpecChange", "Always"] = Field(
        "OnSpecChange",
        description="What becomes of changes that come with another version of the operator or another default image. "
        "OnSpecChange: they wait for the next change of the spec or of restart.id, and the condition UpdateAvailable "
        "says so. Always: they are rolled out at once. Default: OnSpecChange.",
    )
    rollback: Literal["Auto", "Never"] = Field(
        "Auto",
        description="Auto: when pods of a new revision fail again and again before one was ready, the last revision "
        "that worked is put back until the spec changes. Never: they go on failing. Default: Auto.",
    )

    @model_validator(mode="after")
    def _has_effect(self, info: ValidationInfo) -> Self:
        if "idle_timeout_seconds" in self.model_fields_set and not self.wait_for_idle:
            without_effect(info, _NEVER_IDLE)
        return self


class Restart(Part):
    """Asks for one restart of the pods."""

    id: str | None = Field(
        None,
        max_length=64,
        pattern=r"^[A-Za-z0-9]([A-Za-z0-9._:-]*[A-Za-z0-9])?$",
        description="Any text, such as a date. A new one restarts the pods once, as a rollout of nothing else; "
        "status.restart.id is the same when that is done.",
    )


class Spec(Part):
    """What the user wants."""

    model_config = config(
        rule(
            "!has(self.engine) || !(has(self.engine.tensorParallel) || has(self.engine.pipelineParallel)) || "
            "(has(self.hardware) && has(self.hardware.profile) && !has(self.hardware.gpus)) || "
            "(has(self.engine.tensorParallel) ? self.engine.tensorParallel : 1) * "
            "(has(self.engine.pipelineParallel) ? self.engine.pipelineParallel : 1) == "
            "(has(self.hardware) && has(self.hardware.gpus) ? [self.hardware.gpus, 1].max() : 1)",
            "'engine.tensorParallel times engine.pipelineParallel must be hardware.gpus: leave them out, or set them "
            "to numbers whose product it is'",
        ),
        rule(
            "!has(self.cache) || self.model.source.startsWith('hf://') || self.model.source.startsWith('s3://')",
            '"cache is for models that are downloaded, and model.source is \'" + self.model.source + "\': remove '
            'cache"',
            field_path=".cache",
        ),
        rule(
            "!has(self.engine) || !has(self.engine.gpuMemoryUtilization) || !has(self.hardware) || "
            "!has(self.hardware.gpus) || self.hardware.gpus > 0",
            '"engine.gpuMemoryUtilization is \'" + self.engine.gpuMemoryUtilization + "\', but hardware.gpus is 0: '
            'set engine.kvCacheMemory to size the cache on a CPU"',
        ),
    )

    model: Model = Field(description="What is served.")
    engine: Engine = Field(Engine(), description="How the engine runs. What is left out is for the engine to decide.")
    hardware: Hardware = Field(Hardware(), description="What each engine pod needs of a node.")
    replicas: int = Field(
        1,
        ge=0,
        le=1000,
        json_schema_extra={SERVER_SIDE_DEFAULT: 1},
        description="Engine pods. The operator writes it only with autoscaling.mode BuiltIn, so `kubectl scale` and "
        "other autoscalers own it. Default: 1.",
    )
    autoscaling: Autoscaling | None = Field(
        None, description="Who decides how many replicas there are. Default: whoever sets replicas."
    )
    suspend: bool = Field(False, description="No pods, while replicas keeps its value for later. Default: false.")
    cache: ModelCache = Field(ModelCache(), description="Where a downloaded model is kept.")
    lifecycle: Lifecycle = Field(Lifecycle(), description="How long starting and ending may take.")
    expose: Expose = Field(Expose(), description="How clients reach the API.")
    observability: Observability = Field(Observability(), description="How Prometheus finds the metrics.")
    rollout: Rollout = Field(Rollout(), description="How pods are replaced when their template changes.")
    restart: Restart = Field(Restart(), description="Asks for one restart of the pods.")
    pod_template: PodTemplate = Field(PodTemplate(), description="What is added to the engine pods.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        tensor, pipeline = self.engine.tensor_parallel, self.engine.pipeline_parallel
        product = (tensor or 1) * (pipeline or 1)
        if (tensor is not None or pipeline is not None) and product != max(self.hardware.gpus, 1):
            raise ValueError(
                "engine.tensorParallel times engine.pipelineParallel must be hardware.gpus: leave them out, or set "
                "them to numbers whose product it is"
            )
        if "cache" in self.model_fields_set and not self.model.is_downloaded:
            raise ValueError(
                f"cache is for models that are downloaded, and model.source is '{self.model.source}': remove cache"
            )
        if self.engine.gpu_memory_utilization is not None and not self.hardware.gpus:
            raise ValueError(
                f"engine.gpuMemoryUtilization is '{self.engine.gpu_memory_utilization}', but hardware.gpus is 0: "
                "set engine.kvCacheMemory to size the cache on a CPU"
            )
        return self

    @property
    def desired_replicas(self) -> int:
        return 0 if self.suspend else self.replicas

    @property
    def scales_itself(self) -> bool:
        """Whether the operator decides how many replicas there are."""
        return self.autoscaling is not None and self.autoscaling.mode == "BuiltIn" and not self.suspend

    @property
    def strategy(self) -> str:
        return self.rollout.strategy or "Auto"


@dataclass(frozen=True)
class Server:
    """A parsed LLMServer: in this type nothing is out of range."""

    namespace: str
    name: str
    uid: str
    generation: int
    spec: Spec
    asked: str = ""
    """A digest of what of the spec, as it was written, goes into the pods, and by which rule it was made."""
    without_effect: tuple[str, ...] = ()
    """What of the spec does nothing, a sentence each. It was stored by an API server that did not refuse it yet."""

    @property
    def engine_config(self) -> EngineConfig:
        return _engine_config(self.spec)

    @property
    def server_config(self) -> ServerConfig:
        return _server_config(self.spec, self.name)

    @property
    def args(self) -> list[str]:
        """The engine container's arguments."""
        extra = self.spec.engine.args or []
        words = ["serve", *to_args(self.engine_config), *to_args(self.server_config), *extra]
        # The kubelet would put variables in the place of $(NAME), the token's among them.
        return [word.replace("$", "$$") for word in words]


@dataclass(frozen=True)
class Problem:
    """One reason why a spec cannot be served: the field, and a sentence with the value and what would be right."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


Profile = Mapping[str, Any]
"""Fields of hardware, and `image` for engine.image, as the operator's settings have them."""


def parse(resource: Mapping[str, Any], profiles: Mapping[str, Profile] = NO_PROFILES) -> Server | tuple[Problem, ...]:
    """A Server, or what keeps it from being one.

    Most problems were refused by the API server already. What is left: a CRD of another version than the operator's,
    and what the engine of this version does not do yet.
    """
    metadata = resource["metadata"]
    name = str(metadata["name"])
    raw = resource.get("spec") or {}
    chosen = (raw.get("hardware") or {}).get("profile")
    if chosen is not None and chosen not in profiles:
        known = f"the operator knows {', '.join(sorted(profiles))}" if profiles else "the operator has no profiles"
        return (Problem("spec.hardware.profile", f"got {chosen!r}, but {known} (Helm value engine.profiles)"),)
    idle: list[str] = []
    try:
        spec = Spec.model_validate(with_profile(raw, profiles[chosen]) if chosen is not None else raw, context=idle)
    except ValidationError as error:
        return tuple(
            Problem("spec" + "".join(f".{part}" for part in problem["loc"]), _sentence(problem))
            for problem in error.errors()
        )
    if len(name) > NAME_MAX or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        return (Problem("metadata.name", f"got {name!r}, expected at most {NAME_MAX} characters of a-z, 0-9 and -"),)
    try:
        _engine_config(spec).check()
        _server_config(spec, name)
    except ConfigError as error:
        return (Problem(FIELD_OF_FLAG.get(error.flag, error.flag), f"got {error.value!r}, expected {error.expected}"),)
    return Server(
        namespace=str(metadata.get("namespace") or "default"),
        name=name,
        uid=str(metadata.get("uid", "")),
        generation=int(metadata.get("generation", 0)),
        spec=spec,
        asked=f"{ASKED_RULE}.{digest(_asked(raw))}",
        without_effect=tuple(idle),
    )


ASKED_RULE = "r1"
"""Another one when `_asked` changes: digests of two rules say nothing of each other (rollout.py)."""
_NOT_OF_PODS = ("replicas", "autoscaling", "suspend", "rollout", "observability", "expose")


def _asked(raw: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in raw.items() if name not in _NOT_OF_PODS}
    exposed, rollout = raw.get("expose") or {}, raw.get("rollout") or {}
    kept |= {"verify": rollout["verify"]} if rollout.get("verify") else {}
    return {**kept, "expose": {name: exposed[name] for name in ("apiKeysSecretRef", "tls") if name in exposed}}


def with_profile(spec: Mapping[str, Any], profile: Profile) -> dict[str, Any]:
    """The spec with what the profile says where the spec says nothing. Maps are merged, tolerations are joined."""
    hardware, engine = {**(spec.get("hardware") or {})}, {**(spec.get("engine") or {})}
    for name, value in profile.items():
        mine = hardware.get(name)
        if name == "image":
            engine.setdefault("image", value)
        elif mine is None:
            hardware[name] = value
        elif name == "nodeSelector":
            hardware[name] = {**value, **mine}
        elif name == "resources":
            kinds = {*value, *mine}
            hardware[name] = {kind: {**value.get(kind, {}), **mine.get(kind, {})} for kind in kinds}
        elif name == "tolerations":
            hardware[name] = [*value, *mine]
    return {**spec, "hardware": hardware, "engine": engine}


def problems_of_profile(profile: Profile) -> list[str]:
    """What is wrong with a profile of the operator's settings; empty when nothing is."""
    try:
        Hardware.model_validate({name: value for name, value in profile.items() if name != "image"}, context=[])
        Engine.model_validate({"image": profile["image"]} if "image" in profile else {})
    except ValidationError as error:
        return [".".join(map(str, p["loc"])) + f": {_sentence(p)}" for p in error.errors()]
    return ["profile: a profile names no other"] if "profile" in profile else []


def _sentence(problem: ErrorDetails) -> str:
    if problem["type"] == "extra_forbidden":
        if "podTemplate" in problem["loc"]:
            return "is not among what podTemplate may set (kubectl explain llm.spec.podTemplate.spec): remove it"
        return "there is no such field: correct its name (kubectl explain llm.spec), or remove it"
    if problem["type"] == "value_error":  # ours: the sentence quotes the value already
        return problem["msg"].removeprefix("Value error, ")
    return f"{problem['msg']}, got {str(problem['input'])[:200]!r}"


def in_fields(text: str) -> str:
    """An engine's words, with the LLMServer's fields in the place of the flags and variables that they stand for."""
    for theirs, ours in PHRASES.items():
        text = text.replace(theirs, ours)
    return re.sub(r"--[a-z][a-z-]*|\b[A-Z]+(?:_[A-Z]+)+\b", lambda word: FIELD_OF_FLAG.get(word[0], word[0]), text)


PHRASES = {
    "or write an id like Qwen/Qwen3-8B": "in which /models is what spec.model.source mounts, or use another source, "
    "such as hf://Qwen/Qwen3-8B",
    "(HTTPS_PROXY, HF_ENDPOINT), or name a local folder": "(HTTPS_PROXY, HF_ENDPOINT; Helm value engine.env), or use "
    "another spec.model.source",
}
"""What an engine advises to whoever started it, and what that is for whoever wrote an LLMServer."""
FIELD_OF_FLAG = {
    "--model": "spec.model.source",
    "--revision": "spec.model.revision",
    "--model-store-size": "spec.cache.size",
    "--max-model-len": "spec.engine.maxModelLen",
    "--dtype": "spec.engine.dtype",
    "--gpu-memory-utilization": "spec.engine.gpuMemoryUtilization",
    "--kv-cache-memory-bytes": "spec.engine.kvCacheMemory",
    "--block-size": "spec.engine.blockSize",
    "--tensor-parallel-size": "spec.engine.tensorParallel (by default hardware.gpus)",
    "--pipeline-parallel-size": "spec.engine.pipelineParallel",
    "--max-num-seqs": "spec.engine.maxNumSeqs",
    "--max-num-batched-tokens": "spec.engine.maxNumBatchedTokens",
    "--served-model-name": "spec.model.servedNames",
    "HF_TOKEN": "spec.model.tokenSecretRef",
    "AWS_ENDPOINT_URL": "spec.model.s3.endpoint",
    "AWS_REGION": "spec.model.s3.region",
    "--verify-prompt": "spec.rollout.verify.prompt",
    "--verify-max-tokens": "spec.rollout.verify.maxTokens",
    "--verify-expect": "spec.rollout.verify.expect",
    "--verify-min-tokens-per-s": "spec.rollout.verify.minTokensPerSecond",
}


def _engine_config(spec: Spec) -> EngineConfig:
    engine, gpus = spec.engine, spec.hardware.gpus
    pipeline = engine.pipeline_parallel or 1
    chosen: dict[str, Any] = {
        "revision": spec.model.revision,
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "gpu_memory_utilization": _share(engine.gpu_memory_utilization),
        "kv_cache_memory_bytes": None if engine.kv_cache_memory is None else _bytes(engine.kv_cache_memory),
        "block_size": engine.block_size,
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
        "enable_prefix_caching": engine.enable_prefix_caching,
        "enable_chunked_prefill": engine.enable_chunked_prefill,
        "tensor_parallel_size": engine.tensor_parallel or max(gpus // pipeline, 1),
        "pipeline_parallel_size": engine.pipeline_parallel,
        "model_store": MODELS_PATH if spec.model.is_downloaded else None,
        "model_store_size": spec.cache.size_bytes if spec.model.is_downloaded else None,
    }
    return EngineConfig(
        model=spec.model.location,
        device="cuda" if gpus else "cpu",
        **{name: value for name, value in chosen.items() if value is not None},
    )


def _server_config(spec: Spec, name: str) -> ServerConfig:
    verify = spec.rollout.verify
    asked: dict[str, Any] = {}
    if verify is not None:
        asked = {"verify_prompt": verify.prompt, "verify_max_tokens": verify.max_tokens, "verify_expect": verify.expect}
        if verify.min_tokens_per_second is not None:
            asked["verify_min_tokens_per_s"] = float(verify.min_tokens_per_second)
    return ServerConfig(
        host="0.0.0.0",
        port=API_PORT,
        management_port=MANAGEMENT_PORT,
        served_model_name=tuple(spec.model.served_names or [name]),
        api_key_file=f"{API_KEYS_PATH}/{API_KEYS_FILE}" if spec.expose.api_keys_secret_ref else None,
        ssl_certfile=f"{TLS_PATH}/tls.crt" if spec.expose.tls else None,
        ssl_keyfile=f"{TLS_PATH}/tls.key" if spec.expose.tls else None,
        drain_timeout_s=float(spec.lifecycle.drain_timeout_seconds),
        startup_stall_s=float(spec.lifecycle.startup_stall_seconds),
        **asked,
    )


def _share(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise ConfigError("--gpu-memory-utilization", text, "a share from '0.01' to '1.0'") from None


def _bytes(quantity: str | int) -> int:
    try:
        return int(parse_quantity(quantity))
    except ValueError:
        raise ConfigError("--kv-cache-memory-bytes", quantity, "an amount of memory such as 4Gi") from None
