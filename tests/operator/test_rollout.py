"""What becomes of a new pod template: a table of worlds, and what is decided in each."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from build import NOW, engine, pod

from octavo_engine.status import Load, Stage
from octavo_operator import names
from octavo_operator.causes import About, Cause
from octavo_operator.desired.deployment import deployment, revision
from octavo_operator.observed import write_time
from octavo_operator.replicas import Replica
from octavo_operator.report import RevisionStatus
from octavo_operator.rollout import Decision, decide, deletion_costs, put_back
from octavo_operator.settings import EngineDefaults
from octavo_operator.spec import Server, parse

NO_ROOM = Cause(About.SCHEDULING, "InsufficientGPU", "1 of 1 node has no nvidia.com/gpu free.")


def server(length: int = 2048, replicas: int = 1, gpus: int = 1, **rollout: Any) -> Server:
    body = {
        "model": {"source": "hf://org/name"},
        "engine": {"maxModelLen": length},
        "hardware": {"gpus": gpus},
        "replicas": replicas,
        "rollout": rollout,
    }
    metadata = {"name": "qwen", "namespace": "default", "uid": "uid-server", "generation": 3}
    parsed = parse({"metadata": metadata, "spec": body})
    assert isinstance(parsed, Server), parsed
    return parsed


OLD = deployment(server(1024), EngineDefaults())
OLD_REVISION = revision(OLD)


def new(of: Server, image: str = EngineDefaults.image) -> dict[str, Any]:
    return deployment(of, EngineDefaults(image=image))


def replica(of: str, name: str = "qwen-old", *, ready: bool = True, load: Load | None = None, **facts: Any) -> Replica:
    cause = facts.pop("cause", None)
    made = pod(name, revision=of, ready=ready, **facts)
    stage = Stage.READY if ready else Stage.LOADING_WEIGHTS
    return Replica(made, stage.value, engine(stage, load=load), cause)


def decided(of: Server, wanted: dict[str, Any], found: list[Replica], **more: Any) -> Decision:
    facts: dict[str, Any] = {"present": OLD, "before": None, "refused": None, "now": NOW, "tick": 0.0} | more
    return decide(of, wanted, found=found, **facts)


def test_the_first_deployment_is_made_as_wanted():
    of = server()
    decision = decided(of, new(of), [], present=None)

    assert decision.deployment == new(of)
    assert decision.held is None


def test_a_changed_spec_is_rolled_out_by_surge():
    of = server()
    decision = decided(of, new(of), [replica(OLD_REVISION)])

    assert decision.revision == revision(new(of))
    assert decision.deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert decision.report.verified == OLD_REVISION


def test_a_change_that_came_with_the_operator_is_held_back_and_leaves_the_template_alone():
    of = server(1024)
    decision = decided(of, new(of, "octavo/engine:next"), [replica(OLD_REVISION)])

    assert decision.held == "update"
    assert decision.deployment["spec"]["template"] == OLD["spec"]["template"]
    assert decision.revision == OLD_REVISION


def test_what_the_operator_brings_goes_out_with_the_next_change_of_the_spec_or_by_policy():
    changed, always = server(2048), server(1024, updatePolicy="Always")
    by_change = decided(changed, new(changed, "octavo/engine:next"), [replica(OLD_REVISION)])
    by_policy = decided(always, new(always, "octavo/engine:next"), [replica(OLD_REVISION)])

    assert (by_change.held, by_policy.held) == (None, None)


def test_without_pods_nothing_is_restarted_so_nothing_is_held_back():
    of = server(1024)

    assert decided(of, new(of, "octavo/engine:next"), []).held is None


def test_replicas_and_rollout_settings_are_no_reason_to_take_the_operators_changes_along():
    of = server(1024, replicas=3, strategy="InPlace")
    decision = decided(of, new(of, "octavo/engine:next"), [replica(OLD_REVISION)])

    assert decision.held == "update"
    assert decision.deployment["spec"]["replicas"] == 3
    assert decision.deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0


@pytest.mark.parametrize(("age_s", "kind"), [(5, "Surge"), (11, "InPlace")])
def test_a_surge_that_finds_no_room_is_gone_on_with_in_place_after_a_while(age_s, kind):
    of = server()
    wanted = new(of)
    fresh = replica(revision(wanted), "qwen-new", ready=False, node=None, unschedulable="0/1 nodes", cause=NO_ROOM)
    before = RevisionStatus(current=revision(wanted), strategy="Surge", verified=OLD_REVISION)
    decision = decided(of, wanted, [replica(OLD_REVISION), fresh], present=wanted, before=before, tick=age_s)

    assert decision.report.strategy == kind
    if kind == "InPlace":
        assert "no nvidia.com/gpu free" in (decision.report.reason or "")


def test_in_place_stays_in_place_for_the_whole_rollout_and_the_next_one_surges_again():
    of, next_one = server(), server(4096)
    wanted = new(of)
    before = RevisionStatus(current=revision(wanted), strategy="InPlace", reason="no room")
    during = decided(of, wanted, [replica(revision(wanted))], present=wanted, before=before)
    after = decided(next_one, new(next_one), [replica(revision(wanted))], present=wanted, before=before)

    assert (during.report.strategy, during.report.reason) == ("InPlace", "no room")
    assert after.report.strategy == "Surge"


def test_a_quota_that_refuses_one_more_pod_is_no_room_either():
    of = server()
    wanted = new(of)
    before = RevisionStatus(current=revision(wanted), strategy="Surge")
    decision = decided(
        of, wanted, [replica(OLD_REVISION)], present=wanted, before=before, refused="exceeded quota: small"
    )

    assert decision.report.strategy == "InPlace"
    assert "exceeded quota" in (decision.report.reason or "")


def test_idle_is_waited_for_with_the_queue_and_not_for_ever():
    of = server(waitForIdle=True, idleTimeoutSeconds=60)
    queued = [replica(OLD_REVISION, load=Load(running=0, waiting=2))]
    waits = decided(of, new(of), queued)
    before = RevisionStatus(waiting_since=write_time(NOW))
    over = decided(of, new(of), queued, before=before, waited_s=61)
    idle = decided(of, new(of), [replica(OLD_REVISION)], before=before)

    assert waits.held == "idle"
    assert waits.report.waiting_since == write_time(NOW)
    assert waits.deployment["metadata"]["annotations"][names.ASKED_ANNOTATION] != of.asked
    assert (over.held, idle.held) == (None, None)


def marked(mark: str | None) -> dict[str, Any]:
    """The present Deployment, with a mark by another version's rule or without one."""
    annotations = {} if mark is None else {names.ASKED_ANNOTATION: mark}
    return {**OLD, "metadata": {**OLD["metadata"], "annotations": annotations}}


