"""Fixtures of the operator's tests: a real API server, and the operator as a process with the chart's own rights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "cluster")]

from fixtures import cluster  # noqa: E402 -- the path above leads to it

__all__ = ["api", "cluster", "engines", "operator", "stage"]


@pytest.fixture(scope="session")
def api(cluster) -> Iterator[object]:
    """The API server as an administrator, with the CRD and the chart's roles on it."""
    from stage import Api, chart, define

    cluster.kubectl("create", "namespace", "octavo-system")
    define(cluster, chart("octavo", "crd", "rbac", "serviceaccount"))
    made = Api(cluster)
    yield made
    made.close()


@pytest.fixture(scope="session")
def engines(cluster, api):
    """Stand-ins for engines: what each says on its management port is up to the test."""
    from stage import Engines

    return Engines(cluster)


@pytest.fixture
def stage(api, engines) -> Iterator[object]:
    """A namespace of its own, gone after the test."""
    from stage import Stage

    made = Stage(api, engines)
    yield made
    made.remove()


@pytest.fixture(scope="module")
def operator(cluster, api) -> Iterator[object]:
    """One running operator for the tests of a file. Another one would wait for its lease."""
    from stage import Operator, wait_for

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
