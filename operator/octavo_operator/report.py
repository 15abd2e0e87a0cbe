"""The LLMServer's status as people and programs read it: fields only. status.py fills them, crd.py describes them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from octavo_operator import names

MAX_PODS = 16
"""More pods than this are counted but not listed: an object in etcd has a bound, and nobody reads on."""


class _Model(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)


class PodStatus(_Model):
    name: str = Field(description="Name of the pod.")
    node: str | None = Field(None, description="Node that it was given to.")
    stage: str = Field(
        description="What its engine does: starting, downloading, loading_weights, capturing, warming_up, ready, "
        "draining, failed; or, where there is no engine to ask: pending, creating, crashed, unreachable, terminating."
    )
    percent: int | None = Field(None, description="How much of the stage is done.")
    eta_seconds: int | None = Field(None, description="Estimated time until the stage is done.")
    running: int | None = Field(None, description="Requests being computed.")
    queued: int | None = Field(None, description="Requests waiting.")
    restarts: int | None = Field(None, description="How often its container ended and was started again.")
    revision: str | None = Field(None, description="Digest of the pod template it was made from.")


class EngineStatus(_Model):
    """What the engine resolved its configuration to."""

    version: str | None = Field(None, description="Version of the engine.")
    model: str | None = Field(None, description="Id or folder of the model.")
    resolved_revision: str | None = Field(None, description="Commit of the model.")
    dtype: str | None = Field(None, description="Type of weights and activations.")
    kv_cache_dtype: str | None = Field(None, description="Type of the KV cache.")
    quantization: str | None = Field(None, description="Quantization of the weights.")
    max_model_len: int | None = Field(None, description="Longest prompt plus output, in tokens.")
    block_size: int | None = Field(None, description="Tokens in a block of the KV cache.")
    attention_backend: str | None = Field(None, description="Implementation of attention.")
    cuda_graphs: bool | None = Field(None, description="Whether steps run as CUDA graphs.")
    device: str | None = Field(None, description="GPU or CPU that it computes on.")
    driver: str | None = Field(None, description="Version of the GPU driver.")
    tensor_parallel: int | None = Field(None, description="GPUs that share each layer.")


class RestartStatus(_Model):
    """Up to where restarts were carried out."""

    id: str = Field(description="The spec.restart.id that all pods were started with, and are ready.")


class Plan(_Model):
    """Where the memory goes, as the engine computed it."""

    weights: str = Field(description="Memory of the weights.")
    kv_cache: str = Field(description="Memory of the KV cache.")
    kv_tokens: int = Field(description="Tokens that the KV cache holds.")
    max_concurrency: str = Field(description="Requests of the full length that fit at once.")
    source: Literal["engine"] = Field("engine", description="Who computed it: the running engine.")


class RevisionStatus(_Model):
    """Which pod template is in use, and how the last change of it goes out."""

    current: str | None = Field(None, description="Digest of the pod template that pods are made of.")
    verified: str | None = Field(
        None, description="The last one of which an engine was ready, which includes a generation."
    )
    failed: str | None = Field(None, description="The one that the spec makes, where it did not come up.")
    strategy: str | None = Field(None, description="How pods are replaced: Surge, InPlace or Recreate.")
    reason: str | None = Field(None, description="Why so, in a sentence.")
    waiting_since: str | None = Field(None, description="Since when a change waits for the engines to be idle.")


class LastFailure(_Model):
    """The newest end of an engine that nobody asked for. It stays after recovery."""

    time: str | None = Field(None, description="When it ended.")
    pod: str = Field(description="Pod that it ran in.")
    code: str = Field(description="What kind of failure; the engine's codes are listed in octavo_engine.status.")
    message: str = Field(description="What was wrong.")
    fix: str | None = Field(None, description="What would be right.")


class Condition(_Model):
    type: str = Field(description="What the condition is about.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    observed_generation: int = Field(description="metadata.generation that it was computed from.")
    last_transition_time: str = Field(
        json_schema_extra={"format": "date-time"}, description="When its status last changed."
    )
    reason: str = Field(description="One word, for programs.")
    message: str = Field(description="A sentence, for people; names the next step where there is one.")


class Status(_Model):
    """What the operator observed; written only by it."""

    observed_generation: int = Field(description="metadata.generation that all of this was computed from.")
    phase: str = Field(
        description="The conditions in one word: "
        + ", ".join(names.PHASES)
        + ". For people; program against conditions."
    )
    message: str = Field(description="The state in a sentence, with the next step where something is wrong.")
    url: str | None = Field(None, description="Base URL of the OpenAI API inside the cluster.")
    activator_port: int | None = Field(
        None, description="Port of the activator's pods that stands for this server, where a request wakes it."
    )
    replicas: int = Field(description="Engine pods that exist.")
    ready_replicas: int = Field(description="Engine pods that take requests.")
    updated_replicas: int = Field(description="Engine pods of the present specification.")
    ready: str = Field(description="Ready and wanted pods, for display: 1/2.")
    gpus: int | None = Field(None, description="GPUs of each pod, a profile's included.")
    selector: str = Field(description="Label selector of the pods, for autoscalers.")
    engine: EngineStatus | None = Field(None, description="What the engine resolved its configuration to.")
    plan: Plan | None = Field(None, description="Where the memory goes, as the engine computed it.")
    pods: list[PodStatus] | None = Field(
        None,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        description=f"The engine pods, those with trouble first, at most {MAX_PODS}.",
    )
    revision: RevisionStatus | None = Field(
        None, description="Which pod template is in use, and how the last change of it goes out."
    )
    restart: RestartStatus | None = Field(
        None, description="The last restart that was asked for by spec.restart.id and is done."
    )
    last_failure: LastFailure | None = Field(
        None, description="The newest end of an engine that nobody asked for. It stays after recovery."
    )
    conditions: list[Condition] = Field(
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
        description="Ready, Progressing, Schedulable, ModelCached, Fits, Verified, UpdateAvailable, MonitoringReady; "
        "and Wakeable, where autoscaling.minReplicas is 0.",
    )
