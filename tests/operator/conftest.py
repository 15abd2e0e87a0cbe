"""Fixtures of the operator's tests: a real API server, and the operator as a process with the chart's own rights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from stage import LEASE, Api, ApiError, Engines, Operator, Stage, chart, define, wait_for


@pytest.fixture(scope="session")
def api(cluster) -> Iterator[Api]:
    """The API server as an administrator, with the CRD and the chart's roles on it."""
    define(cluster, chart("octavo", "crd", "rbac", "serviceaccount"))
    made = Api(cluster)
    yield made
    made.close()


@pytest.fixture(scope="session")
def engines(cluster, api) -> Engines:
    """Stand-ins for engines: what each says on its management port is up to the test."""
    return Engines(cluster)


@pytest.fixture
def stage(api, engines) -> Iterator[Stage]:
    """A namespace of its own, gone after the test."""
    made = Stage(api, engines)
    yield made
    made.remove()


@pytest.fixture
def start(cluster, api):
    """Starts operators; those that still run at the end of the test are stopped, and the next waits for no lease."""
    started = []

    def one(identity, port, account="octavo-operator", **environment):
        started.append(Operator(cluster, identity, port, account, **environment))
        return started[-1]

    yield one
    for running in started:
        if running.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it may end by itself meanwhile
                running.kill()
            running.process.wait(60)
    with contextlib.suppress(ApiError):
        api.request("DELETE", LEASE)


@pytest.fixture(scope="module")
def operator(cluster, api) -> Iterator[Operator]:
    """One running operator for the tests of a file. Another one would wait for its lease."""
    # A busy machine may keep it from renewing for seconds, and nobody waits for this lease.
    running = Operator(cluster, "operator", port=18080, OCTAVO_LEASE_SECONDS="15")
    running.wait_leading()
    # Its watches begin a moment after it leads: a server that is looked at shows that they have.
    warm_up = {"apiVersion": "octavo.dev/v1alpha1", "kind": "LLMServer", "metadata": {"name": "warm-up"}}
    path = "/apis/octavo.dev/v1alpha1/namespaces/default/llmservers"
    api.request("POST", path, {**warm_up, "spec": {"model": {"source": "hf://org/name"}, "replicas": 0}})
    wait_for(lambda: api.get(f"{path}/warm-up").get("status"), "the first status")
    api.request("DELETE", f"{path}/warm-up")
    yield running
    assert running.process.poll() is None, f"the operator ended: {running.log()[-3000:]}"
    running.stop()