@pytest.mark.parametrize("mark", ["04a99fae98", "r0.04a99fae98", None])
def test_another_versions_mark_holds_the_template_unless_the_spec_has_changed_since(mark):
    of = server(1024)
    wanted = new(of, "octavo/engine:next")
    upgraded = decided(of, wanted, [replica(OLD_REVISION)], present=marked(mark), seen_generation=of.generation)
    changed = decided(of, wanted, [replica(OLD_REVISION)], present=marked(mark), seen_generation=of.generation - 1)
    busy = [replica(OLD_REVISION, load=Load(running=1))]
    waits = server(1024, waitForIdle=True)
    later = {"present": marked(mark), "seen_generation": waits.generation - 1}
    held = decided(waits, new(waits, "octavo/engine:next"), busy, **later)
    again = decided(waits, new(waits, "octavo/engine:next"), busy, present=held.deployment, seen_generation=3)

    assert upgraded.held == "update"
    assert upgraded.deployment["spec"]["template"] == OLD["spec"]["template"]
    assert upgraded.deployment["metadata"]["annotations"][names.ASKED_ANNOTATION] == of.asked
    assert (changed.held, changed.deployment["spec"]["template"]) == (None, wanted["spec"]["template"])
    # What was asked for is not forgotten while it waits.
    assert (held.held, again.held) == ("idle", "idle")


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_clock_that_jumps_decides_nothing(hours):
    of = server(waitForIdle=True, idleTimeoutSeconds=60)
    wanted = new(of)
    now = NOW + timedelta(hours=hours)
    queued = [replica(OLD_REVISION, load=Load(running=1))]
    held = decided(of, wanted, queued, before=RevisionStatus(waiting_since=write_time(NOW)), now=now, waited_s=2)
    fresh = replica(revision(wanted), "qwen-new", ready=False, node=None, unschedulable="0/1 nodes", cause=NO_ROOM)
    before = RevisionStatus(current=revision(wanted), strategy="Surge", verified=OLD_REVISION)
    surge = decided(of, wanted, [*queued, fresh], present=wanted, before=before, now=now, tick=2)

    assert (held.held, held.report.waiting_since) == ("idle", write_time(NOW))
    assert surge.report.strategy == "Surge"


