"""What is applied, deleted and left alone."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
from build import pod, server

from octavo_operator import names
from octavo_operator.changes import Altered, changes, differences, differs, with_digest
from octavo_operator.desired import objects
from octavo_operator.desired.monitoring import SCRAPE_ANNOTATIONS
from octavo_operator.prefetch import waits
from octavo_operator.settings import EngineDefaults

OURS = "uid-server"


def desired(**spec: Any) -> list[dict[str, Any]]:
    return objects(server(**spec), EngineDefaults(), pod_monitors_known=spec.get("monitors", False))


def applied(bodies: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The children as they are after an apply: with what others add."""
    found = {}
    for body in bodies:
        child = copy.deepcopy(with_digest(body))
        child["metadata"] |= {"uid": f"uid-{body['kind']}", "resourceVersion": "1"}
        child["status"] = {"x": 1}
        found[body["kind"]] = child
    return found


def decide(bodies, children, pods=(), scrape=None):
    return changes(OURS, bodies, children, pods, scrape or {}, "default")


def test_what_is_missing_is_created_and_a_second_look_finds_nothing_to_do():
    first = decide(desired(), {})
    second = decide(desired(), applied(desired()))

    assert [body["kind"] for body in first.create] == ["Deployment", "Service", "PodDisruptionBudget"]
    assert second == type(second)()


def test_a_changed_field_updates_only_its_object():
    todo = decide(desired(engine={"maxModelLen": 99}), applied(desired()))

    assert [body["kind"] for body in todo.update] == ["Deployment"]


def test_a_field_taken_away_is_seen_by_the_digest_alone():
    before = desired(hardware={"gpus": 0, "nodeSelector": {"a": "b"}})
    present = applied(before)
    todo = decide(desired(), present)

    # Every field that is wanted is there: comparing would see nothing.
    body = todo.update[0]
    spec = {**body["spec"], "template": present["Deployment"]["spec"]["template"]}
    assert not differs(spec, present["Deployment"]["spec"])
    assert [body["kind"] for body in todo.update] == ["Deployment"]


def test_an_edit_by_somebody_else_is_seen_by_comparing_alone():
    present = applied(desired())
    present["Service"]["spec"]["selector"] = {"octavo.dev/server": "other"}

    assert [body["kind"] for body in decide(desired(), present).update] == ["Service"]


def test_what_is_no_longer_wanted_is_deleted_and_only_if_it_is_ours():
    children = applied(desired())
    monitor = {
        "kind": "PodMonitor",
        "metadata": {"name": "qwen", "ownerReferences": [{"uid": OURS, "controller": True}]},
    }
    theirs = {"kind": "PodMonitor", "metadata": {"name": "qwen", "ownerReferences": [{"uid": "x", "controller": True}]}}
    going = {**monitor, "metadata": {**monitor["metadata"], "deletionTimestamp": "x"}}

    assert decide(desired(), {**children, "PodMonitor": monitor}).delete == (monitor,)
    assert decide(desired(), {**children, "PodMonitor": theirs}).delete == ()
    assert decide(desired(), {**children, "PodMonitor": going}).delete == ()


@pytest.mark.parametrize("owners", [[], [{"uid": "x", "controller": True}], [{"uid": OURS, "controller": False}]])
def test_an_object_of_somebody_else_is_never_taken_over(owners):
    children = applied(desired())
    children["Service"]["metadata"]["ownerReferences"] = owners
    todo = decide(desired(engine={"maxModelLen": 99}), children)

    assert todo.foreign == ("Service",)
    assert [body["kind"] for body in todo.update] == ["Deployment"]


