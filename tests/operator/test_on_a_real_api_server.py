"""The operator as a process against a real API server, scheduler and controllers, with the chart's rights.

Pods are staged (see stage.py), so that a test can let them be and end as it likes. What a kubelet says is in
test_on_a_real_node.py.
"""

from __future__ import annotations

import time

import pytest
from stage import CHILDREN, ApiError, certificate, says, wait_for

from octavo_engine.status import Failure, FailureCode, Load, Stage

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("operator")]


LOOKS = "octavo_operator_look_seconds_count"


def test_an_applied_server_has_a_pod_within_a_second(stage):
    taken = []
    for number in range(5):
        started = time.monotonic()
        stage.serve(f"fast-{number}")
        wait_for(lambda n=number: stage.pods(f"fast-{n}"), "a pod", every_s=0.005)
        taken.append(time.monotonic() - started)

    print("apply to pod, ms:", [round(1000 * seconds) for seconds in taken])
    assert sorted(taken)[len(taken) // 2] < 1  # a machine that does other things may take longer over one


def test_the_children_belong_to_the_server_and_nothing_is_written_into_its_metadata(stage):
    uid = stage.serve()["metadata"]["uid"]
    stage.wait_pods(1)
    server = stage.get("llmservers", "qwen")

    for kind in CHILDREN:
        (owner,) = wait_for(lambda kind=kind: stage.get(kind, "qwen"), kind)["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"]) == (uid, True)
    assert "finalizers" not in server["metadata"]
    assert "annotations" not in server["metadata"]


def test_the_status_follows_the_engine_from_stage_to_stage(stage):
    stage.serve()
    (pod,) = stage.wait_pods(1)
    assert wait_for(lambda: stage.status().get("pods"), "the pod in the status")[0]["stage"] == "creating"
    address = stage.run_pod(pod)
    late = {}

    for engine_stage, percent in ((Stage.STARTING, 0), (Stage.DOWNLOADING, 10), (Stage.DOWNLOADING, 80)):
        late[engine_stage, percent] = seconds_until_told(stage, address, engine_stage, percent)
    assert stage.condition("ModelCached")["reason"] == "Downloading"
    assert stage.status()["phase"] == "Downloading"
    for engine_stage, percent in ((Stage.LOADING_WEIGHTS, 25), (Stage.LOADING_WEIGHTS, 61), (Stage.WARMING_UP, 0)):
        late[engine_stage, percent] = seconds_until_told(stage, address, engine_stage, percent)
    assert stage.condition("ModelCached")["status"] == "True"
    assert stage.condition("Ready")["reason"] == "WarmingUp"
    assert stage.status()["phase"] == "Loading"
    stage.up(pod)
    ready = stage.wait_condition("Ready", "True", "AllReplicasReady")

    print("engine to resource, ms:", [round(1000 * seconds) for seconds in late.values()])
    assert max(late.values()) < 10  # a second and a half on a quiet machine
    assert ready["message"] == f"1/1 ready at http://qwen.{stage.namespace}.svc/v1."


def seconds_until_told(stage, address, engine_stage, percent):
    stage.engines.say(address, says(engine_stage, percent, done=percent * 2**20, total=100 * 2**20, eta=40.0))
    started = time.monotonic()

    def told():
        (pod,) = stage.status()["pods"]
        return (pod["stage"], pod.get("percent", 0)) == (engine_stage, percent)

    wait_for(told, f"{engine_stage} at {percent} %")
    return time.monotonic() - started


def test_a_ready_server_tells_its_configuration_its_plan_and_its_load(stage):
    stage.serve()
    (pod,) = stage.wait_pods(1)
    stage.up(pod, load=Load(running=3, waiting=2))
    stage.wait_condition("Ready", "True", "AllReplicasReady")
    status = stage.status()

    assert status["engine"]["maxModelLen"] == 2048
    assert status["engine"]["attentionBackend"] == "reference"
    assert status["plan"]["kvTokens"] == 6400
    assert status["plan"]["weights"] == "538.0 MiB"
    assert (status["phase"], status["ready"], status["readyReplicas"]) == ("Ready", "1/1", 1)
    assert (status["pods"][0]["running"], status["pods"][0]["queued"]) == (3, 2)
    assert "3.1 requests of 2,048 tokens at once" in stage.condition("Fits")["message"]
    assert stage.condition("Schedulable")["message"] == f"1 pod on {stage.node}."
    assert stage.condition("Progressing")["reason"] == "Settled"
    stage.wait_event("Normal", "Ready")


