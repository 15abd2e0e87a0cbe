"""The operator behind an API server that fails: what it lost is found, what it began is ended, once."""

from __future__ import annotations

import contextlib
import time

import pytest
from stage import ApiError, Faults, Operator, wait_for

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
    wait_for(lambda: stage.get("services", "qwen"), "the Service again, though no watch told that it was gone", 20)
    found_s = time.monotonic() - began
    lost = running.metric('octavo_operator_watch_lost_total{kind="Service"}')

    # A second loss in a row is no accident.
    def ended():
        stage.delete("services", "qwen")
        return running.process.poll() is not None

    wait_for(ended, "its end", 30, 0.5)
    faults.do()
    again = start("deaf", 18101, server=faults.url)
    again.wait_leading(5)
    wait_for(lambda: stage.get("services", "qwen"), "the Service")
    time.sleep(2)
    stage.delete("services", "qwen")
    wait_for(lambda: stage.get("services", "qwen"), "the Service by the new watches", 2)

    print(f"a lost deletion was found after {found_s:.1f} s with a sweep every 3 s")
    assert found_s < 3 + 2 + 3
    assert lost == 1
    assert running.process.poll() == 1
    assert "the watches lose changes, so the operator starts anew kinds=Service" in running.log()
