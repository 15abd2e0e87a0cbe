"""The conditions of a server, each a pure function of what was seen. Called by status.py.

Unknown is an honest value: it is given wherever nobody has looked yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from octavo_engine.status import Effective, FailureCode, Stage
from octavo_operator import names
from octavo_operator.causes import About, Cause
from octavo_operator.desired.cache import store_claim
from octavo_operator.desired.service import url
from octavo_operator.failures import OOM_KILLED
from octavo_operator.monitoring import Monitoring, judge
from octavo_operator.quantity import gib
from octavo_operator.replicas import Replica, headline
from octavo_operator.rollout import Decision
from octavo_operator.spec import Problem, Server
from octavo_operator.wake import Waking, outlook, sentence

Truth = Literal["True", "False", "Unknown"]

SIZE_CODES = {
    FailureCode.WEIGHTS_TOO_LARGE.value,
    FailureCode.KV_CACHE_TOO_SMALL.value,
    FailureCode.OUT_OF_MEMORY.value,
    OOM_KILLED,
}
MODEL_CODES = {
    FailureCode.MODEL_NOT_FOUND.value,
    FailureCode.MODEL_GATED.value,
    FailureCode.MODEL_INVALID.value,
    FailureCode.WEIGHTS_CORRUPT.value,
    FailureCode.DOWNLOAD_FAILED.value,
    FailureCode.DOWNLOAD_STALLED.value,
}
INVALID_SPEC = "InvalidSpec"
OPERATOR_CHANGED = (
    "This operator would make the pods differently (its version, or its default image). Running ones are left alone: "
    "change restart.id for a rollout, or set rollout.updatePolicy to Always."
)


_NO_PODS = "There are no pods to ask."


@dataclass(frozen=True)
class Finding:
    """A condition before it has times."""

    type: str
    status: Truth
    reason: str
    message: str
    trouble: bool = False
    """Something that a person has to mend; without it a False is a state on the way."""


@dataclass(frozen=True)
class View:
    """A server and what was seen of it, counted."""

    server: Server
    replicas: tuple[Replica, ...]
    revision: str
    """Of the pods that the present spec asks for."""
    pod_monitors_known: bool = False
    unannotated: str | None = None
    """Why the pods could not be annotated, where they should be."""
    causes: tuple[Cause, ...] = ()
    """Beside those of single pods: objects that could not be applied, pods that may not be made."""
    rollout: Decision | None = None
    altered: tuple[tuple[str, str], ...] = ()
    """Children that the cluster keeps otherwise than applied: kind, and where they differ first."""
    not_scaling: str | None = None
    """Why its HorizontalPodAutoscaler or ScaledObject does nothing, where it has one that does nothing."""
    monitoring: Monitoring = field(default_factory=Monitoring)
    waking: Waking | None = None
    """How the server is woken when it sleeps; None where it does not."""
    prefetch: tuple[Replica, ...] | None = None
    """The pods that download the model, while the present spec's pods wait for it; None when nothing waits."""

    @property
    def desired(self) -> int:
        return self.server.spec.desired_replicas

    @property
    def ready(self) -> int:
        return sum(replica.ready for replica in self.replicas)

    @property
    def live(self) -> tuple[Replica, ...]:
        return tuple(replica for replica in self.replicas if not replica.pod.terminating)

    @property
    def updated(self) -> int:
        return sum(replica.pod.revision == self.revision for replica in self.live)

    @property
    def settled(self) -> bool:
        """Nothing is on its way: what is wanted is there, ready and of the present spec."""
        waits = self.prefetch is not None or (self.rollout is not None and self.rollout.held == "idle")
        return len(self.replicas) == self.ready == self.updated == self.desired and not (self.causes or waits)

    @property
    def cause(self) -> Cause | None:
        """The one to be told first."""
        every = (*self.replicas, *(self.prefetch or ()))
        causes = [*self.causes, *(replica.cause for replica in every if replica.cause)]
        return min(causes, key=lambda cause: cause.about, default=None)

    @property
    def effective(self) -> Effective | None:
        """The configuration of an engine of the present spec, or else of any engine; one that serves comes first."""
        told = [replica for replica in self.replicas if replica.engine and replica.engine.effective]
        told.sort(key=lambda r: (r.pod.revision != self.revision, not r.ready, r.pod.name))
        return told[0].engine.effective if told and told[0].engine else None

    def progress(self) -> str:
        """What happens now, in a few words; empty when nothing does."""
        if self.cause is not None:
            return self.cause.message
        if self.rollout and self.rollout.held in ("failed", "idle") and self.rollout.report.reason:
            return self.rollout.report.reason
        if self.prefetch is not None:
            # Kubernetes calls such a pod ready, as it has no probe; what it does is told all the same.
            doing = next((replica for replica in self.prefetch if not replica.pod.terminating), None)
            return f"The model is downloaded first{': ' + doing.words() if doing else ', by a Job'}."
        if replica := headline(self.replicas):
            return replica.words() + "."
        ending = len(self.replicas) - len(self.live)
        if ending:
            return f"{ending} {'pod is' if ending == 1 else 'pods are'} ending."
        if len(self.live) > self.desired:
            return f"{_pods(len(self.live) - self.desired)} too many, to be ended."
        return "Its pods are being created." if len(self.live) < self.desired else ""