def test_looking_again_writes_nothing(stage, operator):
    stage.serve()
    (pod,) = stage.wait_pods(1)
    stage.up(pod)
    stage.wait_condition("Progressing", "False", "Settled")
    # A label of somebody else's on each child is an event, after which everything is read and compared again.
    for kind in CHILDREN:
        stage.api.merge(stage.path(kind, "qwen"), {"metadata": {"labels": {"team": "ml"}}})
    time.sleep(0.5)

    def versions():
        found = [stage.get(kind, "qwen") for kind in ("llmservers", *CHILDREN)] + stage.pods()
        return {document["metadata"]["uid"]: document["metadata"]["resourceVersion"] for document in found}

    before, looks, events = versions(), operator.metric(LOOKS), stage.events()
    stage.api.merge(stage.path("services", "qwen"), {"metadata": {"labels": {"team": None}}})
    del before[service_uid := stage.get("services", "qwen")["metadata"]["uid"]]
    wait_for(lambda: operator.metric(LOOKS) > looks, "the next look", every_s=0.2)
    time.sleep(0.5)
    after = versions()
    del after[service_uid]

    assert after == before
    assert not stage.get("services", "qwen")["metadata"]["labels"].get("team")
    assert stage.events() == events


def test_an_engine_that_is_silent_behind_passing_probes_does_not_count_as_ready(stage):
    stage.serve()
    (pod,) = stage.wait_pods(1)
    address = stage.up(pod)
    stage.wait_condition("Ready", "True", "AllReplicasReady")
    stage.engines.say(address, None)
    ready = stage.wait_condition("Ready", "Unknown", "EngineUnreachable")
    counted = stage.status()["readyReplicas"]
    stage.up(pod)
    stage.wait_condition("Ready", "True", "AllReplicasReady")

    assert "does not answer the operator on port 8001" in ready["message"]
    assert "NetworkPolicy" in ready["message"]
    assert counted == 0


def test_a_pod_that_is_told_to_end_is_draining_at_once(stage):
    stage.serve()
    (pod,) = stage.wait_pods(1)
    stage.up(pod, load=Load(running=2))
    stage.wait_condition("Ready", "True", "AllReplicasReady")
    stage.delete("pods", pod["metadata"]["name"])

    def told():
        return next((p for p in stage.status().get("pods", []) if p["name"] == pod["metadata"]["name"]), {})

    # A settled server is looked at by itself after 20 s.
    wait_for(lambda: told().get("stage") == "draining", "the stage", 15)
    assert stage.condition("Ready")["status"] == "False"


def test_an_edited_child_is_put_right_and_foreign_labels_stay(stage):
    stage.serve()
    wait_for(lambda: stage.get("services", "qwen"), "the Service")
    patch = {"metadata": {"labels": {"team": "ml"}}, "spec": {"selector": {"octavo.dev/server": "other"}}}
    stage.api.merge(stage.path("services", "qwen"), patch)

    def righted():
        service = stage.get("services", "qwen")
        return service if service["spec"]["selector"] == {"octavo.dev/server": "qwen"} else None

    assert wait_for(righted, "the selector to be put right")["metadata"]["labels"]["team"] == "ml"


@pytest.mark.parametrize("kind", CHILDREN)
def test_a_deleted_child_comes_back(stage, kind):
    stage.serve()
    stage.wait_pods(1)
    uid = wait_for(lambda: stage.get(kind, "qwen"), kind)["metadata"]["uid"]
    stage.delete(kind, "qwen")

    def again():
        found = stage.get(kind, "qwen")
        return found is not None and found["metadata"]["uid"] != uid

    assert wait_for(again, f"another of {kind}")


