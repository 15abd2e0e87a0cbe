"""The operator behind an API server that fails: what it lost is found, what it began is ended, once."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import sys
import time
from pathlib import Path

import pytest
from stage import CHILDREN, Faults, says, wait_for

from octavo_engine.status import Load, Stage

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_watch_that_goes_deaf_is_noticed_and_the_operator_starts_anew(stage, cluster, start):
    faults = Faults(cluster, 18200)
    running = start("deaf", 18100, server=faults.url, OCTAVO_RESYNC_SECONDS="3")
    running.wait_leading()
    stage.serve()
    stage.wait_pods(1)
    faults.do(deaf=["services"])
    began = time.monotonic()
    stage.delete("services", "qwen")
    wait_for(lambda: stage.get("services", "qwen"), "the Service again, though no watch told that it was gone")
    found_s = time.monotonic() - began

    # A second loss in a row is no accident.
    def ended():
        stage.delete("services", "qwen")
        return running.process.poll() is not None

    wait_for(ended, "its end", every_s=0.5)
    faults.do()
    again = start("deaf", 18101, server=faults.url, OCTAVO_RESYNC_SECONDS="600")
    again.wait_leading(20)
    wait_for(lambda: stage.get("services", "qwen"), "the Service")
    time.sleep(2)
    stage.delete("services", "qwen")
    wait_for(lambda: stage.get("services", "qwen"), "the Service by the new watches")

    print(f"a lost deletion was found after {found_s:.1f} s with a sweep every 3 s")
    assert found_s < 15  # 5 s on a quiet machine
    assert running.process.poll() == 1
    assert "the watches lose changes, so the operator starts anew kinds=Service" in running.log()


ACTS = (
    ("grow", {"replicas": 3}),
    ("change", {"engine": {"maxModelLen": 1024}}),
    ("shrink", {"replicas": 1}),
    ("change back", {"engine": {"maxModelLen": 2048}}),
    ("another Service", {"expose": {"service": {"port": 8080}}}),
)
BAD = {"refuse": 0.15, "statuses": [409, 410, 429, 500], "cut_s": 3.0, "gone": 0.3}


@pytest.mark.parametrize("seed", range(5))
def test_two_operators_killed_at_random_behind_a_failing_api_server_end_in_the_same_world(stage, cluster, start, seed):
    """Four kills for each seed, twenty in all, at random moments of creating, growing, changing and shrinking."""
    rng = random.Random(seed)
    killed = 0
    faults = Faults(cluster, 18210)
    faults.do(**BAD, seed=seed)
    running, everyone = {}, []

    def bring_back():
        """What a kubelet does with one that has ended, by itself or not."""
        for name, port in (("chaos-a", 18110), ("chaos-b", 18111)):
            if name not in running or running[name].process.poll() is not None:
                running[name] = start(name, port, server=faults.url, OCTAVO_RESYNC_SECONDS="5")
                everyone.append(running[name])

    def kill_the_leader():
        """At a random moment, unless it ends by itself before it, as one does that cannot renew its lease."""
        leader = wait_for(lambda: next((n for n in running if leads(running[n])), None), "a leader")
        time.sleep(rng.uniform(0, 1.0))
        with contextlib.suppress(ProcessLookupError):
            running[leader].kill()
            return True
        return False

    bring_back()
    wait_for(lambda: any(map(leads, running.values())), "one to lead")
    with stage.kubelet():
        stage.serve(engine={"maxModelLen": 2048})
        kills = sorted(rng.sample(range(len(ACTS)), 4))
        for number, (_, patch) in enumerate(ACTS):
            time.sleep(rng.uniform(0, 1.5))
            stage.patch("qwen", patch)
            if number in kills:
                while not kill_the_leader():
                    bring_back()
                killed += 1
            bring_back()
        faults.do()
        bring_back()
        stage.wait_condition("Ready", "True", "AllReplicasReady")
        stage.wait_condition("Progressing", "False", "Settled")
        wait_for(lambda: len(stage.pods()) == 1, "one pod")
    final = stage.get("llmservers", "qwen")["spec"]
    stage.create("llmservers", {**SERVER, "metadata": {"name": "calm"}, "spec": final})
    with stage.kubelet("calm"):
        stage.wait_condition("Progressing", "False", "Settled", "calm")

    assert world_of(stage, "qwen") == world_of(stage, "calm")
    answers = sum(one.metric("octavo_operator_api_requests_total") for one in running.values())
    print(f"seed {seed}: {killed} kills, {len(everyone)} operators; the last two made {answers:.0f} requests")
    assert killed == 4
    assert stage.status()["ready"] == "1/1"
    # What the API server does is no surprise to a look, whatever it is.
    assert "a look failed" not in "".join(one.log() for one in everyone)


def asked(refused: Path, word: str = "") -> list[tuple[float, str]]:
    """The requests with such a word that were refused, and when each was."""
    lines = refused.read_text().splitlines() if refused.exists() else []
    return [(float(at), what) for at, _, what in (line.partition(" ") for line in lines) if word in what]


def test_an_api_server_that_is_busy_is_left_alone_for_as_long_as_it_says(stage, cluster, start):
    refused = cluster.state / "refused"
    # What is asked for kinds gives up after ten seconds, begins anew, and is not to forget then when it may.
    often_enough = {"watch=true": 3, "leases": 3, "monitoring.coreos.com": 12}
    faults = Faults(cluster, 18240)
    # All that runs by itself does so often, the lease too: every twenty seconds, and it outlives what is refused here.
    often = {"OCTAVO_RESYNC_SECONDS": "1", "OCTAVO_SETTLED_POLL_SECONDS": "1", "OCTAVO_LEASE_SECONDS": "60"}
    running = start("patient", 18140, server=faults.url, **often)
    running.wait_leading()
    faults.do(cut_s=1.0)
    with stage.kubelet():
        stage.serve()
        stage.wait_condition("Progressing", "False", "Settled")
        faults.do(busy_s=2, refused=str(refused), cut_s=1.0)
        stage.patch("qwen", {"replicas": 2})
        wait_for(
            lambda: all(len(asked(refused, word)) >= count for word, count in often_enough.items()),
            "a watch, the lease and looks refused",
        )
        faults.do()
        stage.wait_condition("Ready", "True", "AllReplicasReady")
        wait_for(lambda: len(stage.pods()) == 2, "the second pod")
    times: dict[str, list[float]] = {}
    for at, what in asked(refused):
        times.setdefault(what, []).append(at)
    again = [(what, after - at) for what, seen in times.items() for at, after in itertools.pairwise(seen)]

    assert [(what, round(gap, 2)) for what, gap in again if gap < 1.95] == []
    assert len(again) > 3  # it did come again
    assert running.process.poll() is None
    assert "a look failed" not in running.log()


def test_clocks_that_jump_by_hours_and_pods_that_lie_about_theirs_change_nothing(stage, cluster, start):
    hours = cluster.state / "hours"

    def jump(by):
        partial = hours.with_suffix(".partial")
        partial.write_text(str(by))
        partial.rename(hours)
        time.sleep(1.5)  # a look at an unsettled server every half a second

    jump(0)
    python = (sys.executable, str(Path(__file__).with_name("jumping.py")), str(hours))
    poll = {"OCTAVO_LOADING_POLL_SECONDS": "0.5", "OCTAVO_SETTLED_POLL_SECONDS": "1", "OCTAVO_LEASE_SECONDS": "10"}
    running = start("jumps", 18130, python=python, **poll)
    running.wait_leading()
    waiting = start("patient", 18131)
    stage.serve(rollout={"waitForIdle": True, "idleTimeoutSeconds": 600}, engine={"maxModelLen": 2048})
    (old,) = stage.wait_pods(1)
    address = stage.engines.new_address()
    stage.engines.say(address, says(Stage.LOADING_WEIGHTS, 50, done=1, total=2, eta=-7200.0))
    stage.report(old, address, {"running": {"startedAt": "2031-01-01T00:00:00Z"}})
    loading = wait_for(lambda: (stage.status().get("pods") or [{}])[0].get("etaSeconds") and stage.status(), "an ETA")
    stage.up(old, load=Load(running=1))
    stage.wait_condition("Progressing", "False", "Settled")

    # A change waits for a request to end, and for no clock.
    stage.patch("qwen", {"engine": {"maxModelLen": 1024}})
    stage.wait_condition("Progressing", "True", "WaitingForIdle")
    for by in (5, -30, 100):
        jump(by)
    held = stage.condition("Progressing")["reason"]
    stage.up(old)
    fresh = wait_for(lambda: next((p for p in stage.pods() if is_other(p, old)), None), "the new revision's pod")
    # A pod that cannot start yet is not given up, and an engine that was just made is not taken for silent.
    pulls = {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}}
    stage.report(fresh, None, pulls)
    stage.wait_condition("Progressing", "False", "ImagePull")
    for by in (-100, 30):
        jump(by)
    given_up = stage.condition("Progressing")["reason"]
    stage.report(fresh, address_of_nobody(stage), {"running": {"startedAt": "2001-01-01T00:00:00Z"}})
    starting = wait_for(lambda: "starting" in str(stage.status().get("pods")) and stage.status(), "it to start")
    stage.up(fresh)
    with stage.kubelet():
        stage.wait_condition("Progressing", "False", "Settled")
    jump(0)
    final = stage.get("llmservers", "qwen")["spec"]
    stage.create("llmservers", {**SERVER, "metadata": {"name": "calm"}, "spec": final})
    with stage.kubelet("calm"):
        stage.wait_condition("Progressing", "False", "Settled", "calm")

    assert loading["pods"][0]["etaSeconds"] == 1
    assert (held, given_up) == ("WaitingForIdle", "ImagePull")
    assert {pod["stage"] for pod in starting["pods"]} == {"ready", "starting"}
    assert stage.status()["revision"].get("failed") is None
    assert world_of(stage, "qwen") == world_of(stage, "calm")
    assert running.process.poll() is None
    assert "leading identity" not in waiting.log()
    assert "a look failed" not in running.log()


def address_of_nobody(stage):
    """Where no stand-in answers."""
    return stage.engines.new_address()


def is_other(pod, known):
    return pod["metadata"]["uid"] != known["metadata"]["uid"] and pod["spec"].get("nodeName")


def leads(operator):
    return operator.process.poll() is None and "leading identity" in operator.log()


SERVER = {"apiVersion": "octavo.dev/v1alpha1", "kind": "LLMServer"}
OWN = ("clusterIP", "clusterIPs", "template")


def world_of(stage, name):
    """What belongs to a server: all that its controllers were told, without names, addresses and digests."""
    found = {}
    for kind in (*CHILDREN, "pods"):
        of_server = stage.list(kind, f"?labelSelector=octavo.dev/server%3D{name}")
        if kind == "pods":
            found[kind] = [pod["spec"]["containers"][0]["args"] for pod in of_server]
        else:
            found[kind] = [{k: v for k, v in one["spec"].items() if k not in OWN} for one in of_server]
            found[f"{kind} owners"] = [[o["name"] for o in one["metadata"]["ownerReferences"]] for one in of_server]
    (deployment,) = stage.list("deployments", f"?labelSelector=octavo.dev/server%3D{name}")
    found["containers"] = deployment["spec"]["template"]["spec"]["containers"]
    text = json.dumps(found, sort_keys=True)
    return json.loads(text.replace(f'"{name}"', '"NAME"').replace(f"={name}", "=NAME"))
