"""octavo-operator diff and doctor, and the log as JSON, against a real API server."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml
from stage import ROOT, ApiError, Operator, wait_for
from test_cache_and_routes import volume_for

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("operator")]


def command(cluster, *words, stdin="", **settings):
    environment = os.environ | {"KUBECONFIG": str(cluster.kubeconfig), "PYTHONPATH": f"{ROOT}/engine:{ROOT}/operator"}
    environment |= settings
    whole = [sys.executable, "-m", "octavo_operator.cli", *words]
    return subprocess.run(whole, input=stdin, env=environment, capture_output=True, text=True, timeout=60)


def manifest(stage, **spec):
    metadata = {"name": "qwen", "namespace": stage.namespace}
    body = {"apiVersion": "octavo.dev/v1alpha1", "kind": "LLMServer", "metadata": metadata}
    return yaml.safe_dump({**body, "spec": stage.spec(**spec)})


def test_diff_is_silent_where_nothing_would_change_and_writes_nothing(stage, cluster):
    stage.serve()
    (pod,) = stage.wait_pods(1)
    stage.up(pod)
    stage.wait_condition("Progressing", "False", "Settled")
    version = stage.get("deployments", "qwen")["metadata"]["resourceVersion"]
    same = command(cluster, "diff", "-f", "-", stdin=manifest(stage))
    other = command(cluster, "diff", "-f", "-", stdin=manifest(stage, engine={"maxModelLen": 1024}))

    assert (same.returncode, same.stdout) == (0, ""), same.stdout + same.stderr
    assert other.returncode == 1
    assert "+        - --max-model-len=1024" in other.stdout
    assert "the engine pods of qwen are replaced" in other.stdout
    assert "live/Service" not in other.stdout
    assert stage.get("deployments", "qwen")["metadata"]["resourceVersion"] == version


def test_diff_leaves_alone_what_the_operator_would_leave_alone(stage, cluster):
    """An autoscaler's replicas, a claim that nobody owns, and pods that only another operator makes differently."""
    cached = {"cache": {"mode": "Shared", "size": "1Gi", "storageClassName": "", "deletionPolicy": "Retain"}}
    stage.serve(**cached)
    volume_for(stage)
    (pod,) = stage.wait_pods(1)
    stage.up(pod)
    stage.patch("qwen", {"replicas": 2})
    wait_for(lambda: (stage.get("deployments", "qwen") or {})["spec"]["replicas"] == 2, "the second replica")
    same = command(cluster, "diff", "-f", "-", stdin=manifest(stage, **cached))
    other = command(cluster, "diff", "-f", "-", stdin=manifest(stage, **cached), OCTAVO_ENGINE_IMAGE="other:2")

    assert (same.returncode, same.stdout) == (0, ""), same.stdout + same.stderr
    assert other.stdout.startswith("# qwen: This operator would make the pods differently")
    assert "image: other:2" not in other.stdout


def test_what_render_prints_can_be_applied(stage, cluster):
    """By whoever runs without the operator, or wants the API server to look at it first."""
    cached = {"cache": {"mode": "Shared", "size": "1Gi", "prefetch": True}, "expose": {"networkPolicy": {}}}
    rendered = command(cluster, "render", "-f", "-", stdin=manifest(stage, **cached))
    told = cluster.kubectl("apply", "--server-side", "--dry-run=server", "-f", "-", stdin=rendered.stdout)

    for kind in ("deployment.apps", "service", "job.batch", "persistentvolumeclaim", "networkpolicy.networking.k8s.io"):
        assert f"{kind}/qwen serverside-applied (server dry run)" in told


def test_diff_of_a_new_server_shows_all_of_it(stage, cluster):
    found = command(cluster, "diff", "-f", "-", stdin=manifest(stage))

    assert found.returncode == 1
    for kind in ("Deployment", "Service", "PodDisruptionBudget"):
        assert f"+kind: {kind}" in found.stdout
    assert stage.get("deployments", "qwen") is None


def test_doctor_finds_a_server_that_is_not_ready_and_what_the_cluster_lacks(stage, cluster):
    stage.serve(hardware={"nodeSelector": {"gpu": "h900"}})
    stage.wait_condition("Schedulable", "False", "NoMatchingNode")
    stage.serve("sleeps", autoscaling={"minReplicas": 0, "maxReplicas": 1}, replicas=0)
    stage.wait_condition("Ready", "False", "ScaledToZero", "sleeps")
    found = command(cluster, "doctor")
    lines = found.stdout.splitlines()

    assert found.returncode == 1, found.stderr
    assert any(line.startswith("ok    Kubernetes v1.") for line in lines)
    assert "ok    the CRD of LLMServers is this version's" in lines
    assert "ok    the operator operator leads" in lines
    assert any("nvidia.com/gpu" in line for line in lines)
    assert any(line.startswith("note  no PodMonitor kind") for line in lines)
    assert any(line.startswith(f"FAIL  {stage.namespace}/qwen") and "hardware.nodeSelector" in line for line in lines)
    asleep = (
        f"note  {stage.namespace}/sleeps: Asleep. No request wakes it, as the activator is off: set activator.enabled"
    )
    assert any(line.startswith(asleep) for line in lines), lines


def test_doctor_says_that_the_definition_is_of_another_version(stage, cluster, api):
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/llmservers.octavo.dev"
    before = api.get(path)["spec"]
    changed = json.loads(json.dumps(before))
    del changed["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["suspend"]
    api.merge(path, {"spec": changed})
    try:
        found = command(cluster, "doctor")
    finally:
        api.merge(path, {"spec": before})
        # The API server takes a moment over a changed definition, and refuses its kind meanwhile.
        wait_for(lambda: _lists(stage), "the kind to be served")

    assert "fields that it lacks are dropped in silence" in found.stdout
    assert found.returncode == 1


def test_a_cluster_that_does_not_answer_is_another_status_than_a_finding(cluster, tmp_path):
    environment = os.environ | {"KUBECONFIG": str(tmp_path / "none"), "PYTHONPATH": f"{ROOT}/engine:{ROOT}/operator"}
    whole = [sys.executable, "-m", "octavo_operator.cli", "doctor"]
    found = subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=60)

    assert found.returncode == 2
    assert "no way to the API server" in found.stderr
    assert "Traceback" not in found.stderr


def test_the_log_as_json_names_the_server_in_each_line_about_it(stage, cluster, operator):
    operator.stop()
    running = Operator(cluster, "operator", port=18130, OCTAVO_LOG_FORMAT="json")
    try:
        running.wait_leading()
        stage.serve()
        wait_for(lambda: "applied" in running.log(), "the children")
        lines = [json.loads(line) for line in running.log().splitlines()]
    finally:
        running.stop()
        operator.__init__(cluster, "operator", port=18080)
        operator.wait_leading()

    applied = next(line for line in lines if line["message"].startswith("applied"))
    assert applied["server"] == f"{stage.namespace}/qwen"
    assert (applied["level"], applied["logger"]) == ("info", "octavo_operator.reconcile")
    assert "server" not in next(line for line in lines if "leading" in line["message"])


def _lists(stage):
    try:
        return stage.list("llmservers") is not None
    except ApiError:
        return False