def test_a_field_that_is_taken_out_of_the_spec_leaves_the_children(stage):
    stage.serve(hardware={"runtimeClassName": None, "resources": {"limits": {"memory": "4Gi"}}})
    stage.wait_pods(1)
    stage.patch("qwen", {"hardware": {"resources": None}})

    def gone():
        container = stage.get("deployments", "qwen")["spec"]["template"]["spec"]["containers"][0]
        return not container.get("resources")

    assert wait_for(gone, "the limits to be gone from the Deployment")


def test_a_death_certificate_is_on_the_resource_with_its_fix_and_outlives_recovery(stage):
    stage.serve(engine={"maxModelLen": 32768})
    (pod,) = stage.wait_pods(1)
    address = stage.run_pod(pod)
    failure = Failure(
        FailureCode.KV_CACHE_TOO_SMALL,
        "The KV cache is too small for one request of 32,768 tokens.",
        "set --max-model-len <= 9216",
        need="7.00 GiB",
        have="1.97 GiB",
    )
    stage.crash_pod(pod, certificate(failure), FailureCode.KV_CACHE_TOO_SMALL.exit_status)
    ready = stage.wait_condition("Ready", "False", "KvCacheTooSmall")
    told = stage.status()["lastFailure"]
    fits, phase = stage.condition("Fits"), stage.status()["phase"]
    stage.wait_event("Warning", "KvCacheTooSmall")
    stage.engines.say(address, says(Stage.LOADING_WEIGHTS, 40))
    end = pod["status"]["containerStatuses"][0]["lastState"]
    stage.run_pod(pod, restarts=1, last=end)
    wait_for(lambda: stage.status().get("phase") == "Loading", "the next try")
    stage.wait_condition("Ready", "False", "KvCacheTooSmall")
    stage.up(pod)
    stage.wait_condition("Ready", "True", "AllReplicasReady")

    assert (told["code"], told["pod"]) == ("KV_CACHE_TOO_SMALL", pod["metadata"]["name"])
    assert told["fix"] == "set spec.engine.maxModelLen <= 9216"
    assert "spec.engine.maxModelLen <= 9216" in ready["message"]
    assert (fits["status"], fits["reason"], phase) == ("False", "KvCacheTooSmall", "Failed")
    assert stage.status()["lastFailure"] == told
    assert stage.events().count(("Warning", "KvCacheTooSmall")) == 1


def test_an_engine_killed_at_its_memory_limit_is_told_with_the_limit(stage):
    stage.serve(hardware={"resources": {"limits": {"memory": "4Gi"}}})
    (pod,) = stage.wait_pods(1)
    stage.crash_pod(pod, "", 137, "OOMKilled")
    ready = stage.wait_condition("Ready", "False", "OOMKilled")

    assert "at its memory limit of 4Gi" in ready["message"]
    assert "hardware.resources.limits.memory" in ready["message"]
    assert stage.status()["lastFailure"]["code"] == "OOM_KILLED"


def test_a_kill_of_the_engine_process_alone_is_told_as_the_kernels(stage):
    stage.serve(hardware={"resources": {"limits": {"memory": "4Gi"}}})
    (pod,) = stage.wait_pods(1)
    died = Failure(FailureCode.ENGINE_DIED, "The engine process was killed by SIGKILL.", "")
    stage.crash_pod(pod, certificate(died), FailureCode.ENGINE_DIED.exit_status, "OOMKilled")
    ready = stage.wait_condition("Ready", "False", "OOMKilled")

    assert "at its memory limit of 4Gi" in ready["message"]


def test_a_crash_without_a_certificate_is_told_with_its_last_words(stage):
    stage.serve()
    (pod,) = stage.wait_pods(1)
    stage.crash_pod(pod, "Traceback (most recent call last):\nImportError: libcuda.so.1\n", 139)
    ready = stage.wait_condition("Ready", "False", "Exited")

    assert "status 139 (SIGSEGV); its last words: ImportError: libcuda.so.1" in ready["message"]
    assert f"kubectl logs {pod['metadata']['name']} --previous" in stage.status()["lastFailure"]["fix"]


