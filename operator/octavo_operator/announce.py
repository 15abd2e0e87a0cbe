"""Which Kubernetes events a new status is worth: one for each transition, none for a state that goes on. Pure.

Compared with the status on the resource, so that an operator that restarts does not tell everything again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from octavo_operator import names
from octavo_operator.changes import Changes
from octavo_operator.conditions import Finding
from octavo_operator.failures import reason_of, sentence
from octavo_operator.report import LastFailure

MESSAGE_MAX = 1000


@dataclass(frozen=True)
class Announcement:
    type: Literal["Normal", "Warning"]
    reason: str
    message: str


def announcements(
    findings: Sequence[Finding], failure: LastFailure | None, changes: Changes, previous: Mapping[str, Any]
) -> list[Announcement]:
    """previous: the status that the resource had before."""
    told = []
    if changes.create:
        told.append(Announcement("Normal", "Created", "Created " + _kinds(changes.create) + "."))
    if changes.update:
        told.append(Announcement("Normal", "Updated", "Updated " + _kinds(changes.update) + "."))
    if changes.delete:
        told.append(Announcement("Normal", "Deleted", "Deleted " + _kinds(changes.delete) + ", no longer wanted."))
    before = {condition["type"]: condition for condition in previous.get("conditions", [])}
    known = {condition["reason"] for condition in before.values() if condition["status"] == "False"}
    # A pod that fails again and again is one transition: its reason stands in the conditions until it is up.
    if failure is not None and _is_new(failure, previous.get("lastFailure") or {}):
        reason = reason_of(failure.code)
        if reason not in known:
            told.append(Announcement("Warning", reason, f"Pod {failure.pod}: {sentence(failure.message, failure.fix)}"))
            known.add(reason)
    # Ready repeats the cause that another condition is about, so it is asked last.
    for finding in sorted(findings, key=lambda finding: finding.type == names.READY):
        if finding.trouble and finding.reason not in known:
            known.add(finding.reason)
            told.append(Announcement("Warning", finding.reason, finding.message))
    ready = next(finding for finding in findings if finding.type == names.READY)
    was_ready = before.get(names.READY, {}).get("status") == "True"
    if ready.status == "True" and not was_ready:
        told.append(Announcement("Normal", "Ready", ready.message))
    elif was_ready and ready.status != "True" and not ready.trouble:
        told.append(Announcement("Normal", "NotReady", ready.message))
    return [Announcement(one.type, one.reason, one.message[:MESSAGE_MAX]) for one in told]


def _kinds(objects: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(str(body["kind"]) for body in objects)


def _is_new(failure: LastFailure, before: Mapping[str, Any]) -> bool:
    return (failure.time, failure.pod, failure.code) != (before.get("time"), before.get("pod"), before.get("code"))