def conditions(view: View) -> list[Finding]:
    return [
        *(_ready(view), _progressing(view), _schedulable(view), _model_cached(view), _fits(view)),
        *(_verified(view), _update_available(view), _monitoring(view)),
        *([_wakeable(view.server, view.waking)] if view.waking else []),
    ]


def conditions_of_invalid(problems: Sequence[Problem], serving: int) -> list[Finding]:
    """Nothing is changed for a spec that cannot be served: pods of the one before it go on."""
    told = " ".join(f"{problem}." for problem in problems)
    still = f" Still serving: {_pods(serving)} of the specification before it." if serving else ""
    ready = Finding(names.READY, "False", INVALID_SPEC, told + still, trouble=True)
    stopped = Finding(names.PROGRESSING, "False", INVALID_SPEC, "It waits for the specification to be corrected.")
    others = (
        *(names.SCHEDULABLE, names.MODEL_CACHED, names.FITS),
        *(names.VERIFIED, names.UPDATE_AVAILABLE, names.MONITORING_READY),
    )
    return [ready, stopped, *(Finding(kind, "Unknown", INVALID_SPEC, "Not looked at.") for kind in others)]


def _ready(view: View) -> Finding:
    count = f"{view.ready}/{view.desired} ready"
    if any(cause.about is About.OBJECTS for cause in view.causes) and view.cause:
        meanwhile = f" Meanwhile {count} at {url(view.server)}." if view.ready else ""
        return Finding(names.READY, "False", view.cause.reason, view.cause.message + meanwhile, trouble=True)
    if view.server.spec.suspend:
        return Finding(names.READY, "False", "Suspended", "Set suspend to false to start its pods.")
    if view.desired == 0:
        how = sentence(view.server, view.waking) if view.waking else "Raise replicas to start pods."
        return Finding(names.READY, "False", "ScaledToZero", how)
    if view.ready >= view.desired:
        return Finding(names.READY, "True", "AllReplicasReady", f"{count} at {url(view.server)}.")
    if view.ready:
        return Finding(names.READY, "True", "SomeReplicasReady", f"{count}. {_capital(view.progress())}")
    if view.cause:
        # A pod that passes its probes has its place in the Service, and we cannot see what it does there.
        truth: Truth = "Unknown" if view.cause.reason == "EngineUnreachable" else "False"
        return Finding(names.READY, truth, view.cause.reason, f"{count}. {view.cause.message}", trouble=True)
    if view.prefetch is not None and not view.live:
        return Finding(names.READY, "False", "Prefetching", f"{count}. {view.progress()}")
    replica = headline(view.replicas)
    reason = _camel(replica.stage) if replica else "CreatingPods"
    if replica and replica.stage == Stage.READY:
        reason = "WaitingForProbe"
    return Finding(names.READY, "False", reason, f"{count}. {_capital(view.progress())}")