def test_one_replica_that_fails_leaves_the_server_ready_but_degraded(stage):
    stage.serve(replicas=2)
    first, second = stage.wait_pods(2)
    stage.up(first)
    stage.crash_pod(second, "", 1)
    progressing = stage.wait_condition("Progressing", "False", "Exited")

    assert stage.condition("Ready")["reason"] == "SomeReplicasReady"
    assert (stage.status()["phase"], stage.status()["ready"]) == ("Degraded", "1/2")
    assert second["metadata"]["name"] == stage.status()["pods"][0]["name"]
    assert "Restarted 1 time." in progressing["message"]


def test_a_quota_that_refuses_pods_is_told(stage):
    stage.create("resourcequotas", {"metadata": {"name": "small"}, "spec": {"hard": {"pods": "0"}}})
    # The quota is in force when its status is there.
    wait_for(lambda: stage.get("resourcequotas", "small").get("status", {}).get("hard"), "the quota")
    stage.serve()
    found = stage.wait_condition("Schedulable", "False", "QuotaExceeded")

    assert "small" in found["message"]
    assert "raise the ResourceQuota" in found["message"]
    assert stage.condition("Ready")["reason"] == "QuotaExceeded"


def test_a_namespace_that_enforces_the_restricted_standard_takes_the_pods(stage):
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    stage.api.merge(f"/api/v1/namespaces/{stage.namespace}", {"metadata": {"labels": labels}})
    stage.serve(
        model={"source": "pvc://claim/folder"},
        expose={"apiKeysSecretRef": {"name": "keys"}},
        hardware={"sharedMemory": "1Gi"},
    )

    assert wait_for(lambda: stage.pods(), "a pod")


def test_a_pod_without_a_node_is_told_with_what_is_missing(stage):
    stage.serve(hardware={"resources": {"requests": {"memory": "1Ti"}}})
    found = stage.wait_condition("Schedulable", "False", "InsufficientMemory")

    assert "1 of 2 nodes has too little memory free" in found["message"]
    assert "hardware.resources.requests" in found["message"]
    assert stage.status()["phase"] == "Pending"
    stage.wait_event("Warning", "InsufficientMemory")


def test_among_many_gpus_the_last_pods_wait_and_the_resource_stays_readable(stage):
    for number in range(6):
        stage.add_node(f"{stage.node}-gpu-{number}", gpus=8)
    stage.serve(replicas=50, hardware={"gpus": 1, "nodeSelector": {"octavo.dev/staged": stage.node}})
    found = stage.wait_condition("Schedulable", "False", "InsufficientGPU")
    wait_for(lambda: sum("nodeName" in pod["spec"] for pod in stage.pods()) == 48, "48 pods on nodes", every_s=0.2)
    wait_for(
        lambda: [pod["stage"] for pod in stage.status()["pods"]][:3] == ["pending", "pending", "creating"], "order"
    )

    # The staged node without GPUs counts among the nodes that have none free.
    assert "7 of 8 nodes have no nvidia.com/gpu free, and each pod needs 1" in found["message"]
    assert stage.status()["ready"] == "0/50"
    assert len(stage.status()["pods"]) == 16


def test_a_node_selector_that_no_node_has_is_told(stage):
    stage.serve(hardware={"nodeSelector": {"gpu": "h900"}})
    found = stage.wait_condition("Schedulable", "False", "NoMatchingNode")

    assert "hardware.nodeSelector" in found["message"]


def test_a_service_of_that_name_that_is_somebody_elses_is_left_alone(stage):
    spec = {"ports": [{"port": 1}], "selector": {"app": "theirs"}}
    theirs = stage.create("services", {"metadata": {"name": "qwen"}, "spec": spec})
    stage.serve()
    found = stage.wait_condition("Ready", "False", "NameTaken")
    still = stage.get("services", "qwen")
    stage.delete("services", "qwen")
    # Nothing watches objects of others: the next look finds the name free.
    stage.wait_condition("Ready", "False", "Creating")

    assert "A Service named qwen exists and is not this LLMServer's" in found["message"]
    assert still["metadata"]["resourceVersion"] == theirs["metadata"]["resourceVersion"]
    assert stage.get("services", "qwen")["spec"]["selector"] == {"octavo.dev/server": "qwen"}


