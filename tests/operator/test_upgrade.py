"""An operator that takes over what another version of it left behind: no engine is restarted, and it says what differs.

older-version.json is what the version of commit 5375bd9 wrote for a few servers: their status, and each child as it was
applied. Its pod templates, and the rule by which it marked what they were made for, are not those of today. Renewed by

    python tests/operator/two_versions.py COMMIT --write tests/operator/older-version.json

which also goes back to the older version, and says whether that restarts anything.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from stage import KINDS, wait_for

OLDER = json.loads(Path(__file__).with_name("older-version.json").read_text())
PLURALS = {"Deployment": "deployments", "Service": "services", "PodDisruptionBudget": "poddisruptionbudgets"}
pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture
def older(stage):
    """The world of the older version, its pods up. Gives the names of its servers."""
    labels = OLDER["servers"][0]["spec"]["hardware"]["nodeSelector"]
    stage.api.merge(f"/api/v1/nodes/{stage.node}", {"metadata": {"labels": labels}})
    with contextlib.ExitStack() as kubelets:
        for server in OLDER["servers"]:
            name, kind = server["metadata"]["name"], {"apiVersion": server["apiVersion"], "kind": server["kind"]}
            metadata = {"name": name, "namespace": stage.namespace}
            made = stage.create("llmservers", {**kind, "metadata": {"name": name}, "spec": server["spec"]})
            for body in OLDER["applied"][name]:
                apply(
                    stage, {**body, "metadata": body["metadata"] | {"namespace": stage.namespace} | owned(made, body)}
                )
            status = {**server["status"], "observedGeneration": made["metadata"]["generation"]}
            apply(stage, {**kind, "metadata": metadata, "status": status}, "status")
            kubelets.enter_context(stage.kubelet(name))
        names = [server["metadata"]["name"] for server in OLDER["servers"]]
        wait_for(lambda: all(is_up(stage, name) for name in names), "the older version's pods")
        yield names


def apply(stage, body, subresource=""):
    plural = PLURALS.get(body["kind"], "llmservers")
    path = f"{KINDS[plural]}/namespaces/{stage.namespace}/{plural}/{body['metadata']['name']}/{subresource}".rstrip("/")
    path += "?fieldManager=octavo-operator&force=true"
    stage.api.request("PATCH", path, body, "application/apply-patch+yaml")


def owned(server, body):
    (owner,) = body["metadata"]["ownerReferences"]
    return {"ownerReferences": [{**owner, "uid": server["metadata"]["uid"]}]}


def is_up(stage, name):
    ready = stage.get("deployments", name).get("status", {}).get("readyReplicas", 0)
    return ready == stage.get("llmservers", name)["spec"]["replicas"]


def world(stage, names):
    """By server its pod template, and by pod how often its containers were restarted."""
    found = {}
    for name in names:
        statuses = {pod["metadata"]["uid"]: pod["status"].get("containerStatuses", []) for pod in stage.pods(name)}
        restarts = {uid: [status["restartCount"] for status in one] for uid, one in statuses.items()}
        found[name] = stage.get("deployments", name)["spec"]["template"], restarts
    return found


def test_no_engine_is_restarted_by_another_version_of_the_operator(stage, older, start):
    before = world(stage, older)
    running = start("newer", 18160, OCTAVO_SETTLED_POLL_SECONDS="1", OCTAVO_LEASE_SECONDS="15")
    running.wait_leading()
    for name in older:
        stage.wait_condition("UpdateAvailable", "True", "OperatorChanged", name)
        stage.wait_condition("Progressing", "False", "Settled", name)
    looks = running.metric("octavo_operator_look_seconds_count")
    more = 3 * len(older)
    wait_for(lambda: running.metric("octavo_operator_look_seconds_count") > looks + more, "more looks", every_s=0.5)
    after = world(stage, older)
    # Asked for by a change of the spec, the newer template goes out with it, and for this server alone.
    stage.patch("plain", {"engine": {"maxModelLen": 1024}})
    stage.wait_condition("UpdateAvailable", "False", "UpToDate", "plain")
    wait_for(lambda: not before["plain"][1].keys() & world(stage, older)["plain"][1].keys(), "another pod")
    last = world(stage, older)

    assert after == before
    assert {name for name in older if last[name] != before[name]} == {"plain"}
    assert "ERROR" not in running.log()
