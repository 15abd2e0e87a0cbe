"""The status of a server: what was seen, counted, said in a sentence, with times. Pure; called by reconcile.py.

A status is a function of the world and of the status before it: from the latter come the times at which conditions
changed, and the last failure, which outlives the pod that it happened in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from pydantic import ValidationError

from octavo_engine.status import Effective, Stage
from octavo_operator import names
from octavo_operator.causes import About
from octavo_operator.conditions import Finding, View
from octavo_operator.desired.service import url
from octavo_operator.failures import last_failure
from octavo_operator.observed import Pod, write_time
from octavo_operator.quantity import gib
from octavo_operator.replicas import Replica
from octavo_operator.report import (
    MAX_PODS,
    Condition,
    EngineStatus,
    LastFailure,
    Plan,
    PodStatus,
    RestartStatus,
    RevisionStatus,
    Status,
)

MESSAGE_MAX = 1000


def status_of(
    view: View, findings: Sequence[Finding], pods: Sequence[Pod], previous: Mapping[str, Any], now: datetime
) -> Status:
    """previous: the status on the resource, {} where there is none. pods: all of them, also those that are over."""
    limits = view.server.spec.hardware.resources.limits if view.server.spec.hardware.resources else None
    memory_limit = str((limits or {}).get("memory", "")) or None
    before = previous if previous.get("observedGeneration") == view.server.generation and view.desired else {}
    effective = view.effective
    engine = _engine(effective) if effective else read_part(EngineStatus, before.get("engine"))
    plan = _plan(effective) if effective and effective.kv_tokens else read_part(Plan, before.get("plan"))
    return Status(
        observed_generation=view.server.generation,
        phase=_phase(view),
        message=_message(view, findings)[:MESSAGE_MAX],
        url=url(view.server),
        activator_port=view.waking.port if view.waking else None,
        replicas=len(view.live),
        ready_replicas=view.ready,
        updated_replicas=view.updated,
        ready=f"{view.ready}/{view.desired}",
        gpus=view.server.spec.hardware.gpus,
        selector=f"{names.SERVER_LABEL}={view.server.name}",
        engine=engine,
        plan=plan,
        pods=_pods(view.replicas),
        revision=view.rollout.report if view.rollout else None,
        restart=_restart(view, read_part(RestartStatus, previous.get("restart"))),
        last_failure=last_failure(
            pods, read_part(LastFailure, previous.get("lastFailure")), _told(previous), memory_limit
        ),
        conditions=_timed(findings, previous, view.server.generation, now),
    )


def status_of_invalid(
    name: str,
    generation: int,
    findings: Sequence[Finding],
    replicas: Sequence[Replica],
    previous: Mapping[str, Any],
    now: datetime,
) -> Status:
    ready = sum(replica.ready for replica in replicas)
    live = sum(not replica.pod.terminating for replica in replicas)
    return Status(
        observed_generation=generation,
        phase=names.FAILED,
        message=findings[0].message[:MESSAGE_MAX],
        url=previous.get("url"),
        activator_port=previous.get("activatorPort"),
        replicas=live,
        ready_replicas=ready,
        updated_replicas=0,
        ready=f"{ready}/?",
        selector=f"{names.SERVER_LABEL}={name}",
        engine=read_part(EngineStatus, previous.get("engine")),
        plan=read_part(Plan, previous.get("plan")),
        pods=_pods(replicas),
        revision=read_part(RevisionStatus, previous.get("revision")),
        restart=read_part(RestartStatus, previous.get("restart")),
        last_failure=read_part(LastFailure, previous.get("lastFailure")),
        conditions=_timed(findings, previous, generation, now),
    )


def _restart(view: View, before: RestartStatus | None) -> RestartStatus | None:
    """Done when every pod is of the template that has the id, and ready; a rollback has taken it back."""
    asked = view.server.spec.restart.id
    done = view.settled and not (view.rollout and view.rollout.held == "failed")
    return RestartStatus(id=asked) if asked is not None and done else before


def _pods(replicas: Sequence[Replica]) -> list[PodStatus] | None:
    # None and not an empty list: applied by the server, a list that loses its last item is gone.
    return [replica.report() for replica in replicas[:MAX_PODS]] or None


def _told(previous: Mapping[str, Any]) -> dict[str, PodStatus]:
    parts = [read_part(PodStatus, pod) for pod in previous.get("pods") or []]
    return {part.name: part for part in parts if part is not None}


def as_document(status: Status) -> dict[str, Any]:
    """As it is written to the resource, and as it is compared with what is there."""
    document: dict[str, Any] = status.model_dump(by_alias=True, exclude_none=True, mode="json")
    return document


def same(status: Mapping[str, Any], there: Mapping[str, Any]) -> bool:
    """Whether there is nothing to write. The API server keeps lists by key in an order of its own."""
    return _ordered(status) == _ordered(there)


def _ordered(status: Mapping[str, Any]) -> dict[str, Any]:
    keys = {"pods": "name", "conditions": "type"}
    return {
        name: sorted(value, key=lambda item: str(item[keys[name]])) if name in keys else value
        for name, value in status.items()
    }


def _timed(findings: Sequence[Finding], previous: Mapping[str, Any], generation: int, now: datetime) -> list[Condition]:
    before = {condition["type"]: condition for condition in previous.get("conditions", [])}
    timed = []
    for finding in findings:
        old = before.get(finding.type, {})
        kept = old.get("lastTransitionTime") if old.get("status") == finding.status else None
        timed.append(
            Condition(
                type=finding.type,
                status=finding.status,
                observed_generation=generation,
                last_transition_time=kept or write_time(now),
                reason=finding.reason,
                message=finding.message[:MESSAGE_MAX],
            )
        )
    return timed


def _phase(view: View) -> str:
    cause = view.cause
    if cause and cause.about is About.OBJECTS:
        return names.FAILED
    if view.desired == 0:
        if view.replicas:
            return names.DRAINING
        return names.ASLEEP if view.waking else names.SUSPENDED
    if view.ready:
        return names.DEGRADED if cause else names.SERVING
    stages = {replica.stage for replica in view.live}
    if cause and cause.about is About.CRASH and not stages & _LOADING_STAGES:
        return names.FAILED
    if Stage.DOWNLOADING in stages or (view.prefetch is not None and not cause):
        return names.DOWNLOADING
    return names.LOADING if stages & _LOADING_STAGES else names.PENDING


_LOADING_STAGES = {
    *(stage.value for stage in (Stage.STARTING, Stage.DOWNLOADING, Stage.LOADING_WEIGHTS, Stage.CAPTURING)),
    *(stage.value for stage in (Stage.WARMING_UP, Stage.READY)),
}


def _message(view: View, findings: Sequence[Finding]) -> str:
    ready = next(finding for finding in findings if finding.type == names.READY)
    if ready.reason == "AllReplicasReady" and (doing := view.progress()):
        return f"{ready.message} {doing[:1].upper()}{doing[1:]}"
    return ready.message


def _engine(effective: Effective) -> EngineStatus:
    return EngineStatus(
        version=effective.engine_version or None,
        model=effective.model or None,
        resolved_revision=effective.resolved_revision,
        dtype=effective.dtype or None,
        kv_cache_dtype=effective.kv_dtype or None,
        quantization=effective.quantization,
        max_model_len=effective.max_model_len or None,
        block_size=effective.block_size or None,
        attention_backend=effective.attention_backend or None,
        cuda_graphs=effective.cuda_graphs,
        device=effective.gpu or None,
        driver=effective.driver,
        tensor_parallel=effective.tensor_parallel,
    )


def _plan(effective: Effective) -> Plan:
    return Plan(
        weights=gib(effective.weights_bytes),
        kv_cache=gib(effective.kv_bytes),
        kv_tokens=effective.kv_tokens,
        max_concurrency=f"{effective.max_concurrency_at_max_len:.1f}",
    )


T = TypeVar("T", EngineStatus, Plan, PodStatus, LastFailure, RestartStatus, RevisionStatus)


def read_part(kind: type[T], document: Any) -> T | None:
    """A part of the status before; None where another version wrote what this one cannot read."""
    if document is None:
        return None
    try:
        return kind.model_validate(document)
    except ValidationError:
        return None