def test_an_image_as_a_models_disk_where_the_cluster_cannot_is_told_and_not_asked_for_each_second(operator, stage):
    """Kubernetes 1.34 drops the volume without a word unless it is told to know it."""
    stage.serve(model={"source": "oci://r.example/model:1"})
    told = stage.wait_condition("Ready", "False", "ImageVolumeMissing")
    before = stage.get("deployments", "qwen")["metadata"]
    # The others are looked at each second or less, and this one is woken besides.
    stage.api.merge(stage.path("llmservers", "qwen"), {"spec": {"lifecycle": {"drainTimeoutSeconds": 9}}})
    wait_for(lambda: stage.status(), "another look")
    changed = stage.get("deployments", "qwen")["metadata"]
    time.sleep(2)
    after = stage.get("deployments", "qwen")["metadata"]

    assert "use another model.source" in told["message"]
    assert changed["generation"] > before["generation"]
    assert after["generation"] == changed["generation"]
    stage.wait_event("Warning", "ImageVolumeMissing")
    stage.patch("qwen", {"model": {"source": "hf://org/name"}})
    wait_for(lambda: "ImageVolume" not in str(stage.status() or "ImageVolume"), "the cause to be gone")


def test_a_spec_that_this_version_cannot_serve_is_a_condition_until_it_is_corrected(stage, operator):
    stage.serve(hardware={"gpus": 2})
    ready = stage.wait_condition("Ready", "False", "InvalidSpec")
    made = [stage.get(kind, "qwen") for kind in CHILDREN]
    version = stage.get("llmservers", "qwen")["metadata"]["resourceVersion"]
    time.sleep(1)
    unwritten = stage.get("llmservers", "qwen")["metadata"]["resourceVersion"] == version
    stage.patch("qwen", {"hardware": {"gpus": 0}})
    stage.wait_pods(1)

    assert "tensorParallel" in ready["message"]
    assert "this version computes on one device" in ready["message"]
    assert made == [None, None, None]
    assert unwritten
    assert stage.condition("Ready")["reason"] != "InvalidSpec"


def test_scaling_and_suspending_go_through_the_scale_subresource_and_back(stage):
    stage.serve()
    with stage.kubelet():
        stage.wait_condition("Ready", "True", "AllReplicasReady")
        stage.api.merge(stage.path("llmservers", "qwen", "scale"), {"spec": {"replicas": 3}})
        wait_for(lambda: stage.status().get("readyReplicas") == 3, "three ready replicas")
        scale = stage.api.get(stage.path("llmservers", "qwen", "scale"))
        stage.patch("qwen", {"suspend": True})
        stage.wait_condition("Ready", "False", "Suspended")
        wait_for(lambda: stage.status().get("phase") == "Suspended", "no pods")
        pods = stage.pods()
        stage.patch("qwen", {"suspend": False})
        wait_for(lambda: stage.status().get("readyReplicas") == 3, "three ready replicas again")

    assert scale["status"]["replicas"] == 3
    assert scale["status"]["selector"] == "octavo.dev/server=qwen"
    assert pods == []
    stage.wait_event("Normal", "NotReady")


def test_a_change_of_the_spec_rolls_out_and_tells_how_far_it_is(stage):
    stage.serve(engine={"maxModelLen": 2048})
    (old,) = stage.wait_pods(1)
    stage.up(old)
    stage.wait_condition("Progressing", "False", "Settled")
    stage.patch("qwen", {"engine": {"maxModelLen": 1024}})
    progressing = stage.wait_condition("Progressing", "True", "RollingOut")
    pods = stage.wait_pods(2)
    (new,) = [pod for pod in pods if pod["metadata"]["uid"] != old["metadata"]["uid"]]
    ready = stage.condition("Ready")
    with stage.kubelet():
        stage.wait_condition("Progressing", "False", "Settled")

    assert "0 of 1 pods are of the present specification" in progressing["message"]
    assert ready["status"] == "True"
    assert stage.status()["pods"][0]["name"] == new["metadata"]["name"]


