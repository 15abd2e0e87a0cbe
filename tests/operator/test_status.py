"""What is told of a server: conditions, phase, message, pods, and what stays from the status before."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from build import EFFECTIVE, NOW, TICK, end, engine, pod, server

from octavo_engine.status import Failure, FailureCode, Load, Stage
from octavo_operator.announce import announcements
from octavo_operator.causes import About, Cause, Wanted
from octavo_operator.changes import Changes
from octavo_operator.conditions import View, conditions, conditions_of_invalid
from octavo_operator.observed import World
from octavo_operator.replicas import replicas
from octavo_operator.report import MAX_PODS, LastFailure, RevisionStatus
from octavo_operator.rollout import Decision
from octavo_operator.spec import Problem
from octavo_operator.status import as_document, same, status_of, status_of_invalid

WANTED = Wanted("nvidia.com/gpu", 1, None, None)
TOO_SMALL = Failure(FailureCode.KV_CACHE_TOO_SMALL, "Too small.", "set --max-model-len <= 9216").to_json()
RUNNING = {"running": True, "ip": "10.0.0.1"}


def view(pods=(), engines=None, *, causes=(), known=False, unannotated=None, silent_s=0.0, **spec: Any) -> View:
    answered = {one.name: TICK - silent_s for one in pods}
    world = World(pods=tuple(pods), engines=engines or {}, answered=answered)
    return View(server(**spec), replicas(world, WANTED, TICK), "r1", known, unannotated, tuple(causes))


def told(seen: View, previous: dict[str, Any] | None = None, now=NOW) -> dict[str, Any]:
    pods = [replica.pod for replica in seen.replicas]
    return as_document(status_of(seen, conditions(seen), pods, previous or {}, now))


def condition(seen: View, kind: str) -> tuple[str, str]:
    (found,) = [finding for finding in conditions(seen) if finding.type == kind]
    return found.status, found.reason


def ready(name: str = "qwen-1", **facts: Any):
    return pod(name, ready=True, **(RUNNING | facts))


LOADING = {"qwen-1": engine(Stage.LOADING_WEIGHTS, 61)}
SERVING = {"qwen-1": engine(Stage.READY, effective=EFFECTIVE)}
QUOTA = Cause(About.ADMISSION, "QuotaExceeded", "Exceeded quota.")
TAKEN = Cause(About.OBJECTS, "NameTaken", "A Service named qwen exists.")

# what is seen, then phase and the reasons of Ready, Progressing, Schedulable, ModelCached, Fits
TABLE: dict[str, tuple[View, str, str, str, str, str, str]] = {
    "nothing yet": (
        view(),
        "Pending", "False CreatingPods", "True Starting", "Unknown Waiting", "Unknown NotLookedYet",
        "Unknown NotPlannedYet",
    ),
    "waits for a node": (
        view([pod(node=None)]),
        "Pending", "False Pending", "True Starting", "Unknown Waiting", "Unknown NotLookedYet",
        "Unknown NotPlannedYet",
    ),
    "no node": (
        view([pod(node=None, unschedulable="0/1 nodes are available: 1 Insufficient nvidia.com/gpu.")]),
        "Pending", "False InsufficientGPU", "False InsufficientGPU", "False InsufficientGPU", "Unknown NotLookedYet",
        "Unknown NotPlannedYet",
    ),
    "being created": (
        view([pod(waiting="ContainerCreating")]),
        "Pending", "False Creating", "True Starting", "True Scheduled", "Unknown NotLookedYet",
        "Unknown NotPlannedYet",
    ),
    "just started": (
        view([pod(running=True, ip="10.0.0.1")]),
        "Loading", "False Starting", "True Starting", "True Scheduled", "Unknown NotLookedYet",
        "Unknown NotPlannedYet",
    ),
    "does not answer": (
        view([pod(**RUNNING)], silent_s=11),
        "Pending", "False Unreachable", "True Starting", "True Scheduled", "Unknown NotLookedYet",
        "Unknown NotPlannedYet",
    ),
    "downloading": (
        view([pod(**RUNNING)], {"qwen-1": engine(Stage.DOWNLOADING, 10)}),
        "Downloading", "False Downloading", "True Starting", "True Scheduled", "False Downloading",
        "Unknown NotPlannedYet",
    ),
    "loading": (
        view([pod(**RUNNING)], LOADING),
        "Loading", "False LoadingWeights", "True Starting", "True Scheduled", "True Downloaded",
        "Unknown NotPlannedYet",
    ),
    "loading from a claim": (
        view([pod(**RUNNING)], LOADING, model={"source": "pvc://models/x"}),
        "Loading", "False LoadingWeights", "True Starting", "True Scheduled", "True OnClaim",
        "Unknown NotPlannedYet",
    ),
    "ready before its probe": (
        view([pod(**RUNNING)], SERVING),
        "Loading", "False WaitingForProbe", "True Starting", "True Scheduled", "True Downloaded", "True Planned",
    ),
    "ready": (
        view([ready()], SERVING),
        "Ready", "True AllReplicasReady", "False Settled", "True Scheduled", "True Downloaded", "True Planned",
    ),
    "ready, and this look missed its engine": (
        view([ready()]),
        "Ready", "True AllReplicasReady", "False Settled", "True Scheduled", "True Downloaded",
        "Unknown NotPlannedYet",
    ),
    "one of two": (
        view([ready(), pod("qwen-2", waiting="ContainerCreating")], SERVING, replicas=2),
        "Ready", "True SomeReplicasReady", "True Starting", "True Scheduled", "True Downloaded", "True Planned",
    ),
    "one of two, the other crashed": (
        view([ready(), pod("qwen-2", waiting="CrashLoopBackOff", terminations=(end(1),))], SERVING, replicas=2),
        "Degraded", "True SomeReplicasReady", "False Exited", "True Scheduled", "True Downloaded", "True Planned",
    ),
    "crashed": (
        view([pod(waiting="CrashLoopBackOff", terminations=(end(41, TOO_SMALL),))]),
        "Failed", "False KvCacheTooSmall", "False KvCacheTooSmall", "True Scheduled", "Unknown NotLookedYet",
        "False KvCacheTooSmall",
    ),
    "crashed and trying again": (
        view([pod(**RUNNING, terminations=(end(41, TOO_SMALL),), restarts=1)], LOADING),
        "Loading", "False KvCacheTooSmall", "False KvCacheTooSmall", "True Scheduled", "True Downloaded",
        "False KvCacheTooSmall",
    ),
    "no such model": (
        view([pod(terminations=(end(20, Failure(FailureCode.MODEL_NOT_FOUND, "None.").to_json()),))]),
        "Failed", "False ModelNotFound", "False ModelNotFound", "True Scheduled", "False ModelNotFound",
        "Unknown NotPlannedYet",
    ),
    "killed for memory": (
        view([pod(terminations=(end(137, reason="OOMKilled"),))]),
        "Failed", "False OOMKilled", "False OOMKilled", "True Scheduled", "Unknown NotLookedYet", "False OOMKilled",
    ),
    "pods refused": (
        view(causes=[QUOTA]),
        "Pending", "False QuotaExceeded", "False QuotaExceeded", "False QuotaExceeded", "Unknown NotLookedYet",
        "Unknown NotPlannedYet",
    ),
    "a name taken": (
        view([ready()], SERVING, causes=[TAKEN]),
        "Failed", "False NameTaken", "False NameTaken", "True Scheduled", "True Downloaded", "True Planned",
    ),
    "suspended": (
        view(suspend=True),
        "Suspended", "False Suspended", "False Settled", "Unknown NoPods", "Unknown NoPods",
        "Unknown NoPods",
    ),
    "no replicas": (
        view(replicas=0),
        "Suspended", "False ScaledToZero", "False Settled", "Unknown NoPods", "Unknown NoPods",
        "Unknown NoPods",
    ),
    "draining": (
        view([pod(**RUNNING, terminating=True)], {"qwen-1": engine(Stage.DRAINING)}, suspend=True),
        "Draining", "False Suspended", "True ScalingDown", "Unknown NoPods", "True Downloaded",
        "Unknown NotPlannedYet",
    ),
    "rolling out": (
        view([ready(revision="r0"), pod("qwen-2", **RUNNING)], {**SERVING, "qwen-2": engine(Stage.LOADING_WEIGHTS, 5)}),
        "Ready", "True AllReplicasReady", "True RollingOut", "True Scheduled", "True Downloaded", "True Planned",
    ),
    "one too many": (
        view([ready(), ready("qwen-2")], SERVING),
        "Ready", "True AllReplicasReady", "True ScalingDown", "True Scheduled", "True Downloaded", "True Planned",
    ),
    "over": (
        view([pod(phase="Failed", reason="Evicted"), ready("qwen-2")]),
        "Ready", "True AllReplicasReady", "False Settled", "True Scheduled", "True Downloaded",
        "Unknown NotPlannedYet",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", TABLE.values(), ids=list(TABLE))
def test_the_conditions_follow_from_what_is_seen(row):
    seen, phase, *expected = row
    kinds = ("Ready", "Progressing", "Schedulable", "ModelCached", "Fits")

    assert [" ".join(condition(seen, kind)) for kind in kinds] == expected
    assert told(seen)["phase"] == phase


@pytest.mark.parametrize("row", TABLE.values(), ids=list(TABLE))
def test_every_condition_has_a_sentence_and_a_reason_that_the_api_takes(row):
    for found in conditions(row[0]):
        assert found.reason.isalnum(), found
        assert found.message, found
        assert found.message.endswith((".", "/v1.")), found
        assert found.message[0].isupper() or found.message[0].isdigit() or "/" in found.message, found


def test_the_message_says_how_far_the_pod_is_and_how_long_it_takes():
    seen = view(
        [ready(), pod("qwen-2", **RUNNING)], {**SERVING, "qwen-2": engine(Stage.LOADING_WEIGHTS, 61)}, replicas=2
    )

    assert told(seen)["message"] == (
        "1/2 ready. Pod qwen-2: loading weights 61 % (61.0 MiB of 100.0 MiB), about 40 s left."
    )


def test_a_pod_tells_percent_and_seconds_only_while_it_loads():
    (loading,) = told(view([pod(**RUNNING)], LOADING))["pods"]
    (serving,) = told(view([ready()], {"qwen-1": engine(Stage.READY, 100, load=Load(running=3, waiting=1))}))["pods"]

    assert (loading["stage"], loading["percent"], loading["etaSeconds"]) == ("loading_weights", 61, 40)
    assert (serving["stage"], serving["running"], serving["queued"]) == ("ready", 3, 1)
    assert "percent" not in serving
    assert "etaSeconds" not in serving


def test_at_most_so_many_pods_are_listed_with_the_troubled_ones_first():
    crashed = pod("zzz", terminations=(end(1),))
    document = told(view([*(ready(f"qwen-{n}") for n in range(40)), crashed], replicas=41))

    assert len(document["pods"]) == MAX_PODS
    assert document["pods"][0]["name"] == "zzz"
    assert (document["replicas"], document["readyReplicas"], document["ready"]) == (41, 40, "40/41")


def test_configuration_and_plan_are_the_engines_and_of_the_newest_spec():
    import dataclasses

    old = dataclasses.replace(EFFECTIVE, max_model_len=999)
    pods = [ready(revision="r0"), ready("qwen-2", revision="r1")]
    engines = {"qwen-1": engine(Stage.READY, effective=old), "qwen-2": engine(Stage.READY, effective=EFFECTIVE)}
    document = told(view(pods, engines))

    assert document["engine"]["maxModelLen"] == 2048
    assert document["plan"] == {
        "weights": "538.0 MiB",
        "kvCache": "1.0 GiB",
        "kvTokens": 6400,
        "maxConcurrency": "3.1",
        "source": "engine",
    }


def test_configuration_stays_while_an_engine_starts_again_and_goes_with_a_new_spec():
    before = told(view([ready()], SERVING))
    again = told(view([pod(**RUNNING)], LOADING), before)
    other_spec = told(view([pod(**RUNNING)], LOADING), before | {"observedGeneration": 2})
    suspended = told(view(suspend=True), before)

    assert again["engine"] == before["engine"]
    assert "engine" not in other_spec
    assert "engine" not in suspended


def test_what_the_cluster_keeps_otherwise_is_told_of_a_server_that_serves():
    seen = replace(view([ready()], SERVING), altered=(("Deployment", "spec.template.spec.containers[engine].image"),))
    (found,) = [finding for finding in conditions(seen) if finding.type == "Progressing"]

    assert (found.status, found.reason, found.trouble) == ("False", "KeptOtherwise", True)
    assert "keeps the Deployment at spec.template.spec.containers[engine].image otherwise" in found.message
    assert condition(seen, "Ready") == ("True", "AllReplicasReady")


def test_a_field_that_does_nothing_is_told_of_a_server_that_serves():
    idle = server(autoscaling={"maxReplicas": 2, "idleSeconds": 60})
    seen = replace(view([ready()], SERVING), server=idle)
    (found,) = [finding for finding in conditions(seen) if finding.type == "Progressing"]

    assert (found.status, found.reason, found.trouble) == ("False", "WithoutEffect", True)
    assert found.message == (
        "Everything is as specified, and some of it does nothing: autoscaling.idleSeconds is for servers that may go "
        "to zero: set autoscaling.minReplicas to 0, or remove idleSeconds."
    )
    assert condition(seen, "Ready") == ("True", "AllReplicasReady")


def test_an_autoscaler_that_does_nothing_is_told_of_a_server_that_serves_and_makes_no_event():
    seen = replace(view([ready()], SERVING), not_scaling="autoscaling.mode HPA does not scale the server. No.")
    (found,) = [finding for finding in conditions(seen) if finding.type == "Progressing"]

    assert (found.status, found.reason, found.trouble) == ("False", "NotScaling", False)
    assert "does not scale" in found.message


def test_a_server_without_its_ingress_says_that_its_pods_serve_all_the_same():
    refused = Cause(About.OBJECTS, "HostnameRefused", "Not that name.")
    serving = replace(view([ready()], SERVING), causes=(refused,))
    loading = replace(view([pod()], {}), causes=(refused,))

    assert condition(serving, "Ready") == ("False", "HostnameRefused")
    assert conditions(serving)[0].message == "Not that name. Meanwhile 1/1 ready at http://qwen.default.svc/v1."
    assert conditions(loading)[0].message == "Not that name."


def test_what_was_verified_before_is_not_said_to_have_never_been_ready():
    """Of a server that sleeps, and of one whose pod has lost its node, it said that no engine was ready yet."""
    report = RevisionStatus(current="r1", verified="r1")
    decision = Decision({}, "r1", report)
    asleep = replace(view(replicas=0), rollout=decision)
    away = replace(view([pod(running=True)], {}), rollout=decision)

    assert condition(asleep, "Verified") == condition(away, "Verified") == ("True", "Generated")
    assert condition(asleep, "ModelCached") == condition(asleep, "Fits") == ("Unknown", "NoPods")
    assert condition(view(replicas=0), "Verified") == ("Unknown", "NotGeneratedYet")


def test_an_event_tells_a_failure_in_sentences():
    failure = LastFailure(pod="qwen-1", code="OOM_KILLED", message="The kernel killed it", fix="raise the limit")
    (told_,) = [a for a in announcements(conditions(view()), failure, Changes(), {}) if a.reason == "OOMKilled"]

    assert told_.message == "Pod qwen-1: The kernel killed it. Fix: raise the limit."


def test_the_gpus_of_each_pod_are_told():
    assert told(view([ready()], SERVING, hardware={"gpus": 1}))["gpus"] == 1


def test_what_new_pods_were_asked_is_told_when_one_has_answered():
    asked = view([ready()], SERVING, rollout={"verify": {"prompt": "2+2=", "expect": "4"}})
    (found,) = [finding for finding in conditions(asked) if finding.type == "Verified"]

    assert (found.status, found.reason) == ("True", "Answered")
    assert found.message == "An engine of revision r1 answered rollout.verify with '4' in it."
    failed = Decision({}, "r1", RevisionStatus(current="r1", failed="r2", reason="Its answer lacks '4'."), "failed")
    assert condition(replace(asked, rollout=failed), "Verified") == ("True", "Generated")


def test_a_restart_is_told_when_it_is_done_and_the_one_before_stays_until_then():
    asked = {"restart": {"id": "tuesday"}}
    before = {"restart": {"id": "monday"}}
    old, new = ready(revision="r0"), ready("qwen-2")

    assert told(view([old], SERVING, **asked), before)["restart"] == {"id": "monday"}
    assert told(view([new], {"qwen-2": engine(Stage.READY)}, **asked), before)["restart"] == {"id": "tuesday"}
    assert told(view([new]), before)["restart"] == {"id": "monday"}
    assert "restart" not in told(view([new]))


def test_a_restart_that_was_rolled_back_is_not_done():
    seen = view([ready()], SERVING, restart={"id": "tuesday"})
    failed = Decision({}, "r1", RevisionStatus(current="r1", failed="r2", reason="It does not come up."), "failed")

    assert "restart" not in told(replace(seen, rollout=failed))


def test_a_condition_keeps_its_time_until_its_status_changes():
    later = NOW + timedelta(minutes=5)
    first = told(view([pod(waiting="ContainerCreating")]))
    second = told(view([pod(**RUNNING)], LOADING), first, later)
    third = told(view([ready()], SERVING), second, later)

    def time_of(document: dict[str, Any]) -> str:
        (found,) = [c for c in document["conditions"] if c["type"] == "Ready"]
        return str(found["lastTransitionTime"])

    assert time_of(first) == time_of(second) == "2026-01-01T00:01:00Z"
    assert time_of(third) == "2026-01-01T00:06:00Z"


def test_the_same_world_gives_the_same_status_whatever_time_it_is():
    first = told(view([ready()], SERVING))
    second = told(view([ready()], SERVING), first, NOW + timedelta(hours=1))

    assert same(second, first)


def test_lists_by_key_may_come_back_in_another_order():
    first = told(view([ready(), ready("qwen-2")], replicas=2))
    shuffled = first | {"pods": first["pods"][::-1], "conditions": first["conditions"][::-1]}

    assert same(first, shuffled)
    assert not same(first, shuffled | {"phase": "Pending"})
    assert not same(first, {})


def test_the_last_failure_outlives_the_pod_that_it_happened_in():
    before = told(view([pod(terminations=(end(41, TOO_SMALL, at=3),))]))
    after = told(view([ready("qwen-2")]), before)

    assert after["lastFailure"] == before["lastFailure"]
    assert after["lastFailure"] == {
        "time": "2026-01-01T00:00:03Z",
        "pod": "qwen-1",
        "code": "KV_CACHE_TOO_SMALL",
        "message": "Too small.",
        "fix": "set spec.engine.maxModelLen <= 9216",
    }


def test_a_status_of_another_version_is_no_obstacle():
    document = told(view([ready()]), {"lastFailure": {"new": 1}, "engine": "text", "conditions": []})

    assert "lastFailure" not in document


def test_an_invalid_spec_is_told_and_pods_before_it_go_on():
    serving = replicas(World(pods=(ready(),)), WANTED, TICK)
    findings = conditions_of_invalid([Problem("spec.x", "got 1, expected 2")], 1)
    before = told(view([ready()], SERVING))
    document = as_document(status_of_invalid("qwen", 4, findings, serving, before, NOW))

    assert (document["phase"], document["observedGeneration"], document["readyReplicas"]) == ("Failed", 4, 1)
    assert document["message"] == "spec.x: got 1, expected 2. Still serving: 1 pod of the specification before it."
    assert {c["status"] for c in document["conditions"]} == {"False", "Unknown"}


@pytest.mark.parametrize(
    ("seen", "status", "reason"),
    [
        (view(known=True), "True", "PodMonitor"),
        (view(), "True", "ScrapeAnnotations"),
        (view(unannotated="forbidden"), "False", "AnnotationRefused"),
        (view(observability={"podMonitor": "Enabled"}), "False", "PodMonitorKindMissing"),
        (view(observability={"podMonitor": "Enabled"}, known=True), "True", "PodMonitor"),
        (view(observability={"podMonitor": "Disabled"}, known=True), "False", "Disabled"),
    ],
)
def test_how_prometheus_finds_the_pods_is_a_condition(seen, status, reason):
    assert condition(seen, "MonitoringReady") == (status, reason)


def events(seen: View, previous: dict[str, Any], changes: Changes | None = None) -> list[tuple[str, str]]:
    pods = [replica.pod for replica in seen.replicas]
    findings = conditions(seen)
    new = status_of(seen, findings, pods, previous, NOW)
    return [(e.type, e.reason) for e in announcements(findings, new.last_failure, changes or Changes(), previous)]


CRASHED = view([pod(waiting="CrashLoopBackOff", terminations=(end(41, TOO_SMALL, at=1),))])
CRASHED_AGAIN = view([pod(waiting="CrashLoopBackOff", terminations=(end(41, TOO_SMALL, at=9),))])
UNSCHEDULED = TABLE["no node"][0]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (None, view(), []),
        (view(), view([pod(**RUNNING)], LOADING), []),
        (view([pod(**RUNNING)], LOADING), view([ready()], SERVING), [("Normal", "Ready")]),
        (view([ready()], SERVING), view([ready()], SERVING), []),
        (view(), UNSCHEDULED, [("Warning", "InsufficientGPU")]),
        (UNSCHEDULED, UNSCHEDULED, []),
        (view(), CRASHED, [("Warning", "KvCacheTooSmall")]),
        (CRASHED, CRASHED, []),
        (CRASHED, CRASHED_AGAIN, []),
        (view([ready()], SERVING), CRASHED, [("Warning", "KvCacheTooSmall")]),
        (CRASHED, view([ready()], SERVING), [("Normal", "Ready")]),
        (view([ready()], SERVING), view(suspend=True), [("Normal", "NotReady")]),
        (view([ready()], SERVING), view([pod(**RUNNING)], LOADING), [("Normal", "NotReady")]),
        (view(), view(causes=[TAKEN]), [("Warning", "NameTaken")]),
    ],
)
def test_a_transition_is_told_once(before, after, expected):
    assert events(after, told(before) if before else {}) == expected


def test_what_was_done_is_told():
    made = Changes(create=({"kind": "Deployment"}, {"kind": "Service"}), delete=({"kind": "PodMonitor"},))

    assert events(view(), {}, made) == [("Normal", "Created"), ("Normal", "Deleted")]