def _progressing(view: View) -> Finding:
    if view.rollout and view.rollout.held == "failed":
        return Finding(names.PROGRESSING, "False", "RolledBack", view.rollout.report.reason or "", trouble=True)
    if view.rollout and view.rollout.held == "idle":
        return Finding(names.PROGRESSING, "True", "WaitingForIdle", view.rollout.report.reason or "")
    if view.settled and view.altered:
        where = " and ".join(f"the {kind} at {at}" for kind, at in view.altered)
        message = (
            f"The cluster keeps {where} otherwise than it was applied: a webhook changes it, or the API server does "
            "not know the field. It is left so, and tried again when the specification changes."
        )
        return Finding(names.PROGRESSING, "False", "KeptOtherwise", message, trouble=True)
    if view.settled and (idle := view.server.without_effect):
        message = f"Everything is as specified, and some of it does nothing: {'; '.join(idle)}."
        return Finding(names.PROGRESSING, "False", "WithoutEffect", message, trouble=True)
    if view.settled and view.not_scaling:
        # Just started pods have no metrics yet: it is told while it lasts, and no event made of it.
        return Finding(names.PROGRESSING, "False", "NotScaling", view.not_scaling)
    if view.settled:
        return Finding(names.PROGRESSING, "False", "Settled", "Everything is as specified.")
    if view.cause:
        return Finding(names.PROGRESSING, "False", view.cause.reason, view.cause.message, trouble=True)
    message = _capital(view.progress())
    if view.prefetch is not None:
        return Finding(names.PROGRESSING, "True", "Prefetching", message)
    if view.updated < len(view.live):
        count = f"{view.updated} of {view.desired} pods are of the present specification."
        how = f" {view.rollout.report.reason}" if view.rollout and view.rollout.report.reason else ""
        return Finding(names.PROGRESSING, "True", "RollingOut", f"{count} {message}{how}")
    if len(view.live) > view.desired or view.ready >= view.desired:
        return Finding(names.PROGRESSING, "True", "ScalingDown", message)
    return Finding(names.PROGRESSING, "True", "Starting", message)


def _schedulable(view: View) -> Finding:
    for cause in (*view.causes, *(r.cause for r in (*view.replicas, *(view.prefetch or ())) if r.cause)):
        if cause.about in (About.ADMISSION, About.SCHEDULING):
            return Finding(names.SCHEDULABLE, "False", cause.reason, cause.message, trouble=True)
    if view.desired == 0:
        return Finding(names.SCHEDULABLE, "Unknown", "NoPods", "There are no pods to schedule.")
    nodes = sorted({replica.pod.node for replica in view.live if replica.pod.node})
    if not view.live or any(replica.pod.node is None for replica in view.live):
        return Finding(names.SCHEDULABLE, "Unknown", "Waiting", "The scheduler has not decided yet.")
    shown = ", ".join(nodes[:8]) + (f" and {len(nodes) - 8} more" if len(nodes) > 8 else "")
    return Finding(names.SCHEDULABLE, "True", "Scheduled", f"{_pods(len(view.live))} on {shown}.")


def _model_cached(view: View) -> Finding:
    claim = view.server.spec.model.claim
    for replica in (*(view.prefetch or ()), *view.replicas):
        cause = replica.cause
        if cause and (cause.code in MODEL_CODES or cause.reason in ("ClaimMissing", "ClaimPending", "VolumeMount")):
            return Finding(names.MODEL_CACHED, "False", cause.reason, cause.message, trouble=True)
    if view.prefetch is not None:
        return Finding(names.MODEL_CACHED, "False", "Prefetching", view.progress())
    if any(replica.has_model for replica in view.replicas):
        if shared := store_claim(view.server):
            message = f"On the PersistentVolumeClaim {shared}, for every pod that mounts it."
            return Finding(names.MODEL_CACHED, "True", "InStore", message)
        if not view.server.spec.model.is_downloaded and claim is None:
            return Finding(names.MODEL_CACHED, "True", "InImage", "It comes with an image.")
        if claim is not None:
            return Finding(names.MODEL_CACHED, "True", "OnClaim", f"On the PersistentVolumeClaim {claim}.")
        message = "Each pod has a copy of its own; a new pod downloads it again."
        return Finding(names.MODEL_CACHED, "True", "Downloaded", message)
    for replica in view.replicas:
        if replica.stage == Stage.DOWNLOADING:
            return Finding(names.MODEL_CACHED, "False", "Downloading", _capital(replica.words()) + ".")
    if not view.desired and not view.replicas:
        return Finding(names.MODEL_CACHED, "Unknown", "NoPods", _NO_PODS)
    return Finding(names.MODEL_CACHED, "Unknown", "NotLookedYet", "No engine has told of the model yet.")