def test_pods_carry_scrape_annotations_until_the_cluster_knows_pod_monitors(stage, cluster, operator):
    stage.serve(observability={"labels": {"release": "prometheus"}})
    (pod,) = stage.wait_pods(1)
    scraped = {"prometheus.io/scrape": "true", "prometheus.io/port": "8001", "prometheus.io/path": "/metrics"}

    def annotations():
        return {k: v for k, v in stage.pods()[0]["metadata"]["annotations"].items() if k.startswith("prometheus.io/")}

    wait_for(lambda: annotations() == scraped, "the scrape annotations")
    annotated = stage.condition("MonitoringReady")["reason"]
    cluster.kubectl("apply", "-f", "-", stdin=POD_MONITOR_CRD)
    try:
        stage.wait_condition("MonitoringReady", "True", "PodMonitor")
        monitor = wait_for(lambda: stage.get("podmonitors", "qwen"), "the PodMonitor")
        wait_for(lambda: annotations() == {}, "the annotations to be gone")
        stage.patch("qwen", {"observability": {"podMonitor": "Disabled", "labels": None}})
        wait_for(lambda: stage.get("podmonitors", "qwen") is None, "the PodMonitor to be gone")
    finally:
        cluster.kubectl("delete", "crd", "podmonitors.monitoring.coreos.com")
    stage.patch("qwen", {"observability": {"podMonitor": "Enabled"}})
    stage.wait_condition("MonitoringReady", "False", "PodMonitorKindMissing")

    assert annotated == "ScrapeAnnotations"
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"]["podMetricsEndpoints"] == [{"port": "management", "path": "/metrics"}]
    assert stage.pods()[0]["metadata"]["uid"] == pod["metadata"]["uid"], "a change of monitoring restarted the engine"


POD_MONITOR_CRD = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: podmonitors.monitoring.coreos.com}
spec:
  group: monitoring.coreos.com
  scope: Namespaced
  names: {kind: PodMonitor, listKind: PodMonitorList, plural: podmonitors, singular: podmonitor}
  versions:
    - name: v1
      served: true
      storage: true
      schema:
        openAPIV3Schema:
          type: object
          properties: {spec: {type: object, x-kubernetes-preserve-unknown-fields: true}}
"""


def test_deletion_collects_every_child(stage):
    stage.serve()
    (pod,) = stage.wait_pods(1)
    stage.delete("llmservers", "qwen")
    wait_for(lambda: all(stage.get(kind, "qwen") is None for kind in CHILDREN), "the children to be gone")
    wait_for(lambda: "deletionTimestamp" in (stage.get("pods", pod["metadata"]["name"]) or pod)["metadata"], "the pod")
    stage.forget(pod["metadata"]["name"])
    time.sleep(1)

    assert [stage.get(kind, "qwen") for kind in CHILDREN] == [None, None, None]
    assert stage.pods() == []


def test_the_operator_may_not_touch_secrets_or_the_spec(cluster):
    def may(*words):
        account = "--as=system:serviceaccount:octavo-system:octavo-operator"
        done = cluster.run(["kubectl", "auth", "can-i", *words, account, "-n", "default"], check=False)
        return done.stdout.strip()

    assert may("get", "secrets") == "no"
    assert may("patch", "llmservers.octavo.dev") == "no"
    assert may("update", "llmservers.octavo.dev") == "no"
    assert may("create", "pods") == "no"
    assert may("patch", "llmservers.octavo.dev", "--subresource=status") == "yes"


def test_a_server_with_an_unknown_field_is_refused_by_strict_validation(stage):
    body = {"apiVersion": "octavo.dev/v1alpha1", "kind": "LLMServer", "metadata": {"name": "typo"}}
    body["spec"] = stage.spec(engine={"maxModelLenght": 1})
    with pytest.raises(ApiError, match="maxModelLenght"):
        stage.api.request("POST", stage.path("llmservers") + "?fieldValidation=Strict", body)


def test_the_operators_port_answers_health_readiness_and_metrics(operator):
    assert operator.get("/healthz") == "ok\n200"
    assert operator.get("/readyz") == "ok\n200"
    assert operator.metric("octavo_operator_leader") == 1
    assert operator.metric("octavo_operator_look_errors_total") == 0
    assert operator.metric("octavo_operator_look_seconds_count") > 0
    assert operator.metric("octavo_operator_api_requests_total") > 0
    assert "\noctavo_operator_queue_length " in operator.get("/metrics")
    assert operator.metric("process_resident_memory_bytes") < 100 * 2**20