@pytest.mark.parametrize(
    ("wanted", "present", "differ"),
    [
        (1, 1, False),
        (1, 2, True),
        ("1000m", "1", False),
        ("1Gi", "1024Mi", False),
        ("1Gi", "1G", True),
        ({}, None, False),
        ({"a": {}}, {"a": {"b": 1}}, False),
        ({"a": None}, {}, False),
        ({"a": None}, {"a": {"b": 1}}, True),
        ({"a": 1}, None, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ([1, 2], [1, 2], False),
        ([1, 2], [2, 1], True),
        ([1], [1, 2], True),
        ([], None, False),
        ([{"name": "a", "x": 1}], [{"name": "sidecar"}, {"name": "a", "x": 1, "y": 2}], False),
        ([{"name": "a", "x": 1}], [{"name": "b", "x": 1}], True),
        ([{"port": 1}], [{"port": 1, "protocol": "TCP"}], False),
        (False, None, True),
        ("true", True, True),
    ],
)
def test_only_what_is_wanted_is_compared(wanted, present, differ):
    assert differs(wanted, present) is differ


@pytest.mark.parametrize(
    ("wanted", "present", "at"),
    [
        ({"a": {"b": [{"name": "x", "c": 1}]}}, {"a": {"b": [{"name": "x", "c": 2}]}}, "a.b[x].c"),
        ({"a": [{"b": 1}, {"b": 2}]}, {"a": [{"b": 1}, {"b": 3}]}, "a[1].b"),
        ({"a": [{"name": "x", "image": {}}]}, {"a": []}, "a[x]"),
        ({"a": 1, "b": 2}, {"a": 1, "b": 2}, None),
    ],
)
def test_where_it_differs_is_told_as_people_write_it(wanted, present, at):
    assert next(differences(wanted, present), None) == at


def test_what_the_cluster_makes_otherwise_is_not_asked_for_again_until_something_changes():
    """A webhook that puts a mirror's address before images: asking again would go on for ever, each second."""
    bodies = desired()
    body = with_digest(bodies[0])
    answer = copy.deepcopy(body)
    answer["spec"]["template"]["spec"]["containers"][0]["image"] = "mirror/x"
    answer["metadata"]["annotations"]["deployment.kubernetes.io/revision"] = "2"
    altered = Altered.read(body, answer)
    assert altered is not None

    def updates(present: dict[str, Any], wanted: list[dict[str, Any]]) -> list[str]:
        known = {"Deployment": altered}
        todo = changes(OURS, wanted, {"Deployment": present}, [], {}, "default", altered=known)
        return [one["kind"] for one in todo.update]

    edited = copy.deepcopy(answer)
    edited["spec"]["replicas"] = 7
    again = copy.deepcopy(answer) | {"status": {"replicas": 1}}
    again["metadata"] |= {"resourceVersion": "9", "annotations": {**answer["metadata"]["annotations"]}}
    again["metadata"]["annotations"]["deployment.kubernetes.io/revision"] = "3"
    assert altered.at == ("spec.template.spec.containers[engine].image",)
    assert updates(again, bodies) == []
    assert updates(edited, bodies) == ["Deployment"]
    assert updates(answer, desired(replicas=5)) == ["Deployment"]


def test_what_others_add_never_counts_and_what_they_change_always_does():
    rng = random.Random(7)
    for _ in range(300):
        wanted = desired(replicas=rng.randrange(5))[0]
        present = copy.deepcopy(wanted)
        _add_fields(present, rng)
        assert not differs(wanted, present)
        path = _change_one(present, wanted, rng)
        assert differs(wanted, present), path


def _add_fields(node: Any, rng: random.Random) -> None:
    if isinstance(node, dict):
        for value in node.values():
            _add_fields(value, rng)
        if rng.random() < 0.5:
            node["added-by-others"] = rng.randrange(9)
    elif isinstance(node, list):
        for value in node:
            _add_fields(value, rng)


def _change_one(present: Any, wanted: Any, rng: random.Random) -> str:
    """Changes a random leaf of `present` that `wanted` has too."""
    if isinstance(wanted, dict):
        names_ = [key for key, value in wanted.items() if value not in ({}, [], None)]
        key: Any = rng.choice([name for name in names_ if name != "name"] or names_)
    else:
        key = rng.randrange(len(wanted))
    if isinstance(wanted[key], (dict, list)) and wanted[key]:
        return f"{key}." + _change_one(present[key], wanted[key], rng)
    present[key] = "changed"
    return str(key)


def test_pods_are_annotated_once_and_set_free_when_a_pod_monitor_does_the_work():
    bare = pod("bare")
    done = pod("done", annotations=SCRAPE_ANNOTATIONS, annotated_by_us=True)
    others = pod("others", annotations={"prometheus.io/scrape": "true"})
    ending = pod("ending", terminating=True)
    wanted = decide(desired(), applied(desired()), [bare, done, ending], SCRAPE_ANNOTATIONS).annotate
    unwanted = decide(desired(), applied(desired()), [bare, done, others], {}).annotate

    assert [body["metadata"]["name"] for body in wanted] == ["bare"]
    assert wanted[0]["metadata"]["uid"] == bare.uid
    assert wanted[0]["metadata"]["annotations"] == SCRAPE_ANNOTATIONS
    assert [body["metadata"]["name"] for body in unwanted] == ["done"]
    assert "annotations" not in unwanted[0]["metadata"]


def test_the_digest_is_on_every_child_and_depends_on_content_alone():
    one, two = with_digest(desired()[0]), with_digest(desired()[0])

    assert one == two
    assert names.APPLIED_ANNOTATION in one["metadata"]["annotations"]
    assert with_digest(desired(replicas=2)[0])["metadata"]["annotations"] != one["metadata"]["annotations"]


SHARED = {"mode": "Shared", "size": "2Gi", "prefetch": True}


def test_a_job_of_another_model_is_deleted_and_made_at_the_next_look():
    present = applied(desired(cache=SHARED))
    todo = decide(desired(cache=SHARED, model={"source": "hf://o/n", "revision": "v2"}), present)
    del present["Job"]
    then = decide(desired(cache=SHARED, model={"source": "hf://o/n", "revision": "v2"}), present)

    assert [body["kind"] for body in todo.delete] == ["Job"]
    assert [body["kind"] for body in todo.create] == []
    assert [body["kind"] for body in then.create] == ["Job"]


def test_what_is_held_is_neither_made_nor_changed_nor_deleted():
    present = applied(desired(cache=SHARED))
    bodies = desired(cache=SHARED, engine={"maxNumSeqs": 7})

    def decide_held(children):
        return changes(OURS, bodies, children, (), {}, "default", held={"Deployment"})

    assert decide_held(present) == type(decide_held(present))()
    assert "Deployment" not in [body["kind"] for body in decide_held({}).create]


def test_a_retained_claim_without_an_owner_is_taken_again_and_never_deleted():
    retained = {"mode": "Shared", "size": "2Gi", "deletionPolicy": "Retain"}
    present = applied(desired(cache=retained))
    bigger = decide(desired(cache={**retained, "size": "3Gi"}), present)
    without = decide(desired(), present)
    present["PersistentVolumeClaim"]["metadata"]["labels"] = {}
    foreign = decide(desired(cache=retained), present)

    assert [body["kind"] for body in bigger.update if body["kind"] != "Deployment"] == ["PersistentVolumeClaim"]
    assert without.delete == ()
    assert foreign.foreign == ("PersistentVolumeClaim",)


@pytest.mark.parametrize(
    ("job", "waiting"),
    [
        (None, True),
        ({}, True),
        ({"conditions": [{"type": "Failed", "status": "True"}]}, True),
        ({"conditions": [{"type": "Complete", "status": "True"}]}, False),
    ],
)
def test_pods_wait_for_the_job_of_their_own_spec_alone(job, waiting):
    bodies = desired(cache=SHARED)
    children = applied(bodies)
    children["Job"]["status"] = job or {}
    if job is None:
        del children["Job"]

    assert waits(bodies, children) is waiting
    assert waits(desired(cache=SHARED, model={"source": "hf://o/other"}), children)
    assert not waits(desired(), children)
