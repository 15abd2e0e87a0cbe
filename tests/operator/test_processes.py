"""Operators that are killed, that wait for each other, and that come back: the end is the same."""

from __future__ import annotations

import re
import signal
import time

import pytest
from stage import LEASE, Stage, chart, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05, 0.1])
def test_an_operator_killed_in_the_middle_of_it_is_followed_by_one_that_ends_it(stage, start, delay_s):
    first = start("killed", 18090)
    first.wait_leading()
    stage.serve("before", replicas=0)
    wait_for(lambda: stage.status("before"), "the watches of the first")
    stage.serve()
    time.sleep(delay_s)
    first.kill()
    first.process.wait(60)
    with stage.kubelet():
        start("killed", 18090)  # the same pod's container, started again: its own lease is free for it
        stage.wait_condition("Ready", "True", "AllReplicasReady")
        stage.wait_condition("Progressing", "False", "Settled")

    assert len(stage.pods()) == 1
    stage.wait_event("Normal", "Ready")
    assert stage.events().count(("Normal", "Ready")) == 1


def test_of_two_operators_one_works_and_the_other_takes_over_when_it_dies(stage, start):
    # Long enough a lease that a busy machine renews it in time.
    first, second = (start(name, port, OCTAVO_LEASE_SECONDS="6") for name, port in (("one", 18091), ("two", 18092)))
    wait_for(lambda: "leading identity" in first.log() + second.log(), "one to lead")
    if "leading identity" in second.log():
        first, second = second, first
    wait_for(lambda: second.get("/readyz").endswith("200"), "the one that waits to be ready", every_s=0.2)
    waits = "leading identity" not in second.log()
    time.sleep(5)
    still_waits = "leading identity" not in second.log()
    looked = second.metric("octavo_operator_look_seconds_count")
    first.kill()
    died = time.monotonic()
    second.wait_leading()
    took_s = time.monotonic() - died
    stage.serve()
    stage.wait_pods(1)

    assert waits
    assert still_waits
    assert looked == 0
    print(f"takeover after a kill: {took_s:.1f} s with a lease of 6 s")
    assert took_s < 15
    assert stage.api.get(LEASE)["spec"]["holderIdentity"] == second.identity


def test_an_operator_that_is_asked_to_end_hands_its_lease_over_at_once(start):
    first = start("leaving", 18093, OCTAVO_LEASE_SECONDS="300")
    first.wait_leading()
    time.sleep(2)  # until its watches run, which have handlers of their own for signals
    first.kill(signal.SIGTERM)
    status = first.process.wait(60)
    second = start("next", 18094, OCTAVO_LEASE_SECONDS="300")
    second.wait_leading()

    assert status == 0
    assert "Traceback" not in first.log()


def test_an_operator_that_loses_its_lease_ends_with_a_failure(api, start):
    running = start("loser", 18095)
    running.wait_leading()
    lease = api.merge(LEASE, {"spec": {"holderIdentity": "thief"}})
    status = running.process.wait(60)

    assert lease["spec"]["holderIdentity"] == "thief"
    assert status == 1
    assert re.search(r"ERROR .* the lease is lost", running.log())


def test_an_operator_of_some_namespaces_needs_no_rights_beyond_them(stage, api, cluster, engines, start):
    other = Stage(api, engines)
    try:
        values = (f"watchNamespaces={{{stage.namespace}}}", "rbac.aggregate=false")
        roles = chart("narrow", "rbac", "serviceaccount", values=values)
        cluster.kubectl("apply", "-f", "-", stdin=roles)
        settings = {"OCTAVO_WATCH_NAMESPACES": stage.namespace, "OCTAVO_RESYNC_SECONDS": "2"}
        running = start("narrow", 18097, account="narrow-operator", **settings)
        running.wait_leading()
        other.serve()
        stage.serve()
        stage.wait_pods(1)
        stage.wait_condition("MonitoringReady", "True", "ScrapeAnnotations")
        time.sleep(3)  # a resync

        assert "ClusterRole" not in roles
        assert other.status() == {}
        assert "WARNING" not in running.log()
        assert "ERROR" not in running.log()
    finally:
        other.remove()


def test_without_an_api_server_the_operator_says_so_and_is_not_ready(start, tmp_path):
    running = start("alone", 18096, KUBECONFIG="/nowhere/kubeconfig")
    status = running.process.wait(60)

    assert status == 1
    assert "no way to the API server" in running.log()
    assert "Traceback" not in running.log()
