"""The chart's tests with an API server use the operator's: a cluster with the CRD."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "operator"), str(TESTS / "cluster")]

from fixtures import cluster  # noqa: E402 -- the path above leads to it

__all__ = ["api", "cluster"]


import pytest  # noqa: E402


@pytest.fixture(scope="session")
def api(cluster):
    from stage import chart, define

    cluster.kubectl("create", "namespace", "octavo-system")
    define(cluster, chart("octavo", "crd"))
    return cluster
