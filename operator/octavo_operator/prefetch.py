"""Whether pods have to wait for the Job that downloads their model. Pure; called by reconcile.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from octavo_operator.changes import differs, with_digest

Object = dict[str, Any]


def waits(wanted: Iterable[Object], children: Mapping[str, Object]) -> bool:
    """Until the Job of the present spec is done, the Deployment stays as it is, or is not there yet."""
    job = next((body for body in wanted if body["kind"] == "Job"), None)
    if job is None:
        return False
    present = children.get("Job")
    return present is None or differs(with_digest(job), present) or not is_done(present)


def is_done(job: Mapping[str, Any]) -> bool:
    conditions = job.get("status", {}).get("conditions") or []
    return any(c["type"] == "Complete" and c["status"] == "True" for c in conditions)
