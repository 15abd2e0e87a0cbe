"""Decides what becomes of a new pod template: rolled out now and how, held back, or taken back. Pure.

Restarting an engine costs minutes of a GPU, so a template is not applied just because it differs:

1. A difference that nobody asked for (another operator, another default image) is held back, and the UpdateAvailable
   condition says so. It goes out with the next change of the spec, with restart.id, or by rollout.updatePolicy.
   What the present template was made for is marked on the Deployment. Where another version of the operator made the
   mark by a rule of its own, nothing was asked for if the spec is still of the generation that was looked at last.
2. With rollout.waitForIdle it is held back until no request runs or waits, or until the wait has been long enough.
3. `Auto` surges: the scheduler knows better than any count of free GPUs whether one more pod fits. A surge that it
   finds no room for is turned into a replacement in place, for this revision, with the scheduler's reason.
4. The engine's readiness includes a generation, so old pods stay until a new one has generated; that revision is the
   verified one then. A revision whose pods fail, twice over, before any of them was ready is taken back to it.

What must be known from look to look is on the resource: in the Deployment's annotation, and in status.revision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from octavo_engine.status import Stage
from octavo_operator import names
from octavo_operator.causes import About
from octavo_operator.desired.deployment import revision, strategy
from octavo_operator.observed import write_time
from octavo_operator.replicas import Replica
from octavo_operator.report import RevisionStatus
from octavo_operator.spec import Server

Object = dict[str, Any]
SURGE_PATIENCE_S = 10.0
"""How long the scheduler may take to find room for one more pod; a preemption or a drained pod's end fits into it."""
HOPELESS_RESTARTS = 2
HOPELESS_AFTER_S = 120.0
"""For a pod that cannot start: an image, a secret. Somebody may be about to bring it."""


@dataclass(frozen=True)
class Decision:
    deployment: Object
    """To be applied."""
    revision: str
    """Of its template: what pods should be of, as things are."""
    report: RevisionStatus
    held: Literal["update", "idle", "failed", "prefetch"] | None = None
    """Why the template that the spec makes is not the one to be applied."""
    restore: str | None = None
    """The revision whose template has to be put back. The Deployment's old ReplicaSets know it."""


def decide(
    server: Server,
    wanted: Object,
    present: Object | None,
    found: Sequence[Replica],
    before: RevisionStatus | None,
    refused: str | None,
    now: datetime,
    tick: float,
    *,
    waited_s: float = 0.0,
    seen_generation: int | None = None,
    prefetching: bool = False,
) -> Decision:
    """wanted: the Deployment that the spec makes. present: ours, as it is. refused: why pods may not be made.

    now: for what is written down. tick: seconds of the monotonic clock, for what is decided by age.
    seen_generation: of the spec at the last look of whatever operator.
    waited_s: for how long this operator has seen the change wait for the engines to be idle. One that restarts begins
    anew: a change goes out late by that, never early, whatever its clock does.
    prefetching: the wanted pods' model is still being downloaded.
    """
    before = before or RevisionStatus()
    new = revision(wanted)
    if present is None:
        return Decision(wanted, new, RevisionStatus(current=new, strategy="Surge", reason=_SURGES))
    asked = _asked_before(present, server, seen_generation)
    current = revision(present)
    serving = {r.pod.revision for r in found if r.ready and r.engine and r.engine.stage is Stage.READY}
    verified = current if current in serving else before.verified
    base = RevisionStatus(current=current, verified=verified)
    live = [r for r in found if not r.pod.terminating]
    if new == current:
        if hopeless := _hopeless(server, current, verified, live, tick):
            report = replace_report(base, current=verified, failed=new, reason=hopeless)
            return Decision(
                _keep(wanted, present, _kept_strategy(server, before), asked), new, report, "failed", verified
            )
        kind, why = _strategy(server, new, before, live, refused, tick)
        return Decision(_with(wanted, kind), new, replace_report(base, strategy=kind, reason=why))
    kept = _keep(wanted, present, _kept_strategy(server, before), asked)
    if prefetching:
        why = "The new pods wait until their model is downloaded."
        return Decision(kept, current, replace_report(base, strategy=before.strategy, reason=why), "prefetch")
    if new == before.failed and live:
        report = replace_report(base, failed=new, strategy=before.strategy, reason=before.reason)
        return Decision(kept, current, report, "failed")
    if live and asked == server.asked and server.spec.rollout.update_policy == "OnSpecChange":
        return Decision(kept, current, replace_report(base, strategy=before.strategy, reason=before.reason), "update")
    busy = sum(r.engine.load.running + r.engine.load.waiting for r in live if r.engine)
    if server.spec.rollout.wait_for_idle and busy:
        since = before.waiting_since or write_time(now)
        if waited_s < server.spec.rollout.idle_timeout_seconds:
            why = f"It waits until no request runs or waits before it changes the pods: {busy} do."
            return Decision(kept, current, replace_report(base, waiting_since=since, reason=why), "idle")
    kind, why = _strategy(server, new, before, live, refused, tick)
    return Decision(_with(wanted, kind), new, replace_report(base, current=new, strategy=kind, reason=why))


