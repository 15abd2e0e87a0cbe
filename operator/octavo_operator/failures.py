"""How engines ended when nobody asked them to: death certificates, kills, crashes without a word. Pure."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from octavo_engine.status import Failure as Certificate
from octavo_engine.status import FailureCode
from octavo_operator import names
from octavo_operator.observed import Pod, Termination, write_time
from octavo_operator.report import MAX_PODS, LastFailure, PodStatus
from octavo_operator.spec import in_fields

OOM_KILLED = "OOM_KILLED"
RESTARTED = "RESTARTED"
EXITED = "EXITED"
"""Codes beside the engine's own, for ends of which the engine could not tell."""


@dataclass(frozen=True)
class Failure:
    pod: str
    code: str
    message: str
    fix: str
    finished_at: datetime | None

    @property
    def reason(self) -> str:
        return reason_of(self.code)

    @property
    def sentence(self) -> str:
        return sentence(self.message, self.fix)

    def report(self) -> LastFailure:
        time = write_time(self.finished_at) if self.finished_at else None
        return LastFailure(time=time, pod=self.pod, code=self.code, message=self.message, fix=self.fix or None)


def sentence(message: str, fix: str | None) -> str:
    """Both as sentences, with the full stops that they may lack."""
    message = message if message.endswith((".", "!", "?")) else f"{message}."
    fix = fix if not fix or fix.endswith(".") else f"{fix}."
    return f"{message} Fix: {fix}" if fix else message


def reason_of(code: str) -> str:
    """KV_CACHE_TOO_SMALL → KvCacheTooSmall, as reasons of conditions and events are written."""
    return "OOMKilled" if code == OOM_KILLED else "".join(part.capitalize() for part in code.split("_"))


def failure_of(pod: Pod, memory_limit: str | None = None) -> Failure | None:
    """The newest end of the pod's engine that nobody asked for."""
    if pod.over and pod.reason:
        message = pod.message or f"The pod was ended: {pod.reason}"
        return Failure(pod.name, pod.reason.upper(), message, "", None)
    for end in pod.terminations:
        if pod.terminating and end is pod.terminations[0] and not pod.running:
            continue  # the end that its deletion asked for, however it came about
        return _read(pod, end, memory_limit)
    return None


def last_failure(
    pods: Iterable[Pod], previous: LastFailure | None, told: Mapping[str, PodStatus], memory_limit: str | None
) -> LastFailure | None:
    """The newest failure known: one that the status before did not know, or the one on it, which outlives its pod.

    When an engine ended is told by its node's clock, and one that is an hour ahead would keep a failure newest for an
    hour. So what is new is told by counting: a pod's engine has ended more often than it had when the status was
    written. Where several are new at once, as after a pause of the operator, the pod counts that the API server made
    last, and then the name: two looks at the same world must give the same answer.

    told: the pods of the status before, by name.
    """
    seen = [(pod, failure) for pod in pods if (failure := failure_of(pod, memory_limit))]
    new = seen if previous is None else [(pod, failure) for pod, failure in seen if _is_new(pod, told)]
    if new:
        return max(new, key=lambda both: (both[0].created, both[1].pod))[1].report()
    for _, failure in seen:
        again = failure.report()
        if previous and (again.pod, again.time) == (previous.pod, previous.time):
            return again  # the kubelet may have learnt more of it meanwhile
    return previous


def _is_new(pod: Pod, told: Mapping[str, PodStatus]) -> bool:
    before = told.get(pod.name)
    if pod.over:
        return before is not None  # a status tells only of pods that run or will run: it was one of them then
    if before is None:
        # Born since; or one of the many that a status does not list, which are those without trouble.
        return len(told) < MAX_PODS or not pod.running
    return _ends(pod) > (before.restarts or 0) + (before.stage == names.POD_CRASHED)


def _ends(pod: Pod) -> int:
    """How often its engine ended without being asked to. An end is there before the restart that follows it counts."""
    return pod.restarts + bool(pod.terminations and not pod.running and not pod.terminating)


def _read(pod: Pod, end: Termination, memory_limit: str | None) -> Failure:
    certificate = Certificate.from_json(end.message)
    if end.reason == "OOMKilled" and certificate and certificate.code is FailureCode.ENGINE_DIED:
        # The kernel took the engine's process, and its other process could only tell that it died.
        certificate = None
    if certificate:
        return Failure(
            pod.name, certificate.code, in_fields(certificate.message), in_fields(certificate.fix), end.finished_at
        )
    if end.reason == "OOMKilled":
        at = f" of {memory_limit}" if memory_limit else ""
        message = f"The kernel killed the engine at its memory limit{at}"
        fix = "raise hardware.resources.limits.memory, or lower engine.kvCacheMemory"
        if not memory_limit:
            message = "The kernel killed the engine, as the node ran out of memory"
            fix = "set hardware.resources.requests.memory to what the model needs"
        return Failure(pod.name, OOM_KILLED, message, fix, end.finished_at)
    if end.exit_code == 0:
        message = "The kubelet ended the container, most likely as a probe failed"
        return Failure(
            pod.name, RESTARTED, message, f"kubectl describe pod {pod.name} names the probe", end.finished_at
        )
    last_words = next((line.strip() for line in reversed(end.message.splitlines()) if line.strip()), "")
    said = f"; its last words: {last_words[:300]}" if last_words else " without a word"
    message = f"The engine ended with status {end.exit_code}{_signal(end.exit_code)}{said}"
    fix = f"kubectl logs {pod.name} --previous tells more"
    if end.exit_code == 128 + signal.SIGKILL:
        # Some container runtimes miss the kernel's word now and then, so that the kubelet does not say OOMKilled.
        fix += "; if nobody killed it, memory ended: see hardware.resources.limits.memory"
    return Failure(pod.name, EXITED, message, fix, end.finished_at)


def _signal(exit_code: int) -> str:
    if exit_code <= 128:
        return ""
    try:
        return f" ({signal.Signals(exit_code - 128).name})"
    except ValueError:
        return ""
