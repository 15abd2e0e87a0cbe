"""What has to be applied and deleted so that the children are as desired. Pure: two sets of objects in, a list out.

An object is applied when it differs from what is there, which has two sides: a field that we set has another value now
(somebody edited it), or a field that we set before is no longer set by us. Comparing shows the first only, as defaults
and other people's fields are there too; a digest of what was applied, kept on the object, shows the second.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from octavo_operator import names
from octavo_operator.digest import digest
from octavo_operator.observed import Pod
from octavo_operator.quantity import parse_quantity

Object = dict[str, Any]


@dataclass(frozen=True)
class Changes:
    create: tuple[Object, ...] = ()
    update: tuple[Object, ...] = ()
    delete: tuple[Object, ...] = ()
    foreign: tuple[str, ...] = ()
    """Kinds whose object of our name belongs to somebody else. It is left alone, and a condition says so."""
    annotate: tuple[Object, ...] = ()
    """Pods, as far as we set them: annotations for Prometheus, and for the choice of pods to end."""


@dataclass(frozen=True)
class Altered:
    """An answer to an apply that is not what was applied: by a webhook, or by an API server that drops a field."""

    at: tuple[str, ...]
    """Where it differs."""
    wanted: str
    answered: str
    """Digests of both, by which it is known as the same."""

    @classmethod
    def read(cls, body: Object, answer: Object) -> Altered | None:
        at = tuple(differences(body, answer))
        return cls(at, digest(body), digest(_asked(answer))) if at else None

    def is_still_so(self, body: Object, present: Object) -> bool:
        return self.wanted == digest(body) and self.answered == digest(_asked(present))


def _asked(document: Object) -> Object:
    """Without what changes by itself: the status, and all metadata but labels and annotations."""
    marks = {name: document["metadata"].get(name) for name in ("labels", "annotations")}
    # Of a Deployment, its controller counts revisions in an annotation.
    notes = {k: v for k, v in (marks["annotations"] or {}).items() if not k.startswith("deployment.kubernetes.io/")}
    kept = {name: value for name, value in document.items() if name not in ("metadata", "status")}
    return {**kept, "labels": marks["labels"], "annotations": notes}


NOTHING_ALTERED: Mapping[str, Altered] = {}


def changes(
    owner_uid: str,
    desired: Iterable[Object],
    children: Mapping[str, Object],
    pods: Iterable[Pod],
    scrape: Mapping[str, str],
    namespace: str,
    costs: Mapping[str, int] | None = None,
    held: Collection[str] = (),
    altered: Mapping[str, Altered] = NOTHING_ALTERED,
) -> Changes:
    """children: by kind, the object with the server's name. scrape: annotations that the pods should carry.

    costs: by pod, what the Deployment's controller goes by when it chooses which pods end.
    held: kinds that are left as they are for now, made or not.
    altered: by kind, what the cluster made otherwise of what was applied. Asked for again, it would do so again.
    """
    create, update, delete, foreign = [], [], [], []
    wanted = {body["kind"]: with_digest(body) for body in desired}
    for kind, body in wanted.items():
        if kind in held:
            continue
        present = children.get(kind)
        if present is None:
            create.append(body)
        elif not may_be_applied(present, body, owner_uid):
            foreign.append(kind)
        elif differs(body, present) and not (kind in altered and altered[kind].is_still_so(body, present)):
            if kind == "Job":
                # What a Job does cannot be changed: another takes its place at the next look, when it is gone.
                delete.append(present)
            else:
                update.append(body)
    for kind, present in children.items():
        going = "deletionTimestamp" in present["metadata"]
        if kind not in wanted and _is_ours(present, owner_uid) and not going:
            delete.append(present)
    annotate = []
    for pod in pods:
        cost = (costs or {}).get(pod.name)
        marks = {**scrape, **({} if cost is None else {names.DELETION_COST_ANNOTATION: str(cost)})}
        if not pod.terminating and not pod.over and _needs_annotations(pod, marks):
            annotate.append(_annotations(pod, marks, namespace))
    return Changes(tuple(create), tuple(update), tuple(delete), tuple(foreign), tuple(annotate))


def may_be_applied(present: Object, body: Object, owner_uid: str) -> bool:
    """Whether what has the name of `body` is the server's, or nobody's and left to it."""
    return _is_ours(present, owner_uid) or _is_left_to_us(present, body)


def with_digest(body: Object) -> Object:
    metadata = body["metadata"]
    annotations = {**metadata.get("annotations", {}), names.APPLIED_ANNOTATION: digest(body)}
    return {**body, "metadata": {**metadata, "annotations": annotations}}


def differs(wanted: Any, present: Any) -> bool:
    """Whether `present` lacks something of `wanted`. What it has beside that is none of our business."""
    return next(differences(wanted, present), None) is not None


def differences(wanted: Any, present: Any, path: str = "") -> Iterator[str]:
    """Where `present` lacks something of `wanted`: spec.template.spec.volumes[models]."""
    if isinstance(wanted, Mapping):
        if isinstance(present, Mapping):
            for key, value in wanted.items():
                yield from differences(value, present.get(key), f"{path}.{key}" if path else str(key))
        elif wanted or present is not None:  # {} is as good as absent
            yield path
    elif isinstance(wanted, list):
        yield from _in_list(wanted, present if isinstance(present, list) else [], path)
    elif wanted != present and not _same_quantity(wanted, present):
        yield path


def _in_list(wanted: list[Any], present: list[Any], path: str) -> Iterator[str]:
    if wanted and all(isinstance(item, Mapping) and "name" in item for item in wanted):
        # A list by name, such as containers and volumes: a webhook may have added its own to it.
        there = {item["name"]: item for item in present if isinstance(item, Mapping) and "name" in item}
        for item in wanted:
            yield from differences(item, there.get(item["name"]), f"{path}[{item['name']}]")
    elif len(wanted) != len(present):
        yield path
    else:
        for number, (value, there) in enumerate(zip(wanted, present, strict=True)):
            yield from differences(value, there, f"{path}[{number}]")


def _same_quantity(wanted: Any, present: Any) -> bool:
    """1000m and 1 are one amount: the API server writes amounts in its own way."""
    try:
        return parse_quantity(wanted) == parse_quantity(present)
    except ValueError:
        return False


def _is_ours(present: Object, owner_uid: str) -> bool:
    owners = present["metadata"].get("ownerReferences", [])
    return any(owner.get("uid") == owner_uid and owner.get("controller") for owner in owners)


def _is_left_to_us(present: Object, body: Object) -> bool:
    """A claim that was made for a server of this name and retained: nobody owns it, and its labels say whose it was."""
    metadata, labels = present["metadata"], body["metadata"]["labels"]
    mine = (names.SERVER_LABEL, names.MANAGED_BY_LABEL)
    same = all((metadata.get("labels") or {}).get(name) == labels[name] for name in mine)
    return body["kind"] == "PersistentVolumeClaim" and same and not metadata.get("ownerReferences")


def _needs_annotations(pod: Pod, scrape: Mapping[str, str]) -> bool:
    if scrape:
        return any(pod.annotations.get(name) != value for name, value in scrape.items())
    return pod.annotated_by_us


def _annotations(pod: Pod, scrape: Mapping[str, str], namespace: str) -> Object:
    # With the uid, a pod that is gone by now is a conflict and not a new pod. Applying none takes ours away.
    metadata: Object = {"name": pod.name, "namespace": namespace, "uid": pod.uid}
    if scrape:
        metadata["annotations"] = dict(scrape)
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}