def put_back(decision: Decision, template: Object) -> Decision:
    """template: of the revision that `restore` names, as its ReplicaSet has it."""
    labels = {k: v for k, v in template["metadata"]["labels"].items() if k != "pod-template-hash"}
    template = {**template, "metadata": {**template["metadata"], "labels": labels}}
    body = {**decision.deployment, "spec": {**decision.deployment["spec"], "template": template}}
    return replace(decision, deployment=body, revision=labels[names.REVISION_LABEL], restore=None)


def deletion_costs(found: Sequence[Replica], present: Object | None, desired: int) -> dict[str, int]:
    """By pod, what its end would cost in requests: before a scale-down, so that the idlest pods go first."""
    if present is None or desired >= int(present["spec"].get("replicas", 1)) or desired == 0:
        return {}
    engines = [(r.pod.name, r.engine.load) for r in found if r.engine and not r.pod.terminating]
    return {name: load.running + load.waiting for name, load in engines}


def replace_report(report: RevisionStatus, **changed: Any) -> RevisionStatus:
    return report.model_copy(update=changed)


_SURGES = "A new pod is ready before an old one ends."


def _strategy(
    server: Server, new: str, before: RevisionStatus, live: Sequence[Replica], refused: str | None, tick: float
) -> tuple[str, str]:
    if server.spec.strategy != "Auto":
        return server.spec.strategy, f"rollout.strategy is {server.spec.strategy}."
    if before.current == new and before.strategy == "InPlace":
        return "InPlace", before.reason or ""  # for all of this rollout: what room there is comes and goes with it
    fresh = [r for r in live if r.pod.revision == new]
    if len(fresh) < len(live) or (refused and live):
        for replica in fresh:
            if replica.pod.unschedulable is not None and tick - replica.pod.known_since >= SURGE_PATIENCE_S:
                why = replica.cause.message if replica.cause else replica.pod.unschedulable
                return "InPlace", f"Pods are replaced in place, as there is no room for one more beside them. {why}"
        if refused and len(fresh) < server.spec.desired_replicas and before.current == new:
            return "InPlace", f"Pods are replaced in place, as no more may be made: {refused}"
    return "Surge", _SURGES


def _kept_strategy(server: Server, before: RevisionStatus) -> str:
    if server.spec.strategy != "Auto":
        return server.spec.strategy
    return before.strategy or "Surge"


def _hopeless(server: Server, current: str, verified: str | None, live: Sequence[Replica], tick: float) -> str | None:
    """Why the revision that is being rolled out will not come up; None while it may, or where there is no way back."""
    if server.spec.rollout.rollback == "Never" or verified in (None, current):
        return None
    for replica in live:
        cause = replica.cause
        if cause is None or replica.pod.revision != current:
            continue
        crashed = cause.about is About.CRASH and replica.pod.restarts >= HOPELESS_RESTARTS
        stuck = cause.about is About.START and tick - replica.pod.known_since >= HOPELESS_AFTER_S
        if crashed or stuck:
            return f"Rolled back to the last revision that worked, as the new one does not come up: {cause.message}"
    return None


def _with(wanted: Object, kind: str) -> Object:
    return {**wanted, "spec": {**wanted["spec"], "strategy": strategy(kind)}}


def _asked_before(present: Object, server: Server, seen_generation: int | None) -> str:
    """The mark of what the present template was made for, by the rule of this version."""
    mark: str = present["metadata"].get("annotations", {}).get(names.ASKED_ANNOTATION, "")
    rule = server.asked.partition(".")[0]
    if mark.startswith(f"{rule}."):
        return mark
    return server.asked if seen_generation == server.generation else f"{rule}.other"


def _keep(wanted: Object, present: Object, kind: str, asked: str) -> Object:
    """The wanted Deployment, with the template left as it is, and the mark of what that was made for."""
    annotations = {**wanted["metadata"].get("annotations", {}), names.ASKED_ANNOTATION: asked}
    spec = {**wanted["spec"], "template": present["spec"]["template"], "strategy": strategy(kind)}
    return {**wanted, "metadata": {**wanted["metadata"], "annotations": annotations}, "spec": spec}