def _fits(view: View) -> Finding:
    for replica in view.replicas:
        if replica.cause and replica.cause.code in SIZE_CODES:
            return Finding(names.FITS, "False", replica.cause.reason, replica.cause.message, trouble=True)
    sizes = view.effective
    if not view.desired and not view.replicas:
        return Finding(names.FITS, "Unknown", "NoPods", _NO_PODS)
    if sizes is None or not sizes.kv_tokens:
        return Finding(names.FITS, "Unknown", "NotPlannedYet", "No engine has computed its plan yet.")
    message = (
        f"Weights {gib(sizes.weights_bytes)}, KV cache {gib(sizes.kv_bytes)} for {sizes.kv_tokens:,} tokens: "
        f"{sizes.max_concurrency_at_max_len:.1f} requests of {sizes.max_model_len:,} tokens at once."
    )
    return Finding(names.FITS, "True", "Planned", message)


def _verified(view: View) -> Finding:
    """By the engine's own generation before it calls itself ready: the operator holds no key to ask for one."""
    for replica in view.live:
        if replica.pod.revision == view.revision and replica.ready and replica.stage == Stage.READY:
            # Of pods that are not of the present spec, it does not say what they were asked.
            present = view.rollout is None or view.rollout.held in (None, "update")
            if (asked := view.server.spec.rollout.verify) is not None and present:
                answer = "answered rollout.verify" + (f" with {asked.expect!r} in it" if asked.expect else "")
                return Finding(names.VERIFIED, "True", "Answered", f"An engine of revision {view.revision} {answer}.")
            message = f"An engine of revision {view.revision} generated, and the result was sound."
            return Finding(names.VERIFIED, "True", "Generated", message)
    for replica in view.replicas:
        if replica.cause and replica.cause.code == FailureCode.SELF_TEST_FAILED:
            return Finding(names.VERIFIED, "False", replica.cause.reason, replica.cause.message, trouble=True)
    if view.rollout and view.rollout.report.verified == view.revision:
        message = f"An engine of revision {view.revision} was ready before, which includes a generation."
        return Finding(names.VERIFIED, "True", "Generated", message)
    return Finding(
        names.VERIFIED, "Unknown", "NotGeneratedYet", f"No engine of revision {view.revision} was ready yet."
    )


def _update_available(view: View) -> Finding:
    if view.rollout and view.rollout.held == "update":
        return Finding(names.UPDATE_AVAILABLE, "True", "OperatorChanged", OPERATOR_CHANGED)
    return Finding(names.UPDATE_AVAILABLE, "False", "UpToDate", "The pods are made as this operator would make them.")


def _monitoring(view: View) -> Finding:
    told = judge(view.server, view.monitoring, pod_monitors_known=view.pod_monitors_known, unannotated=view.unannotated)
    truth: Truth = "True" if told.holds else "False"
    return Finding(names.MONITORING_READY, truth, told.reason, told.message, trouble=told.trouble)


def _wakeable(server: Server, waking: Waking) -> Finding:
    reason, message = outlook(server, waking)
    if waking.barrier:
        return Finding(names.WAKEABLE, "False", reason, message, trouble=True)
    return Finding(names.WAKEABLE, "True" if waking.addresses else "Unknown", reason, message)


def _pods(count: int) -> str:
    return f"{count} pod" if count == 1 else f"{count} pods"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _camel(stage: str) -> str:
    return "".join(part.capitalize() for part in stage.split("_"))
