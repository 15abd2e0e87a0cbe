"""The operator behind an API server that fails: what it lost is found, what it began is ended, once."""

from __future__ import annotations

import contextlib
import json
import random
import time

import pytest
from stage import CHILDREN, ApiError, Faults, Operator, wait_for

LEASE = "/apis/coordination.k8s.io/v1/namespaces/octavo-system/leases/octavo-operator"
pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def start(cluster, api):
    """Starts operators; those that still run at the end of the test are stopped."""
    started = []

    def one(identity, port, **more):
        started.append(Operator(cluster, identity, port, **more))
        return started[-1]

    yield one
    for running in started:
        if running.process.poll() is None:
            running.kill()
            running.process.wait(10)
    with contextlib.suppress(ApiError):
        api.request("DELETE", LEASE)


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

    wait_for(ended, "its end", 30, 0.5)
    faults.do()
    again = start("deaf", 18101, server=faults.url, OCTAVO_RESYNC_SECONDS="600")
    again.wait_leading(20)
    wait_for(lambda: stage.get("services", "qwen"), "the Service")
    time.sleep(2)
    stage.delete("services", "qwen")
    wait_for(lambda: stage.get("services", "qwen"), "the Service by the new watches", 20)

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

    bring_back()
    wait_for(lambda: any(map(leads, running.values())), "one to lead", 30)
    with stage.kubelet():
        stage.serve(engine={"maxModelLen": 2048})
        kills = sorted(rng.sample(range(len(ACTS)), 4))
        for number, (_, patch) in enumerate(ACTS):
            time.sleep(rng.uniform(0, 1.5))
            stage.patch("qwen", patch)
            if number in kills:
                leader = wait_for(lambda: next((n for n in running if leads(running[n])), None), "a leader", 30)
                time.sleep(rng.uniform(0, 1.0))
                running[leader].kill()
                killed += 1
            bring_back()
        faults.do()
        bring_back()
        stage.wait_condition("Ready", "True", "AllReplicasReady", timeout_s=60)
        stage.wait_condition("Progressing", "False", "Settled", timeout_s=60)
        wait_for(lambda: len(stage.pods()) == 1, "one pod", 30)
    final = stage.get("llmservers", "qwen")["spec"]
    stage.create("llmservers", {**SERVER, "metadata": {"name": "calm"}, "spec": final})
    with stage.kubelet("calm"):
        stage.wait_condition("Progressing", "False", "Settled", "calm", timeout_s=60)

    assert world_of(stage, "qwen") == world_of(stage, "calm")
    answers = sum(one.metric("octavo_operator_api_requests_total") for one in running.values())
    print(f"seed {seed}: {killed} kills, {len(everyone)} operators; the last two made {answers:.0f} requests")
    assert killed == 4
    assert stage.status()["ready"] == "1/1"
    # What the API server does is no surprise to a look, whatever it is.
    assert "a look failed" not in "".join(one.log() for one in everyone)


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