def crashing(of: str, restarts: int) -> Replica:
    cause = Cause(About.CRASH, "KvCacheTooSmall", "The KV cache is too small.", "KV_CACHE_TOO_SMALL")
    return replica(of, "qwen-new", ready=False, restarts=restarts, cause=cause)


def test_a_revision_that_fails_again_is_rolled_back_to_the_one_that_worked_and_stays_so():
    of = server()
    wanted = new(of)
    failed = revision(wanted)
    before = RevisionStatus(current=failed, verified=OLD_REVISION, strategy="Surge")
    found = [replica(OLD_REVISION), crashing(failed, 2)]
    once = decided(of, wanted, [found[0], crashing(failed, 1)], present=wanted, before=before)
    decision = decided(of, wanted, found, present=wanted, before=before)
    template = {**OLD["spec"]["template"]}
    template["metadata"] = {
        **template["metadata"],
        "labels": {**template["metadata"]["labels"], "pod-template-hash": "x"},
    }
    back = put_back(decision, template)
    later = decided(of, wanted, [replica(OLD_REVISION)], present=back.deployment, before=back.report)

    assert once.held is None
    assert (decision.held, decision.restore) == ("failed", OLD_REVISION)
    assert back.deployment["spec"]["template"] == OLD["spec"]["template"]
    assert back.revision == OLD_REVISION
    assert "KV cache is too small" in (back.report.reason or "")
    assert (later.held, later.restore, later.report.failed) == ("failed", None, failed)
    assert later.report.reason == back.report.reason


def test_after_a_rollback_another_spec_is_tried():
    of, corrected = server(), server(512)
    before = RevisionStatus(current=OLD_REVISION, verified=OLD_REVISION, failed=revision(new(of)), reason="why")
    decision = decided(corrected, new(corrected), [replica(OLD_REVISION)], before=before)

    assert decision.held is None
    assert decision.report.failed is None


def test_there_is_no_way_back_from_the_first_revision_or_where_it_is_not_wanted():
    of, never = server(), server(rollback="Never")
    for one, verified in ((of, None), (of, revision(new(of))), (never, OLD_REVISION)):
        wanted = new(one)
        before = RevisionStatus(current=revision(wanted), verified=verified)

        assert decided(one, wanted, [crashing(revision(wanted), 5)], present=wanted, before=before).held is None


def test_before_a_scale_down_the_pods_cost_what_they_do():
    busy = replica(OLD_REVISION, "a", load=Load(running=3, waiting=1))
    idle = replica(OLD_REVISION, "b")
    present = {"spec": {"replicas": 2}}

    assert deletion_costs([busy, idle], present, 1) == {"a": 4, "b": 0}
    assert deletion_costs([busy, idle], present, 2) == {}
